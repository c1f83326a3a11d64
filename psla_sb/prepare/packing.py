"""Puts the clips of an annotation into packs (see `psla_sb.dataio.packs`); it can be killed at any moment and started again."""

import hashlib
import io
import itertools
import os
import re
import stat
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from tqdm import tqdm

from psla_sb.dataio.manifest import ROOTS, Manifest
from psla_sb.dataio.packs import PLACE
from psla_sb.errors import InputError
from psla_sb.files import UNFINISHED, atomic_write, one_process
from psla_sb.prepare.annotations import list_left_out
from psla_sb.prepare.pack_index import INDEX, INDEX_ENDING, in_threads, index_of, read_index

FILES_AT_ONCE = 256
# of what cannot be packed, in place of its size
MISSING, UNREADABLE = -1, -2
REASONS = {MISSING: "no such file", UNREADABLE: "not a regular file, or must not be read"}


def pack(annotation, out, data_root=None, shard_size=10**9, n_workers=8, leave_out=False):
    """Packs the clips of an annotation.

    Clips are shared out in the annotation's order, by their size, so the same clips give the same files. Each file appears whole or
    not at all. Called again after an interruption, it keeps packs that are whole: those whose index lists the IDs and sizes that
    they should have, that are as long as it says, and that are younger than the files of their clips.

    Arguments
    ---------
    annotation : str or Path
        See `Manifest.from_file`. Nothing is decoded: any file can be a clip.
    out : str or Path
        The folder to write to. Of several processes with the same folder one works and the others wait.
    data_root : str or Path, optional
        What `{data_root}` in the annotation's paths stands for.
    shard_size : int
        Bytes of a pack at most, tar's end of up to 10 kB not counted; a larger clip has a pack of its own.
    n_workers : int
        Files that are read at a time.
    leave_out : bool
        Whether clips whose file cannot be read are left out, and listed in `<annotation>_left_out.csv`.

    Returns
    -------
    Path
        The annotation of the packed clips, whose `{data_root}` is `out`.

    Raises
    ------
    InputError
        The annotation or a file of a clip cannot be read; other clips are packed in `out` under this name; the disk is full.
    ValueError
        `shard_size` or `n_workers` is below 1.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "a.wav").write_bytes(b"sound")
    >>> Manifest.from_columns(["a"], [str(folder / "a.wav")], [1.0], ["x"]).to_csv(folder / "train.csv")
    >>> packed = pack(folder / "train.csv", folder / "packs")
    >>> Manifest.from_csv(packed)[0]["wav"]
    '{data_root}/train-00000.tar/512+5'
    """
    if min(shard_size, n_workers) < 1:
        raise ValueError(f"shard_size and n_workers must be 1 or more, not {shard_size} and {n_workers}")
    manifest, out, name = Manifest.from_file(annotation, data_root), Path(out), Path(annotation).stem
    packed = out / f"{name}.csv"
    if packed.exists() and packed.samefile(annotation):
        raise InputError(f"{annotation}: the packed annotation would take its place. Pack into another folder")
    with one_process(out):
        return _pack(manifest, annotation, packed, shard_size, n_workers, leave_out)


def _pack(manifest, annotation, packed, shard_size, n_workers, leave_out):
    out, name = packed.parent, packed.stem
    paths = manifest.paths()
    for placeholder in ROOTS:
        if pc.any(pc.starts_with(paths, placeholder)).as_py():
            raise InputError(f"{annotation}: its paths begin with {placeholder}: say which folder that is (--data-folder)")
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
        bad = np.flatnonzero(sizes < 0).tolist()
        list_left_out(packed, ((manifest.table["ID"][row], REASONS[sizes[row]], paths[row]) for row in bad))
    paths, sizes, changed = paths.filter(pa.array(usable)), sizes[usable], changed[usable]
    bounds = shard_bounds(sizes, shard_size)
    shards = [out / f"{name}-{number:05}.tar" for number in range(len(bounds) - 1)]
    for shard in shards:
        # an index is there before its pack
        if shard.exists() and not index_of(shard).exists():
            raise InputError(f"{shard}: is there already, without its index. Choose another folder, or delete this file")
    _sweep(out, name, shards)
    ids, slices = table["ID"].combine_chunks(), [slice(*pair) for pair in itertools.pairwise(bounds)]
    unwritten = [
        (shard, rows)
        for shard, rows in zip(shards, slices, strict=True)
        if not is_whole(shard, ids[rows], sizes[rows], changed[rows].max())
    ]
    if unwritten:
        packed.unlink(missing_ok=True)
    stop = threading.Event()
    with tqdm(total=sizes.sum(), desc=packed.name, unit="B", unit_scale=True, disable=None) as bar:
        bar.update(sizes.sum() - sum(sizes[rows].sum() for _, rows in unwritten))
        jobs = ((shard, ids[rows], paths[rows], sizes[rows], stop, bar) for shard, rows in unwritten)
        for _ in in_threads(_write, jobs, n_workers, stop):
            pass
    wavs = [_places(shard) for shard in shards]
    Manifest(table.set_column(table.column_names.index("wav"), "wav", pa.chunked_array(wavs))).to_csv(packed)
    return packed


