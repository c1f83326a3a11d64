"""Copies of sound files as a training reads them fastest: mono, at the model's sample rate, in 16 bits.

They are made once, by several processes, which can be killed at any moment.
"""

import contextlib
import functools
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile
import torch
from speechbrain.utils.logger import get_logger
from torch.utils.data import DataLoader
from tqdm import tqdm

from psla_sb.dataio.audio import AudioError, read_audio
from psla_sb.dataio.resampling import RESAMPLING
from psla_sb.errors import InputError
from psla_sb.files import LOCK, one_process, write_errors, write_file

logger = get_logger(__name__)

FULL_SCALE = 2**15
# with what copies are made; the lock file of their folder says so
RESAMPLER = json.dumps(RESAMPLING)
# FLAC of the lowest level, which is 4 % larger than by default, and is decoded in nine tenths of the time
FORMATS: dict[str, dict] = {".flac": {"format": "FLAC", "compression_level": 0.0}, ".wav": {"format": "WAV"}}
# clips that wait for each worker, so that a long one holds up no other
CLIPS_AHEAD = 32

Files: TypeAlias = Sequence[str] | pa.Array


def ending_of(resampled_format: str) -> str:
    """Returns the ending of copies: "flac" or "wav", which takes twice the disk and is read over three times as fast."""
    if f".{resampled_format}" not in FORMATS:
        raise InputError(f"resampled_format: must be flac or wav, not {resampled_format}")
    return f".{resampled_format}"


def resample_clips(
    sources: Files, targets: Files, folder: str | Path, sample_rate: int = 16000, n_workers: int | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """Writes copies of clips, those that are not there yet. It can be killed at any moment and started again.

    Targets are relative to the folder and end in `.flac` or `.wav`. Returned are the copies' seconds `[clips]`, NaN for a clip that
    cannot be read, and what is wrong with each such clip, by its row. A copy that cannot be written raises `InputError`.
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources but {len(targets)} targets")
    sources, targets = pa.array(sources, pa.string()), pa.array(targets, pa.string())
    if not pc.all(pc.match_substring_regex(targets, r"\.(flac|wav)$"), min_count=0).as_py():
        raise ValueError(f"targets must end in one of {', '.join(FORMATS)}")
    if n_workers is None:
        # a container may have fewer cores than the machine
        n_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if n_workers < 1:
        raise ValueError(f"n_workers must be 1 or more, not {n_workers}")
    durations, errors = np.full(len(sources), np.nan), {}
    with one_process(folder):
        since = _made_since(Path(folder))
        # never in this process: results depend on the number of threads, and workers have one
        n_workers = max(1, min(n_workers, len(sources)))
        rows: Any = range(len(sources))  # any sequence is a Dataset
        copy = functools.partial(_copy, sources, targets, folder, sample_rate, since)
        # the global generator would be advanced, and training would draw other numbers than without a preparation
        own = torch.Generator()
        loader = DataLoader(rows, None, num_workers=n_workers, collate_fn=copy, prefetch_factor=CLIPS_AHEAD, generator=own)
        for row, (seconds, error) in enumerate(tqdm(loader, desc=f"Copies in {folder}", unit=" clips", disable=None)):
            durations[row] = seconds
            if isinstance(error, AudioError):
                errors[row] = str(error)
            elif error is not None:
                raise error
    return durations, errors


def _made_since(folder: Path) -> float:
    """When the folder's copies began to be made with this resampler (see `os.stat`); what is older is made anew."""
    lock = folder / LOCK
    if lock.read_text(encoding="utf-8") != RESAMPLER:
        if any(path.suffix in FORMATS for path in folder.rglob("*")):
            logger.warning("%s: copies that another resampler made are made anew, if their sources are there.", folder)
        with write_errors(lock):
            lock.write_text(RESAMPLER, encoding="utf-8")
    return lock.stat().st_mtime


def _copy(
    sources: pa.Array, targets: pa.Array, folder: str | Path, sample_rate: int, since: float, row: int
) -> tuple[float, InputError | None]:
    """What a worker process does with a clip: makes its copy, and returns (seconds, None), or (NaN, the error)."""
    try:
        return resample_clip(sources[row].as_py(), os.path.join(folder, targets[row].as_py()), sample_rate, since), None
    except InputError as error:
        # an exception that crosses from a worker arrives as a traceback
        return math.nan, error


def resample_clip(source: str, target: str, sample_rate: int = 16000, since: float = 0.0) -> float:
    """Writes the copy of one clip, unless it is there (see `resample_clips`), and returns the copy's seconds."""
    # kept if it is whole, has this sample rate, and is not older than its source and than `since`, or the source is gone
    with contextlib.suppress(OSError, soundfile.SoundFileError):
        made = os.stat(target).st_mtime
        if not os.path.exists(source) or made >= max(since, os.stat(source).st_mtime):
            info = soundfile.info(target)
            if info.samplerate == sample_rate and info.frames:
                return info.duration
    # resampling can make samples beyond full scale
    samples = (read_audio(source, sample_rate) * FULL_SCALE).round().clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16)
    # encoded in memory: libsndfile does not tell of a full disk what Python does
    encoded = io.BytesIO()
    soundfile.write(encoded, samples.numpy(), sample_rate, subtype="PCM_16", **FORMATS[os.path.splitext(target)[1]])
    # what a killed process left unfinished, `tmp+...`, is replaced here when its clip is made again
    write_file(target, encoded.getvalue())
    return len(samples) / sample_rate
