"""Scores of models on the disk: `.npy` files `[clips, classes]`, and beside each what says of which clips and classes they are.

    ensemble.npy + ensemble.json     of an annotation, in its order, as the digests of its clips and classes in the .json say
    scores.npy + ids.csv             of the clips whose IDs are listed; class_labels_indices.csv, if it is there, has the classes

`psla_sb.aggregation` writes the former; label enhancement, psla-teacher and out-of-fold teachers the latter. A training with a
teacher reads both.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from speechbrain.utils.logger import get_logger

from psla_sb.errors import InputError
from psla_sb.files import atomic_write
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import average_precision

logger = get_logger(__name__)
# In a folder of scores: the scores, the clips that their rows are of, and the classes that their columns are of.
SCORES, IDS, CLASS_LIST = "scores.npy", "ids.csv", "class_labels_indices.csv"
FLOATS = (np.float16, np.float32, np.float64)
# The check of a teacher looks at so many clips at most, and asks for such a part of the way from chance to a perfect mAP.
CHECKED_CLIPS, ABOVE_CHANCE = 20_000, 0.1
WRONG = "Are they of these clips (is the list of IDs right), and of these classes in this order?"
IMPORT = "psla-teacher imports the scores of other systems: it makes probabilities of logits, and puts classes in order"


def stamp(manifest: Any, vocabulary: Vocabulary) -> dict[str, str]:
    """Tells whether scores are of these clips and classes: what the JSON file beside them has."""
    return {"annotation": manifest.digest(), "classes": vocabulary.digest()}


class MatchedScores:
    """A teacher's scores by the clips of an annotation: item i, float32 `[classes]`, is clip i's row of a file, or NaN.

    The file stays on the disk, also where this is sent to another process.

    Example
    -------
    >>> path = getfixture("tmp_path") / "scores.npy"
    >>> np.save(path, np.float16([[0.25, 0.5], [0.75, 1]]))
    >>> scores = MatchedScores(path, np.array([1, -1]))
    >>> scores[0], scores[1], scores.shape
    (array([0.75, 1.  ], dtype=float32), array([nan, nan], dtype=float32), (2, 2))
    """

    def __init__(self, path: str | Path, rows: np.ndarray) -> None:
        self.path, self.rows = Path(path), rows  # rows: [clips], -1 for a clip without scores
        self.scores = np.load(self.path, mmap_mode="r")

    @property
    def shape(self) -> tuple[int, int]:
        """`(clips, classes)`."""
        return len(self.rows), self.scores.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, clips: Any) -> np.ndarray:
        rows = self.rows[clips]
        found = np.asarray(self.scores[rows]).astype(np.float32)
        found[rows < 0] = np.nan
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def open_scores(path: str | Path, manifest: Any, vocabulary: Vocabulary) -> np.ndarray | MatchedScores:
    """Maps a teacher's scores of a `Manifest`'s clips, `[clips, classes]`; a row is of NaN where a clip has none.

    `path` is a folder with `scores.npy` and `ids.csv`, whose clips may be others, in any order; or a `.npy` file as a recipe's
    `aggregate.py` writes it, of exactly these clips.

    Raises
    ------
    InputError
        The files are not such scores, are of other classes or of another order of them, or of none of the clips.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    if path.is_dir() or (path.is_file() and not beside.exists() and path.with_name(IDS).is_file()):
        return _matched(path, manifest, vocabulary)
    of_clips = stamp(manifest, vocabulary)
    try:
        scores, said = np.load(path, mmap_mode="r"), json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename}: no such file; aggregate.py writes scores as a pair of .npy and .json, psla-teacher and "
            f"out_of_fold.py write folders with {SCORES} and {IDS}"
        ) from None
    except (ValueError, RecursionError, OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as scores with a .json file beside it: {error}") from None
    # np.load reads .npz too, as another kind of object
    if not isinstance(said, dict) or not isinstance(scores, np.ndarray):
        raise InputError(f"{path}: not a pair of .npy and .json as aggregate.py writes it")
    for key, what in (("annotation", manifest.source), ("classes", "the class list")):
        if said.get(key) != of_clips[key]:
            raise InputError(
                f"{path}: scores of others than {what}, or in another order; score them with aggregate.py --annotation"
            )
    if scores.shape != (len(manifest), len(vocabulary)):
        raise InputError(f"{path}: has the shape {list(scores.shape)}, not {[len(manifest), len(vocabulary)]}; write it again")
    _check_type(scores, path)
    return scores


def _matched(path: Path, manifest: Any, vocabulary: Vocabulary) -> np.ndarray | MatchedScores:
    scores, ids, source = read_scores(path)
    if scores.shape[1] != len(vocabulary):
        raise InputError(f"{source}: has scores of {scores.shape[1]} classes, not of the {len(vocabulary)} of the class list")
    check_classes(source, vocabulary)
    _check_type(scores, source)
    if pc.count_distinct(ids).as_py() < len(ids):
        raise InputError(f"{source.with_name(IDS)}: some IDs are there more than once; IDs must be unique")
    found = pc.index_in(manifest.table["ID"], value_set=ids)
    rows = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    n_matched, n_clips = len(found) - found.null_count, len(found)
    if not n_matched:
        raise InputError(
            f"{source}: has scores of none of the {n_clips} clips of {manifest.source}: its first ID is "
            f"'{ids[0] if len(ids) else ''}', the first of the annotation '{manifest[0]['id']}'"
        )
    others = "" if n_matched == n_clips else "; the others learn from their labels alone"
    logger.info("%s: scores of %d of %d training clips (%.1f %%)%s", source, n_matched, n_clips, 100 * n_matched / n_clips, others)
    # scores of all clips in their order are those of an aggregation
    return scores if len(scores) == n_clips and (rows == np.arange(n_clips)).all() else MatchedScores(source, rows)


def check_classes(source: Path, vocabulary: Vocabulary) -> None:
    """Refuses scores of others than these classes in this order, if the list beside them says which they are of."""
    listed = source.with_name(CLASS_LIST)
    if source.name == SCORES and listed.is_file() and (mids := Vocabulary.from_csv(listed).mids) != vocabulary.mids:
        wrong = "in another order" if sorted(mids) == sorted(vocabulary.mids) else "others than those of the class list"
        raise InputError(f"{source}: by {listed.name} its classes are {wrong}; {IMPORT}")


def _check_type(scores: np.ndarray, source: Path) -> None:
    if scores.dtype.type not in FLOATS:
        raise InputError(f"{source}: has {scores.dtype} numbers; scores are float16, float32 or float64")


def check_teacher(scores: Any, labels: LabelSets, source: str | Path, remedy: str = WRONG) -> tuple[float, float]:
    """Refuses scores that do not say what the clips' labels say; returns their mAP, and that of the same rows shuffled.

    A wrong list of IDs or another order of classes gives scores that are as good as chance. Of `CHECKED_CLIPS` at most, evenly
    spaced among those that have scores.

    Arguments
    ---------
    scores
        What `open_scores` gives, `[clips, classes]`.
    labels
        Of the same clips.
    remedy
        What to do about scores that are not.

    Raises
    ------
    InputError
        Scores are not finite numbers from 0 to 1; or (mAP - chance) / (1 - chance) is below `ABOVE_CHANCE`.

    Example
    -------
    >>> labels = LabelSets.from_lists([[0], [1], [0], [1], [0], [1]])
    >>> scores = labels.to_multi_hot(np.arange(6), 2) * 0.5 + 0.25
    >>> check_teacher(scores, labels, "scores.npy")[0]
    1.0
    >>> check_teacher(scores[::-1], labels, "scores.npy")
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: scores.npy: these scores do not know the clips' labels: ...
    """
    known = np.flatnonzero(scores.rows >= 0) if isinstance(scores, MatchedScores) else np.arange(len(scores))
    clips = known[np.linspace(0, len(known) - 1, min(CHECKED_CLIPS, len(known))).astype(int)]
    looked_at = scores[clips].astype(np.float32)
    finite = np.isfinite(looked_at).all(axis=1)
    if not finite.all():
        raise InputError(f"{source}: the teacher's scores of clip {clips[finite.argmin()]} are not all finite numbers")
    low, high = float(looked_at.min(initial=0)), float(looked_at.max(initial=0))
    if low < 0 or high > 1:
        raise InputError(
            f"{source}: its scores are from {low:.4g} to {high:.4g}, and probabilities are from 0 to 1. Are they logits? {IMPORT}"
        )
    targets = labels.to_multi_hot(clips, looked_at.shape[1])
    carried = targets.any(axis=0)
    if not carried.any():
        return float("nan"), float("nan")
    looked_at, targets = looked_at[:, carried], targets[:, carried]
    score = float(average_precision(looked_at, targets).mean())
    # round in a random circle, so that no clip keeps its own
    circle, other = np.random.default_rng(0).permutation(len(clips)), np.empty(len(clips), int)
    other[circle] = np.roll(circle, 1)
    chance = float(average_precision(looked_at[other], targets).mean())
    # where all clips carry the same classes, nothing is better than chance
    if score - chance < ABOVE_CHANCE * (1 - chance):
        raise InputError(
            f"{source}: these scores do not know the clips' labels: their mAP on {len(clips)} clips is {score:.4f}, and given to "
            f"other clips {chance:.4f}. {remedy}"
        )
    return score, chance


def new_array(path: str | Path, shape: tuple[int, ...], dtype: type[np.floating] = np.float32) -> np.memmap:
    """Makes a `.npy` file of NaN, to be filled through memory; `OSError` if the disk is full."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as stream:
        # Where there is no room left when a mapped page is written, the process ends by a signal: take the room now.
        os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
    array[:] = np.nan
    return array


def write_clips(folder: str | Path, ids: pa.ChunkedArray | pa.Array, vocabulary: Vocabulary) -> None:
    """Writes, into a folder of scores, of which clips the rows are and of which classes the columns."""
    with atomic_write(Path(folder) / IDS) as temporary:
        pyarrow.csv.write_csv(pa.table({"ID": ids}), temporary)
    vocabulary.to_csv(Path(folder) / CLASS_LIST)


def read_scores(path: str | Path) -> tuple[np.ndarray, pa.ChunkedArray, Path]:
    """Maps a teacher's scores `[rows, classes]`, and reads the IDs of the clips that they are of; the third is the scores' file.

    `path` is a folder with `scores.npy`, or another such file. The column `ID` of `ids.csv` in the same folder has the IDs.
    """
    source = Path(path) / SCORES if Path(path).is_dir() else Path(path)
    try:
        scores = np.load(source, mmap_mode="r")
        if not isinstance(scores, np.ndarray):
            raise ValueError("an archive of several")
    except FileNotFoundError:
        raise InputError(
            f"{source}: no such file of a teacher's scores; the recipe's enhance_labels.py writes them, and its out_of_fold.py and "
            "psla-teacher. Of an aggregation, name the file ensemble.npy"
        ) from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{source}: not a whole .npy file of numbers ({error})") from None
    file = source.with_name(IDS)
    if not file.is_file():
        raise InputError(f"{file}: no such file; it says in a column 'ID' which clips the rows of {source.name} are of")
    ids = read_ids(file)
    if scores.ndim != 2 or len(ids) != len(scores):
        raise InputError(f"{file} has {len(ids)} IDs for the scores in {source.name}, whose shape is {list(scores.shape)}")
    return scores, ids, source


def read_ids(file: str | Path) -> pa.ChunkedArray:
    """Reads the column `ID` of a CSV file."""
    # IDs are text: 007 is not 7, and NA is a name
    options = pyarrow.csv.ConvertOptions(column_types={"ID": pa.string()}, include_columns=["ID"], strings_can_be_null=False)
    try:
        return pyarrow.csv.read_csv(file, convert_options=options)["ID"]
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise InputError(f"{file}: not a CSV file with a column 'ID' ({error})") from None
