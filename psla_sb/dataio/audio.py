"""Sound files as mono float waveforms at the model's sample rate, and one clear error for those that cannot be read."""

from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
from speechbrain.dataio import audio_io
from torchaudio.transforms import Resample

from psla_sb.errors import InputError

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
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
        A file that libsndfile reads: WAV, FLAC, MP3, Ogg and others. Of a WAV or MP3 file that was cut off, which libsndfile
        cannot tell from a shorter one, it is what is there.
    sample_rate : int
        Of the result, in Hz.

    Returns
    -------
    torch.Tensor
        `[samples]`, float32; the files' full scale is 1.

    Raises
    ------
    AudioError
        The file is missing, is not sound, has no samples, has samples that are not numbers, or a sample rate that no sound has.

    Example
    -------
    >>> path = getfixture("tmp_path") / "stereo.wav"
    >>> audio_io.save(path, torch.zeros(2, 44100), 44100)
    >>> read_audio(path).shape
    torch.Size([16000])
    """
    try:
        wave, rate = audio_io.load(str(path), channels_first=False)
    except Exception as error:
        # soundfile raises several kinds of exceptions for broken files, and SpeechBrain wraps them
        if Path(path).is_file():
            reason = f"cannot be decoded as sound ({getattr(error.__cause__, 'error_string', error.__cause__)})"
        else:
            reason = "is a folder, not a sound file" if Path(path).is_dir() else "no such file"
        raise AudioError(f"{path}: {reason}") from None
    if rate not in SAMPLE_RATES:
        raise AudioError(f"{path}: has a sample rate of {rate} Hz in its header, which cannot be right")
    wave = wave.mean(dim=1)
    if len(wave) == 0:
        raise AudioError(f"{path}: has no samples")
    if not torch.isfinite(wave).all():
        raise AudioError(f"{path}: has samples that are not finite numbers")
    return wave if rate == sample_rate else _resampler(rate, sample_rate)(wave)


def read_clip(path, sample_rate=16000, n_samples=None):
    """A clip for the model: `read_audio`, less the whole clip's mean, then no more than the first `n_samples`.

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
    >>> audio_io.save(path, torch.tensor([[0.5] * 100 + [0.0] * 300]), 16000)
    >>> read_clip(path, n_samples=200)[[0, 150]]
    tensor([ 0.3750, -0.1250])
    """
    wave = read_audio(path, sample_rate)
    return (wave - wave.mean())[:n_samples]
