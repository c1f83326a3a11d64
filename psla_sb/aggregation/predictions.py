"""Scores on the disk, of which clips and classes they are, and the clips that several of them have in common."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from psla_sb.checkpoints.run_folder import CLASSES, best_epoch, prediction_path, read_results, trained_epochs
from psla_sb.dataio.manifest import COLUMNS, Manifest
from psla_sb.errors import InputError
from psla_sb.labels.teacher_scores import IDS, SCORES
from psla_sb.labels.vocabulary import Vocabulary

# What can be compared of a run, and the clips' file of an aggregation.
ROWS = ("ensemble", "weight_average", "best", "last")
CLIPS = "clips.csv"


@dataclass(frozen=True, eq=False)
class Predictions:
    """Scores `[clips, classes]`, mapped; the clips that they are of; the classes, and whose list that is, if a file says so."""

    name: str
    path: Path
    scores: np.ndarray
    clips: Manifest
    has_labels: bool
    vocabulary: Vocabulary | None
    class_list: Path | None

    @property
    def ids(self) -> pa.ChunkedArray:
        """The clips' IDs."""
        return self.clips.table["ID"]


@dataclass(frozen=True, eq=False)
class Matched:
    """Several systems' scores of the same clips and classes, each `[clips, classes]`, and the targets, bool `[clips, classes]`."""

    systems: list[Predictions]
    vocabulary: Vocabulary
    scores: list[np.ndarray]
    targets: np.ndarray


def match(systems: Sequence[Predictions], classes: str | Path | None = None, annotation: str | Path | None = None) -> Matched:
    """Brings systems to the clips that all have, in the first one's order of clips and of classes.

    Arguments
    ---------
    classes
        The class list of systems without an own one; by default that of the first that has one.
    annotation
        Has the targets, in place of the `labels` beside the scores: a CSV file with columns `ID` and `labels`, or the published
        PSLA code's data file. Clips that it lacks are left out.

    Raises
    ------
    InputError
        No clip or not all classes are common, labels differ or are missing, or a score is not finite.
    """
    lists = [(system.vocabulary, system.class_list) for system in systems if system.vocabulary is not None]
    given = (Vocabulary.from_csv(classes), Path(classes)) if classes is not None else lists[0] if lists else None
    if given is None:
        raise InputError(f"{systems[0].path}: no {CLASSES} beside it says which classes its scores are of; pass --classes CSV")
    each = [given if system.vocabulary is None else (system.vocabulary, system.class_list) for system in systems]
    vocabulary = each[0][0]
    for system, (own, file) in zip(systems, each, strict=True):
        if system.scores.shape[1] != len(own):
            raise InputError(f"{system.path}: scores of {system.scores.shape[1]} classes, but {file} has {len(own)}")
    columns = [_columns(vocabulary, own, each[0][1], file) for own, file in each]
    truth = None if annotation is None else _read_annotation(Path(annotation))
    ids = _common_ids(systems, truth)
    targets = _common_targets(systems, ids, vocabulary, truth)
    scores = [_take(system, ids, order) for system, order in zip(systems, columns, strict=True)]
    return Matched(list(systems), vocabulary, scores, targets)


def _columns(vocabulary: Vocabulary, own: Vocabulary, file: Path | None, own_file: Path | None) -> np.ndarray | None:
    """Where the classes of a vocabulary are in another one; None if in the same places."""
    if own.mids == vocabulary.mids:
        return None
    if lacking := next((mid for mid in vocabulary.mids if mid not in own), None):
        raise InputError(f"{own_file} has no class '{lacking}', which {file} has; only scores of the same classes can be compared")
    if more := next((mid for mid in own.mids if mid not in vocabulary), None):
        raise InputError(f"{file} has no class '{more}', which {own_file} has; only scores of the same classes can be compared")
    return np.array([own.index(mid) for mid in vocabulary.mids])


def _common_ids(systems: Sequence[Predictions], truth: Manifest | None) -> pa.Array:
    ids, source = systems[0].ids.combine_chunks(), systems[0].clips.source
    for other in [*(system.clips for system in systems[1:]), *([] if truth is None else [truth])]:
        common = ids.filter(pc.is_in(ids, value_set=other.table["ID"].combine_chunks()))
        if not len(common):
            example = f"'{ids[0]}' is a clip of the one, '{other.table['ID'][0]}' of the other"
            raise InputError(f"{source} and {other.source} have no clip in common: {example}")
        ids = common
    return ids


