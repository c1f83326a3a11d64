"""Small sound files for the tests of psla-prepare, each another one."""

import zlib
from pathlib import Path

import numpy as np
import soundfile

from psla_sb.dataio.manifest import Manifest

RATE = 8000


def write_sound(path, seed=None, seconds=0.3, rate=RATE, gain=0.1):
    """Writes noise that depends on the last parts of the path, or the seed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32("/".join(path.parts[-3:]).encode()) if seed is None else seed
    noise = gain * np.random.default_rng(seed).standard_normal(round(seconds * rate))
    soundfile.write(path, noise.clip(-0.9, 0.9), rate, format="WAV")
    return path


def write_folders(root, classes, n_clips=8, **kwargs):
    """Writes a folder of clips for each class."""
    for name in classes:
        for i in range(n_clips):
            write_sound(root / name / f"{name.replace('/', '_')}{i}.wav", **kwargs)
    return root


def sets_of(out):
    """The clips that a preparation wrote, by set: {"train": {file name: labels}}."""
    return {
        name: {Path(clip["wav"]).name: set(clip["labels"]) for clip in Manifest.from_csv(out / f"{name}.csv")}
        for name in ("train", "valid", "test")
        if (out / f"{name}.csv").exists()
    }


def all_of(out):
    """The labels of all clips that a preparation wrote, by file name."""
    return {file: labels for clips in sets_of(out).values() for file, labels in clips.items()}
