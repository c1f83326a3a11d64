"""Sounds as mono float waveforms at the model's sample rate, and one clear error for those that cannot be read."""

import io
import math
import os
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from psla_sb.dataio import decoders, packs
from psla_sb.dataio.containers import AudioError, warn
from psla_sb.dataio.decoders import decoded, decoded_segment
from psla_sb.dataio.resampling import Resampling, resampler
from psla_sb.dataio.windows import through
from psla_sb.errors import InputError

SAMPLE_RATES = range(1_000, 1_000_001)  # in Hz; others come from broken headers
NOT_FINITE = "samples that are not finite, or far outside of [-1, 1]"
# Full scale is 1. What is beyond this may be samples of integers that were not divided by theirs, and far beyond it, is.
LOUD, LOUDEST = 32.0, 1024.0
# Of a segment so much may be missing at its end, in seconds: lengths in annotations are rounded.
MISSING_AT_END = 0.05

AudioFile = str | Path | BinaryIO
Opened = AudioFile | list[torch.Tensor]  # the waveform of an array, as the only block of `read_blocks`


def read_audio(path: AudioFile, sample_rate: int = 16000, start: float | None = None, seconds: float | None = None) -> torch.Tensor:
    """Decodes a sound file, averages its channels and resamples it to `[samples]`, float32; full scale is 1.

    Arguments
    ---------
    path
        A file of any format that libsndfile or FFmpeg reads: WAV, FLAC, MP3, Ogg, M4A, WebM, WMA and others, also the sound of a
        film; or a clip in a pack (see `psla_sb.dataio.packs`); or a file object. Of WAV and MP3 files that just end, it is what is
        there, and a warning.
    sample_rate
        Of the result, in Hz.
    start, seconds
        Of a segment of the file, which alone is decoded if the file's format can be sought in (WAV, FLAC and others that libsndfile
        reads). Without `seconds` it goes to the file's end, without `start` the whole file is read.

    Raises
    ------
    AudioError
        The file is missing, is not a regular file, is not sound, is damaged, ends early, also for its segment, has no samples, has
        samples that are not numbers or far beyond full scale, or a sample rate that no sound has.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "stereo.wav"
    >>> soundfile.write(path, [[0.0, 0.0]] * 44100, 44100)
    >>> read_audio(path).shape
    torch.Size([16000])
    """
    return as_floats(_read(*_source(path), sample_rate, start, seconds))


def segment(path: AudioFile, start: float, seconds: float | None) -> tuple[int, torch.Tensor]:
    """Decodes a segment of a file, see `read_audio`, as it is: its sample rate and `[samples, channels]`, int16 or float32."""
    pieces = _segment(*_source(path), start, seconds)
    if len({(rate, piece.dtype, piece.shape[1]) for rate, piece in pieces}) > 1:
        raise AudioError(f"{path}: its sample rate changes within a segment; convert the file to one rate")
    return pieces[0][0], _joined([piece for _, piece in pieces])


def _segment(path: str, source: str | io.BytesIO, start: float, seconds: float | None) -> list[tuple[int, torch.Tensor]]:
    length = math.inf if seconds is None or math.isnan(seconds) else seconds
    pieces = [(rate, piece) for rate, piece in decoded_segment(path, source, start, length) if len(piece)]
    there = sum(len(piece) / rate for rate, piece in pieces)
    if there < (0.0 if math.isinf(length) else length - MISSING_AT_END) or not pieces:
        what = "there are no" if not pieces else f"only {there:.2f} s are"
        until = "" if math.isinf(length) else f" to {start + length:.2f} s"
        raise AudioError(f"{path}: it ends early for its segment from {start:.2f} s{until}, of which {what} samples there")
    return pieces


def _read(
    path: str, source: str | io.BytesIO, sample_rate: int, start: float | None = None, seconds: float | None = None
) -> torch.Tensor:
    """Does the work of `read_audio`, but leaves the int16 samples of a file in one channel at this rate as they are."""
    pieces = list(decoded(path, source, seconds=600.0)) if start is None else _segment(path, source, start, seconds)
    if all(rate == sample_rate and piece.dtype == torch.int16 and piece.shape[1] == 1 for rate, piece in pieces):
        waves = [piece[:, 0] for _, piece in pieces]
    else:
        waves = []
        for rate, group in groupby(pieces, key=lambda piece: piece[0]):
            _check_rate(path, rate)
            wave = _joined([mono(path, as_floats(piece)) for _, piece in group])
            waves.append(wave if rate == sample_rate or not len(wave) else resampler(rate, sample_rate)(wave))
    if not any(map(len, waves)):
        raise AudioError(f"{path}: has no samples")
    return _joined(waves)


def _joined(waves: list[torch.Tensor]) -> torch.Tensor:
    return waves[0] if len(waves) == 1 else torch.cat(waves)


