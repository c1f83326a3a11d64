"""Log-mel features of whole batches, on whatever device the waveforms are on, and their normalisation.

PSLA's are Kaldi's, in torchaudio's arithmetic and order: the logarithm of a nearly empty mel bin shows differences in rounding.
Those of later systems (PaSST, EfficientAT) have frames around their time, not from it on.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.compliance.kaldi import get_mel_banks

from psla_sb.lobes.fused import have_kernels, windowed_frames

FRAME_LENGTH_MS, FRAME_SHIFT_MS = 25.0, 10.0
PREEMPHASIS, LOWEST_HZ = 0.97, 20.0
ENERGY_FLOOR = torch.finfo(torch.float32).eps
# that a CPU transforms at a time: memory that is freed and taken again stays in its caches, and with the process
CPU_FRAMES = 2048


def frame_length_and_shift(sample_rate: int) -> tuple[int, int]:
    """Gives the length of a frame (25 ms) and the shift between frames (10 ms), in samples, rounded as Kaldi does."""
    return int(sample_rate * FRAME_LENGTH_MS * 0.001), int(sample_rate * FRAME_SHIFT_MS * 0.001)


def n_frames_of(n_samples: Any, sample_rate: int = 16000) -> Any:
    """Counts the whole frames of a clip (of each, for an array or tensor); a clip that is shorter than a frame has one."""
    length, shift = frame_length_and_shift(sample_rate)
    return 1 + (n_samples >= length) * ((n_samples - length) // shift)


def n_samples_for(n_frames: int | None, sample_rate: int = 16000) -> Any:
    """Gives the fewest samples that have `n_frames` frames, of which there is at least one; None for None."""
    length, shift = frame_length_and_shift(sample_rate)
    return None if n_frames is None else (n_frames - 1) * shift + length


def true_lengths(wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
    """Gives the lengths of padded clips in samples, int64 `[batch]`; without relative lengths every clip fills its row."""
    if wav_lens is None:
        return torch.full(wavs.shape[:1], wavs.shape[1], device=wavs.device)
    return (wav_lens.to(wavs.device) * wavs.shape[1]).round().long()


def remove_mean(wavs: Tensor, lengths: Tensor) -> Tensor:
    """Subtracts from each clip the mean over its true length (in samples), and sets the padding to zero."""
    padding = torch.arange(wavs.shape[1], device=wavs.device) >= lengths[:, None]
    mean = wavs.masked_fill(padding, 0.0).sum(1, keepdim=True) / lengths[:, None].clamp(min=1)
    return (wavs - mean).masked_fill(padding, 0.0)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Makes products of float32 matrices be computed in float32 while it is open: no autocast, no TF32.

    SpeechBrain switches TF32 on when it is imported; three digits are too few for features and for probabilities. TF32 stays off
    while any thread is in here. The compiler does not keep the switch, nor does a backward pass: see `float32_matmul`.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or torch.compiler.is_compiling():
            yield
            return
        _without_tf32.enter()
        try:
            yield
        finally:
            _without_tf32.leave()


class _WithoutTF32:
    """One switch for all threads: off from when the first one enters until the last one has left."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, False

    # the older of PyTorch's two switches: SpeechBrain uses it, and PyTorch refuses to run on a mixture
    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = torch.backends.cuda.matmul.allow_tf32
                torch.backends.cuda.matmul.allow_tf32 = False
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch.backends.cuda.matmul.allow_tf32 = self.before


_without_tf32 = _WithoutTF32()


# An operator of its own, into which the compiler does not look; its backward pass consists of the same operator.
@torch.library.custom_op("psla_sb::float32_matmul", mutates_args=())
def _float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    with full_float32(a.device):
        return a @ b


@_float32_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _matmul_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    of_a, of_b = ctx.needs_input_grad
    return _float32_matmul(gradient, b.T) if of_a else None, _float32_matmul(a.T, gradient) if of_b else None


