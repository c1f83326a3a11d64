"""Annotations of sound clips, in memory as columns.

Two million clips are the normal case, so a `Manifest` is an Arrow table: rows become Python objects only while they are looked at.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from psla_sb.errors import InputError
from psla_sb.files import atomic_write
from psla_sb.labels.label_sets import LabelSets

COLUMNS = {"ID": pa.string(), "wav": pa.string(), "duration": pa.float64(), "labels": pa.string()}
ROOTS = ("{data_root}", "$data_root")  # as in SpeechBrain's JSON files, and as in its CSV files
READ_BLOCK_SIZE, LONGEST_ROW = 1 << 22, 1 << 26  # bytes


class Manifest:
    """The clips of an annotation, in columns.

    Arguments
    ---------
    table : pyarrow.Table
        Columns `ID` (unique), `wav` (path of a sound file), `duration` (seconds; may be null) and `labels` (mids joined by `;`).
    data_root : str, optional
        What SpeechBrain's `{data_root}` or `$data_root` at the start of a path stands for.
    source : str, optional
        Where the table comes from, for error messages.

    Raises
    ------
    InputError
        There are no clips, or two of the same ID.

    Example
    -------
    >>> manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [10.0, 3.2], ["/m/09x0r;/t/dd00088", "/m/012xff"])
    >>> len(manifest)
    2
    >>> manifest[1]
    {'id': 'b', 'wav': 'b.wav', 'duration': 3.2, 'labels': ['/m/012xff']}
    """

    def __init__(self, table, data_root=None, source="annotation"):
        if len(table) == 0:
            raise InputError(f"{source}: no clips in it; an annotation needs at least one.")
        self.table, self.data_root, self.source = table, data_root, str(source)
        for column in ("ID", "wav"):
            if pc.any(pc.equal(table[column], "")).as_py():
                row = pc.index(table[column], "").as_py()
                raise InputError(f"{source}, clip {row + 1}: the column '{column}' is empty.")
        # a hash table of all IDs would take more memory than the annotation
        ids = table["ID"].combine_chunks()
        ids = ids.take(pc.sort_indices(ids))
        if pc.any(pc.equal(ids[1:], ids[:-1])).as_py():
            repeated = ids[1:].filter(pc.equal(ids[1:], ids[:-1])).unique()
            raise InputError(f"{source}: {len(repeated)} IDs occur more than once, the first is '{repeated[0]}'; make them unique.")

    @classmethod
    def from_columns(cls, ids, wavs, durations, labels, **kwargs):
        """Columns as sequences of equal length; the labels of a clip as one string, mids joined by `;`.

        Example
        -------
        >>> Manifest.from_columns(["a"], ["a.wav"], [1.0], [""])[0]["labels"]
        []
        """
        columns = {"ID": ids, "wav": wavs, "duration": durations, "labels": labels}
        return cls(pa.table({name: pa.array(columns[name], COLUMNS[name]) for name in COLUMNS}), **kwargs)

    @classmethod
    def from_csv(cls, path, data_root=None):
        """Reads `ID,wav,duration,labels`; a column `duration` may be missing, further columns are ignored.

        Raises
        ------
        InputError
            The file is missing, empty, not such a CSV, or an ID is repeated.

        Example
        -------
        >>> path = getfixture("tmp_path") / "train.csv"
        >>> _ = path.write_text("ID,wav,duration,labels\\na,{data_root}/a.wav,1.5,/m/09x0r;/m/05zppz\\n")
        >>> Manifest.from_csv(path, data_root="/data")[0]["wav"]
        '/data/a.wav'
        """
        try:
            try:
                table = _read_table(path, READ_BLOCK_SIZE)
            except pa.ArrowInvalid as error:
                if "block" not in str(error):
                    raise
                table = _read_table(path, LONGEST_ROW)
        except FileNotFoundError:
            raise InputError(f"{path}: no such annotation file.") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: cannot be read as an annotation CSV (ID,wav,duration,labels): {error}") from None
        missing = [name for name in ("ID", "wav", "labels") if table[name].null_count]
        if missing:
            raise InputError(f"{path}: no column {', '.join(missing)}; the header of an annotation is ID,wav,duration,labels.")
        return cls(table, data_root, path)

    @classmethod
    def from_psla_json(cls, path):
        """Reads the published PSLA code's data file, `{"data": [{"wav": path, "labels": "mid,mid"}, ...]}`.

        The ID of a clip is the name of its file without ending, or its whole path where these are not unique.

        Raises
        ------
        InputError
            The file is missing or has another layout.

        Example
        -------
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
    def from_file(cls, path, data_root=None):
        """A `.json` file by `from_psla_json`, any other by `from_csv`.

        Example
        -------
        >>> path = getfixture("tmp_path") / "train.csv"
        >>> Manifest.from_columns(["a"], ["a.wav"], [1.0], ["x"]).to_csv(path)
        >>> len(Manifest.from_file(path))
        1
        """
        return cls.from_psla_json(path) if Path(path).suffix == ".json" else cls.from_csv(path, data_root)

    def to_csv(self, path):
        """Writes the annotation, a duration that is not known as `nan`; the file appears whole or not at all.

        Example
        -------
        >>> path = getfixture("tmp_path") / "copy.csv"
        >>> Manifest.from_columns(["a"], ["a, b.wav"], [1.0], ["x;y"]).to_csv(path)
        >>> path.read_text().splitlines()
        ['"ID","wav","duration","labels"', '"a","a, b.wav",1,"x;y"']
        """
        # an empty cell is no number to SpeechBrain's from_csv
        durations = pc.fill_null(self.table["duration"], math.nan)
        with atomic_write(path) as temporary:
            pyarrow.csv.write_csv(
                self.table.set_column(self.table.column_names.index("duration"), "duration", durations), temporary
            )

    def to_psla_json(self, path):
        """Writes the published PSLA code's data file; the file appears whole or not at all.

        Example
        -------
        >>> path = getfixture("tmp_path") / "train.json"
        >>> Manifest.from_columns(["a"], ["/d/a.wav"], [1.0], ["x;y"]).to_psla_json(path)
        >>> path.read_text()
        '{"data": [{"wav": "/d/a.wav", "labels": "x,y"}]}'
        """
        rows = map(self.__getitem__, range(len(self)))
        clips = [{"wav": row["wav"], "labels": ",".join(row["labels"])} for row in rows]
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"data": clips}), encoding="utf-8")

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        wav, labels = self.table["wav"][i].as_py(), self.table["labels"][i].as_py()
        if self.data_root is not None:
            for placeholder in ROOTS:
                wav = wav.replace(placeholder, str(self.data_root))
        return {
            "id": self.table["ID"][i].as_py(),
            "wav": wav,
            "duration": self.table["duration"][i].as_py(),
            "labels": [label for label in labels.split(";") if label],
        }

    def paths(self):
        """The paths of the clips, with the data root in its place.

        Returns
        -------
        pyarrow.Array

        Example
        -------
        >>> Manifest.from_columns(["a"], ["{data_root}/a.wav"], [1.0], [""], data_root="/data").paths().to_pylist()
        ['/data/a.wav']
        """
        paths = self.table["wav"].combine_chunks()
        for placeholder in ROOTS if self.data_root is not None else ():
            paths = pc.replace_substring(paths, placeholder, str(self.data_root))
        return paths

    def digest(self):
        """SHA-256 of the IDs and paths, which tells whether scores are of these clips.

        Example
        -------
        >>> manifest = Manifest.from_columns(["a"], ["a.wav"], [1.0], ["x"])
        >>> manifest.digest() == Manifest.from_columns(["a"], ["a.wav"], [2.0], ["y"]).digest()
        True
        """
        digest = hashlib.sha256()
        for column in (self.table["ID"], self.table["wav"]):
            for start in range(0, len(self), 1_000_000):
                values = column.slice(start, 1_000_000).combine_chunks()
                lines = pc.binary_join(pa.ListArray.from_arrays([0, len(values)], values), "\n")
                digest.update(lines[0].as_buffer())
        return digest.hexdigest()

    def label_sets(self, vocabulary):
        """The clips' labels as indices of the vocabulary's classes; a label that a clip repeats counts once.

        Arguments
        ---------
        vocabulary : psla_sb.labels.vocabulary.Vocabulary
            The classes.

        Returns
        -------
        LabelSets

        Raises
        ------
        InputError
            A clip has a label that is not in the vocabulary.

        Example
        -------
        >>> from psla_sb.labels.vocabulary import Vocabulary
        >>> manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [1.0, 1.0], ["/m/2;/m/1", "/m/2"])
        >>> manifest.label_sets(Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]))[0]
        array([0, 1], dtype=int32)
        """
        lists = pc.split_pattern(self.table["labels"].combine_chunks(), ";")
        offsets, mids = lists.offsets.to_numpy(), lists.flatten()
        present = pc.not_equal(mids, "").to_numpy(zero_copy_only=False)
        classes = pc.fill_null(pc.index_in(mids, value_set=pa.array(vocabulary.mids)), -1).to_numpy()
        clips = np.repeat(np.arange(len(self)), np.diff(offsets))
        unknown = np.flatnonzero(present & (classes < 0))
        if len(unknown):
            clip = self[int(clips[unknown[0]])]["id"]
            raise InputError(
                f"{self.source}, clip '{clip}': the label '{mids[int(unknown[0])]}' is not in the class list "
                f"({len(unknown)} such labels in all). Labels are mids joined by ';'; use the class list that belongs to them."
            )
        offsets = np.concatenate([[0], np.cumsum(np.bincount(clips[present], minlength=len(self)))])
        clips, classes = LabelSets(offsets, classes[present].astype(np.int32)).pairs(len(vocabulary))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(clips, minlength=len(self)))])
        return LabelSets(offsets, classes.astype(np.int32))

    def rows_in(self, ids, source):
        """Where each clip is in something that has its own order of clips.

        Arguments
        ---------
        ids : pyarrow.Array or pyarrow.ChunkedArray
            The IDs there.
        source : str or Path
            What has them, for error messages.

        Returns
        -------
        np.ndarray
            `[clips]`, row numbers from 0.

        Raises
        ------
        InputError
            A clip is not there, or an ID is there twice.

        Example
        -------
        >>> manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [1.0, 1.0], ["x", "x"])
        >>> manifest.rows_in(pa.array(["b", "c", "a"]), "scores.npy")
        array([2, 0], dtype=int32)
        """
        if pc.count_distinct(ids).as_py() < len(ids):
            raise InputError(f"{source}: some IDs of its clips are there more than once; IDs must be unique.")
        rows = pc.index_in(self.table["ID"], value_set=ids)
        if rows.null_count:
            first = self.table["ID"].filter(pc.is_null(rows))[0]
            raise InputError(f"{source}: lacks {rows.null_count} of the {len(self)} clips of {self.source}, first '{first}'.")
        return rows.to_numpy()

    def with_labels(self, label_sets, vocabulary):
        """The same clips with other labels.

        Arguments
        ---------
        label_sets : LabelSets
            The labels.
        vocabulary : psla_sb.labels.vocabulary.Vocabulary
            The classes.

        Returns
        -------
        Manifest

        Example
        -------
        >>> from psla_sb.labels.vocabulary import Vocabulary
        >>> manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [1.0, 1.0], ["/m/1", ""])
        >>> labels = LabelSets.from_lists([[0, 1], []])
        >>> manifest.with_labels(labels, Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"])).table["labels"].to_pylist()
        ['/m/1;/m/2', '']
        """
        mids = pa.array(vocabulary.mids).take(pa.array(label_sets.indices))
        joined = pc.binary_join(pa.LargeListArray.from_arrays(pa.array(label_sets.offsets, pa.int64()), mids), ";")
        column = self.table.column_names.index("labels")
        return Manifest(self.table.set_column(column, "labels", joined), self.data_root, self.source)


def _read_table(path, block_size):
    """The columns of an annotation CSV; a block holds at least a row."""
    # the streaming reader holds one block at a time
    with pyarrow.csv.open_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(block_size=block_size),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=COLUMNS, include_columns=list(COLUMNS), include_missing_columns=True, strings_can_be_null=False
        ),
    ) as reader:
        return reader.read_all()
