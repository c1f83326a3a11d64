"""Sound files as mono float waveforms at the model's sample rate, and one clear error for those that cannot be read."""

import io
import math
import os
from fractions import Fraction
from functools import lru_cache

import soundfile
import torch
from torchaudio.transforms import Resample

from psla_sb.dataio import packs
from psla_sb.dataio.flac import read_flac
from psla_sb.errors import InputError

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
# what soundfile raises for one broken file or another; MemoryError for headers that promise too much
DECODING_ERRORS = (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError)
SAMPLE_RATES = range(1_000, 1_000_001)  # in Hz; others come from broken headers


class AudioError(InputError):
    """A sound file that cannot be used; the message names the file.

    Example
    -------
    >>> read_audio("nowhere.wav")
    Traceback (most recent call last):
    ...
    psla_sb.dataio.audio.AudioError: nowhere.wav: no such file
    """


@lru_cache(maxsize=16)
def _resampler(from_rate, to_rate):
    # The filter grows with both terms of the ratio: unrounded, a header with 44101 Hz in place of 44100 would cost gigabytes.
    low, high = sorted((from_rate, to_rate))
    ratio = Fraction(low, high).limit_denominator(1000)
    terms = {low: ratio.numerator, high: ratio.denominator}
    return Resample(terms[from_rate], terms[to_rate])


def read_audio(path, sample_rate=16000):
    """Decodes a sound file, averages its channels and resamples it.

    Arguments
    ---------
    path : str or Path
        A file that libsndfile reads: WAV, FLAC, MP3, Ogg and others; or a clip in a pack (see `psla_sb.dataio.packs`). Of a WAV
        or MP3 file that was cut off, which libsndfile cannot tell from a shorter one, it is what is there.
    sample_rate : int
        Of the result, in Hz.

    Returns
    -------
    torch.Tensor
        `[samples]`, float32; the files' full scale is 1.

    Raises
    ------
    AudioError
        The file is missing, is not a regular file, is not sound, has no samples, has samples that are not numbers, or a sample
        rate that no sound has.

    Example
    -------
    >>> path = getfixture("tmp_path") / "stereo.wav"
    >>> soundfile.write(path, [[0.0, 0.0]] * 44100, 44100)
    >>> read_audio(path).shape
    torch.Size([16000])
    """
    return as_floats(_read(path, sample_rate))


def _read(path, sample_rate):
    """What `read_audio` returns, or int16 `[samples]` if the file has nothing else, in one channel at this rate."""
    source = _source(path)
    try:
        wave, rate = _decoded(source)
    except DECODING_ERRORS as error:
        raise AudioError(_undecoded(path, error)) from None
    _check_rate(path, rate)
    if len(wave) == 0:
        raise AudioError(f"{path}: has no samples")
    if wave.dtype == torch.int16 and wave.shape[1] == 1 and rate == sample_rate:
        return wave[:, 0]
    wave = _mono(path, as_floats(wave))
    return wave if rate == sample_rate else _resampler(rate, sample_rate)(wave)


def _source(path):
    """What is to be decoded: the file of this name, or the bytes of a clip in a pack.

    Nothing but a regular file is opened: a pipe or a device would keep the reader for ever.
    """
    place = packs.locate(path)
    if place is not None and os.path.isfile(place.pack):
        try:
            return io.BytesIO(packs.read(place))
        except (OSError, EOFError) as error:
            raise AudioError(f"{path}: cannot be read from its pack ({getattr(error, 'strerror', error)})") from None
    if not os.path.isfile(path):
        parent = os.path.dirname(path)
        if os.path.isfile(parent):
            raise AudioError(f"{path}: no such file; if {parent} is a pack, a clip in it is called {parent}/<offset>+<size>")
        folder = "is a folder, not a sound file" if os.path.isdir(path) else "is a device or a pipe, not a sound file"
        raise AudioError(f"{path}: {folder if os.path.exists(path) else 'no such file'}")
    return str(path)


