"""Augmentation of whole batches on the device, PSLA's and that of later systems.

It draws from PyTorch's global generator of the CPU, so a seed repeats a batch, and no GPU is waited for.
"""

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torchaudio.functional import mask_along_axis_iid

from psla_sb.lobes.features import remove_mean, true_lengths


class Gain(nn.Module):
    """Makes each clip louder or softer, by whole dB from -`amount` to `amount` - 1, each as often; 0 does nothing.

    As PaSST (Koutini et al., Interspeech 2022) and EfficientAT (Schmid, Koutini, Widmer, ICASSP 2023) do, with 7 or 12.

    Example
    -------
    >>> Gain(amount=12)(torch.zeros(2, 800)).shape
    torch.Size([2, 800])
    """

    def __init__(self, amount: int = 12) -> None:
        super().__init__()
        if amount < 0 or amount != int(amount):
            raise ValueError(f"Gain needs a whole number of dB, 0 or more, not {amount}")
        self.amount = int(amount)

    def forward(self, wavs: Tensor) -> Tensor:
        """Takes `[batch, samples]`."""
        if not self.amount:
            return wavs
        decibels = torch.randint(-self.amount, self.amount, (len(wavs), 1))
        return wavs * (10.0 ** (decibels / 20)).to(wavs.device, wavs.dtype, non_blocking=True)