def _rows(clips: Manifest, ids: pa.Array) -> np.ndarray:
    return pc.index_in(ids, value_set=clips.table["ID"].combine_chunks()).to_numpy()


def _common_targets(systems: Sequence[Predictions], ids: pa.Array, vocabulary: Vocabulary, truth: Manifest | None) -> np.ndarray:
    sources = [system.clips for system in systems if system.has_labels] if truth is None else [truth]
    if not sources:
        raise InputError(f"{systems[0].clips.source}: no column 'labels', nor is there one of another; pass --annotation CSV")
    found = []
    for source in sources:
        clips = Manifest(source.table.take(_rows(source, ids)), source=source.source)
        found.append(clips.label_sets(vocabulary).to_sparse(len(vocabulary)))
        differing = (found[0] != found[-1]).nonzero()[0]
        if len(differing):
            raise InputError(
                f"{sources[0].source} and {source.source}: the labels of {len(np.unique(differing))} clips differ, first of "
                f"'{ids[int(differing.min())]}'; say with --annotation CSV which are true"
            )
    return found[0].toarray()


def _take(system: Predictions, ids: pa.Array, columns: np.ndarray | None) -> np.ndarray:
    scores = system.scores[_rows(system.clips, ids)]
    if not (finite := np.isfinite(scores).all(axis=1)).all():
        clip = ids[int(np.argmin(finite))]
        raise InputError(f"{system.path}, clip '{clip}': a score is NaN or infinite ({(~finite).sum()} such clips); score it again")
    return scores if columns is None else scores[:, columns]


def open_all(arguments: Sequence[str], row: str = "ensemble") -> list[Predictions]:
    """Opens what is to be compared: `PATH` or `NAME=PATH`, each as `open_predictions` takes it."""
    return [open_predictions(path, row, name) for name, path in named(arguments).items()]


