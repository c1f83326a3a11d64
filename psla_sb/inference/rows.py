"""What is told of sounds, in rows of one schema, whether in JSON, JSON lines, CSV or Parquet.

A row is a tag, a step of a timeline, an event, a sound's scores or its embedding. Its fields, in this order:

    file          as the user calls it; bytes of a name that are not UTF-8 stand as \\xNN
    start, end    in seconds, to the millisecond; null where the row is about the whole sound
    label, mid    the class; null where nothing is told: nothing reached the threshold, or there is an error
    score         in [0, 1]
    probability, decision    of a tagger with thresholds alone: see `Tag`; a step and an event have a decision alone
    error         why the sound could not be tagged; null if it was

In the place of `start` to `decision` there are `scores`, of all classes in the model's order, or the `embedding`, if these were
asked for.
"""

import csv
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from psla_sb.dataio.audio import named
from psla_sb.inference.many_files import over_files, timelines_of_files
from psla_sb.inference.tagger import AudioTagger
from psla_sb.inference.timeline import Timeline, events, top_classes

SCHEMA = 1  # its version; raised when a field changes
LONGEST_ERROR = 10_000  # characters that are kept of an error
THRESHOLD = 0.5  # of an event, of a model without thresholds of its own

Row = dict[str, Any]


class FileRows(ABC):
    """Tells of many sounds.

    Arguments
    ---------
    tagger
        The model.
    settings
        What else the rows follow from, for comparison with those of an earlier run.
    """

    def __init__(self, tagger: AudioTagger, **settings: Any) -> None:
        self.tagger = tagger
        own = None if tagger.calibration is None else tagger.calibration.threshold
        self.thresholds = own
        known = None if own is None else hashlib.sha256(np.asarray(own, np.float64).tobytes()).hexdigest()[:16]
        self.settings = {"schema": SCHEMA, "rows": type(self).__name__.lower(), "thresholds": known, **settings}

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Names and types of the fields between `file` and `error`."""
        decided = {} if self.thresholds is None else {"probability": pa.float64(), "decision": pa.bool_()}
        texts = {"label": pa.string(), "mid": pa.string()}
        return {"start": pa.float64(), "end": pa.float64(), **texts, "score": pa.float64(), **decided}

    @property
    def schema(self) -> pa.Schema:
        """The fields as Arrow and Parquet have them, with the classes and the settings as metadata."""
        about = {"settings": self.settings, "labels": self.tagger.labels, "mids": list(self.tagger.hparams.mids)}
        columns = {"file": pa.string(), **self.columns, "error": pa.string()}
        return pa.schema(list(columns.items()), metadata={"psla_sb": json.dumps({"schema": SCHEMA, **about})})

    def of_files(
        self, files: Sequence[Any], batch_size: int = 16, num_workers: int = 0, names: Sequence[str] | None = None
    ) -> Iterator[list[Row]]:
        """Yields each file's rows, one at least, in the files' order.

        Arguments
        ---------
        files
            Paths; with no workers also file objects.
        names
            What the files are called in the rows (default: their paths; of file objects their `name`).
        """
        names = files if names is None else names
        for row, rows, error in self._answers(files, batch_size, num_workers):
            name = name_in_rows(named(names[row]))
            said = error and name_in_rows(error).replace(name_in_rows(named(files[row])), name)
            yield [self.whole(name, one, None) for one in rows] or [self.whole(name, {}, said)]

    def whole(self, name: str, row: Row, error: str | None) -> Row:
        """Gives a row all fields."""
        return {"file": name, **dict.fromkeys(self.columns), **row, "error": error and error[:LONGEST_ERROR]}

    def row(self, start: float, end: float, c: int, score: float) -> Row:
        """Tells of a class from `start` to `end`, in seconds."""
        decided = {} if self.thresholds is None else {"decision": bool(score >= self.thresholds[c])}
        span = {"start": round(start, 3), "end": round(end, 3)}
        return {**span, "label": self.tagger.labels[c], "mid": self.tagger.hparams.mids[c], "score": score, **decided}

    @abstractmethod
    def _answers(self, files: Sequence[Any], batch_size: int, num_workers: int) -> Iterator[tuple[int, list[Row], str | None]]:
        """Yields each file's place, its rows without `file` and `error`, and its error."""


