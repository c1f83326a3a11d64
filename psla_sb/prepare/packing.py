"""Puts the clips of an annotation into packs (see `psla_sb.dataio.packs`); it can be killed at any moment and started again."""

import contextlib
import hashlib
import io
import itertools
import os
import re
import stat
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from tqdm import tqdm

from psla_sb.dataio.manifest import ROOTS, START, Manifest
from psla_sb.dataio.packs import PLACE
from psla_sb.errors import InputError
from psla_sb.files import UNFINISHED, atomic_write, one_process
from psla_sb.prepare.annotations import list_left_out
from psla_sb.prepare.pack_index import INDEX, INDEX_ENDING, in_threads, index_of, read_index
from psla_sb.prepare.segments import cut_segments

FILES_AT_ONCE = 256
# of what cannot be packed, in place of its size
MISSING, UNREADABLE = -1, -2
REASONS = {MISSING: "no such file", UNREADABLE: "not a regular file, or must not be read"}


def pack(
    annotation: str | Path,
    out: str | Path,
    data_root: str | Path | None = None,
    shard_size: int = 10**9,
    n_workers: int = 8,
    leave_out: bool = False,
) -> Path:
    """Packs the clips of an annotation, and returns the annotation of the packed clips, whose `{data_root}` is `out`.

    Clips are shared out in the annotation's order, by their size, so the same clips give the same files; nothing is decoded.
    Packs have at most `shard_size` bytes, tar's end of up to 10 kB not counted, but for a larger clip, which has one of its own.
    Of clips that are segments, the segments alone are packed, so the annotation of packed clips has no `start`.
    With `leave_out`, clips whose file cannot be read are left out and listed; otherwise they raise `InputError`.
    Called again after an interruption, it keeps packs that are whole (see `is_whole`).
    """
    if min(shard_size, n_workers) < 1:
        raise ValueError(f"shard_size and n_workers must be 1 or more, not {shard_size} and {n_workers}")
    manifest = Manifest.from_file(annotation, data_root)
    packed = Path(out, f"{Path(annotation).stem}.csv")
    if packed.exists() and packed.samefile(annotation):
        raise InputError(f"{annotation}: the packed annotation would take its place. Pack into another folder")
    for placeholder in ROOTS:
        if pc.any(pc.starts_with(manifest.paths(), placeholder)).as_py():
            raise InputError(f"{manifest.source}: its paths begin with {placeholder}: say which folder that is (--data-folder)")
    with one_process(out):
        if not manifest.has_segments:
            return _pack(manifest, manifest.paths(), packed, shard_size, n_workers, leave_out)
        whole = Manifest(manifest.table.drop_columns([START]), manifest.data_root, manifest.source)
        with cut_segments(manifest, out, n_workers) as paths:
            return _pack(whole, paths, packed, shard_size, n_workers, leave_out)


def _pack(manifest: Manifest, paths: pa.Array, packed: Path, shard_size: int, n_workers: int, leave_out: bool) -> Path:
    out, name = packed.parent, packed.stem
    sizes, changed = _look(paths, n_workers)
    usable = sizes >= 0
    if not usable.all():
        _refuse(manifest, paths, sizes, leave_out)
    table = manifest.table.filter(pa.array(usable))
    if packed.exists():
        there = Manifest.from_csv(packed).table
        ours = pc.all(pc.starts_with(there["wav"], f"{{data_root}}/{name}-")).as_py()
        if not ours or not there["ID"].equals(table["ID"]):
            raise InputError(f"{packed}: is there already, and is of other clips. Choose another folder, or delete this file")
    if leave_out:
        bad = np.flatnonzero(~usable).tolist()
        list_left_out(packed, ((manifest.table["ID"][row], REASONS[sizes[row]], paths[row]) for row in bad))
    ids, paths, sizes, changed = table["ID"].combine_chunks(), paths.filter(pa.array(usable)), sizes[usable], changed[usable]
    bounds = itertools.pairwise(shard_bounds(sizes, shard_size))
    shards = {out / f"{name}-{number:05}.tar": slice(*rows) for number, rows in enumerate(bounds)}
    for shard in shards:
        # an index is there before its pack
        if shard.exists() and not index_of(shard).exists():
            raise InputError(f"{shard}: is there already, without its index. Choose another folder, or delete this file")
    _sweep(out, name, shards)
    unwritten = {shard: rows for shard, rows in shards.items() if not is_whole(shard, ids[rows], sizes[rows], changed[rows].max())}
    if unwritten:
        packed.unlink(missing_ok=True)
    stop = threading.Event()
    with tqdm(total=sizes.sum(), desc=packed.name, unit="B", unit_scale=True, disable=None) as bar:
        bar.update(sizes.sum() - sum(sizes[rows].sum() for rows in unwritten.values()))
        jobs = ((shard, ids[rows], paths[rows], sizes[rows], stop, bar) for shard, rows in unwritten.items())
        for _ in in_threads(_write, jobs, n_workers, stop):
            pass
    wavs = pa.chunked_array(map(_places, shards))
    Manifest(table.set_column(table.column_names.index("wav"), "wav", wavs)).to_csv(packed)
    return packed


