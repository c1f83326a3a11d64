"""What the recipes' preparations share: annotations that are made once, and lists of the clips that were left out."""

import csv
import json
import os
from pathlib import Path

from speechbrain.utils.logger import get_logger

from psla_sb.files import atomic_write

logger = get_logger(__name__)

LEFT_OUT_HEADER = ["ID", "reason", "file"]


def origin(files, *settings):
    """What annotations are made from, as text: another size or time of a file, or another setting, gives another text.

    Arguments
    ---------
    files : sequence of Path
        They must exist.
    *settings
        Further texts and numbers.

    Returns
    -------
    str

    Example
    -------
    >>> path = getfixture("tmp_path") / "eval_segments.csv"
    >>> path.touch()
    >>> origin([path], 16000) == origin([path], 32000)
    False
    """
    return json.dumps([*settings, *((str(path), path.stat().st_size, path.stat().st_mtime) for path in files)])


def are_made(annotations, made_from):
    """Whether annotations are there, and were made from the same; the log then says so.

    Arguments
    ---------
    annotations : sequence of Path
        CSV files that `write_annotation` writes.
    made_from : str
        See `origin`.

    Returns
    -------
    bool

    Example
    -------
    >>> are_made([Path("nowhere.csv")], origin([]))
    False
    """
    if not all(path.exists() and _stamp(path).exists() and _stamp(path).read_text() == made_from for path in annotations):
        return False
    logger.info(
        "The annotations %s are there already and are used as they are; if clips were added or removed since, delete them, or "
        "choose another output folder, and they are made again.",
        ", ".join(map(str, annotations)),
    )
    return True


def write_annotation(annotation, manifest, left_out, made_from):
    """Writes an annotation, and beside it a list of the clips that it lacks. Once both are whole it counts as made (`are_made`).

    Arguments
    ---------
    annotation : Path
        The CSV file to write.
    manifest : Manifest
        The clips.
    left_out : iterable
        See `list_left_out`.
    made_from : str
        See `origin`.

    Returns
    -------
    Path
        The list of the clips that were left out.

    Example
    -------
    >>> from psla_sb.dataio.manifest import Manifest
    >>> annotation = getfixture("tmp_path") / "eval.csv"
    >>> manifest = Manifest.from_columns(["a"], ["a.wav"], [1.0], ["x"])
    >>> write_annotation(annotation, manifest, [["b", "no file", ""]], origin([])).name
    'eval_left_out.csv'
    >>> are_made([annotation], origin([]))
    True
    """
    _stamp(annotation).unlink(missing_ok=True)
    listed = list_left_out(annotation, left_out)
    manifest.to_csv(annotation)
    with atomic_write(_stamp(annotation)) as temporary:
        temporary.write_text(made_from)
    return listed


def _stamp(annotation):
    return annotation.with_suffix(".made_from.json")


def list_left_out(annotation, rows):
    """Writes `<annotation>_left_out.csv`.

    Arguments
    ---------
    annotation : Path
        Which the clips are left out of.
    rows : iterable of (str, str, str)
        ID, reason and file of each.

    Returns
    -------
    Path
        What was written.

    Example
    -------
    >>> list_left_out(getfixture("tmp_path") / "eval.csv", [["7", "no such file", "7.wav"]]).read_text().splitlines()
    ['ID,reason,file', '7,no such file,7.wav']
    """
    path = annotation.with_name(f"{annotation.stem}_left_out.csv")
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(LEFT_OUT_HEADER)
        writer.writerows(rows)
    return path


def in_annotation(folder, data_folder):
    """What the paths of a folder's files begin with in an annotation.

    Arguments
    ---------
    folder, data_folder : str or Path
        Absolute.

    Returns
    -------
    str
        `{data_root}/...` inside of the data folder, which can be moved then; an absolute path outside.

    Example
    -------
    >>> in_annotation("/data/audioset/audio", "/data/audioset"), in_annotation("/fast/16k", "/data/audioset")
    ('{data_root}/audio/', '/fast/16k/')
    """
    inside = Path(folder).is_relative_to(data_folder)
    return os.path.join("{data_root}" if inside else "", Path(folder).relative_to(data_folder) if inside else folder, "").replace(
        "/./", "/"
    )
