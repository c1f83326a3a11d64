"""Whether a data set has the sounds that it had: how loud some clips are over time, which every format of a sound keeps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from psla_sb.dataio.audio import as_floats, read_audio, read_blocks
from psla_sb.dataio.manifest import START, Manifest
from psla_sb.errors import InputError

CLIPS = 24
SECONDS, PART = 10.0, 0.5
RATE = 16000
FLOOR = 1e-6  # of the energy, -60 dB
# Mean difference in dB. Compression, and the silence that it puts at the start, change some tenths; another sound changes ten.
ALIKE = 3.0


def loudness(path: str, start: float | None = None, seconds: float | None = None) -> list[int] | None:
    """Measures each half second of the first ten of a sound file, or of a segment of it, in dB; None if it cannot be read.

    >>> import soundfile
    >>> path = str(getfixture("tmp_path") / "steps.wav")
    >>> soundfile.write(path, np.repeat([0.1, 0.0], 8000), 16000)
    >>> loudness(path)
    [-20, -60]
    """
    blocks, n_read, n_samples = list[torch.Tensor](), 0, int(SECONDS * RATE)
    try:
        for block in read_blocks(path, RATE, SECONDS) if start is None else [read_audio(path, RATE, start, seconds)]:
            blocks.append(as_floats(block))
            n_read += len(block)
            if n_read >= n_samples:
                break
    except InputError:
        return None
    parts = torch.cat(blocks)[:n_samples].split(int(PART * RATE))
    return [round(10 * np.log10(part.square().mean().item() + FLOOR)) for part in parts]


def some_loudness(clips: Manifest) -> dict[str, dict[str, Any]]:
    """Measures some clips of a data set: where they are, and their loudness, by their IDs."""
    rows = np.unique(np.linspace(0, len(clips) - 1, CLIPS).astype(int)).tolist()
    some = [clips[row] for row in rows]
    return {
        clip["id"]: {"file": clip["wav"], "loudness": loudness(clip["wav"], clip.get(START), clip["duration"])} for clip in some
    }


def other_sound(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Finds the first clip with another sound, of those that both of what `some_loudness` gave have, and that could be read."""
    for clip in was:
        levels = [measured.get(clip, {}).get("loudness") for measured in (was, now)]
        if None not in levels and not _alike(*levels):
            return clip
    return None


def _alike(was: Sequence[int], now: Sequence[int]) -> bool:
    n = min(len(was), len(now))
    # the last part may be some samples
    difference = np.abs(np.subtract(was[:n], now[:n]))[: max(1, n - 1)].mean()
    return abs(len(was) - len(now)) <= 1 and bool(difference <= ALIKE)
