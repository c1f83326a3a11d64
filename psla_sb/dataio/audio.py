"""Sound files as mono float waveforms at the model's sample rate, and one clear error for those that cannot be read."""

import io
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

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
    """Says which sound file cannot be used, and why."""


@lru_cache(maxsize=16)
def _resampler(from_rate: int, to_rate: int) -> Resample:
    # The filter grows with both terms of the ratio: unrounded, a header with 44101 Hz in place of 44100 would cost gigabytes.
    terms = Fraction(*sorted((from_rate, to_rate))).limit_denominator(1000).as_integer_ratio()
    return Resample(*(terms if from_rate < to_rate else terms[::-1]))


def read_audio(path: str | Path, sample_rate: int = 16000) -> torch.Tensor:
    """Decodes a sound file, averages its channels and resamples it to `[samples]`, float32; full scale is 1.

    Arguments
    ---------
    path
        A file that libsndfile reads: WAV, FLAC, MP3, Ogg and others; or a clip in a pack (see `psla_sb.dataio.packs`). Of a WAV
        or MP3 file that was cut off, which libsndfile cannot tell from a shorter one, it is what is there.
    sample_rate
        Of the result, in Hz.

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


def _read(path: str | Path, sample_rate: int) -> torch.Tensor:
    """Does the work of `read_audio`, but leaves the int16 samples of a file in one channel at this rate as they are."""
    source = _source(path)
    try:
        wave, rate = _decoded(source)
    except DECODING_ERRORS as error:
        raise _undecoded(path, error) from None
    _check_rate(path, rate)
    if len(wave) == 0:
        raise AudioError(f"{path}: has no samples")
    if wave.dtype == torch.int16 and wave.shape[1] == 1 and rate == sample_rate:
        return wave[:, 0]
    wave = _mono(path, as_floats(wave))
    return wave if rate == sample_rate else _resampler(rate, sample_rate)(wave)


def _source(path: str | Path) -> str | io.BytesIO:
    """Gives what is to be decoded: the file of this name, or the bytes of a clip in a pack."""
    if (place := packs.locate(path)) and os.path.isfile(place.pack):
        try:
            return io.BytesIO(packs.read(place))
        except (OSError, EOFError) as error:
            raise AudioError(f"{path}: cannot be read from its pack ({getattr(error, 'strerror', error)})") from None
    # only a regular file is opened: a pipe or a device would keep the reader for ever
    if not os.path.isfile(path):
        parent = os.path.dirname(path)
        if os.path.isfile(parent):
            raise AudioError(f"{path}: no such file; if {parent} is a pack, a clip in it is called {parent}/<offset>+<size>")
        folder = "is a folder, not a sound file" if os.path.isdir(path) else "is a device or a pipe, not a sound file"
        raise AudioError(f"{path}: {folder if os.path.exists(path) else 'no such file'}")
    return str(path)


def _decoded(source: str | io.BytesIO) -> tuple[torch.Tensor, int]:
    """Gives `[samples, channels]`, int16 or float32, and the sample rate."""
    if (flac := read_flac(source)) is not None:
        return flac
    with soundfile.SoundFile(source) as file:
        # libsndfile makes the same floats of 16 bits as `as_floats`, in more time
        is_16_bit = file.format in ("WAV", "WAVEX", "FLAC") and file.subtype == "PCM_16"
        return torch.from_numpy(file.read(dtype="int16" if is_16_bit else "float32", always_2d=True)), file.samplerate


def as_floats(samples: torch.Tensor) -> torch.Tensor:
    """Converts samples of 16 bits to floats in [-1, 1), and leaves floats as they are."""
    return samples.float().mul_(2**-15) if samples.dtype == torch.int16 else samples


def _undecoded(path: str | Path, error: Exception) -> AudioError:
    return AudioError(f"{path}: cannot be decoded as sound ({getattr(error, 'error_string', error)})")


def _check_rate(path: str | Path, rate: int) -> None:
    if rate not in SAMPLE_RATES:
        raise AudioError(f"{path}: has a sample rate of {rate} Hz in its header, which cannot be right")


def _mono(path: str | Path, wave: torch.Tensor) -> torch.Tensor:
    wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(dim=1)
    # the sum is not finite if any sample is not, and takes a fifth of the time
    if not torch.isfinite(wave.sum()) and not torch.isfinite(wave).all():
        raise AudioError(f"{path}: has samples that are not finite numbers")
    return wave


def read_blocks(path: str | Path, sample_rate: int = 16000, seconds: float = 10.0) -> Iterator[torch.Tensor]:
    """Decodes a sound file of any length in pieces of `seconds`, each `[samples]`, float32.

    The pieces, joined, are what `read_audio` returns, with the same arguments and errors, if the file is not damaged.

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


