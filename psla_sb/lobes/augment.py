"""PSLA's augmentation of whole batches on the device: mixup of waveforms, masks over features.

Both modules act whenever they are called (the Brain calls them in training only), and draw from PyTorch's global
generators, so that reseeding these makes a batch repeatable.
"""

import torch
from torch import nn
from torch.distributions import Beta
from torchaudio.functional import mask_along_axis_iid

from psla_sb.lobes.features import remove_mean, true_lengths


class WaveformMixup(nn.Module):
    """Mix the partner clips at the end of a batch into its first clips, and drop them.

    Clip k is mixed with the k-th partner: `lambda * clip + (1 - lambda) * partner` with its own lambda ~ Beta(alpha,
    alpha). Both have their mean removed before, and the mixture has afterwards; the partner is cut or filled with zeros to
    the clip's true length, which the mixture keeps. Targets mix with the same lambda. (Tokozume et al., "Learning from
    between-class examples for deep sound recognition", ICLR 2018, as used by PSLA.)

    Arguments
    ---------
    alpha : float
        Parameter of the Beta distribution; 10 keeps lambda near 0.5.

    Raises
    ------
    ValueError
        If `alpha` is not positive.

    Example
    -------
    >>> wavs, lens, targets = torch.rand(3, 800), torch.ones(3), torch.eye(3)
    >>> wavs, lens, targets = WaveformMixup()(wavs, lens, targets, n_partners=1)
    >>> wavs.shape, lens, targets[1]
    (torch.Size([2, 800]), tensor([1., 1.]), tensor([0., 1., 0.]))
    """

    def __init__(self, alpha=10.0):
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"WaveformMixup needs a positive alpha, not {alpha}")
        self.alpha = float(alpha)

    def forward(self, wavs, wav_lens, targets, n_partners):
        """Mix.

        Arguments
        ---------
        wavs : torch.Tensor
            `[batch, samples]`; the last `n_partners` rows are partners.
        wav_lens : torch.Tensor or None
            `[batch]`, lengths relative to the longest clip.
        targets : torch.Tensor
            `[batch, classes]`, float.
        n_partners : int
            At most half of the batch.

        Returns
        -------
        tuple of torch.Tensor
            Waveforms, lengths and targets of the `batch - n_partners` clips. The waveforms keep their width, so the
            lengths stay as they were.

        Raises
        ------
        ValueError
            If there are more partners than clips to mix them into.
        """
        if n_partners == 0:
            return wavs, wav_lens, targets
        n_clips = len(wavs) - n_partners
        if not 0 < n_partners <= n_clips:
            raise ValueError(f"WaveformMixup: {n_partners} partners for {n_clips} other clips of the batch")
        lengths = true_lengths(wavs, wav_lens)
        centred = remove_mean(wavs, lengths)
        weight = Beta(self.alpha, self.alpha, validate_args=False).sample((n_partners, 1)).to(wavs.device)
        mixed = torch.lerp(centred[n_clips:], centred[:n_partners], weight)
        mixed = remove_mean(mixed, lengths[:n_partners])
        # lerp, unlike a weighted sum, leaves a class that both clips carry at exactly 1
        mixed_targets = torch.lerp(targets[n_clips:], targets[:n_partners], weight.to(targets.dtype))
        return (
            torch.cat([mixed, wavs[n_partners:n_clips]]),
            None if wav_lens is None else wav_lens[:n_clips],
            torch.cat([mixed_targets, targets[n_partners:n_clips]]),
        )


class SpecAugment(nn.Module):
    """One frequency mask and one time mask for each clip, filled with 0.0.

    A mask's width is uniform in [0, the given maximum), rounded down; its start is uniform over the places where it fits.
    Time masks range over all frames, padding included. (Park et al., "SpecAugment", Interspeech 2019, in PSLA's form:
    applied before normalisation.)

    Arguments
    ---------
    freq_mask : int
        Bound of the frequency mask's width in mel bins; 0 for none.
    time_mask : int
        Bound of the time mask's width in frames; 0 for none.

    Raises
    ------
    ValueError
        If a bound is negative.

    Example
    -------
    >>> masked = SpecAugment(freq_mask=48, time_mask=0)(torch.ones(2, 100, 128))
    >>> masked.shape, bool((masked.amax(1) == masked.amin(1)).all())
    (torch.Size([2, 100, 128]), True)
    """

    def __init__(self, freq_mask=48, time_mask=192):
        super().__init__()
        if freq_mask < 0 or time_mask < 0:
            raise ValueError(f"SpecAugment's masks cannot be negative: freq_mask={freq_mask}, time_mask={time_mask}")
        self.freq_mask = freq_mask
        self.time_mask = time_mask

    def forward(self, feats):
        """Mask.

        Arguments
        ---------
        feats : torch.Tensor
            `[batch, frames, mels]`, not yet normalised.

        Returns
        -------
        torch.Tensor
            `[batch, frames, mels]`
        """
        feats = mask_along_axis_iid(feats, self.freq_mask, 0.0, axis=2)
        return mask_along_axis_iid(feats, self.time_mask, 0.0, axis=1)
