"""Rows of very many files in one table, which several processes write, and which any of them may be killed at.

While it is being written, there is a folder beside the table:

    tags.parquet.parts/
        1c0ffee...-0-of-1.parquet   rows of some files each, called by a hash of the first one's name, and by who wrote them
        process-0-of-1/.lock        held by the process that writes
    tags.parquet                    all rows, once there are those of all files; the parts go
    .lock                           held while parts are listed or joined

A part appears whole or not at all, has all rows of its files, and the settings that they were made with in its metadata. What is in
no part was not done.
"""

import codecs
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from tqdm import tqdm

from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.files import LOCK, UNFINISHED, atomic_write, one_process, read_json, write_json
from psla_sb.inference.rows import FileRows, Row, TextRows, name_in_rows

FORMS = (".parquet", ".csv", ".jsonl")
PARTS, ABOUT = ".parts", "about.json"
# of a folder with a file for each sound
SETTINGS, ERRORS = "psla-tag.about.json", "psla-tag.errors"
# a part is written after so many files, rows or seconds: what is done again when a process is killed
FILES, ROWS, SECONDS = 1000, 50_000, 20.0
BATCH_ROWS = 1 << 14
LONGEST_ROW = 1 << 24  # bytes, of a table of text


class PathList(Sequence[str]):
    """Holds very many paths as bytes, which processes that were forked off do not copy.

    >>> PathList(["a.wav", "b.wav"])[1:][0]
    'b.wav'
    """

    def __init__(self, paths: Iterable[str] | pa.Array) -> None:
        self._paths = paths if isinstance(paths, pa.Array) else pa.array(map(os.fsencode, paths), pa.large_binary())

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "PathList": ...
    def __getitem__(self, place: int | slice) -> "str | PathList":
        return PathList(self._paths[place]) if isinstance(place, slice) else os.fsdecode(self._paths[place].as_py())

    def unique(self) -> "PathList":
        """Gives each path once, where it is first."""
        return PathList(pc.unique(self._paths))

    def take(self, places: np.ndarray) -> "PathList":
        """Gives the paths at some places."""
        return PathList(self._paths.take(pa.array(places)))


def listed(file: str, data_folder: str | None = None) -> list[str]:
    """Reads the paths in a text file, one a line (`-`: stdin), or those of the clips of an annotation, a `.csv`."""
    if not file.endswith(".csv"):
        try:
            lines = (sys.stdin.buffer if file == "-" else open(file, "rb")).read().splitlines()  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{file}: cannot be read as a list of files ({error.strerror})") from None
        # some editors begin a file with a mark
        return [os.fsdecode(line.removeprefix(codecs.BOM_UTF8)) for line in lines if line.strip()]
    clips = Manifest.from_csv(file, data_folder)
    if clips.has_segments:
        raise InputError(f"{file}: its clips are segments of recordings (column start), whose files are tagged whole: list these")
    return [clips[row]["wav"] for row in range(len(clips))]


class Written(NamedTuple):
    """What became of the files of a call."""

    n_files: int
    n_failed: int  # of these, how many have an error; 0 while some are left
    n_left: int  # how many have no rows yet: those of other processes
    n_others: int  # files in the table that were not among these


