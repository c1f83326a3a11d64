"""Rows of very many files in one table, which several processes write, and which any of them may be killed at.

While it is being written, there is a folder beside the table:

    tags.parquet.parts/
        about.json                  the schema, with the settings: others are refused
        1c0ffee...parquet           rows of some files each, called by a hash of the first one's name
    tags.parquet                    all rows, in the files' order, once there are those of all files; the folder goes

A part appears whole or not at all, and has all rows of its files. What is in no part was not done.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

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
# a part is written after so many files, rows or seconds: what is done again when a process is killed
FILES, ROWS, SECONDS = 1000, 50_000, 20.0
BATCH_ROWS = 1 << 14


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
        return [os.fsdecode(line) for line in lines if line.strip()]
    clips = Manifest.from_csv(file, data_folder)
    if clips.has_segments:
        raise InputError(f"{file}: its clips are segments of recordings (column start), whose files are tagged whole: list these")
    return [clips[row]["wav"] for row in range(len(clips))]


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
        self._check_settings()

    def _check_settings(self) -> None:
        wanted = json.loads(self.rows.schema.metadata[b"psla_sb"])
        _refuse_others(self.out, self._settings_of_table(), wanted)
        _refuse_others(self.folder, read_json(self.folder / ABOUT), wanted)

    def _settings_of_table(self) -> dict[str, Any] | None:
        if not self.out.exists():
            return None
        if self.out.suffix != ".parquet":
            return read_json(self.about)
        with contextlib.suppress(pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
            return json.loads(pq.read_schema(self.out).metadata[b"psla_sb"])
        return None

    def write(
        self, files: PathList, batch_size: int = 16, num_workers: int = 0, rank: int = 0, world_size: int = 1, progress: bool = True
    ) -> int | None:
        """Writes the rows of those of the files that have none yet; of several processes, this one's share.

        The last one to end makes the table. Returns how many of the files have an error; None if other processes are not done yet.
        """
        files = files.unique()
        names = _hashes(map(name_in_rows, files))
        unique, times = np.unique(names, return_counts=True)
        if len(unique) < len(names):
            both = files.take(np.flatnonzero(names == unique[np.argmax(times)]))
            raise InputError(f"{' and '.join(map(repr, both))} would have the same name in the table; rename one of them")
        with one_process(self.folder if world_size == 1 else self.folder / f"process-{rank}-of-{world_size}"):
            self._check_settings()
            if rank == 0 or not (self.folder / ABOUT).exists():
                write_json(self.folder / ABOUT, json.loads(self.rows.schema.metadata[b"psla_sb"]))
            done = self._owners()[0]
            # in blocks, so that what follows each other in the table mostly does so in a part
            block = min(max(1, len(files) // (8 * world_size)), FILES)
            mine = np.flatnonzero(np.arange(len(files)) // block % world_size == rank)
            left = mine[~np.isin(names[mine], done)]
            bar = tqdm(total=len(mine), initial=len(mine) - len(left), unit=" files", disable=None if progress else True)
            with bar:
                self._write_parts(files.take(left), left, batch_size, num_workers, bar)
        with one_process(self.folder):
            done = self._owners()[0]
            if not np.isin(names, done).all():
                return None
            if any(self.folder.glob("*.parquet")):
                self._join(files, names)
            failed = self._count_errors(names)
        shutil.rmtree(self.folder, ignore_errors=True)
        return failed

    def _write_parts(self, files: PathList, places: np.ndarray, batch_size: int, num_workers: int, bar: tqdm) -> None:
        part: list[Row] = []
        n_files, begun = 0, time.monotonic()
        try:
            for i, rows in enumerate(self.rows.of_files(files, batch_size, num_workers)):
                # the files of a part follow each other in the table
                whole = n_files >= FILES or len(part) >= ROWS or time.monotonic() - begun > SECONDS
                if part and (whole or places[i] != places[i - 1] + 1):
                    self._write_part(part)
                    part, n_files, begun = [], 0, time.monotonic()
                part += rows
                n_files += 1
                bar.update()
        finally:
            # also if this is interrupted
            if part:
                self._write_part(part)

    def _write_part(self, rows: list[Row]) -> None:
        table = pa.Table.from_pylist(rows, schema=self.rows.schema)
        with atomic_write(self.folder / f"{_hashes([rows[0]['file']])[0]:016x}.parquet") as file:
            pq.write_table(table, file)

    def _sources(self) -> list[Path]:
        """Lists what has rows: the table, if it is there, and the parts."""
        parts = sorted(file for file in self.folder.glob("*.parquet") if not file.name.startswith(UNFINISHED))
        return [*([self.out] if self.out.exists() else []), *parts]

    def _owners(self) -> tuple[np.ndarray, np.ndarray]:
        """Finds out which files have rows, as sorted hashes of their names, and in which of the sources first."""
        hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for number, source in enumerate(self._sources()):
            for batch in self._batches(source, ["file"]):
                found = _hashes(pc.unique(batch["file"]).to_pylist())
                hashes.append(found)
                owners.append(np.full(len(found), number))
        # stable: of the first source
        unique, first = np.unique(np.concatenate(hashes), return_index=True)
        return unique, np.concatenate(owners)[first]

    def _batches(self, source: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        schema = self.rows.schema if columns is None else pa.schema([self.rows.schema.field(name) for name in columns])
        if source.suffix == ".parquet":
            with pq.ParquetFile(source) as file:
                yield from file.iter_batches(BATCH_ROWS, columns=schema.names)
        elif source.suffix == ".csv":
            convert = pa.csv.ConvertOptions(
                column_types=schema, include_columns=schema.names, null_values=[""], strings_can_be_null=True
            )
            parse = pa.csv.ParseOptions(newlines_in_values=True)
            yield from pa.csv.open_csv(source, convert_options=convert, parse_options=parse)
        else:
            parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            yield from pa.json.open_json(source, parse_options=parse)

    def _join(self, files: PathList, names: np.ndarray) -> None:
        """Makes the table of all rows, those of each file once: a part may be in the table already."""
        hashes, owners = self._owners()
        sources = self._sources()
        places = dict.fromkeys(range(len(sources)), len(files))
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

    def _count_errors(self, names: np.ndarray) -> int:
        n_errors = 0
        for batch in self._batches(self.out, ["file", "error"]):
            failed = pc.unique(batch["file"].filter(batch["error"].is_valid())).to_pylist()
            n_errors += int(np.isin(_hashes(failed), names).sum())
        return n_errors


def write_each(rows: FileRows, places: dict[str, str], folder: str, form: str, batch_size: int = 16, num_workers: int = 0) -> int:
    """Writes the rows of each file to one of its own, `folder/place.form`; what is there already is not made again.

    Arguments
    ---------
    places
        Where below the folder a file's rows go, without the ending that says the form.
    form
        "json", "jsonl" or "csv".

    Returns how many of the files have an error, of those made now.
    """
    wanted = json.loads(rows.schema.metadata[b"psla_sb"])
    _refuse_others(Path(folder), read_json(Path(folder) / ABOUT), wanted)
    targets = {path: Path(folder) / f"{place}.{form}" for path, place in places.items()}
    if len(set(targets.values())) < len(targets):
        raise InputError(f"{folder}: two of the sounds would have the same name there; tag them into folders of their own")
    write_json(Path(folder) / ABOUT, wanted)
    left = [path for path, target in targets.items() if not target.exists()]
    n_errors = 0
    with tqdm(total=len(targets), initial=len(targets) - len(left), unit=" files", disable=None) as bar:
        for path, of_file in zip(left, rows.of_files(left, batch_size, num_workers), strict=True):
            with (
                atomic_write(targets[path]) as temporary,
                open(temporary, "w", encoding="utf-8", newline="") as text,
                TextRows(text, form, rows.schema.names) as table,
            ):
                table.write(of_file)
            bar.update()
            n_errors += of_file[0]["error"] is not None
    return n_errors


def _refuse_others(place: Path, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Refuses to go on with rows that were made with other settings, None: with what is not of psla-tag."""
    if found is None:
        # what a process leaves that is killed before it has begun
        begun = (LOCK, UNFINISHED, "process-")
        if place.is_file() or (place.is_dir() and not all(file.name.startswith(begun) for file in place.iterdir())):
            raise InputError(f"{place}: is there already, and not by psla-tag; give another name")
        return
    then, now = found["settings"], wanted["settings"]
    keys = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if keys or found["mids"] != wanted["mids"]:
        each = "; ".join(f"{key}: {then.get(key)} there, {now.get(key)} now" for key in keys) or "other classes"
        raise InputError(f"{place}: its rows were made with other settings ({each}); give another name, or delete it")


def _hashes(names: Iterable[str]) -> np.ndarray:
    """Hashes names to 64 bits each."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, np.uint64)