def _decoded(source):
    """`[samples, channels]`, int16 or float32, and the sample rate."""
    if (flac := read_flac(source)) is not None:
        return flac
    with soundfile.SoundFile(source) as file:
        # libsndfile makes the same floats of 16 bits as `as_floats`, in more time
        is_16_bit = file.format in ("WAV", "WAVEX", "FLAC") and file.subtype == "PCM_16"
        return torch.from_numpy(file.read(dtype="int16" if is_16_bit else "float32", always_2d=True)), file.samplerate


def as_floats(samples):
    """Samples of 16 bits as floats in [-1, 1); floats as they are.

    Example
    -------
    >>> as_floats(torch.tensor([-(2**15), 2**14], dtype=torch.int16))
    tensor([-1.0000,  0.5000])
    """
    return samples.float().mul_(2**-15) if samples.dtype == torch.int16 else samples


def _undecoded(path, error):
    return f"{path}: cannot be decoded as sound ({getattr(error, 'error_string', error)})"


def _check_rate(path, rate):
    if rate not in SAMPLE_RATES:
        raise AudioError(f"{path}: has a sample rate of {rate} Hz in its header, which cannot be right")


def _mono(path, wave):
    """`[samples, channels]` -> `[samples]`"""
    wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(dim=1)
    # the sum is not finite if any sample is not, and takes a fifth of the time
    if not torch.isfinite(wave.sum()) and not torch.isfinite(wave).all():
        raise AudioError(f"{path}: has samples that are not finite numbers")
    return wave


def read_blocks(path, sample_rate=16000, seconds=10.0):
    """Decodes a sound file of any length piece by piece.

    The pieces, joined, are what `read_audio` returns, if the file is not damaged.

    Arguments
    ---------
    path : str or Path
        See `read_audio`.
    sample_rate : int
        Of the result, in Hz.
    seconds : float
        What is read at a time.

    Yields
    ------
    torch.Tensor
        `[samples]`, float32.

    Raises
    ------
    AudioError
        See `read_audio`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "long.wav"
    >>> soundfile.write(path, [[0.0, 0.0]] * 44100 * 25, 44100)
    >>> sum(len(block) for block in read_blocks(path))
    400000
    """
    blocks = _decoded_blocks(path, seconds)
    rate, n_samples = next(blocks), 0
    _check_rate(path, rate)
    for block in blocks if rate == sample_rate else resampled(blocks, _resampler(rate, sample_rate)):
        n_samples += len(block)
        yield block
    if n_samples == 0:
        raise AudioError(f"{path}: has no samples")


def _decoded_blocks(path, seconds):
    """The sample rate, then the pieces in mono."""
    source = _source(path)
    try:
        with soundfile.SoundFile(source) as file:
            yield file.samplerate
            while len(block := file.read(max(1, round(seconds * file.samplerate)), dtype="float32", always_2d=True)):
                yield _mono(path, torch.from_numpy(block))
    except DECODING_ERRORS as error:
        raise AudioError(_undecoded(path, error)) from None


def resampled(blocks, resample):
    """Resamples a signal that comes piece by piece; the result has no seams.

    The filter repeats after a whole number of samples in (`orig_freq`) and out (`new_freq`). Each call gets as much of the signal
    on either side as the filter reaches, and of its answer only whole periods are kept that saw no edge.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        `[samples]` each.
    resample : torchaudio.transforms.Resample
        With frequencies that have no common divisor.

    Yields
    ------
    torch.Tensor
        `[samples]`

    Example
    -------
    >>> resample, wave = Resample(441, 160), torch.randn(10_000)
    >>> torch.allclose(torch.cat(list(resampled(wave.split(3000), resample))), resample(wave), atol=1e-6)
    True
    """
    period_in, period_out = resample.orig_freq, resample.new_freq
    context = resample.width // period_in + 2  # periods
    signal, done = torch.zeros(0), 0
    for block in blocks:
        signal = torch.cat([signal, block])
        ready = len(signal) // period_in - context
        if ready > done:
            yield resample(signal)[done * period_out : ready * period_out]
            dropped = max(0, ready - context)
            signal, done = signal[dropped * period_in :], ready - dropped
    rest = resample(signal)[done * period_out :] if len(signal) else signal
    if len(rest):
        yield rest