_float32_matmul.register_autograd(_matmul_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def float32_matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiplies `[..., k]` with `[k, n]`, both float32, in float32: eager, compiled, in threads and in the backward pass.

    Example
    -------
    >>> float32_matmul(torch.ones(2, 3, 4), torch.ones(4, 5)).shape
    torch.Size([2, 3, 5])
    """
    if not x.is_cuda:
        return x @ matrix
    return _float32_matmul(x.flatten(0, -2), matrix).unflatten(0, x.shape[:-1])


def mel_filters(n_mels: int, n_fft: int, sample_rate: int, lowest: float, highest: float) -> Tensor:
    """Makes Kaldi's triangular filters from `lowest` to `highest` Hz (0: half the sample rate), `[bins, n_mels]`."""
    filters, _ = get_mel_banks(n_mels, n_fft, float(sample_rate), lowest, highest, 100.0, -500.0, 1.0)
    # the bin of half the sample rate, which torchaudio leaves out, has weight 0
    return F.pad(filters, (0, 1)).T.contiguous()


class LogMel(nn.Module, ABC):
    """Says what the toolkit's own front ends have in common.

    They take clips of any length, tell padding from silence, know how many frames a clip has, and cut or fill up to `n_frames`
    by themselves. `frame_length` and `frame_shift` are in samples.
    """

    sample_rate: int
    n_mels: int
    n_frames: int | None
    frame_length: int
    frame_shift: int

    @property
    def n_samples(self) -> int | None:
        """Says how many samples have all that `n_frames` frames are computed from; None if all frames are taken."""
        return None if self.n_frames is None else (self.n_frames - 1) * self.frame_shift + self.frame_length

    @abstractmethod
    def frames_of(self, n_samples: Any) -> Any:
        """Counts the frames of a clip of so many samples, or of each, for a tensor."""

    def _batch(self, wavs: Tensor) -> Tensor:
        if wavs.dim() != 2:
            raise ValueError(f"{type(self).__name__} takes waveforms [batch, samples], not a tensor of shape {list(wavs.shape)}")
        return wavs.float()


class KaldiFbank(LogMel):
    """Computes log-mel filter-bank energies as Kaldi does, in float32, also under autocast: `[batch, frames, n_mels]`.

    For every clip of a padded batch the same as `torchaudio.compliance.kaldi.fbank(wav - wav.mean(), htk_compat=True,
    use_energy=False, window_type="hanning", dither=0.0)` gives for that clip alone. `sample_rate` is in Hz; there are at least 4
    mels, up to half the sample rate.

    Arguments
    ---------
    n_frames
        Cut to as many, or fill up with frames of 0.0; without it the output is as long as the longest clip.

    Example
    -------
    >>> KaldiFbank(n_frames=1056)(torch.rand(2, 32000), torch.tensor([1.0, 0.5])).shape
    torch.Size([2, 1056, 128])
    """

    window: Tensor
    mel_banks: Tensor

    def __init__(self, sample_rate: int = 16000, n_mels: int = 128, n_frames: int | None = None) -> None:
        super().__init__()
        if sample_rate < 100 or n_mels < 4 or (n_frames is not None and n_frames < 1):
            given = f"{sample_rate}, {n_mels} and {n_frames}"
            raise ValueError(f"KaldiFbank needs sample_rate >= 100, n_mels >= 4 and n_frames >= 1 or None, not {given}")
        self.sample_rate, self.n_mels, self.n_frames = sample_rate, n_mels, n_frames
        self.frame_length, self.frame_shift = frame_length_and_shift(sample_rate)
        self.n_fft = 2 ** (self.frame_length - 1).bit_length()
        # what follows from the constructor's arguments is no state: checkpoints stay free of it
        self.register_buffer("window", torch.hann_window(self.frame_length, periodic=False), persistent=False)
        self.register_buffer("mel_banks", mel_filters(n_mels, self.n_fft, sample_rate, LOWEST_HZ, 0.0), persistent=False)

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Takes `[batch, samples]` in [-1, 1] and relative lengths; frames past a clip's own last one are 0.0."""
        wavs = self._batch(wavs)
        lengths = true_lengths(wavs, wav_lens)
        wavs = remove_mean(wavs, lengths)
        n_frames = n_frames_of(wavs.shape[1], self.sample_rate)
        if self.n_frames is not None:
            n_frames = min(n_frames, self.n_frames)
        n_samples = n_samples_for(n_frames, self.sample_rate)
        wavs = F.pad(wavs, (0, n_samples - wavs.shape[1])) if wavs.shape[1] < n_samples else wavs[:, :n_samples]
        with full_float32(wavs.device):
            spectrum = torch.fft.rfft(self._windowed_frames(wavs, n_frames), self.n_fft)
            energies = float32_matmul(spectrum.real.square() + spectrum.imag.square(), self.mel_banks)
        past_end = torch.arange(n_frames, device=wavs.device) >= n_frames_of(lengths, self.sample_rate)[:, None]
        feats = energies.clamp(min=ENERGY_FLOOR).log().masked_fill(past_end[..., None], 0.0)
        return feats if self.n_frames is None else F.pad(feats, (0, 0, 0, self.n_frames - n_frames))

    def frames_of(self, n_samples: Any) -> Any:
        return n_frames_of(n_samples, self.sample_rate)

    def _windowed_frames(self, wavs: Tensor, n_frames: int) -> Tensor:
        if wavs.is_cuda and not wavs.requires_grad and have_kernels(wavs.device):
            return windowed_frames(wavs, self.window, n_frames, self.frame_shift, PREEMPHASIS, self.n_fft)
        # |<--- frame_length --->|           overlapping views; the subtraction makes a copy, which may be changed in place
        # |shift|<--- frame_length --->|
        frames = wavs.unfold(1, self.frame_length, self.frame_shift)
        frames = frames - frames.mean(2, keepdim=True)
        # in place, for speed; Kaldi's first sample, preceded by itself, does not matter: the window begins with a zero
        frames[..., 1:] -= PREEMPHASIS * frames[..., :-1]
        return frames.mul_(self.window)


class CentredFbank(LogMel):
    """Computes log-mel energies of frames centred on their time, in float32, also under autocast: `[batch, frames, n_mels]`.

    The front end of EfficientAT (Schmid, Koutini, Widmer, arXiv 2211.04772) and PaSST: the differences x[t] - 0.97 x[t - 1] of a
    clip, reflected at its ends, the power of each window, Kaldi's mel filters, log(energy + 1e-5). A clip of n samples has
    1 + (n - 1) // hop_length frames: 1000 in 10 s. These systems normalise with `GlobalNorm(mean=-4.5, std=5.0)`.

    Arguments
    ---------
    sample_rate
        In Hz.
    n_frames
        Cut to as many, or fill up with frames of 0.0; without it the output is as long as the longest clip.
    hop_length, win_length, n_fft
        In samples: from a frame to the next, of the (symmetric Hann) window, and of the Fourier transform.
    lowest, highest
        The edges of the mel filters, in Hz.
    edge_ranges
        In training each batch has edges of its own: `lowest` plus 0, 1, ... of as many whole Hz as the first number says, and as
        many around `highest` as the second one says. [10, 2000] are EfficientAT's; [0, 0] keeps the edges.

    Example
    -------
    >>> CentredFbank()(torch.rand(2, 320000), torch.tensor([1.0, 0.5])).shape
    torch.Size([2, 1000, 128])
    """

    window: Tensor
    mel_banks: Tensor

    def __init__(
        self,
        sample_rate: int = 32000,
        n_mels: int = 128,
        n_frames: int | None = None,
        hop_length: int = 320,
        win_length: int = 800,
        n_fft: int = 1024,
        lowest: float = 0.0,
        highest: float = 15000.0,
        edge_ranges: Sequence[int] = (0, 0),
    ) -> None:
        super().__init__()
        if n_mels < 4 or hop_length < 1 or n_fft % 2 or not 2 <= win_length <= n_fft or (n_frames is not None and n_frames < 1):
            given = f"{n_mels}, {n_frames}, {hop_length}, {win_length} and {n_fft}"
            wanted = "n_mels >= 4, n_frames >= 1 or None, hop_length >= 1 and 2 <= win_length <= n_fft, which is even"
            raise ValueError(f"CentredFbank needs {wanted}, not {given}")
        for_lowest, for_highest = edge_ranges
        least_highest, most_highest = highest + for_highest // 2 - max(0, for_highest - 1), highest + for_highest // 2
        if min(lowest, for_lowest, for_highest) < 0 or not lowest + for_lowest < least_highest <= most_highest <= sample_rate / 2:
            given = f"{lowest} to {highest} Hz with edge_ranges {[for_lowest, for_highest]} at {sample_rate} Hz"
            raise ValueError(f"the mel filters' edges must stay between 0 and half the sample rate, the lowest below: {given}")
        self.sample_rate, self.n_mels, self.n_frames = sample_rate, n_mels, n_frames
        self.frame_length, self.frame_shift, self.n_fft = win_length, hop_length, n_fft
        self.lowest, self.highest, self.edge_ranges = float(lowest), float(highest), (for_lowest, for_highest)
        # in the middle of the transform, with zeros on both sides
        before = (n_fft - win_length) // 2
        window = F.pad(torch.hann_window(win_length, periodic=False), (before, n_fft - win_length - before))
        self.register_buffer("window", window, persistent=False)
        filters = mel_filters(n_mels, n_fft, sample_rate, self.lowest, self.highest)
        self.register_buffer("mel_banks", filters, persistent=False)

    def frames_of(self, n_samples: Any) -> Any:
        return 1 + (n_samples - 1) // self.frame_shift

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Takes `[batch, samples]` in [-1, 1] and relative lengths; frames past a clip's own last one are 0.0."""
        wavs = self._batch(wavs)
        lengths = true_lengths(wavs, wav_lens)
        n_frames = self.frames_of(wavs.shape[1])
        if self.n_frames is not None:
            n_frames, wavs = min(n_frames, self.n_frames), wavs[:, : self.n_samples]
        differences = wavs[:, 1:] - PREEMPHASIS * wavs[:, :-1]
        with full_float32(wavs.device):
            x = self._reflected(differences, None if wav_lens is None else lengths - 1)
            frames, filters = x.unfold(1, self.n_fft, self.frame_shift)[:, :n_frames], self._filters()
            parts = frames.split(len(frames) if frames.is_cuda else max(1, CPU_FRAMES // n_frames))
            energies = torch.cat([self._energies(part, filters) for part in parts])
        past_end = torch.arange(n_frames, device=wavs.device) >= self.frames_of(lengths)[:, None]
        feats = (energies + 1e-5).log().masked_fill(past_end[..., None], 0.0)
        return feats if self.n_frames is None else F.pad(feats, (0, 0, 0, self.n_frames - n_frames))

    def _energies(self, frames: Tensor, filters: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(frames * self.window)
        return float32_matmul(spectrum.real.square().add_(spectrum.imag.square()), filters)

    def _reflected(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Adds half a transform before and after clips `[batch, samples]`, reflected at each one's own ends.

        Clips that are too short for that get zeros first.
        """
        #            x0 x1 x2 x3 x4           |
        #   x2 x1 [  x0 x1 x2 x3 x4  ] x3 x2  | what follows is in no frame of the clip
        half = self.n_fft // 2
        x = F.pad(x, (0, max(0, half + 1 - x.shape[1])))
        if lengths is None:
            return F.pad(x, (half, half), mode="reflect")
        positions = torch.arange(x.shape[1], device=x.device)
        x = x.masked_fill(positions >= lengths[:, None], 0.0)
        last = lengths.clamp(half + 1, x.shape[1])[:, None] - 1
        index = torch.arange(-half, x.shape[1] + half, device=x.device).abs()
        return x.gather(1, torch.where(index > last, 2 * last - index, index).clamp(min=0))

    def _filters(self) -> Tensor:
        for_lowest, for_highest = self.edge_ranges
        if not self.training or not (for_lowest or for_highest):
            return self.mel_banks
        lowest = self.lowest + int(torch.randint(max(1, for_lowest), ()))
        highest = self.highest + for_highest // 2 - int(torch.randint(max(1, for_highest), ()))
        return mel_filters(self.n_mels, self.n_fft, self.sample_rate, lowest, highest).to(self.mel_banks.device, non_blocking=True)


class GlobalNorm(nn.Module):
    """Normalises features of any shape, `(feats - mean) / std`; the default figures are PSLA's, of AudioSet.

    Example
    -------
    >>> GlobalNorm()(torch.zeros(1, 1, 2))
    tensor([[[1.0170, 1.0170]]])
    """

    def __init__(self, mean: float = -4.6476, std: float = 4.5699) -> None:
        super().__init__()
        if not std > 0:
            raise ValueError(f"GlobalNorm needs a positive std, not {std}")
        self.mean, self.std = mean, std

    def forward(self, feats: Tensor, lens: Tensor | None = None) -> Tensor:
        """Normalises; `lens` is not used, but SpeechBrain's normalisers take it."""
        return (feats - self.mean) / self.std