def _source(path: AudioFile) -> tuple[str, str | io.BytesIO]:
    """Gives what messages call a sound, and what is decoded: a file's name, or the bytes of a file object or a clip in a pack."""
    if not isinstance(path, str | os.PathLike):
        return named(path), path if isinstance(path, io.BytesIO) else _in_memory(path)
    if (place := packs.locate(path)) and os.path.isfile(place.pack):
        try:
            return str(path), io.BytesIO(packs.read(place))
        except (OSError, EOFError) as error:
            raise AudioError(f"{path}: cannot be read from its pack ({getattr(error, 'strerror', error)})") from None
    # only a regular file is opened: a pipe or a device would keep the reader for ever
    if not os.path.isfile(path):
        parent = os.path.dirname(path)
        if os.path.isfile(parent):
            raise AudioError(f"{path}: no such file; if {parent} is a pack, a clip in it is called {parent}/<offset>+<size>")
        folder = "is a folder, not a sound file" if os.path.isdir(path) else "is a device or a pipe, not a sound file"
        raise AudioError(f"{path}: {folder if os.path.exists(path) else 'no such file'}")
    return str(path), str(path)


def _in_memory(file: Any) -> io.BytesIO:
    try:
        copy = io.BytesIO(file.read())
    except (OSError, ValueError, TypeError) as error:
        raise AudioError(f"{named(file)}: must be open for reading bytes, as with mode='rb' ({error})") from None
    copy.name = named(file)
    return copy


def named(source: Any) -> str:
    """What messages call a sound: its path, a file object's name, or just that."""
    return str(source if isinstance(source, str | os.PathLike) else getattr(source, "name", "the sound"))


def duration(path: AudioFile) -> float:
    """Finds out how many seconds of sound a file has, without decoding it if its header can be believed; errors as of `read_audio`.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, [0.0] * 8000, 16000)
    >>> duration(path)
    0.5
    """
    return decoders.duration(*_source(path))


def sample_rate_of(path: AudioFile) -> int:
    """Finds out a file's sample rate, in Hz, of its first samples; errors as of `read_audio`.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, [0.0] * 8000, 16000)
    >>> sample_rate_of(path)
    16000
    """
    name, source = _source(path)
    for rate, _ in decoders.decoded(name, source, seconds=0.1):
        return rate
    raise AudioError(f"{name}: has no samples")


def as_floats(samples: torch.Tensor) -> torch.Tensor:
    """Converts samples of 16 bits to floats in [-1, 1), and leaves floats as they are."""
    return samples.float().mul_(2**-15) if samples.dtype == torch.int16 else samples


def _check_rate(path: Any, rate: int) -> None:
    if rate not in SAMPLE_RATES:
        raise AudioError(f"{path}: has a sample rate of {rate} Hz in its header, which cannot be right")


def mono(path: Any, wave: torch.Tensor) -> torch.Tensor:
    """Averages channels, `[samples, channels]` to `[samples]`; refuses samples that are out of range."""
    wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(dim=1)
    if len(wave):
        check_scale(path, wave)
    return wave


def check_scale(source: Any, wave: torch.Tensor) -> None:
    """Refuses samples that are not finite or far beyond full scale, and warns of those that are beyond it for no good reason."""
    least, most = torch.aminmax(wave)
    peak = torch.maximum(-least, most).item()
    remedy = f"up to {peak:.4g}; divide what were integers by their full scale"
    if not peak <= LOUDEST:
        raise AudioError(f"{source}: {NOT_FINITE}: {remedy}")
    if peak > LOUD:
        warn(f"{source}: samples far outside of [-1, 1]: {remedy}")


def to_waveform(samples: Any, sample_rate: int, to_rate: int = 16000) -> torch.Tensor:
    """Converts samples in memory to what `read_audio` gives of a file.

    Arguments
    ---------
    samples
        `[samples]`, `[samples, channels]` or `[channels, samples]`, of which the smaller number is the channels': integers of the
        whole range of their type, or floats in [-1, 1].
    sample_rate, to_rate
        Theirs and the result's, in Hz.

    Raises
    ------
    InputError
        They are of another shape or type, none, not finite, or far beyond full scale.

    Example
    -------
    >>> to_waveform(np.full((44100, 2), 2**14, np.int16), 44100)[8000]
    tensor(0.5000)
    """
    wave = sample_values(samples)
    wave = wave[:, None] if wave.dim() == 1 else wave if wave.shape[0] > wave.shape[1] else wave.T
    _check_rate("an array of sound", sample_rate)
    wave = mono("an array of sound", wave)
    return wave if sample_rate == to_rate else resampler(sample_rate, to_rate)(wave)


def sample_values(samples: Any) -> torch.Tensor:
    """Copies samples in memory of any type, see `to_waveform`, as float32, `[n]` or `[n, m]` as they are."""
    if isinstance(samples, torch.Tensor):
        samples = (samples.float() if samples.is_floating_point() else samples).detach().cpu().numpy()
    array = np.asarray(samples)
    if array.ndim not in (1, 2) or not array.size or array.dtype.kind not in "iuf":
        raise InputError(
            f"an array of sound is [samples] or [samples, channels], of numbers, not {array.dtype} {list(array.shape)}"
        )
    if array.dtype.kind in "iu":
        scale = 2.0 ** (8 * array.itemsize - 1)
        array = array / scale - (array.dtype.kind == "u")
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def opened(source: Any, sample_rate: int | None, to_rate: int) -> Opened:
    """Gives what `read_blocks` and `read_if_short` can read repeatedly, of a path, a file object, or an array of `sample_rate`.

    >>> opened([0.0] * 44100, 44100, to_rate=16000)[0].shape
    torch.Size([16000])
    """
    if isinstance(source, str | os.PathLike):
        return str(source)
    if hasattr(source, "read"):
        return _in_memory(source)
    if sample_rate is None:
        raise ValueError("an array of sound needs sample_rate=, in Hz")
    return [to_waveform(source, sample_rate, to_rate)]