def read_clip(path, sample_rate=16000, n_samples=None, place=0.0):
    """A clip for the model: `read_audio`, less the whole clip's mean, then cut to `n_samples` if it is longer.

    Arguments
    ---------
    path : str or Path
        See `read_audio`.
    sample_rate : int
        Of the result, in Hz.
    n_samples : int, optional
        The most that is kept.
    place : float
        Where a longer clip is cut, in [0, 1): 0 keeps its first samples, 0.5 the middle; a uniform random number makes all crops
        equally likely.

    Returns
    -------
    torch.Tensor
        `[samples]`, float32.

    Raises
    ------
    AudioError
        See `read_audio`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "clip.wav"
    >>> soundfile.write(path, [0.5] * 100 + [0.0] * 300, 16000)
    >>> read_clip(path, n_samples=200)[[0, 150]]
    tensor([ 0.3750, -0.1250])
    >>> read_clip(path, n_samples=200, place=0.5)[0]
    tensor(-0.1250)
    """
    return centred(*read_samples(path, sample_rate, n_samples, place))


def read_samples(path, sample_rate=16000, n_samples=None, place=0.0):
    """`read_clip` in as few bytes and steps as it takes: of a 16-bit file in one channel at this rate the samples themselves.

    Arguments
    ---------
    path, sample_rate, n_samples, place
        See `read_clip`.

    Returns
    -------
    (torch.Tensor, float)
        `[samples]`, int16 or float32, and what to subtract: see `centred`.

    Raises
    ------
    AudioError
        See `read_audio`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "clip.wav"
    >>> soundfile.write(path, [0.5] * 100 + [0.0] * 300, 16000)
    >>> read_samples(path, n_samples=2)
    (tensor([16384, 16384], dtype=torch.int16), 0.125)
    """
    samples, mean = _read(path, sample_rate), math.nan
    if samples.dtype != torch.int16:
        samples -= samples.mean()
        mean = 0.0
    if n_samples is not None and len(samples) > n_samples:
        if math.isnan(mean):
            mean = _mean(samples, len(samples)).item()
        start = int(place * (len(samples) - n_samples + 1))
        samples = samples[start : start + n_samples]
    return samples, mean


def centred(samples, mean, n_samples=None):
    """Samples as floats, less their means.

    Arguments
    ---------
    samples : torch.Tensor
        `[samples]` or, padded with zeros, `[batch, samples]`; int16 or float32.
    mean : float or torch.Tensor
        What to subtract, in full scales; `[batch, 1]` for a batch. NaN stands for the mean of the int16 samples themselves: to take
        it of a whole batch is faster.
    n_samples : torch.Tensor, optional
        `[batch, 1]`, without padding.

    Returns
    -------
    torch.Tensor
        As the samples, float32; padding is not zero any more.

    Example
    -------
    >>> centred(torch.tensor([0, 2**14], dtype=torch.int16), math.nan)
    tensor([-0.2500,  0.2500])
    >>> centred(torch.tensor([[0, 2**14]], dtype=torch.int16), torch.tensor([[0.5]]))
    tensor([[-0.5000,  0.0000]])
    """
    mean = torch.as_tensor(mean, dtype=torch.float32, device=samples.device)
    own = _mean(samples, samples.shape[-1] if n_samples is None else n_samples)
    return as_floats(samples) - torch.where(mean.isnan(), own, mean)


def _mean(samples, n_samples):
    return samples.sum(-1, keepdim=samples.dim() > 1) / n_samples / 2**15
