"""The list of the clips of each pack, with which packs are verified."""

import hashlib
import itertools
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from tqdm import tqdm

from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.packs import PLACE
from psla_sb.errors import InputError

INDEX = {"ID": pa.string(), "member": pa.string(), "offset": pa.int64(), "size": pa.int64(), "sha256": pa.string()}
INDEX_ENDING = ".index.csv"
ANNOTATION_HEADER = '"ID","wav","duration","labels"\n'  # as Manifest.to_csv writes it


def index_of(shard):
    """The file that lists the clips of a pack.

    Example
    -------
    >>> index_of(Path("train-00000.tar")).name
    'train-00000.index.csv'
    """
    return shard.with_name(shard.name.removesuffix(".tar") + INDEX_ENDING)


def read_index(shard):
    """The list of the clips of a pack.

    Returns
    -------
    pyarrow.Table
        Columns `ID`, `member`, `offset`, `size` and `sha256`.

    Raises
    ------
    InputError
        It is missing or damaged.

    Example
    -------
    >>> read_index(Path("nowhere-00000.tar"))
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: nowhere-00000.index.csv: missing or damaged (...)
    """
    try:
        options = pyarrow.csv.ConvertOptions(column_types=INDEX, include_columns=list(INDEX))
        return pyarrow.csv.read_csv(index_of(shard), convert_options=options).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{index_of(shard)}: missing or damaged ({error})") from None


def in_threads(function, jobs, n_workers, stop=None):
    """Yields what a function gives for each job, as they get ready; after an error, or Ctrl-C, sets `stop` and begins no more.

    Arguments
    ---------
    function : callable
    jobs : iterable of tuple
        Its arguments.
    n_workers : int
        Threads.
    stop : threading.Event, optional
        What tells jobs that have begun to end.

    Example
    -------
    >>> sorted(in_threads(abs, [(-1,), (2,)], n_workers=2))
    [1, 2]
    """
    stop, pool = stop or threading.Event(), ThreadPoolExecutor(n_workers)
    try:
        for done in as_completed([pool.submit(function, *job) for job in jobs]):
            yield done.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class Damage(NamedTuple):
    """What is wrong with a clip in a pack, or, if `clip` is None, with a pack or an annotation.

    Example
    -------
    >>> Damage("train.csv", "a", "its bytes are not those that were packed").clip
    'a'
    """

    annotation: str
    clip: str | None
    problem: str


def verify(out, n_workers=8):
    """Reads all packed clips of a folder again, and compares their checksums with those of when they were packed.

    Arguments
    ---------
    out : str or Path
        What `psla_sb.prepare.packing.pack` was told. All annotations in it that point into its packs are looked through.
    n_workers : int
        Packs that are read at a time.

    Returns
    -------
    (int, list of Damage)
        The number of clips, and what is wrong.

    Raises
    ------
    InputError
        There is no annotation of packed clips, or one cannot be read.
    ValueError
        `n_workers` is below 1.

    Example
    -------
    >>> from psla_sb.dataio import packing
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "a.wav").write_bytes(b"sound")
    >>> Manifest.from_columns(["a"], [str(folder / "a.wav")], [1.0], ["x"]).to_csv(folder / "train.csv")
    >>> _ = packing.pack(folder / "train.csv", folder / "packs")
    >>> verify(folder / "packs")
    (1, [])
    """
    if n_workers < 1:
        raise ValueError(f"n_workers must be 1 or more, not {n_workers}")
    out = Path(out)
    jobs, problems = [], []
    for annotation in sorted(out.glob("*.csv")):
        if _first_line(annotation) == ANNOTATION_HEADER:
            jobs += _by_pack(annotation)
    if not jobs:
        raise InputError(f"{out}: no annotation of packed clips there. If packing was interrupted, the same command goes on")
    known = {path.name for _, path, *_ in jobs}
    for shard in sorted({index.name.removesuffix(INDEX_ENDING) + ".tar" for index in out.glob(f"*{INDEX_ENDING}")} - known):
        problem = "belongs to no annotation in its folder. If packing was interrupted, the same command goes on"
        problems.append(Damage(shard, None, problem))
    found, stop = [[]] * len(jobs), threading.Event()

    def check(number, bar):
        found[number] = list(_check(*jobs[number], stop, bar))

    total = sum(int(sizes.sum()) for *_, sizes in jobs)
    with tqdm(total=total, desc=f"Verifying {out}", unit="B", unit_scale=True, disable=None) as bar:
        for _ in in_threads(check, ((number, bar) for number in range(len(jobs))), n_workers, stop):
            pass
    return sum(len(ids) for _, _, ids, _, _ in jobs), problems + list(itertools.chain(*found))


def _first_line(path):
    with open(path, errors="replace") as file:
        return file.readline(1000)


def _by_pack(annotation):
    """Its clips in packs as one tuple a pack: annotation, pack, IDs, offsets, sizes."""
    table = Manifest.from_csv(annotation).table
    places = pc.extract_regex(table["wav"].combine_chunks(), r"^\{data_root\}/" + PLACE + "$")
    ids, places = table["ID"].combine_chunks().filter(places.is_valid()), places.filter(places.is_valid())
    packs = pc.struct_field(places, "pack").dictionary_encode()
    offsets, sizes = (pc.struct_field(places, name).cast(pa.int64()).to_numpy() for name in ("offset", "size"))
    codes = packs.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []
    names = packs.dictionary.to_pylist()
    return [(annotation, annotation.parent / names[codes[rows[0]]], ids.take(rows), offsets[rows], sizes[rows]) for rows in groups]


def _check(annotation, shard, ids, offsets, sizes, stop, bar):
    """Yields what is wrong with the clips of one pack."""
    clips = ids.to_pylist()
    try:
        index, file = read_index(shard), open(shard, "rb")  # noqa: SIM115
    except (InputError, OSError) as error:
        problem = f"{shard}: {error.strerror}" if isinstance(error, OSError) else str(error)
        yield from (Damage(annotation.name, clip, problem) for clip in clips)
        return
    listed = index.take(pc.index_in(ids, value_set=index["ID"].combine_chunks()))
    right = np.equal(listed["offset"].to_numpy(), offsets) & np.equal(listed["size"].to_numpy(), sizes)
    digests = listed["sha256"].to_pylist()
    with file:
        for clip, offset, size, known, digest in zip(clips, offsets.tolist(), sizes.tolist(), right, digests, strict=True):
            if stop.is_set():
                return
            problem = _problem(file, offset, size, digest) if known else f"{index_of(shard).name} does not list it there"
            if problem:
                yield Damage(annotation.name, clip, f"{shard}: {problem}")
            bar.update(size)
    if _members(shard) != list(zip(*(index[name].to_pylist() for name in ("member", "offset", "size")), strict=True)):
        yield Damage(annotation.name, None, f"{shard}: other programs cannot list it: what is between the clips is damaged")


def _problem(file, offset, size, digest):
    try:
        file.seek(offset)
        data = file.read(size)
    except OSError as error:
        return error.strerror
    if len(data) < size:
        return "cut off before the clip's end"
    return None if hashlib.sha256(data).hexdigest() == digest else "the clip's bytes are not those that were packed"


def _members(shard):
    try:
        with tarfile.open(shard, "r:") as tar:
            return [(member.name, member.offset_data, member.size) for member in tar]
    except (tarfile.TarError, OSError, ValueError):
        return None
