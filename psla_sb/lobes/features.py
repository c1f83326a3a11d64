"""Kaldi log-mel features of whole batches, on whatever device the waveforms are on, and their normalisation.

`KaldiFbank` gives for every clip of a padded batch what `torchaudio.compliance.kaldi.fbank` gives for that clip alone, so
models trained on Kaldi features (PSLA, AST and their relatives) see the numbers they know, without per-clip work on the
CPU. The same arithmetic in the same order as torchaudio's, because the logarithm of a nearly empty mel bin shows
differences in rounding.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torchaudio.compliance.kaldi import get_mel_banks

FRAME_LENGTH_MS = 25.0
FRAME_SHIFT_MS = 10.0
PREEMPHASIS = 0.97
LOWEST_HZ = 20.0
ENERGY_FLOOR = torch.finfo(torch.float32).eps


def frame_length_and_shift(sample_rate):
    """The length of a frame (25 ms) and the shift between frames (10 ms), in samples, rounded as Kaldi does.

    Arguments
    ---------
    sample_rate : int
        In Hz.

    Returns
    -------
    tuple of int

    Example
    -------
    >>> frame_length_and_shift(16000)
    (400, 160)
    """
    return int(sample_rate * FRAME_LENGTH_MS * 0.001), int(sample_rate * FRAME_SHIFT_MS * 0.001)


def n_frames_of(n_samples, sample_rate=16000):
    """How many frames a clip gives: the whole ones, and one for a clip that is shorter than a frame.

    Arguments
    ---------
    n_samples : int or integer array or tensor
        Length of the clip in samples.
    sample_rate : int
        In Hz.

    Returns
    -------
    int, or an array or tensor of them

    Example
    -------
    >>> n_frames_of(160000), n_frames_of(100)
    (998, 1)
    """
    length, shift = frame_length_and_shift(sample_rate)
    return 1 + (n_samples >= length) * ((n_samples - length) // shift)


def n_samples_for(n_frames, sample_rate=16000):
    """The fewest samples which give `n_frames` frames.

    Arguments
    ---------
    n_frames : int
        At least 1.
    sample_rate : int
        In Hz.

    Returns
    -------
    int

    Example
    -------
    >>> n_samples_for(1056)
    169200
    """
    length, shift = frame_length_and_shift(sample_rate)
    return (n_frames - 1) * shift + length


def true_lengths(wavs, wav_lens=None):
    """Lengths of padded clips in samples.

    Arguments
    ---------
    wavs : torch.Tensor
        `[batch, samples]`
    wav_lens : torch.Tensor, optional
        `[batch]`, relative to the longest clip; without it every clip fills its row.

    Returns
    -------
    torch.Tensor
        `[batch]`, int64.

    Example
    -------
    >>> true_lengths(torch.zeros(2, 500), torch.tensor([1.0, 0.5]))
    tensor([500, 250])
    """
    if wav_lens is None:
        return torch.full(wavs.shape[:1], wavs.shape[1], device=wavs.device)
    return (wav_lens.to(wavs.device) * wavs.shape[1]).round().long()


def remove_mean(wavs, lengths):
    """Subtract from each clip the mean over its true length, and set the padding to zero.

    Arguments
    ---------
    wavs : torch.Tensor
        `[batch, samples]`
    lengths : torch.Tensor
        `[batch]`, in samples.

    Returns
    -------
    torch.Tensor
        `[batch, samples]`

    Example
    -------
    >>> remove_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([2]))
    tensor([[-1.,  1.,  0.]])
    """
    padding = torch.arange(wavs.shape[1], device=wavs.device) >= lengths[:, None]
    mean = wavs.masked_fill(padding, 0.0).sum(1, keepdim=True) / lengths[:, None].clamp(min=1)
    return (wavs - mean).masked_fill(padding, 0.0)


@contextmanager
def full_float32(device):
    """Inside it products of float32 matrices are computed in float32: no autocast, no TF32.

    SpeechBrain switches TF32 on when it is imported; three digits are too few for features and for probabilities.

    Arguments
    ---------
    device : torch.device
        Where the computation runs.

    Example
    -------
    >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_float32(torch.device("cpu")):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.float32
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        # the older of PyTorch's two switches: SpeechBrain uses it, and PyTorch refuses to run on a mixture
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


