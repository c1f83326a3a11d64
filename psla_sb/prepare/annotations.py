"""What the recipes' preparations share: annotations that are made once, and lists of the clips that were left out."""

import itertools
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from speechbrain.utils.logger import get_logger

from psla_sb.dataio.bad_clips import csv_line
from psla_sb.dataio.manifest import Manifest
from psla_sb.files import atomic_write, write_file
from psla_sb.labels.vocabulary import Vocabulary

logger = get_logger(__name__)


def origin(files: Iterable[Path], *settings: str | float) -> str:
    """Describes what annotations are made from: another size or time of a file, or another setting, gives another text."""
    return json.dumps([*settings, *((str(path), path.stat().st_size, path.stat().st_mtime) for path in files)])


def are_made(annotations: Collection[Path], made_from: str) -> bool:
    """Tells whether annotations are there, and were made from the same (see `origin`); the log then says so."""
    if not all(path.exists() and _stamp(path).exists() and _stamp(path).read_text() == made_from for path in annotations):
        return False
    logger.info(
        "The annotations %s are there already and are used as they are; if clips were added or removed since, delete them, or "
        "choose another output folder, and they are made again.",
        ", ".join(map(str, annotations)),
    )
    return True


def write_annotation(
    annotation: Path, manifest: Manifest, left_out: Iterable[Sequence[object]], made_from: str, official_mids: Any
) -> Path:
    """Writes an annotation, and beside it the list of the clips that it lacks (see `list_left_out`), whose path is returned.

    `official_mids` are the labels of the published set's clips, joined by commas, an Arrow array: how many each class has is
    written to `<annotation>_official.csv`, since scores on fewer clips are scores on other clips.
    """
    # the stamp goes first and comes last: a process that is killed in between leaves what does not count as made
    _stamp(annotation).unlink(missing_ok=True)
    listed = list_left_out(annotation, left_out)
    counts = pc.split_pattern(official_mids, ",").flatten().value_counts()
    rows = "".join(f"{one['values']},{one['counts']}\n" for one in counts.to_pylist())
    write_file(official_counts_path(annotation), f"mid,clips\n{rows}")
    manifest.to_csv(annotation)
    write_file(_stamp(annotation), made_from)
    return listed


def official_counts_path(annotation: str | Path) -> Path:
    """Where it says how many clips of each class the published set has of which an annotation lists those that are there."""
    return Path(annotation).with_name(f"{Path(annotation).stem}_official.csv")


def official_counts(manifest: Manifest, vocabulary: Vocabulary) -> np.ndarray | None:
    """Counts how many clips of each class the published set has, `[classes]`; None if an annotation's preparation did not say."""
    path = official_counts_path(manifest.source)
    if not path.is_file():
        return None
    counts = dict(line.rsplit(",", 1) for line in path.read_text(encoding="utf-8").splitlines()[1:])
    return np.array([int(counts.get(mid, 0)) for mid in vocabulary.mids])


def _stamp(annotation: Path) -> Path:
    return annotation.with_suffix(".made_from.json")


def list_left_out(annotation: Path, rows: Iterable[Sequence[object]]) -> Path:
    """Writes ID, reason and file of clips to `<annotation>_left_out.csv`, whose path is returned."""
    path = annotation.with_name(f"{annotation.stem}_left_out.csv")
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        file.writelines(map(csv_line, itertools.chain([["ID", "reason", "file"]], rows)))
    return path


def in_annotation(folder: str | Path, data_folder: str | Path) -> str:
    """Returns what the paths of a folder's files begin with: `{data_root}/...` in the data folder, which can be moved then.

    Both folders are absolute; outside of the data folder the path stays so.
    """
    folder = Path(folder)
    inside = folder.is_relative_to(data_folder)
    return os.path.join("{data_root}" / folder.relative_to(data_folder) if inside else folder, "")