class BulkRows:
    """Writes the rows of many files to one table, `.parquet`, `.csv` or `.jsonl`; the same call goes on where it was stopped.

    Arguments
    ---------
    rows
        What is told of the files.
    out
        The table.

    Raises
    ------
    InputError
        There is something else under this name, or rows that were made with other settings.
    """

    def __init__(self, rows: FileRows, out: str | Path) -> None:
        self.rows, self.out = rows, Path(out)
        self.folder = self.out.with_name(self.out.name + PARTS)
        # a table of text has no place for it
        self.about = self.out.with_name(f"{self.out.name}.{ABOUT}")
        if self.out.suffix not in FORMS:
            raise InputError(f"{out}: give a name that ends with {', '.join(FORMS)}")
        if self.out.suffix != ".parquet" and isinstance(next(iter(rows.columns.values())), pa.ListType | pa.FixedSizeListType):
            raise InputError(f"{out}: {', '.join(rows.columns)} are lists of numbers, for which a table must be .parquet")
        if self.out.is_dir():
            raise InputError(f"{out}: is a folder; give the name of a table")
        self._check_settings()

    def _check_settings(self) -> None:
        wanted = json.loads(self.rows.schema.metadata[b"psla_sb"])
        if self.out.exists():
            about = _metadata(self.out) if self.out.suffix == ".parquet" else read_json(self.about)
            _refuse_others(self.out, about, wanted)
        for part in self._parts():
            _refuse_others(part, _metadata(part), wanted)

    def write(
        self,
        files: PathList,
        batch_size: int = 16,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        progress: bool = True,
        retry: bool = False,
    ) -> Written:
        """Writes the rows of those of the files that have none yet; of several processes, this one's share.

        The last one to end makes the table. One process writes it in the files' order; what is added later follows.

        Arguments
        ---------
        retry
            Whether files that have an error are tried again.
        """
        files = files.unique()
        names = _hashes(map(name_in_rows, files))
        unique, times = np.unique(names, return_counts=True)
        if len(unique) < len(names):
            both = files.take(np.flatnonzero(names == unique[np.argmax(times)]))
            raise InputError(f"{' and '.join(map(repr, both))} would have the same name in the table; rename one of them")
        with one_process(self.folder / f"process-{rank}-of-{world_size}"):
            with one_process(self.out.parent):
                self._check_settings()
                done = self._owners(self._sources())[0]
                done = np.setdiff1d(done, self._failed()) if retry else done
            # by name, not by place: other processes may have found a file more
            mine = np.flatnonzero(names % np.uint64(world_size) == rank)
            left = mine[~np.isin(names[mine], done)]
            bar = tqdm(total=len(mine), initial=len(mine) - len(left), unit=" files", disable=None if progress else True)
            with bar:
                self._write_parts(files.take(left), left, batch_size, num_workers, bar, rank, world_size)
        with one_process(self.out.parent):
            self._check_settings()
            sources = self._sources()
            hashes, owners = self._owners(sources)
            n_left, failed = int((~np.isin(names, hashes)).sum()), 0
            if not n_left:
                # others may come meanwhile, of processes that were started besides
                if parts := [source for source in sources if source != self.out]:
                    self._join(sources, hashes, owners, names)
                    for part in parts:
                        part.unlink()
                failed = int(np.isin(self._failed(), names).sum())
        self._leave()
        return Written(len(names), failed, n_left, 0 if n_left else len(hashes) - len(names))

    def _leave(self) -> None:
        """Deletes the folders of processes that are at work no more, and, if there are no others and no parts, all."""
        with contextlib.suppress(OSError):
            for lock in self.folder.glob(f"process-*/{LOCK}"):
                with open(lock, "a") as file, contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    lock.unlink()
                    lock.parent.rmdir()
            self.folder.rmdir()

    def _write_parts(
        self, files: PathList, places: np.ndarray, batch_size: int, num_workers: int, bar: tqdm, rank: int, world_size: int
    ) -> None:
        part: list[Row] = []
        n_files, begun, writer = 0, time.monotonic(), f"{rank}-of-{world_size}"
        try:
            for i, rows in enumerate(self.rows.of_files(files, batch_size, num_workers)):
                whole = n_files >= FILES or len(part) >= ROWS or time.monotonic() - begun > SECONDS
                # the files of a part follow each other in the table, if one process writes it
                if part and (whole or (world_size == 1 and places[i] != places[i - 1] + 1)):
                    self._write_part(part, writer)
                    part, n_files, begun = [], 0, time.monotonic()
                part += rows
                n_files += 1
                bar.update()
        finally:
            # also if this is interrupted
            if part:
                self._write_part(part, writer)

    def _write_part(self, rows: list[Row], writer: str) -> None:
        table = pa.Table.from_pylist(rows, schema=self.rows.schema)
        with atomic_write(self.folder / f"{_hashes([rows[0]['file']])[0]:016x}-{writer}.parquet") as file:
            pq.write_table(table, file)

    def _parts(self) -> list[Path]:
        """Lists the parts, the oldest first."""
        parts = (file for file in self.folder.glob("*.parquet") if not file.name.startswith(UNFINISHED))
        return sorted(parts, key=lambda part: (part.stat().st_mtime_ns, part.name))

    def _sources(self) -> list[Path]:
        """Lists what has rows: the table, if it is there, and the parts."""
        return [*([self.out] if self.out.exists() else []), *self._parts()]

    def _owners(self, sources: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        """Finds out which files have rows, as sorted hashes of their names, and in which of the sources last."""
        hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for number, source in enumerate(sources):
            for batch in self._batches(source, ["file"]):
                found = _hashes(pc.unique(batch["file"]).to_pylist())
                hashes.append(found)
                owners.append(np.full(len(found), number))
        # of equal ones the first is given, which is the last here
        unique, first = np.unique(np.concatenate(hashes[::-1]), return_index=True)
        return unique, np.concatenate(owners[::-1])[first]

    def _failed(self) -> np.ndarray:
        """Finds out which files have an error in the last source that has them, as hashes of their names."""
        failed = np.zeros(0, np.uint64)
        for source in self._sources():
            for batch in self._batches(source, ["file", "error"]):
                names, has_error = batch["file"], batch["error"].is_valid()
                tagged = _hashes(pc.unique(names.filter(pc.invert(has_error))).to_pylist()) if len(failed) else failed
                failed = np.union1d(np.setdiff1d(failed, tagged), _hashes(names.filter(has_error).to_pylist()))
        return failed

    def _batches(self, source: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        schema = self.rows.schema if columns is None else pa.schema([self.rows.schema.field(name) for name in columns])
        if source.suffix == ".parquet":
            with pq.ParquetFile(source) as file:
                yield from file.iter_batches(BATCH_ROWS, columns=schema.names)
        elif source.suffix == ".csv":
            convert = pa.csv.ConvertOptions(
                column_types=schema, include_columns=schema.names, null_values=[""], strings_can_be_null=True
            )
            parse, read = pa.csv.ParseOptions(newlines_in_values=True), pa.csv.ReadOptions(block_size=LONGEST_ROW)
            yield from pa.csv.open_csv(source, read_options=read, convert_options=convert, parse_options=parse)
        else:
            parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            yield from pa.json.open_json(source, pa.json.ReadOptions(block_size=LONGEST_ROW), parse)

    def _join(self, sources: list[Path], hashes: np.ndarray, owners: np.ndarray, names: np.ndarray) -> None:
        """Makes the table of all rows, those of each file once: a part may be in the table already."""
        places = dict.fromkeys(range(len(sources)), len(names))
        order = np.argsort(names)
        for number, source in enumerate(sources):
            first = _hashes([next(self._batches(source, ["file"]))["file"][0].as_py()])[0]
            at = np.searchsorted(names, first, sorter=order)
            if at < len(names) and names[order[at]] == first:
                places[number] = int(order[at])
        schema = self.rows.schema
        with atomic_write(self.out) as temporary, contextlib.ExitStack() as stack:
            if self.out.suffix == ".parquet":
                writer: Any = stack.enter_context(pq.ParquetWriter(temporary, schema))
            else:
                text = stack.enter_context(open(temporary, "w", encoding="utf-8", newline=""))
                writer = stack.enter_context(TextRows(text, self.out.suffix[1:], schema.names))
            for number in sorted(places, key=places.__getitem__):
                for batch in self._batches(sources[number]):
                    coded = batch["file"].dictionary_encode()
                    of_file = _hashes(coded.dictionary.to_pylist())
                    own = owners[np.searchsorted(hashes, of_file)] == number
                    kept = batch.filter(pa.array(own[coded.indices.to_numpy()]))
                    if self.out.suffix == ".parquet":
                        writer.write_batch(kept.cast(schema))
                    else:
                        writer.write(kept.to_pylist())
            if self.out.suffix != ".parquet":
                write_json(self.about, json.loads(schema.metadata[b"psla_sb"]))


def write_each(rows: FileRows, places: dict[str, str], folder: str, form: str, batch_size: int = 16, num_workers: int = 0) -> int:
    """Writes the rows of each file to one of its own, `folder/place.form`; what is there already is not made again.

    Files with an error are tried again each time, and have their rows in `folder/psla-tag.errors.form`.

    Arguments
    ---------
    places
        Where below the folder a file's rows go, without the ending that says the form.
    form
        "json", "jsonl" or "csv".

    Returns how many of the files have an error.
    """
    wanted, place = json.loads(rows.schema.metadata[b"psla_sb"]), Path(folder)
    if (place / SETTINGS).exists():
        _refuse_others(place, read_json(place / SETTINGS), wanted)
    elif place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"{folder}: is there already, and not by psla-tag; give another name")
    targets = {path: place / f"{name}.{form}" for path, name in places.items()}
    if len({*targets.values(), place / SETTINGS, place / f"{ERRORS}.{form}"}) < len(targets) + 2:
        raise InputError(f"{folder}: two of the sounds would have the same name there; tag them into folders of their own")
    write_json(place / SETTINGS, wanted)
    left = [path for path, target in targets.items() if not target.exists()]
    errors: list[Row] = []
    with tqdm(total=len(targets), initial=len(targets) - len(left), unit=" files", disable=None) as bar:
        for path, of_file in zip(left, rows.of_files(left, batch_size, num_workers), strict=True):
            if of_file[0]["error"]:
                errors += of_file
            else:
                _write_text(targets[path], of_file, form, rows)
            bar.update()
    _write_text(place / f"{ERRORS}.{form}", errors, form, rows)
    return len(errors)


def _write_text(path: Path, of_file: list[Row], form: str, rows: FileRows) -> None:
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as text,
        TextRows(text, form, rows.schema.names) as table,
    ):
        table.write(of_file)


def _metadata(table: Path) -> dict[str, Any] | None:
    """What a table in Parquet says of its settings; None if it does not."""
    with contextlib.suppress(pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        return json.loads(pq.read_schema(table).metadata[b"psla_sb"])
    return None


def _refuse_others(place: Path, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Refuses to go on with rows that were made with other settings, None: with what is not of psla-tag."""
    if found is None or not isinstance(then := found.get("settings"), dict):
        raise InputError(f"{place}: is there already, and not by psla-tag; give another name")
    now = wanted["settings"]
    keys = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if keys or found.get("mids") != wanted["mids"]:
        each = "; ".join(f"{key}: {then.get(key)} there, {now.get(key)} now" for key in keys) or "other classes"
        raise InputError(f"{place}: its rows were made with other settings ({each}); give another name, or delete it")


def _hashes(names: Iterable[str]) -> np.ndarray:
    """Hashes names to 64 bits each."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, np.uint64)