class KaldiFbank(nn.Module):
    """Log-mel filter-bank energies as Kaldi computes them, without dither and energy column.

    The mean of each clip is subtracted; then for each whole frame of 25 ms, every 10 ms: mean removed, pre-emphasis 0.97,
    symmetric Hann window, power spectrum, triangular mel filters from 20 Hz to half the sample rate, natural logarithm of
    the energy (at least float32's epsilon). The same as `torchaudio.compliance.kaldi.fbank(wav - wav.mean(),
    htk_compat=True, use_energy=False, window_type="hanning", dither=0.0)` of each clip without its padding. Always in
    float32, also under autocast.

    Arguments
    ---------
    sample_rate : int
        In Hz.
    n_mels : int
        Number of mel filters, at least 4.
    n_frames : int, optional
        Cut to this number of frames, or fill with frames of 0.0 up to it. Without it the output is as long as the longest
        clip.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Example
    -------
    >>> compute_features = KaldiFbank(n_frames=1056)
    >>> compute_features(torch.rand(2, 32000), torch.tensor([1.0, 0.5])).shape
    torch.Size([2, 1056, 128])
    """

    def __init__(self, sample_rate=16000, n_mels=128, n_frames=None):
        super().__init__()
        if sample_rate < 100 or n_mels < 4 or (n_frames is not None and n_frames < 1):
            raise ValueError(
                "KaldiFbank needs sample_rate >= 100, n_mels >= 4 and n_frames >= 1 or None, "
                f"not {sample_rate}, {n_mels} and {n_frames}"
            )
        self.sample_rate = sample_rate
        self.n_mels = n_mels
        self.n_frames = n_frames
        self.frame_length, self.frame_shift = frame_length_and_shift(sample_rate)
        self.n_fft = 2 ** (self.frame_length - 1).bit_length()
        mel_banks, _ = get_mel_banks(n_mels, self.n_fft, float(sample_rate), LOWEST_HZ, 0.0, 100.0, -500.0, 1.0)
        # what follows from the constructor's arguments is no state: checkpoints stay free of it
        self.register_buffer("window", torch.hann_window(self.frame_length, periodic=False), persistent=False)
        self.register_buffer("mel_banks", F.pad(mel_banks, (0, 1)).T.contiguous(), persistent=False)

    def forward(self, wavs, wav_lens=None):
        """Compute the features of a padded batch.

        Arguments
        ---------
        wavs : torch.Tensor
            `[batch, samples]`, in [-1, 1]; what stands in the padding does not matter.
        wav_lens : torch.Tensor, optional
            `[batch]`, lengths relative to the longest clip.

        Returns
        -------
        torch.Tensor
            `[batch, frames, mels]`, float32; frames past a clip's own last one are 0.0.
        """
        if wavs.dim() != 2:
            raise ValueError(f"KaldiFbank takes waveforms [batch, samples], not a tensor of shape {list(wavs.shape)}")
        lengths = true_lengths(wavs, wav_lens)
        wavs = remove_mean(wavs.float(), lengths)
        n_frames = n_frames_of(wavs.shape[1], self.sample_rate)
        if self.n_frames is not None:
            n_frames = min(n_frames, self.n_frames)
        n_samples = n_samples_for(n_frames, self.sample_rate)
        wavs = F.pad(wavs, (0, n_samples - wavs.shape[1])) if wavs.shape[1] < n_samples else wavs[:, :n_samples]
        with full_float32(wavs.device):
            frames = wavs.unfold(1, self.frame_length, self.frame_shift)
            frames = frames - frames.mean(2, keepdim=True)
            # in place, for speed; Kaldi's first sample, preceded by itself, does not matter: the window begins with a zero
            frames[..., 1:] -= PREEMPHASIS * frames[..., :-1]
            spectrum = torch.fft.rfft(frames.mul_(self.window), self.n_fft)
            energies = (spectrum.real.square() + spectrum.imag.square()) @ self.mel_banks
        feats = energies.clamp(min=ENERGY_FLOOR).log()
        past_end = torch.arange(n_frames, device=wavs.device) >= n_frames_of(lengths, self.sample_rate)[:, None]
        feats = feats.masked_fill(past_end[..., None], 0.0)
        return feats if self.n_frames is None else F.pad(feats, (0, 0, 0, self.n_frames - n_frames))


class GlobalNorm(nn.Module):
    """Normalise features with one mean and one standard deviation for everything, `(feats - mean) / std`.

    Arguments
    ---------
    mean : float
        The default is PSLA's, of AudioSet.
    std : float
        The default is PSLA's, of AudioSet.

    Raises
    ------
    ValueError
        If `std` is not positive.

    Example
    -------
    >>> GlobalNorm()(torch.zeros(1, 1, 2))
    tensor([[[1.0170, 1.0170]]])
    """

    def __init__(self, mean=-4.6476, std=4.5699):
        super().__init__()
        if not std > 0:
            raise ValueError(f"GlobalNorm needs a positive std, not {std}")
        self.mean = mean
        self.std = std

    def forward(self, feats, lens=None):
        """Normalise.

        Arguments
        ---------
        feats : torch.Tensor
            `[batch, frames, mels]`
        lens : torch.Tensor, optional
            Not used; SpeechBrain's normalisers take it.

        Returns
        -------
        torch.Tensor
            `[batch, frames, mels]`
        """
        return (feats - self.mean) / self.std
