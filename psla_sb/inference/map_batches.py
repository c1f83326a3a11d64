"""Rows of sounds for the `map_batches` of Ray Data, and of whatever else hands batches of columns to workers."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from psla_sb.checkpoints.sources import open_source
from psla_sb.errors import InputError
from psla_sb.inference.rows import Embeddings, Events, FileRows, Scores, Steps, Tags
from psla_sb.inference.tagger import AudioTagger

ROWS: dict[str, type[FileRows]] = {"tags": Tags, "timeline": Steps, "events": Events, "scores": Scores, "embeddings": Embeddings}


class TagBatches:
    """Tells of batches of sounds in rows of the schema of `psla_sb.inference.rows`; a broken sound has a row with its error.

    What a worker is given is this class and its arguments; the model is loaded in the worker, from where the worker finds it.

    Arguments
    ---------
    source, labels, trust
        A trained model, see `psla_sb.checkpoints.sources.open_source`.
    what
        "tags", "timeline", "events", "scores" or "embeddings".
    device
        Of the model, such as "cuda".
    batch_size, num_workers
        Windows on the device at a time; processes that decode, if sounds are paths.
    **options
        Of the rows, such as `top_k`: see `Tags`, `Steps`, `Events` and `Scores` in `psla_sb.inference.rows`.

    Raises
    ------
    InputError
        The model cannot be loaded; a batch has no sounds.

    Example
    -------
    >>> from psla_sb.checkpoints.psla import save_psla_checkpoint
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> from psla_sb.lobes import efficientnet, pooling
    >>> folder = getfixture("tmp_path")
    >>> save_psla_checkpoint(folder / "model.pth", efficientnet.EfficientNetEncoder("b0"), pooling.MeanPooling(1280, 2))
    >>> Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]).to_csv(folder / "labels.csv")
    >>> tag = TagBatches(folder / "model.pth", labels=folder / "labels.csv")
    >>> tag({"path": ["no.wav"]}).to_pylist()[0]["error"]
    'no.wav: no such file'
    """

    def __init__(
        self,
        source: str | Path,
        what: str = "tags",
        labels: str | Path | None = None,
        trust: Sequence[str] = (),
        device: str = "cpu",
        batch_size: int = 16,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        if what not in ROWS:
            raise ValueError(f"what must be one of {', '.join(ROWS)}, not {what!r}")
        model = open_source(source, labels, trust)
        self.rows = ROWS[what](AudioTagger.from_source(model, device), **options, model=model.digest())
        self.batch_size, self.num_workers = batch_size, num_workers

    def __call__(self, batch: Any) -> pa.Table:
        """Gives the rows of all sounds of a batch, in their order.

        Arguments
        ---------
        batch
            Columns by name: `path`, of text, or of bytes, as names that are not UTF-8 are; and, of files that are no paths here,
            `bytes`, all that is in them.
        """
        if "path" not in batch:
            raise InputError(f"a batch of sounds has a column path, and may have bytes; this one has: {', '.join(batch) or 'none'}")
        names = [os.fsdecode(path) for path in batch["path"]]
        sounds = map(_file, batch["bytes"], names) if "bytes" in batch else names
        told = self.rows.of_files(list(sounds), self.batch_size, self.num_workers)
        return pa.Table.from_pylist([row for rows in told for row in rows], schema=self.rows.schema)


def _file(content: bytes, name: str) -> io.BytesIO:
    file = io.BytesIO(content)
    file.name = name
    return file
