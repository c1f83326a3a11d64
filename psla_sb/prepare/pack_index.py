"""The list of the clips of each pack, with which packs are verified."""

import hashlib
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from tqdm import tqdm

from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.packs import PLACE
from psla_sb.errors import InputError

INDEX = {"ID": pa.string(), "member": pa.string(), "offset": pa.int64(), "size": pa.int64(), "sha256": pa.string()}
Packed = tuple[Path, str, pa.Array, np.ndarray, np.ndarray]  # pack, annotation; clips' IDs, offsets and sizes in bytes
INDEX_ENDING = ".index.csv"
ANNOTATION_HEADER = '"ID","wav","duration","labels"\n'  # as Manifest.to_csv writes it


def index_of(shard: Path) -> Path:
    """Returns the file that lists the clips of a pack: `train-00000.index.csv` for `train-00000.tar`."""
    return shard.with_name(shard.name.removesuffix(".tar") + INDEX_ENDING)


def read_index(shard: Path) -> pa.Table:
    """Reads the list of the clips of a pack, in the columns of `INDEX`."""
    try:
        options = pyarrow.csv.ConvertOptions(column_types=INDEX, include_columns=list(INDEX))
        return pyarrow.csv.read_csv(index_of(shard), convert_options=options).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{index_of(shard)}: missing or damaged ({error})") from None


def in_threads(function: Callable, jobs: Iterable[tuple], n_workers: int, stop: threading.Event | None = None) -> Iterator[Any]:
    """Yields what a function gives for each job (its arguments), as they get ready.

    After an error, or Ctrl-C, it begins no more jobs, and sets `stop`, which tells those that have begun to end.
    """
    stop, pool = stop or threading.Event(), ThreadPoolExecutor(n_workers)
    try:
        for done in as_completed([pool.submit(function, *job) for job in jobs]):
            yield done.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class Damage(NamedTuple):
    """Says what is wrong with a clip in a pack, or, if `clip` is None, with a pack or an annotation."""

    annotation: str
    clip: str | None
    problem: str


def verify(out: str | Path, n_workers: int = 8) -> tuple[int, list[Damage]]:
    """Reads all packed clips of a folder again, and compares their checksums with those of when they were packed.

    All annotations in the folder that point into its packs are looked through; the number of clips and what is wrong are returned.
    """
    if n_workers < 1:
        raise ValueError(f"n_workers must be 1 or more, not {n_workers}")
    out = Path(out)
    jobs: list[Packed] = []
    for annotation in sorted(out.glob("*.csv")):
        with open(annotation, errors="replace") as file:
            if file.readline(1000) == ANNOTATION_HEADER:
                jobs += _by_pack(annotation)
    if not jobs:
        raise InputError(f"{out}: no annotation of packed clips there. If packing was interrupted, the same command goes on")
    shards = {index.name.removesuffix(INDEX_ENDING) + ".tar" for index in out.glob(f"*{INDEX_ENDING}")}
    problem = "belongs to no annotation in its folder. If packing was interrupted, the same command goes on"
    problems = [Damage(shard, None, problem) for shard in sorted(shards - {shard.name for shard, *_ in jobs})]
    stop = threading.Event()

    def check(number):
        return number, list(_check(*jobs[number], stop, bar))

    total = sum(int(sizes.sum()) for *_, sizes in jobs)
    with tqdm(total=total, desc=f"Verifying {out}", unit="B", unit_scale=True, disable=None) as bar:
        # in the order of the jobs, whichever was ready first
        found = sorted(in_threads(check, zip(range(len(jobs))), n_workers, stop))
    return sum(len(ids) for _, _, ids, *_ in jobs), problems + [damage for _, damages in found for damage in damages]


def _by_pack(annotation: Path) -> list[Packed]:
    table = Manifest.from_csv(annotation).table
    places = pc.extract_regex(table["wav"].combine_chunks(), r"^\{data_root\}/" + PLACE + "$")
    ids, places = table["ID"].combine_chunks().filter(places.is_valid()), places.filter(places.is_valid())
    packs = pc.struct_field(places, "pack").dictionary_encode()
    offsets, sizes = (pc.struct_field(places, name).cast(pa.int64()).to_numpy() for name in ("offset", "size"))
    # the clips' rows, those of the first pack first, cut where the next pack begins
    codes = packs.indices.to_numpy()
    groups = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    named = zip(packs.dictionary.to_pylist(), groups, strict=False)  # without packs there is one group, which is empty
    return [(annotation.parent / name, annotation.name, ids.take(rows), offsets[rows], sizes[rows]) for name, rows in named]


def _check(
    shard: Path, annotation: str, ids: pa.Array, offsets: np.ndarray, sizes: np.ndarray, stop: threading.Event, bar: tqdm
) -> Iterator[Damage]:
    """Yields what is wrong with the clips of one pack."""
    clips = ids.to_pylist()
    try:
        index, file = read_index(shard), open(shard, "rb")  # noqa: SIM115
    except (InputError, OSError) as error:
        said = f"{shard}: {error.strerror}" if isinstance(error, OSError) else str(error)
        yield from (Damage(annotation, clip, said) for clip in clips)
        return
    listed = index.take(pc.index_in(ids, value_set=index["ID"].combine_chunks()))
    right = (listed["offset"].to_numpy() == offsets) & (listed["size"].to_numpy() == sizes)
    places = zip(clips, offsets.tolist(), sizes.tolist(), right, listed["sha256"].to_pylist(), strict=True)
    with file:
        for clip, offset, size, known, digest in places:
            if stop.is_set():
                return
            problem = _problem(file, offset, size, digest) if known else f"{index_of(shard).name} does not list it there"
            if problem:
                yield Damage(annotation, clip, f"{shard}: {problem}")
            bar.update(size)
    if _members(shard) != list(zip(*(index[name].to_pylist() for name in ("member", "offset", "size")), strict=True)):
        yield Damage(annotation, None, f"{shard}: other programs cannot list it: what is between the clips is damaged")


def _problem(file: BinaryIO, offset: int, size: int, digest: str) -> str | None:
    try:
        file.seek(offset)
        data = file.read(size)
    except OSError as error:
        return error.strerror
    if len(data) < size:
        return "cut off before the clip's end"
    return None if hashlib.sha256(data).hexdigest() == digest else "the clip's bytes are not those that were packed"


def _members(shard: Path) -> list[tuple[str, int, int]] | None:
    try:
        with tarfile.open(shard, "r:") as tar:
            return [(member.name, member.offset_data, member.size) for member in tar]
    except (tarfile.TarError, OSError, ValueError):
        return None