def named(arguments: Sequence[str]) -> dict[str, str]:
    """Finds a name for every path: what stands before `=`, or the shortest end of the path that no other has.

    Example
    -------
    >>> named(["results/psla/1", "results/psla/2", "other's=scores.npy", "ensemble"])
    {'psla/1': 'results/psla/1', 'psla/2': 'results/psla/2', "other's": 'scores.npy', 'ensemble': 'ensemble'}
    """
    pairs = [_name_and_path(argument) for argument in arguments]
    parts = [Path(os.path.abspath(path)).with_suffix("").parts[1:] for name, path in pairs if not name]
    names = [name or _shortest_end(Path(os.path.abspath(path)).with_suffix("").parts[1:], parts) for name, path in pairs]
    (most, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise InputError(f"two systems are called '{most}'; give each a name of its own, NAME=PATH")
    return dict(zip(names, (path for _, path in pairs), strict=True))


def _shortest_end(own: tuple[str, ...], all_parts: Sequence[tuple[str, ...]]) -> str:
    """The shortest end of a path that only it has; the number of a run alone would tell nobody anything."""
    for length in range(1, len(own)):
        end = own[-length:]
        if sum(parts[-length:] == end for parts in all_parts) == 1 and not (length == 1 and end[0].isdecimal()):
            return "/".join(end)
    return "/".join(own)


def _name_and_path(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    return (name, path) if name and equals and os.sep not in name and not Path(argument).exists() else ("", argument)


def open_predictions(path: str | Path, row: str = "ensemble", name: str = "") -> Predictions:
    """Opens a run's output folder, an aggregation's, one with `scores.npy`, or a `.npy` file of scores `[clips, classes]`.

    `row`, one of `ROWS`, says what of a run. Which clips the scores in `X.npy` are of is said, in the same folder, by `X.csv`,
    `X.txt`, `<X up to its first _>_clips.csv`, `clips.csv`, `ids.csv`, `ids.txt`, or by `clips.csv` in the folder above, whichever
    is found first: CSV files with a column `ID`, and maybe `labels` as in an annotation, or text files with an ID a line.
    """
    source = find_scores(path, row)
    try:
        scores = np.load(source, mmap_mode="r")
        # np.load reads .npz too, as another kind of object
        if not isinstance(scores, np.ndarray) or scores.dtype.kind not in "fiu" or scores.ndim != 2:
            raise ValueError("not one array of numbers with two axes")
    except FileNotFoundError:
        raise InputError(f"{source}: no such file of scores") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{source}: not a whole .npy file of scores [clips, classes] ({error})") from None
    file = find_clips(source)
    clips, has_labels = _read_clips(file)
    if len(clips) != len(scores):
        raise InputError(f"{file} has {len(clips)} IDs for the {len(scores)} rows of {source}; put the list of its clips there")
    folders = [source.parent, source.parent.parent] if source.parent.name == "predictions" else [source.parent]
    class_list = next((folder / CLASSES for folder in folders if (folder / CLASSES).is_file()), None)
    vocabulary = None if class_list is None else Vocabulary.from_csv(class_list)
    return Predictions(name or source.stem, source, scores, clips, has_labels, vocabulary, class_list)


def find_scores(path: str | Path, row: str = "ensemble") -> Path:
    """Finds the file of scores in a folder; a file is itself."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file of scores, and no such folder")
    if not path.is_dir():
        return path
    for name in ("ensemble.npy", SCORES):
        if (path / name).is_file():
            return path / name
    if not (path / "predictions").is_dir():
        raise InputError(f"{path}: neither a run's folder with predictions/, nor one with ensemble.npy or {SCORES}")
    name = row
    if row in ("best", "last"):
        epochs = trained_epochs(path)
        name = f"epoch_{best_epoch(epochs) if row == 'best' else epochs[-1]['epoch']:02d}"
    results = read_results(path)
    if "evaluation" not in results:
        raise InputError(f"{path}: a run that is not finished: its scores may be of different epochs; the same command goes on")
    # of a run of before it was noted, what there is
    sets = [results["clips"]["set"]] if "set" in results.get("clips", {}) else ["test", "valid"]
    found = [prediction_path(path, f"{set_name}_{name}") for set_name in sets]
    for file in found:
        if file.is_file():
            return file
    raise InputError(f"{' and '.join(map(str, found))}: no such file; choose another --row")


def find_clips(scores: Path) -> Path:
    """Finds the file that says of which clips the rows of scores are; see `open_predictions`."""
    stem, folder = scores.stem, scores.parent
    names = [f"{stem}.csv", f"{stem}.txt", f"{stem.partition('_')[0]}_{CLIPS}", CLIPS, IDS, str(Path(IDS).with_suffix(".txt"))]
    for file in [*(folder / name for name in names), folder.parent / CLIPS]:
        if file.is_file():
            return file
    raise InputError(
        f"{scores}: nothing says of which clips its rows are; put {stem}.csv beside it, with a column 'ID', in their order: the "
        "annotation that was scored will do"
    )


def _read_annotation(file: Path) -> Manifest:
    clips, has_labels = (Manifest.from_file(file), True) if file.suffix == ".json" else _read_clips(file)
    if not has_labels:
        raise InputError(
            f"{file}: no column 'labels', which has the targets; the header of an annotation is ID,wav,duration,labels"
        )
    return clips


def _read_clips(file: Path) -> tuple[Manifest, bool]:
    """The clips of a CSV file, or of a text file, and whether it has their labels."""
    text = file.suffix == ".txt"
    # IDs are text: 007 is not 7, and NA is a name
    convert = pyarrow.csv.ConvertOptions(
        column_types={"ID": pa.string(), "labels": pa.string()}, include_columns=["ID", "labels"], include_missing_columns=True
    )
    read = pyarrow.csv.ReadOptions(column_names=["ID"] if text else None)
    # of a line of text, all is the ID
    parse = pyarrow.csv.ParseOptions(delimiter="\x1f", quote_char=False) if text else None
    try:
        table = pyarrow.csv.read_csv(file, read, parse, convert)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file}: cannot be read as a list of clips ({error})") from None
    if table["ID"].null_count:
        raise InputError(f"{file}: no column 'ID', which says of which clips the scores are")
    has_labels = table["labels"].null_count == 0
    labels = pc.fill_null(table["labels"], "")
    columns = {"ID": table["ID"], "wav": table["ID"], "duration": pa.nulls(len(table), pa.float64()), "labels": labels}
    return Manifest(pa.table(columns, schema=pa.schema(COLUMNS)), source=file), has_labels
