"""Scores of other systems -> a folder of a teacher's scores: what `psla-teacher` does.

EfficientAT publishes a `.npy` of logits [rows, classes], and a pickle of a dictionary {YouTube's ID of 11 characters: row}.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import expit

from psla_sb.errors import InputError
from psla_sb.files import atomic_write
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.teacher_scores import FLOATS, SCORES, MatchedScores, check_teacher, new_array, read_ids, write_clips
from psla_sb.labels.vocabulary import Vocabulary

ROWS_AT_ONCE = 10_000
# As in AudioSet's preparation: <id>, Y<id>, <id>_<start>_<end>, with any ending.
YOUTUBE = r"^Y?(?P<id>[-_A-Za-z0-9]{11})(?:[-_][0-9]+(?:\.[0-9]+)?s?){0,2}(?:_?ms)?(?:\.f[0-9]+)?(?:\.[A-Za-z0-9]+)?$"
LAYOUT = "an index is {clip id: row}, a pickle or .json of texts and whole numbers alone, or a .csv with a column ID"
CONVERT = "Somebody who trusts the file can write it as JSON: json.dump({str(k): int(v) for k, v in index.items()}, file)"


class Imported(NamedTuple):
    """What came of an import: matched clips, by ID and by YouTube's ID in it, of all; mAP on their labels, and that of chance."""

    by_id: int
    by_youtube_id: int
    n_clips: int
    score: float
    chance: float


class _Plain(pickle.Unpickler):
    """Reads texts, numbers and containers: what names a class or a function, which code would be run by, is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of it")


def import_scores(
    path: str | Path,
    index: str | Path,
    manifest: Any,
    vocabulary: Vocabulary,
    folder: str | Path,
    classes: Vocabulary | None = None,
    probabilities: bool = False,
) -> Imported:
    """Writes scores of those clips of a `Manifest` that an index has, in the manifest's order, as a folder of a teacher's scores.

    Arguments
    ---------
    path
        `.npy`, floating-point, `[rows, classes]`: logits, or `probabilities`.
    index
        Which row is of which clip: a pickle or `.json` of a dictionary, or a `.csv` with a column ID, one row after the other.
    classes
        What the columns are of, by default those of the vocabulary; they are put into its order.

    Raises
    ------
    InputError
        A file is not what it has to be, or the scores do not know the clips' labels, see `check_teacher`; nothing is written then.

    Example
    -------
    >>> from psla_sb.dataio.manifest import Manifest
    >>> folder, vocabulary = getfixture("tmp_path"), Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"])
    >>> np.save(folder / "logits.npy", np.float16([[4, -4], [-3, 3], [0, 0]]))
    >>> _ = (folder / "index.json").write_text('{"bbbbbbbbbbb": 0, "aaaaaaaaaaa": 1, "other": 2}')
    >>> clips = Manifest.from_columns(["Yaaaaaaaaaaa", "bbbbbbbbbbb"], ["a.wav", "b.wav"], [1.0, 1.0], ["/m/2", "/m/1"])
    >>> import_scores(folder / "logits.npy", folder / "index.json", clips, vocabulary, folder / "teacher")
    Imported(by_id=1, by_youtube_id=1, n_clips=2, score=1.0, chance=0.5)
    >>> np.load(folder / "teacher" / "scores.npy").astype(float).round(2).tolist()
    [[0.05, 0.95], [0.98, 0.02]]
    """
    path, folder = Path(path), Path(folder)
    values = _open(path)
    columns = _columns(path, values.shape[1], vocabulary, classes)
    ids, rows = read_index(index, len(values))
    found, n_exact = match(manifest.table["ID"], ids, str(index))
    clips = np.flatnonzero(found >= 0)
    if not len(clips):
        first = f"its first ID is '{ids[0]}'" if len(ids) else "it is empty"
        raise InputError(
            f"{index}: has none of the {len(manifest)} clips of {manifest.source}: {first}, the annotation's '{manifest[0]['id']}'"
        )
    with atomic_write(folder / SCORES) as temporary:
        dtype = np.float16 if values.dtype.type is np.float16 else np.float32
        written = new_array(temporary, (len(clips), len(vocabulary)), dtype)
        low, high = np.inf, -np.inf
        for start in range(0, len(clips), ROWS_AT_ONCE):
            some = clips[start : start + ROWS_AT_ONCE]
            block = np.asarray(values[rows[found[some]]])[:, columns].astype(np.float32)
            finite = np.isfinite(block).all(axis=1)
            if not finite.all():
                bad = manifest[int(some[finite.argmin()])]["id"]
                raise InputError(f"{path}: the scores of clip '{bad}' are not all finite numbers")
            low, high = min(low, block.min()), max(high, block.max())
            written[start : start + ROWS_AT_ONCE] = block if probabilities else expit(block)
        _check_range(path, low, high, probabilities)
        written.flush()
        of_clips = np.full(len(manifest), -1)
        of_clips[clips] = np.arange(len(clips))
        labels: LabelSets = manifest.label_sets(vocabulary)
        score, chance = check_teacher(MatchedScores(temporary, of_clips), labels, path)
        # never new IDs beside old scores
        (folder / SCORES).with_suffix(".json").unlink(missing_ok=True)
        (folder / SCORES).unlink(missing_ok=True)
        write_clips(folder, manifest.table["ID"].take(pa.array(clips)), vocabulary)
    return Imported(n_exact, len(clips) - n_exact, len(manifest), score, chance)


def _open(path: Path) -> np.ndarray:
    try:
        # which unpickles nothing
        values = np.load(path, mmap_mode="r")
        if not isinstance(values, np.ndarray):
            raise ValueError("an archive of several arrays: save the one with the scores by numpy.save")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a whole .npy file of numbers ({error})") from None
    if values.ndim != 2 or values.dtype.type not in FLOATS:
        shape = list(values.shape)
        raise InputError(
            f"{path}: has the shape {shape} of {values.dtype}; scores are [rows, classes] of float16, float32 or float64"
        )
    return values


def _columns(path: Path, n_columns: int, vocabulary: Vocabulary, classes: Vocabulary | None) -> np.ndarray | slice:
    """Which columns are those of the vocabulary's classes."""
    listed = vocabulary if classes is None else classes
    if n_columns != len(listed):
        remedy = "; give the teacher's own class list, --teacher-labels" if classes is None else ""
        raise InputError(f"{path}: has scores of {n_columns} classes, and the class list has {len(listed)}{remedy}")
    if lacking := [mid for mid in vocabulary.mids if mid not in listed]:
        raise InputError(
            f"the teacher's class list lacks {len(lacking)} of the {len(vocabulary)} classes, the first is '{lacking[0]}'"
        )
    return slice(None) if listed.mids == vocabulary.mids else np.array([listed.index(mid) for mid in vocabulary.mids])