class Roll(nn.Module):
    """Rolls each clip by -`shift` to `shift` samples; what leaves it at one end comes in at the other. 0 does nothing.

    As PaSST does, with 50, and EfficientAT, with 4000 at 32 kHz. A padded clip is rolled within its own length.

    Example
    -------
    >>> rolled = Roll(shift=2)(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), torch.tensor([0.75]))
    >>> rolled[:, :3].sort().values, rolled[:, 3:]
    (tensor([[1., 2., 3.]]), tensor([[0.]]))
    """

    def __init__(self, shift: int = 4000) -> None:
        super().__init__()
        if shift < 0 or shift != int(shift):
            raise ValueError(f"Roll needs a whole number of samples, 0 or more, not {shift}")
        self.shift = int(shift)

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Takes `[batch, samples]` and relative lengths."""
        if not self.shift:
            return wavs
        shifts = torch.randint(-self.shift, self.shift + 1, (len(wavs), 1)).to(wavs.device, non_blocking=True)
        lengths = true_lengths(wavs, wav_lens)[:, None].clamp(min=1)
        positions = torch.arange(wavs.shape[1], device=wavs.device)
        return wavs.gather(1, torch.where(positions < lengths, (positions - shifts) % lengths, positions))


class WaveformMixup(nn.Module):
    """Mixes the last `n_partners` clips of a batch into as many first ones, and drops them.

    Clip k becomes `lambda * clip + (1 - lambda) * partner`, and so do its targets; each pair has a lambda ~ Beta(alpha, alpha).
    Means are removed before and after; the partner is cut or zero-padded. (Tokozume et al., ICLR 2018, in PSLA's form.) With
    `at_least_half`, in place of lambda stands max(lambda, 1 - lambda), as in PaSST and EfficientAT: a clip that was drawn for its
    rare class is not drowned by its partner.

    Example
    -------
    >>> wavs, lens, targets = WaveformMixup(alpha=10.0)(torch.rand(3, 800), torch.ones(3), torch.eye(3), n_partners=1)
    >>> wavs.shape, lens, targets[1]
    (torch.Size([2, 800]), tensor([1., 1.]), tensor([0., 1., 0.]))
    """

    def __init__(self, alpha: float = 10.0, at_least_half: bool = False) -> None:
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"WaveformMixup needs a positive alpha, not {alpha}")
        self.alpha, self.at_least_half = float(alpha), at_least_half

    def forward(
        self, wavs: Tensor, wav_lens: Tensor | None, targets: Tensor, n_partners: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Takes `[batch, samples]`, relative lengths or None, and `[batch, classes]`; the width and so the lengths stay."""
        if n_partners == 0:
            return wavs, wav_lens, targets
        n_clips = len(wavs) - n_partners
        if not 0 < n_partners <= n_clips:
            raise ValueError(f"WaveformMixup: {n_partners} partners for {n_clips} other clips of the batch")
        # rows:  |<- mixed: n_partners ->|<- as they are ->|<- partners: n_partners ->|
        #        0                                      n_clips
        lengths = true_lengths(wavs, wav_lens)
        centred = remove_mean(wavs, lengths)
        weight = Beta(self.alpha, self.alpha, validate_args=False).sample((n_partners, 1))
        if self.at_least_half:
            weight = torch.maximum(weight, 1 - weight)
        weight = weight.to(wavs.device, non_blocking=True)
        mixed = remove_mean(torch.lerp(centred[n_clips:], centred[:n_partners], weight), lengths[:n_partners])
        # lerp, unlike a weighted sum, leaves a class that both clips carry at exactly 1
        mixed_targets = torch.lerp(targets[n_clips:], targets[:n_partners], weight.to(targets.dtype))
        lens, rest = None if wav_lens is None else wav_lens[:n_clips], slice(n_partners, n_clips)
        return torch.cat([mixed, wavs[rest]]), lens, torch.cat([mixed_targets, targets[rest]])


class SpecAugment(nn.Module):
    """Fills a band of mels and one of frames of each clip with 0.0; takes features `[batch, frames, mels]` before normalisation.

    Widths are uniform in [0, `freq_mask`) mels and [0, `time_mask`) frames, rounded down, and places wherever they fit, padding
    included; 0 switches a mask off. (Park et al., "SpecAugment", Interspeech 2019, in PSLA's form.)

    Example
    -------
    >>> SpecAugment(freq_mask=48, time_mask=192)(torch.ones(2, 1056, 128)).shape
    torch.Size([2, 1056, 128])
    """

    def __init__(self, freq_mask: int = 48, time_mask: int = 192) -> None:
        super().__init__()
        if freq_mask < 0 or time_mask < 0:
            raise ValueError(f"SpecAugment's masks cannot be negative: freq_mask={freq_mask}, time_mask={time_mask}")
        self.freq_mask, self.time_mask = freq_mask, time_mask

    def forward(self, feats: Tensor) -> Tensor:
        feats = mask_along_axis_iid(feats, self.freq_mask, 0.0, axis=2)
        return mask_along_axis_iid(feats, self.time_mask, 0.0, axis=1)


class FreqMixStyle(nn.Module):
    """Gives clips the spectral colour of others: mixes the mean and the spread of each mel band with another clip's.

    With probability `p` for a batch. Of each clip and band, mean and standard deviation over its own frames become lambda times
    themselves and 1 - lambda times those of another clip of the batch, lambda ~ Beta(alpha, alpha) for each clip; labels stay.
    Takes features `[batch, frames, mels]` and relative lengths; padding stays as it is. No gradient goes through the statistics.
    Source: Kim, Yang, Kim, Chang, "Domain generalization with relaxed instance frequency-wise normalization for multi-device
    acoustic scene classification" (Interspeech 2022), as Schmid et al. (DCASE 2022) have it.

    Example
    -------
    >>> FreqMixStyle(p=1.0)(torch.randn(4, 100, 64)).shape
    torch.Size([4, 100, 64])
    """

    EPSILON = 1e-6

    def __init__(self, p: float = 0.4, alpha: float = 0.4) -> None:
        super().__init__()
        if not (0 <= p <= 1 and alpha > 0):
            raise ValueError(f"FreqMixStyle needs p from 0 to 1 and a positive alpha, not {p} and {alpha}")
        self.p, self.alpha = float(p), float(alpha)

    def forward(self, feats: Tensor, lens: Tensor | None = None) -> Tensor:
        if not self.p or torch.rand(()) >= self.p:
            return feats
        n_clips, n_frames, _ = feats.shape
        weight = Beta(self.alpha, self.alpha, validate_args=False).sample((n_clips, 1, 1)).to(feats.device, non_blocking=True)
        others = torch.randperm(n_clips).to(feats.device, non_blocking=True)
        length = true_lengths(feats[..., 0], lens).clamp(min=1)[:, None, None]
        own = torch.arange(n_frames, device=feats.device)[:, None] < length
        with torch.no_grad():
            mean = torch.where(own, feats, 0.0).sum(1, keepdim=True) / length
            variance = torch.where(own, (feats - mean).square(), 0.0).sum(1, keepdim=True) / (length - 1).clamp(min=1)
            spread = (variance + self.EPSILON).sqrt()
            mixed_mean, mixed_spread = (torch.lerp(x[others], x, weight) for x in (mean, spread))
        return torch.where(own, (feats - mean) / spread * mixed_spread + mixed_mean, feats)