def read_blocks(
    path: Opened, sample_rate: int = 16000, seconds: float = 10.0, on_progress: Callable[[float], Any] | None = None
) -> Iterator[torch.Tensor]:
    """Decodes a sound file of any length in pieces of about so many seconds, each `[samples]`, float32.

    The pieces, joined, are what `read_audio` returns, with the same arguments and errors. Whenever a piece is done with,
    `on_progress` is called with the seconds so far; what it raises ends the reading.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "long.wav"
    >>> soundfile.write(path, [[0.0, 0.0]] * 44100 * 25, 44100)
    >>> sum(len(block) for block in read_blocks(path))
    400000
    """
    n_samples = 0
    for block in path if isinstance(path, list) else _blocks(*_source(path), sample_rate, seconds):
        yield block
        n_samples += len(block)
        if on_progress is not None:
            on_progress(n_samples / sample_rate)


def _blocks(path: str, source: str | io.BytesIO, sample_rate: int, seconds: float) -> Iterator[torch.Tensor]:
    n_samples = 0
    for rate, group in groupby(decoded(path, source, seconds), key=lambda piece: piece[0]):
        _check_rate(path, rate)
        blocks = (mono(path, as_floats(piece)) for _, piece in group)
        for block in blocks if rate == sample_rate else through(Resampling(rate, sample_rate), blocks):
            n_samples += len(block)
            yield block
    if n_samples == 0:
        raise AudioError(f"{path}: has no samples")


def own_blocks(path: AudioFile, seconds: float = 10.0) -> Iterator[tuple[int, torch.Tensor]]:
    """Decodes a sound file in pieces of about so many seconds as it is: sample rates and `[samples, channels]`, float32.

    Errors are those of `read_audio`.
    """
    name, source = _source(path)
    for rate, piece in decoded(name, source, seconds):
        _check_rate(name, rate)
        floats = as_floats(piece)
        if len(floats):
            check_scale(name, floats)
        yield rate, floats


def read_clip(path: str | Path, sample_rate: int = 16000, n_samples: int | None = None, place: float = 0.0) -> torch.Tensor:
    """Reads a clip for the model: `read_audio`, less the whole clip's mean, then cut to `n_samples` if it is longer.

    A longer clip is cut at `place` in [0, 1): 0 keeps its first samples, 0.5 the middle; a uniform random number makes all crops
    equally likely.

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "clip.wav"
    >>> soundfile.write(path, [0.5] * 100 + [0.0] * 300, 16000)
    >>> read_clip(path, n_samples=200)[[0, 150]]
    tensor([ 0.3750, -0.1250])
    """
    return centred(*read_samples(path, sample_rate, n_samples, place))


def read_if_short(path: Opened, sample_rate: int, n_samples: int) -> tuple[torch.Tensor, float] | None:
    """Reads what `read_samples` does of a clip of at most `n_samples`; gives None for a longer one, of which it reads no more."""
    if isinstance(path, list):
        return _less_mean(path[0]) if len(path[0]) <= n_samples else None
    name, source = _source(path)
    seconds = decoders.known_duration(name, source)
    if seconds is not None and seconds * sample_rate <= n_samples:
        return _less_mean(_read(name, source, sample_rate))
    blocks, n_read = [], 0
    for block in _blocks(name, source, sample_rate, n_samples / sample_rate):
        blocks.append(block)
        n_read += len(block)
        if n_read > n_samples:
            return None
    return _less_mean(torch.cat(blocks))


def _less_mean(samples: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Subtracts the mean of floats; of int16 samples it is left to `centred`."""
    return (samples, math.nan) if samples.dtype == torch.int16 else (samples - samples.mean(), 0.0)


def read_samples(
    path: AudioFile,
    sample_rate: int = 16000,
    n_samples: int | None = None,
    place: float = 0.0,
    start: float | None = None,
    seconds: float | None = None,
) -> tuple[torch.Tensor, float]:
    """Reads what `read_clip` does, as `[samples]` in as few bytes as it takes (int16 if possible), and the mean for `centred`.

    Of a file with a `start`, the clip is a segment, see `read_audio`.
    """
    samples, mean = _less_mean(_read(*_source(path), sample_rate, start, seconds))
    if n_samples is not None and len(samples) > n_samples:
        # of the whole clip: `centred` sees only what is kept
        mean = _mean(samples, len(samples)).item() if math.isnan(mean) else mean
        first = int(place * (len(samples) - n_samples + 1))
        samples = samples[first : first + n_samples]
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