def _decoded_blocks(path: str | Path, seconds: float) -> Iterator[Any]:
    """Yields the sample rate, then the pieces in mono."""
    source = _source(path)
    try:
        with soundfile.SoundFile(source) as file:
            yield file.samplerate
            while len(block := file.read(max(1, round(seconds * file.samplerate)), dtype="float32", always_2d=True)):
                yield _mono(path, torch.from_numpy(block))
    except DECODING_ERRORS as error:
        raise _undecoded(path, error) from None


def resampled(blocks: Iterable[torch.Tensor], resample: Resample) -> Iterator[torch.Tensor]:
    """Resamples a signal that comes in pieces `[samples]`, without seams; the two frequencies must have no common divisor."""
    # The filter repeats after a period: so many samples in, so many out. What it makes of a period depends on `context` periods
    # on either side, so each call gets these as well, and of its answer only periods are kept that saw no edge:
    #
    #   signal    |-- context --|-------- new --------|-- context --|    in periods; what is before it has been dropped
    #             0           done                  ready
    #   yielded                 |-------- new --------|
    #   next time                             |-- context --|--- ...
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
    if len(signal) and len(rest := resample(signal)[done * period_out :]):
        yield rest


def read_clip(path: str | Path, sample_rate: int = 16000, n_samples: int | None = None, place: float = 0.0) -> torch.Tensor:
    """Reads a clip for the model: `read_audio`, less the whole clip's mean, then cut to `n_samples` if it is longer.

    A longer clip is cut at `place` in [0, 1): 0 keeps its first samples, 0.5 the middle; a uniform random number makes all crops
    equally likely.

    Example
    -------
    >>> path = getfixture("tmp_path") / "clip.wav"
    >>> soundfile.write(path, [0.5] * 100 + [0.0] * 300, 16000)
    >>> read_clip(path, n_samples=200)[[0, 150]]
    tensor([ 0.3750, -0.1250])
    """
    return centred(*read_samples(path, sample_rate, n_samples, place))


def read_samples(
    path: str | Path, sample_rate: int = 16000, n_samples: int | None = None, place: float = 0.0
) -> tuple[torch.Tensor, float]:
    """Reads what `read_clip` does, as `[samples]` in as few bytes as it takes (int16 if possible), and the mean for `centred`."""
    samples, mean = _read(path, sample_rate), math.nan
    if samples.dtype != torch.int16:
        samples -= samples.mean()
        mean = 0.0
    if n_samples is not None and len(samples) > n_samples:
        # of the whole clip: `centred` sees only what is kept
        mean = _mean(samples, len(samples)).item() if math.isnan(mean) else mean
        start = int(place * (len(samples) - n_samples + 1))
        samples = samples[start : start + n_samples]
    return samples, mean


def centred(samples: torch.Tensor, mean: float | torch.Tensor, n_samples: torch.Tensor | None = None) -> torch.Tensor:
    """Converts samples to floats and subtracts means, in full scales; NaN stands for the mean of the int16 samples themselves.

    For samples `[batch, samples]`, padded with zeros that do not stay zeros, means and lengths without padding are `[batch, 1]`.
    """
    mean = torch.as_tensor(mean, dtype=torch.float32, device=samples.device)
    own = _mean(samples, samples.shape[-1] if n_samples is None else n_samples)
    return as_floats(samples) - torch.where(mean.isnan(), own, mean)


def _mean(samples: torch.Tensor, n_samples: int | torch.Tensor) -> torch.Tensor:
    return samples.sum(-1, keepdim=samples.dim() > 1) / n_samples / 2**15