def _look(paths: pa.Array, n_workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each file, its size in bytes (or why it has none), and when it was changed, in ns since 1970: `[clips]`, int64."""
    sizes, changed = np.full(len(paths), MISSING), np.zeros(len(paths), np.int64)

    def look(start):
        for row, path in enumerate(paths[start : start + FILES_AT_ONCE].to_pylist(), start):
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(path)
                readable = stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK)
                sizes[row], changed[row] = status.st_size if readable else UNREADABLE, status.st_mtime_ns
        return min(FILES_AT_ONCE, len(paths) - start)

    with tqdm(total=len(paths), desc="Looking for the clips", unit=" clips", disable=None) as bar:
        for n_files in in_threads(look, zip(range(0, len(paths), FILES_AT_ONCE)), n_workers):
            bar.update(n_files)
    return sizes, changed


def _refuse(manifest: Manifest, paths: pa.Array, sizes: np.ndarray, leave_out: bool) -> None:
    """Raises an error if the clips that cannot be packed must not be left out, or are no files."""
    bad = np.flatnonzero(sizes < 0)
    if pc.any(pc.match_substring_regex(paths.take(bad), f"^{PLACE}$")).as_py():
        raise InputError(f"{manifest.source}: its clips are in packs already; pack the annotation that has their files")
    if leave_out and len(bad) < len(sizes):
        return
    row = int(bad[0])
    said = f"{len(bad)} of the {len(sizes)} clips cannot be packed, first '{manifest.table['ID'][row]}': {paths[row]}"
    remedy = "Mend the annotation, or leave such clips out (--leave-out)"
    raise InputError(f"{manifest.source}: {said}: {REASONS[sizes[row]]}. {remedy}")


def shard_bounds(sizes: np.ndarray, shard_size: int) -> list[int]:
    """Finds where packs of clips of these sizes, in bytes and with tar's headers, begin and end: rows `[packs + 1]`."""
    ends = np.cumsum(tarfile.BLOCKSIZE + padded(sizes))
    bounds = [0]
    while bounds[-1] < len(sizes):
        begin = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(ends, begin + shard_size, "right"))))
    return bounds


def padded(size: Any, to: int = tarfile.BLOCKSIZE) -> Any:
    """Rounds the bytes of a file, or of a whole tar file, up to whole blocks: a number, or an array of them."""
    return -(-size // to) * to


def _sweep(out: Path, name: str, shards: Iterable[Path]) -> None:
    """Removes what a killed packing has left unfinished, and packs of one with another size."""
    ours = re.compile(rf"({re.escape(UNFINISHED)})?{re.escape(name)}(-[0-9]{{5,}}(\.tar|\.index\.csv)|(_left_out)?\.csv)")
    used = {index_of(shard).name for shard in shards}
    for file in [file for file in out.iterdir() if ours.fullmatch(file.name)]:
        if file.name.startswith(UNFINISHED):
            file.unlink()
        elif file.name.endswith(INDEX_ENDING) and file.name not in used:
            # the index last: a pack without one is taken for somebody else's, and refused
            file.with_name(file.name.removesuffix(INDEX_ENDING) + ".tar").unlink(missing_ok=True)
            file.unlink()


def is_whole(shard: Path, ids: pa.Array, sizes: np.ndarray, changed: int) -> bool:
    """Tells whether a pack is there, has these clips and is younger than their files, the last changed `changed` ns after 1970."""
    try:
        index, length, written = read_index(shard), shard.stat().st_size, index_of(shard).stat().st_mtime_ns
    except (InputError, OSError):
        return False
    return (
        index["ID"].combine_chunks().equals(ids)
        and np.array_equal(index["size"], sizes)
        # the last clip, and tar's end: two empty blocks, and what fills the last record
        and length == padded(index["offset"][-1].as_py() + padded(int(sizes[-1])) + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)
        and changed < written
    )


def _write(shard: Path, ids: pa.Array, paths: pa.Array, sizes: np.ndarray, stop: threading.Event, bar: tqdm) -> None:
    """Writes a pack and its index; neither, if `stop` is set meanwhile."""
    rows = []
    shard.unlink(missing_ok=True)
    index_of(shard).unlink(missing_ok=True)
    with atomic_write(shard) as temporary:
        with open(temporary, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for clip, path, size in zip(ids.to_pylist(), paths.to_pylist(), sizes.tolist(), strict=True):
                if stop.is_set():
                    raise InputError(f"{shard}: not written, because of an error elsewhere")
                data = _bytes_of(clip, path, size)
                # its other fields are constants, so the same clips give the same pack
                member = tarfile.TarInfo(member_name(clip, path))
                member.size = size
                tar.addfile(member, io.BytesIO(data))
                rows.append((clip, member.name, file.tell() - padded(size), size, hashlib.sha256(data).hexdigest()))
                bar.update(size)
        with atomic_write(index_of(shard)) as index:
            pyarrow.csv.write_csv(pa.table(list(zip(*rows, strict=True)), schema=pa.schema(INDEX)), index)


def _bytes_of(clip: str, path: str, size: int) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the file of the clip '{clip}' cannot be read ({error.strerror})") from None
    if len(data) != size:
        raise InputError(f"{path}: the file of the clip '{clip}' was changed while it was packed. Run the same command again")
    return data


def member_name(clip: str, path: str | Path) -> str:
    """Names a clip in its pack: by its ID, in which what cannot be in a file's name is written like `%2F`, and its ending."""
    return re.sub(r"[\x00-\x1f\x7f%/]|^\.", lambda character: f"%{ord(character[0]):02X}", clip + Path(path).suffix)


def _places(shard: Path) -> pa.Array:
    """What the annotation has in its column `wav` for the clips of a pack."""
    index = read_index(shard)
    offsets, sizes = (index[name].combine_chunks().cast(pa.string()) for name in ("offset", "size"))
    return pc.binary_join_element_wise(f"{{data_root}}/{shard.name}/", offsets, "+", sizes, "")
