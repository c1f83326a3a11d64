"""PSLA's augmentation of whole batches on the device; it draws from PyTorch's global generators, so a seed repeats a batch."""

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torchaudio.functional import mask_along_axis_iid

from psla_sb.lobes.features import remove_mean, true_lengths


class WaveformMixup(nn.Module):
    """Mixes the last `n_partners` clips of a batch into as many first ones, and drops them.

    Clip k becomes `lambda * clip + (1 - lambda) * partner`, and so do its targets; each pair has a lambda ~ Beta(alpha, alpha).
    Means are removed before and after; the partner is cut or zero-padded. (Tokozume et al., ICLR 2018, in PSLA's form.)

    Example
    -------
    >>> wavs, lens, targets = WaveformMixup(alpha=10.0)(torch.rand(3, 800), torch.ones(3), torch.eye(3), n_partners=1)
    >>> wavs.shape, lens, targets[1]
    (torch.Size([2, 800]), tensor([1., 1.]), tensor([0., 1., 0.]))
    """

    def __init__(self, alpha: float = 10.0) -> None:
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"WaveformMixup needs a positive alpha, not {alpha}")
        self.alpha = float(alpha)

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
        weight = Beta(self.alpha, self.alpha, validate_args=False).sample((n_partners, 1)).to(wavs.device, non_blocking=True)
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