def _look(paths, n_workers):
    """Of each file, its size in bytes (or why it has none), and when it was changed, in ns since 1970: `[clips]`, int64."""
    sizes, changed = np.full(len(paths), MISSING), np.zeros(len(paths), np.int64)

    def look(start):
        for row, path in enumerate(paths[start : start + FILES_AT_ONCE].to_pylist(), start):
            try:
                status = os.stat(path)
            except (OSError, ValueError):
                continue
            readable = stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK)
            sizes[row], changed[row] = status.st_size if readable else UNREADABLE, status.st_mtime_ns
        return min(FILES_AT_ONCE, len(paths) - start)

    with tqdm(total=len(paths), desc="Looking for the clips", unit=" clips", disable=None) as bar:
        for n_files in in_threads(look, zip(range(0, len(paths), FILES_AT_ONCE)), n_workers):
            bar.update(n_files)
    return sizes, changed


def _refuse(manifest, paths, sizes, leave_out):
    """Raises an error if the clips that cannot be packed must not be left out, or are no files."""
    bad = np.flatnonzero(sizes < 0)
    if pc.any(pc.match_substring_regex(paths.take(bad), f"^{PLACE}$")).as_py():
        raise InputError(f"{manifest.source}: its clips are in packs already; pack the annotation that has their files")
    if leave_out and len(bad) < len(sizes):
        return
    row = int(bad[0])
    raise InputError(
        f"{manifest.source}: {len(bad)} of the {len(sizes)} clips cannot be packed, first '{manifest.table['ID'][row]}': "
        f"{paths[row]}: {REASONS[sizes[row]]}. Mend the annotation, or leave such clips out (--leave-out)"
    )


def shard_bounds(sizes, shard_size):
    """Where one pack ends and the next begins.

    Arguments
    ---------
    sizes : np.ndarray
        `[clips]`, in bytes.
    shard_size : int
        Bytes of a pack at most, with tar's headers.

    Returns
    -------
    list of int
        `[packs + 1]`, row numbers from 0 to the number of clips.

    Example
    -------
    >>> shard_bounds(np.array([1000, 1000, 5000, 10]), shard_size=4000)
    [0, 2, 3, 4]
    """
    ends = np.cumsum(tarfile.BLOCKSIZE + padded(sizes))
    bounds = [0]
    while bounds[-1] < len(sizes):
        begin = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(ends, begin + shard_size, "right"))))
    return bounds


def padded(size, to=tarfile.BLOCKSIZE):
    """Bytes that a file, or a whole tar file, takes up in blocks.

    Example
    -------
    >>> padded(513)
    1024
    """
    return -(-size // to) * to


def _sweep(out, name, shards):
    """Removes what a killed packing has left unfinished, and packs of one with another size."""
    ours = re.compile(rf"({re.escape(UNFINISHED)})?{re.escape(name)}(-[0-9]{{5,}}(\.tar|\.index\.csv)|(_left_out)?\.csv)")
    used = {index_of(shard).name for shard in shards}
    for file in list(out.iterdir()):
        if ours.fullmatch(file.name):
            if file.name.startswith(UNFINISHED):
                file.unlink()
            elif file.name.endswith(INDEX_ENDING) and file.name not in used:
                file.with_name(file.name.removesuffix(INDEX_ENDING) + ".tar").unlink(missing_ok=True)
                file.unlink()


def is_whole(shard, ids, sizes, changed):
    """Whether a pack is there and has what it should have.

    Arguments
    ---------
    shard : Path
        The tar file.
    ids : pyarrow.Array
        IDs of its clips, in their order.
    sizes : np.ndarray
        `[clips]`, their sizes in bytes.
    changed : int
        When the last of their files was changed, in ns since 1970.

    Returns
    -------
    bool

    Example
    -------
    >>> is_whole(Path("nowhere-00000.tar"), pa.array(["a"]), np.array([100]), changed=0)
    False
    """
    try:
        index, length, written = read_index(shard), shard.stat().st_size, index_of(shard).stat().st_mtime_ns
    except (InputError, OSError):
        return False
    return (
        index["ID"].combine_chunks().equals(ids)
        and np.array_equal(index["size"], sizes)
        and length == padded(index["offset"][-1].as_py() + padded(int(sizes[-1])) + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)
        and changed < written
    )


def _write(shard, ids, paths, sizes, stop, bar):
    """A pack and its index; neither, if `stop` is set meanwhile."""
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
        columns = zip(INDEX.items(), zip(*rows, strict=True), strict=True)
        with atomic_write(index_of(shard)) as index:
            pyarrow.csv.write_csv(pa.table({name: pa.array(values, kind) for (name, kind), values in columns}), index)


def _bytes_of(clip, path, size):
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the file of the clip '{clip}' cannot be read ({error.strerror})") from None
    if len(data) != size:
        raise InputError(f"{path}: the file of the clip '{clip}' was changed while it was packed. Run the same command again")
    return data


def member_name(clip, path):
    """What a clip is called in its pack: its ID, in which what cannot be in a file's name is written like `%2F`, and its ending.

    Example
    -------
    >>> member_name("AC/DC", "/d/music.flac")
    'AC%2FDC.flac'
    """
    return re.sub(r"[\x00-\x1f\x7f%/]|^\.", lambda character: f"%{ord(character[0]):02X}", clip + Path(path).suffix)


def _places(shard):
    """What the annotation has in its column `wav` for the clips of a pack."""
    index = read_index(shard)
    offsets, sizes = (index[name].combine_chunks().cast(pa.string()) for name in ("offset", "size"))
    return pc.binary_join_element_wise(f"{{data_root}}/{shard.name}/", pc.binary_join_element_wise(offsets, sizes, "+"), "")
