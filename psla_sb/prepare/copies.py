"""Copies of sound files as a training reads them fastest: mono, at the model's sample rate, in 16 bits.

They are made once, by several processes, which can be killed at any moment.
"""

import io
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from psla_sb.dataio.audio import AudioError, read_audio
from psla_sb.errors import InputError
from psla_sb.files import atomic_write, one_process

FULL_SCALE = 2**15
# FLAC of the lowest level, which is 4 % larger than by default, and is decoded in nine tenths of the time
FORMATS = {".flac": {"format": "FLAC", "compression_level": 0.0}, ".wav": {"format": "WAV"}}
# clips that wait for each worker, so that a long one holds up no other
CLIPS_AHEAD = 32


def ending_of(resampled_format):
    """The ending of copies in a format that a recipe asks for.

    Arguments
    ---------
    resampled_format : str
        "flac"; or "wav", which takes about twice the disk, and which a loader's worker reads over three times as fast.

    Returns
    -------
    str

    Raises
    ------
    InputError
        It is neither.

    Example
    -------
    >>> ending_of("flac")
    '.flac'
    """
    if f".{resampled_format}" not in FORMATS:
        raise InputError(f"resampled_format: must be flac or wav, not {resampled_format}")
    return f".{resampled_format}"


def resample_clips(sources, targets, folder, sample_rate=16000, n_workers=None):
    """Writes copies of clips, those that are not there yet. It can be killed at any moment and started again.

    A copy appears under its own name only when it is whole and on disk. One that is there is kept, unless it is older than its
    source or has another sample rate; it is also kept if its source is gone. What a killed process left unfinished, `tmp+...`, is
    replaced when its clip is made again. Of several processes with the same folder one works and the others wait.

    Arguments
    ---------
    sources : sequence of str or pyarrow.Array
        The clips' files.
    targets : sequence of str or pyarrow.Array
        Their copies, paths relative to the folder, with the ending `.flac` or `.wav`. They must differ.
    folder : str or Path
        Where the copies go; made if there is none.
    sample_rate : int
        Of the copies, in Hz.
    n_workers : int, optional
        Processes that decode, by default as many as there are cores.

    Returns
    -------
    (np.ndarray, dict of int to str)
        Seconds `[clips]` of the copies, NaN for a clip that cannot be read; and what is wrong with each such clip.

    Raises
    ------
    InputError
        A copy cannot be written.
    ValueError
        There are not as many targets as sources, or no workers, or a target has another ending.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> soundfile.write(folder / "a.wav", np.zeros((44100, 2)), 44100)
    >>> durations, errors = resample_clips([str(folder / "a.wav"), "nowhere.wav"], ["a.flac", "b.flac"], folder / "16k")
    >>> durations, errors
    (array([ 1., nan]), {1: 'nowhere.wav: no such file'})
    >>> soundfile.info(folder / "16k" / "a.flac").samplerate
    16000
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources but {len(targets)} targets")
    sources, targets = pa.array(sources, pa.string()), pa.array(targets, pa.string())
    if not pc.all(pc.match_substring_regex(targets, r"\.(flac|wav)$"), min_count=0).as_py():
        raise ValueError(f"targets must end in one of {', '.join(FORMATS)}")
    if n_workers is None:
        # a container may have fewer cores than the machine
        n_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if n_workers < 1:
        raise ValueError(f"n_workers must be 1 or more, not {n_workers}")
    durations, errors = np.full(len(sources), np.nan), {}
    with one_process(folder):
        loader = DataLoader(
            _Copies(sources, targets, str(folder), sample_rate),
            batch_size=None,
            # never in this process: results depend on the number of threads, and workers have one
            num_workers=max(1, min(n_workers, len(sources))),
            prefetch_factor=CLIPS_AHEAD,
            # the global one would be advanced, and training would draw other numbers than without a preparation
            generator=torch.Generator(),
        )
        for row, (seconds, error) in enumerate(tqdm(loader, desc=f"Copies in {folder}", unit=" clips", disable=None)):
            durations[row] = seconds
            if isinstance(error, AudioError):
                errors[row] = str(error)
            elif error is not None:
                raise error
    return durations, errors


class _Copies:
    """What a worker process does: item `i` is (seconds, None), or (NaN, the error), after the copy was made."""

    def __init__(self, sources, targets, folder, sample_rate):
        self.sources, self.targets, self.folder, self.sample_rate = sources, targets, folder, sample_rate

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, row):
        target = os.path.join(self.folder, self.targets[row].as_py())
        try:
            return resample_clip(self.sources[row].as_py(), target, self.sample_rate), None
        except InputError as error:
            # an exception that crosses from a worker arrives as a traceback
            return math.nan, error


def resample_clip(source, target, sample_rate=16000):
    """Writes the copy of a clip, unless it is there; see `resample_clips`.

    Samples beyond full scale, which resampling can make, are clipped.

    Arguments
    ---------
    source, target : str
        The files; the target's ending is `.flac` or `.wav`.
    sample_rate : int
        In Hz.

    Returns
    -------
    float
        Seconds of the copy.

    Raises
    ------
    AudioError
        The source cannot be read.
    InputError
        The copy cannot be written.

    Example
    -------
    >>> source, target = (str(getfixture("tmp_path") / name) for name in ("a.wav", "a.flac"))
    >>> soundfile.write(source, np.zeros(22050), 44100)
    >>> resample_clip(source, target)
    0.5
    """
    seconds = _seconds_if_current(source, target, sample_rate)
    if seconds is None:
        wave = read_audio(source, sample_rate)
        samples = (wave * FULL_SCALE).round().clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16)
        # libsndfile does not tell of a full disk what Python does
        encoded = io.BytesIO()
        kind = FORMATS[os.path.splitext(target)[1]]
        soundfile.write(encoded, samples.numpy(), sample_rate, subtype="PCM_16", **kind)
        with atomic_write(target) as temporary:
            temporary.write_bytes(encoded.getvalue())
        seconds = len(samples) / sample_rate
    return seconds


def _seconds_if_current(source, target, sample_rate):
    """Of a copy that is there, has this sample rate and is not older than its source; otherwise None."""
    try:
        if os.path.exists(source) and os.stat(source).st_mtime > os.stat(target).st_mtime:
            return None
        info = soundfile.info(target)
    except (OSError, soundfile.SoundFileError):
        return None
    return info.duration if info.samplerate == sample_rate and info.frames else None