class Tags(FileRows):
    """Tells the best classes of each sound, see `AudioTagger.tag_files`; with `decided`, those alone that reach their threshold."""

    def __init__(
        self,
        tagger: AudioTagger,
        top_k: int = 5,
        threshold: float | None = None,
        pool: str = "max",
        decided: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(tagger, top_k=top_k, threshold=threshold, pool=pool, decided=decided, **settings)
        self.options: dict[str, Any] = {"top_k": top_k, "threshold": threshold, "pool": pool}
        self.decided = decided

    def _answers(self, files: Sequence[Any], batch_size: int, num_workers: int) -> Iterator[tuple[int, list[Row], str | None]]:
        found = self.tagger.tag_files(files, batch_size, num_workers, progress=False, **self.options)
        for row, (_, tags, error) in enumerate(found):
            rows = [{key: value for key, value in tag._asdict().items() if key in self.columns} for tag in tags or ()]
            yield row, [one for one in rows if not self.decided or one["decision"]], error


class Vectors(FileRows):
    """Tells one vector of each sound."""

    name: str
    type: pa.DataType

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {self.name: self.type}

    def _vectors(
        self, files: Sequence[Any], values_of: Any, pool: str, batch_size: int, num_workers: int
    ) -> Iterator[tuple[int, list[Row], str | None]]:
        for row, values, error in over_files(self.tagger, files, values_of, pool, batch_size, num_workers):
            dtype = self.type.value_type.to_pandas_dtype()
            yield row, [] if values is None else [{self.name: values.numpy().astype(dtype)}], error


class Scores(Vectors):
    """Tells the scores of all classes, in the model's order, as "float32" or "float16" numbers."""

    name = "scores"

    def __init__(self, tagger: AudioTagger, dtype: str = "float32", pool: str = "max", **settings: Any) -> None:
        super().__init__(tagger, dtype=dtype, pool=pool, **settings)
        self.type, self.pool = pa.list_(getattr(pa, dtype)(), len(tagger.labels)), pool

    def _answers(self, files: Sequence[Any], batch_size: int, num_workers: int) -> Iterator[tuple[int, list[Row], str | None]]:
        return self._vectors(files, self.tagger.score_batch, self.pool, batch_size, num_workers)


class Embeddings(Vectors):
    """Tells one vector of features a sound, the mean over its windows of `SoundEncoder.scene_embeddings`."""

    name, type = "embedding", pa.list_(pa.float32())

    def _answers(self, files: Sequence[Any], batch_size: int, num_workers: int) -> Iterator[tuple[int, list[Row], str | None]]:
        return self._vectors(files, self.tagger.scene_embeddings, "mean", batch_size, num_workers)


class Steps(FileRows):
    """Tells the scores along each sound of the `top_k` classes with the highest peaks, from `threshold` on."""

    def __init__(self, tagger: AudioTagger, top_k: int = 5, threshold: float | None = None, **settings: Any) -> None:
        super().__init__(tagger, top_k=top_k, threshold=threshold, **settings)
        self.top_k, self.threshold = top_k, threshold

    def _answers(self, files: Sequence[Any], batch_size: int, num_workers: int) -> Iterator[tuple[int, list[Row], str | None]]:
        labels, mids = self.tagger.labels, list(self.tagger.hparams.mids)
        for row, scores, error in timelines_of_files(self.tagger, files, batch_size=batch_size, num_workers=num_workers):
            if scores is None:
                yield row, [], error
            else:
                times = self.tagger.step_times(len(scores)).numpy()
                yield row, list(self._rows(Timeline(times, scores.numpy(), labels, mids))), None

    def _rows(self, timeline: Timeline) -> Iterator[Row]:
        best = [c for c in top_classes(timeline, self.top_k) if timeline.scores[:, c].max() >= (self.threshold or 0)]
        half = timeline.step / 2
        for time, scores in zip(timeline.times.tolist(), timeline.scores, strict=True):
            yield from (self.row(max(0.0, time - half), time + half, c, scores[c].item()) for c in best)


class Events(Steps):
    """Tells when what reaches the threshold begins and ends, see `psla_sb.inference.timeline.events`.

    The threshold is, if none is given, each class's own, or 0.5 of a model that has none.
    """

    def __init__(self, tagger: AudioTagger, threshold: float | None = None, **settings: Any) -> None:
        super().__init__(tagger, len(tagger.labels), threshold, **settings)

    def _rows(self, timeline: Timeline) -> Iterator[Row]:
        for one in events(timeline, self.threshold or (THRESHOLD if self.thresholds is None else self.thresholds)):
            yield self.row(one.start, one.end, timeline.labels.index(one.label), one.score)


class TextRows:
    """Writes rows as text: "json" (`{"schema": 1, "rows": [...]}`), "jsonl" (a row a line) or "csv".

    Example
    -------
    >>> import io
    >>> text = io.StringIO()
    >>> with TextRows(text, "csv", ["file", "label", "error"]) as rows:
    ...     rows.write([{"file": "a.wav", "label": "Bell", "error": None}])
    >>> text.getvalue()
    'file,label,error\\na.wav,Bell,\\n'
    """

    def __init__(self, stream: TextIO, form: str, fields: Sequence[str]) -> None:
        self.stream, self.form, self._first = stream, form, True
        self._table = csv.DictWriter(stream, fields, lineterminator="\n")
        # whoever reads a carriage return takes it for the end of a row, if it is not quoted
        self._quoting = csv.DictWriter(stream, fields, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def __enter__(self) -> "TextRows":
        if self.form == "csv":
            self._table.writeheader()
        elif self.form == "json":
            self.stream.write(f'{{"schema": {SCHEMA}, "rows": [')
        return self

    def write(self, rows: Iterable[Row]) -> None:
        """Writes rows."""
        if self.form == "csv":
            for row in rows:
                has_return = any(isinstance(cell, str) and "\r" in cell for cell in row.values())
                (self._quoting if has_return else self._table).writerow(row)
        else:
            for row in rows:
                before = "" if self.form == "jsonl" else "\n " if self._first else ",\n "
                self.stream.write(before + json.dumps(row, default=np.ndarray.tolist) + ("\n" if self.form == "jsonl" else ""))
                self._first = False
        self.stream.flush()

    def __exit__(self, *error: Any) -> None:
        if self.form == "json" and error[0] is None:
            self.stream.write("\n]}\n")


def name_in_rows(path: str) -> str:
    """Makes text of any file's name: bytes that are not UTF-8 stand as `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
