"""Annotations of sound clips, in memory as columns.

Two million clips are the normal case, so a `Manifest` is an Arrow table: rows become Python objects only while they are looked at.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from psla_sb.dataio import packs
from psla_sb.errors import InputError
from psla_sb.files import atomic_write, write_file
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.vocabulary import Vocabulary

COLUMNS = {"ID": pa.string(), "wav": pa.string(), "duration": pa.float64(), "labels": pa.string()}
# a column of annotations whose clips are segments of recordings
START = "start"
ROOTS = ("{data_root}", "$data_root")  # as in SpeechBrain's JSON files, and as in its CSV files
READ_BLOCK_SIZE, LONGEST_ROW = 1 << 22, 1 << 26  # bytes


class Manifest:
    """Holds the clips of an annotation, in columns.

    Arguments
    ---------
    table
        Columns `ID` (unique), `wav` (path of a sound file), `duration` (seconds; may be null) and `labels` (mids joined by `;`).
        With a column `start` (seconds), a clip is what its file has from there on, for `duration` or to the end; null: all of it.
    data_root
        What SpeechBrain's `{data_root}` or `$data_root` at the start of a path stands for.
    source
        Where the table comes from, for error messages: an `InputError` if it has no clips, or two of the same ID.

    Example
    -------
    >>> manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [10.0, 3.2], ["/m/09x0r;/t/dd00088", "/m/012xff"])
    >>> len(manifest)
    2
    >>> manifest[1]
    {'id': 'b', 'wav': 'b.wav', 'duration': 3.2, 'labels': ['/m/012xff']}
    """

    def __init__(self, table: pa.Table, data_root: str | Path | None = None, source: str | Path = "annotation") -> None:
        if len(table) == 0:
            raise InputError(f"{source}: no clips in it; an annotation needs at least one.")
        self.table, self.data_root, self.source = table, data_root, str(source)
        for column in ("ID", "wav"):
            row = pc.index(table[column], "").as_py()
            if row >= 0:
                raise InputError(f"{source}, clip {row + 1}: the column '{column}' is empty.")
        if self.has_segments:
            self._check_segments()
        # sorted, because a hash table of all IDs would take more memory than the annotation
        ids = table["ID"].combine_chunks()
        ids = ids.take(pc.sort_indices(ids))
        repeated = ids[1:].filter(pc.equal(ids[1:], ids[:-1])).unique()
        if len(repeated):
            raise InputError(f"{source}: {len(repeated)} IDs occur more than once, the first is '{repeated[0]}'; make them unique.")

    @property
    def has_segments(self) -> bool:
        """Whether clips are segments of their files: whether there is a column `start`."""
        return START in self.table.column_names

    def _check_segments(self) -> None:
        for column, wrong in ((START, pc.less(self.table[START], 0)), ("duration", pc.less_equal(self.table["duration"], 0))):
            row = pc.index(pc.and_(pc.fill_null(wrong, False), self.table[START].is_valid()), True).as_py()
            if row >= 0:
                clip, seconds = self.table["ID"][row], self.table[column][row].as_py()
                raise InputError(
                    f"{self.source}, clip '{clip}': '{column}' is {seconds:g} s; a segment begins at 0 or later, and lasts."
                )

    @classmethod
    def from_columns(
        cls, ids: Iterable, wavs: Iterable, durations: Iterable, labels: Iterable, starts: Iterable | None = None, **kwargs: Any
    ) -> "Manifest":
        """Makes a manifest of columns of equal length; the labels of a clip are one string, mids joined by `;`."""
        columns = {"ID": ids, "wav": wavs, "duration": durations, "labels": labels}
        table = pa.table(columns, schema=pa.schema(COLUMNS))
        return cls(table if starts is None else table.append_column(START, pa.array(starts, pa.float64())), **kwargs)

    @classmethod
    def from_csv(cls, path: str | Path, data_root: str | Path | None = None) -> "Manifest":
        """Reads `ID,wav,duration,labels`, and `start` if it is there; `duration` may be missing, further columns are ignored.

        An `InputError` says what is wrong with the file: it is missing, empty, not such a CSV, or has an ID twice.

        >>> path = getfixture("tmp_path") / "train.csv"
        >>> _ = path.write_text("ID,wav,duration,labels\\na,{data_root}/a.wav,1.5,/m/09x0r;/m/05zppz\\n")
        >>> Manifest.from_csv(path, data_root="/data")[0]["wav"]
        '/data/a.wav'
        """
        try:
            table = _read_table(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such annotation file.") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: cannot be read as an annotation CSV (ID,wav,duration,labels): {error}") from None
        missing = [name for name in ("ID", "wav", "labels") if table[name].null_count]
        if missing:
            raise InputError(f"{path}: no column {', '.join(missing)}; the header of an annotation is ID,wav,duration,labels.")
        return cls(table, data_root, path)

    @classmethod
    def from_psla_json(cls, path: str | Path) -> "Manifest":
        """Reads the published PSLA code's data file, `{"data": [{"wav": path, "labels": "mid,mid"}, ...]}`.

        The ID of a clip is the name of its file without ending, or its whole path where these are not unique. An `InputError` says
        that the file is missing or has another layout.

        >>> path = getfixture("tmp_path") / "train.json"
        >>> _ = path.write_text('{"data": [{"wav": "/d/a.flac", "labels": "/m/09x0r,/m/05zppz"}]}')
        >>> Manifest.from_psla_json(path)[0]
        {'id': 'a', 'wav': '/d/a.flac', 'duration': None, 'labels': ['/m/09x0r', '/m/05zppz']}
        """
        try:
            clips = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
            wavs, labels = [clip["wav"] for clip in clips], [clip["labels"].replace(",", ";") for clip in clips]
            ids = [Path(wav).stem for wav in wavs]
        except FileNotFoundError:
            raise InputError(f"{path}: no such data file.") from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            layout = '{"data": [{"wav": "path", "labels": "mid,mid"}, ...]}'
            raise InputError(f"{path}: not a PSLA data file ({error!r}); the layout is {layout}.") from None
        return cls.from_columns(ids if len(set(ids)) == len(ids) else wavs, wavs, [None] * len(ids), labels, source=path)

    @classmethod
    def from_file(cls, path: str | Path, data_root: str | Path | None = None) -> "Manifest":
        """Reads a `.json` file by `from_psla_json`, any other by `from_csv`."""
        return cls.from_psla_json(path) if Path(path).suffix == ".json" else cls.from_csv(path, data_root)

    def to_csv(self, path: str | Path) -> None:
        """Writes the annotation, a duration or start that is not known as `nan`; the file appears whole or not at all.

        >>> path = getfixture("tmp_path") / "copy.csv"
        >>> Manifest.from_columns(["a"], ["a, b.wav"], [1.0], ["x;y"]).to_csv(path)
        >>> path.read_text().splitlines()
        ['"ID","wav","duration","labels"', '"a","a, b.wav",1,"x;y"']
        """
        # an empty cell is no number to SpeechBrain's from_csv
        table = self.table
        for name in ("duration", *([START] if self.has_segments else [])):
            table = table.set_column(table.column_names.index(name), name, pc.fill_null(table[name], math.nan))
        with atomic_write(path) as temporary:
            pyarrow.csv.write_csv(table, temporary)

    def to_clips_csv(self, path: str | Path) -> None:
        """Writes which clips these are, of which labels, and not where: columns `ID` and `labels`."""
        with atomic_write(path) as temporary:
            pyarrow.csv.write_csv(self.table.select(["ID", "labels"]), temporary)

    def to_psla_json(self, path: str | Path) -> None:
        """Writes the published PSLA code's data file; the file appears whole or not at all."""
        if self.has_segments:
            raise InputError(
                f"{self.source}: its clips are segments of files, which {path} cannot say; pack them first (psla-pack)."
            )
        clips = [{"wav": row["wav"], "labels": ",".join(row["labels"])} for row in map(self.__getitem__, range(len(self)))]
        write_file(path, json.dumps({"data": clips}))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict[str, Any]:
        name, wav, duration, labels = (self.table[column][i].as_py() for column in COLUMNS)
        for placeholder in ROOTS if self.data_root is not None else ():
            wav = wav.replace(placeholder, str(self.data_root))
        clip = {"id": name, "wav": wav, "duration": duration, "labels": [label for label in labels.split(";") if label]}
        return {**clip, START: self.table[START][i].as_py()} if self.has_segments else clip

    def paths(self) -> pa.Array:
        """Gives the paths of the clips, with the data root in its place."""
        paths = self.table["wav"].combine_chunks()
        for placeholder in ROOTS if self.data_root is not None else ():
            paths = pc.replace_substring(paths, placeholder, str(self.data_root))
        return paths

    def places(self) -> pa.Array:
        """Tells clips apart by where they are: their paths, and where in their files segments begin."""
        if not self.has_segments:
            return self.paths()
        starts = pc.fill_null(self.table[START].combine_chunks().cast(pa.string()), "")
        return pc.binary_join_element_wise(self.paths(), starts, "\n")

    def digest(self, columns: Sequence[str] | None = None) -> str:
        """Computes the SHA-256 of the IDs and places, which tells whether scores are of these clips, or of other columns."""
        digest = hashlib.sha256()
        columns = columns or ("ID", "wav", *([START, "duration"] if self.has_segments else []))
        for column in map(self.table.column, columns):
            # in pieces, because they are copied
            for start in range(0, len(self), 1_000_000):
                values = pc.fill_null(column.slice(start, 1_000_000).combine_chunks().cast(pa.string()), "")
                lines = pc.binary_join(pa.ListArray.from_arrays([0, len(values)], values), "\n")
                digest.update(lines[0].as_buffer())
        return digest.hexdigest()

    def state_of_files(self) -> str:
        """Computes the SHA-256 of the sizes and times of change of the clips' files, which tells that a sound was replaced.

        Of segments also that of where they are.
        """
        digest, packs_seen = hashlib.sha256(), dict[str, str]()
        if self.has_segments:
            digest.update(self.digest((START, "duration")).encode())
        paths = self.paths()
        for start in range(0, len(paths), 100_000):
            states = []
            for path in paths[start : start + 100_000].to_pylist():
                place = packs.locate(path)
                state = packs_seen.get(place.pack) if place else None
                if state is None:
                    state = _file_state(path)
                    if state is None and place:
                        state = packs_seen[place.pack] = _file_state(place.pack) or "missing"
                states.append(state or "missing")
            digest.update("\n".join(states).encode())
        return digest.hexdigest()

    def n_labels(self) -> int:
        """Counts the labels of all clips."""
        return (
            pc.sum(pc.count_substring(self.table["labels"], ";")).as_py() + pc.sum(pc.not_equal(self.table["labels"], "")).as_py()
        )

    def targets(self, vocabulary: Vocabulary) -> np.ndarray:
        """Multi-hot targets of all clips, float32 `[clips, classes]`, as figures are computed from."""
        return self.label_sets(vocabulary).to_multi_hot(np.arange(len(self)), len(vocabulary))

    def label_sets(self, vocabulary: Vocabulary) -> LabelSets:
        """Looks up the clips' labels among the vocabulary's classes; a label that a clip repeats counts once.

        An `InputError` names the first clip that has a label which is not in the vocabulary.
        """
        lists = pc.split_pattern(self.table["labels"].combine_chunks(), ";")
        mids = lists.flatten()
        present = pc.not_equal(mids, "").to_numpy(zero_copy_only=False)
        classes = pc.fill_null(pc.index_in(mids, value_set=pa.array(vocabulary.mids)), -1).to_numpy()
        clips = np.repeat(np.arange(len(self)), np.diff(lists.offsets.to_numpy()))
        unknown = np.flatnonzero(present & (classes < 0))
        if len(unknown):
            clip = self[int(clips[unknown[0]])]["id"]
            raise InputError(
                f"{self.source}, clip '{clip}': the label '{mids[int(unknown[0])]}' is not in the class list "
                f"({len(unknown)} such labels in all). A clip's labels are joined by ';'; use the class list that has them."
            )
        offsets = np.searchsorted(clips[present], np.arange(len(self) + 1))
        once = LabelSets(offsets, classes[present]).to_sparse(len(vocabulary))
        return LabelSets(once.indptr.astype(np.int64), once.indices.astype(np.int32))

    def rows_in(self, ids: pa.Array | pa.ChunkedArray, source: str | Path, remedy: str = "") -> np.ndarray:
        """Finds each clip's row, `[clips]`, in something of that source which has its own order of clips, by the IDs there.

        An `InputError` says that a clip is not there, and what to do (`remedy`), or that an ID is there twice.
        """
        if pc.count_distinct(ids).as_py() < len(ids):
            raise InputError(f"{source}: some IDs of its clips are there more than once; IDs must be unique.")
        rows = pc.index_in(self.table["ID"], value_set=ids)
        if rows.null_count:
            first = self.table["ID"].filter(pc.is_null(rows))[0]
            raise InputError(
                f"{source}: lacks {rows.null_count} of the {len(self)} clips of {self.source}, first '{first}'.{remedy}"
            )
        return rows.to_numpy()

    def with_labels(self, label_sets: LabelSets, vocabulary: Vocabulary) -> "Manifest":
        """Makes a manifest of the same clips with other labels."""
        mids = pa.array(vocabulary.mids).take(pa.array(label_sets.indices))
        joined = pc.binary_join(pa.LargeListArray.from_arrays(pa.array(label_sets.offsets, pa.int64()), mids), ";")
        column = self.table.column_names.index("labels")
        return Manifest(self.table.set_column(column, "labels", joined), self.data_root, self.source)


def _file_state(path: str) -> str | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return f"{status.st_size} {status.st_mtime_ns}"


def _read_table(path: str | Path, block_size: int = READ_BLOCK_SIZE) -> pa.Table:
    """Reads the columns of an annotation CSV; a column that is missing is null, but for `start`, which is then missing."""
    # by default an empty cell of strings is no null, and a quoted cell ends in its line
    columns = {**COLUMNS, START: pa.float64()}
    convert = pyarrow.csv.ConvertOptions(column_types=columns, include_columns=list(columns), include_missing_columns=True)
    try:
        # the streaming reader holds one block at a time
        with pyarrow.csv.open_csv(path, pyarrow.csv.ReadOptions(block_size=block_size), convert_options=convert) as reader:
            table = reader.read_all()
        starts = pc.if_else(pc.is_nan(table[START]), None, table[START])
        place = table.column_names.index(START)
        return table.remove_column(place) if starts.null_count == len(table) else table.set_column(place, START, starts)
    except pa.ArrowInvalid as error:
        # a block must hold at least a row
        if block_size == LONGEST_ROW or "block" not in str(error):
            raise
    return _read_table(path, LONGEST_ROW)
