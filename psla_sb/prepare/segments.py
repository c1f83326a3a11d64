"""Segments of recordings as files of their own, which packs are made of."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import soundfile
import torch
from tqdm import tqdm

from psla_sb.dataio.audio import segment
from psla_sb.dataio.manifest import START, Manifest
from psla_sb.files import UNFINISHED, write_errors, write_file
from psla_sb.prepare.pack_index import in_threads


@contextlib.contextmanager
def cut_segments(manifest: Manifest, folder: str | Path, n_workers: int) -> Iterator[pa.Array]:
    """Gives the paths of clips, with a file in the folder, as long as the block lasts, for each clip that is a segment.

    These are FLAC files of the recording's own rate and channels; samples of 16 bits stay as they are, others get 24. A segment
    that cannot be read is an `AudioError`; a file that is not there keeps its path.
    """
    paths, cuts = manifest.paths().to_pylist(), Path(folder) / f"{UNFINISHED}segments"
    starts, durations = manifest.table[START], manifest.table["duration"]

    def cut(row: int) -> None:
        start = starts[row].as_py()
        if start is None or not os.path.isfile(paths[row]):
            return
        target, changed = cuts / f"{row}.flac", os.stat(paths[row])
        write_file(target, encoded(*segment(paths[row], start, durations[row].as_py())))
        # as old as the recording: a pack of it that is younger need not be written again
        os.utime(target, ns=(changed.st_atime_ns, changed.st_mtime_ns))
        paths[row] = str(target)

    with write_errors(cuts):
        cuts.mkdir(parents=True, exist_ok=True)
    try:
        with tqdm(total=len(paths), desc="Cutting segments", unit=" clips", disable=None) as bar:
            for _ in in_threads(cut, zip(range(len(paths))), n_workers):
                bar.update()
        yield pa.array(paths, pa.string())
    finally:
        shutil.rmtree(cuts, ignore_errors=True)


def encoded(sample_rate: int, samples: torch.Tensor) -> bytes:
    """Encodes samples `[samples, channels]` as FLAC: int16 in 16 bits, floats, cut off at full scale, in 24."""
    file, subtype = io.BytesIO(), "PCM_16" if samples.dtype == torch.int16 else "PCM_24"
    soundfile.write(file, samples.numpy(), sample_rate, subtype, format="FLAC")
    return file.getvalue()