def _check_range(path: Path, low: float, high: float, probabilities: bool) -> None:
    inside = low >= 0 and high <= 1
    if inside and not probabilities:
        raise InputError(f"{path}: its scores are from {low:.4g} to {high:.4g}: if they are probabilities, pass --probabilities")
    if probabilities and not inside:
        raise InputError(
            f"{path}: its scores are from {low:.4g} to {high:.4g}, and probabilities are from 0 to 1; of logits leave "
            "--probabilities out"
        )


def read_index(path: str | Path, n_rows: int) -> tuple[pa.Array, np.ndarray]:
    """Reads which row of scores is of which clip: IDs, and their rows, int64; see `import_scores`. Never runs code of the file."""
    path = Path(path)
    if path.suffix == ".csv":
        ids = read_ids(path).combine_chunks()
        if len(ids) != n_rows:
            raise InputError(f"{path}: has {len(ids)} IDs for {n_rows} rows of scores")
        return ids, np.arange(n_rows)
    try:
        with open(path, "rb") as file:
            index = json.load(file) if path.suffix == ".json" else _Plain(file).load()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # a broken pickle raises anything
        remedy = "" if path.suffix == ".json" else f". {CONVERT}"
        raise InputError(f"{path}: cannot be read as an index ({type(error).__name__}: {error}); {LAYOUT}{remedy}") from None
    if not isinstance(index, Mapping):
        raise InputError(f"{path}: holds a {type(index).__name__}; {LAYOUT}")
    for clip, row in index.items():
        # True is an int too
        if type(clip) is not str or type(row) is not int or not 0 <= row < n_rows:
            raise InputError(
                f"{path}: '{clip}' has the row {row!r}; rows are whole numbers from 0 to {n_rows - 1}, and IDs are texts"
            )
    try:
        return pa.array(index.keys(), pa.string()), np.fromiter(index.values(), np.int64, len(index))
    except (UnicodeEncodeError, pa.ArrowException) as error:
        raise InputError(f"{path}: an ID is no text that can be written ({error})") from None


def match(clips: pa.Array | pa.ChunkedArray, ids: pa.Array, source: str) -> tuple[np.ndarray, int]:
    """Finds each clip, `[clips]`, among IDs: where it is there, or else where YouTube's ID of both is the same; -1: nowhere.

    YouTube's ID alone tells nothing where several clips, or several IDs, have the same. The second is how many are there as such.

    Example
    -------
    >>> match(pa.array(["a", "Yaaaaaaaaaaa", "bbbbbbbbbbb_0_10", "c"]), pa.array(["aaaaaaaaaaa", "bbbbbbbbbbb.wav", "a"]), "")
    (array([ 2,  0,  1, -1]), 1)
    """
    if pc.count_distinct(ids).as_py() < len(ids):
        raise InputError(f"{source}: some IDs are there more than once; IDs must be unique")
    exact = pc.index_in(clips, value_set=ids)
    near = pc.index_in(_only_once(_youtube(clips)), value_set=_only_once(_youtube(ids)), skip_nulls=True)
    found = pc.fill_null(pc.coalesce(exact, near), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return found, len(exact) - exact.null_count


def _youtube(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    return pc.struct_field(pc.extract_regex(ids, YOUTUBE), "id").cast(pa.string())


def _only_once(values: pa.Array) -> pa.Array:
    """Null in place of what is there several times."""
    counts = pc.value_counts(values)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    return pc.if_else(pc.is_in(values, value_set=repeated), None, values)
