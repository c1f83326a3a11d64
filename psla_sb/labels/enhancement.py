"""Label enhancement: adds the parents and children that annotators left out.

Where a teacher model hears them: Gong, Chung, Glass: "PSLA", IEEE/ACM TASLP 29, 2021, arXiv 2102.01243, section III-D;
`psla_sb.labels.report` tells what came of it. Or parents alone, without a teacher, where there is no doubt which:
`propagate_to_parents`, hierarchical label propagation, arXiv 2503.21826.
"""

import mmap
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from scipy.sparse import csr_array
from speechbrain.utils.logger import get_logger

from psla_sb.errors import InputError
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.teacher_scores import check_classes, read_scores
from psla_sb.labels.vocabulary import Vocabulary

logger = get_logger(__name__)
# Human voice, Crash cymbal, Human group actions, Respiratory sounds, Domestic sounds: what carries one of these is left as it
# is, as in the published system. They are classes of FSD50K, not of AudioSet.
NEVER_GENERATE = ("/m/09l8g", "/m/0bm0k", "/t/dd00012", "/m/09hlz4", "/t/dd00071")
_BLOCK_BYTES = 2**26
Types = Sequence[str]  # from "I" (direct children are added) and "II" (ancestors)
PARENTS = ("ontology", "vocabulary")


def class_thresholds(scores: np.ndarray, label_sets: LabelSets | np.ndarray, kind: str | float = "mean") -> np.ndarray:
    """Gives what a teacher usually scores where a class is carried, float64 `[classes]`; NaN for a class that no clip carries."""
    average = _average(kind)
    scores = np.asanyarray(scores)
    if isinstance(label_sets, LabelSets):
        n_classes = scores.shape[1] if scores.ndim == 2 else 0
        _check_scores(scores, (len(label_sets), n_classes))
        carried = label_sets.to_sparse(n_classes)
    else:  # an array [clips, classes]: what is not 0 is carried
        _check_scores(scores, np.shape(label_sets))
        carried = csr_array(np.asarray(label_sets) != 0)
    gathered = (block[carried[start : start + len(block)].nonzero()].astype(np.float64) for start, block in _blocks(scores))
    by_class = np.concatenate([np.empty(0), *gathered])[np.argsort(carried.indices, kind="stable")]
    ends = np.cumsum(np.bincount(carried.indices, minlength=scores.shape[1]))
    # One call of NumPy's own mean or percentile per class, so that the figures are theirs to the last bit.
    return np.array([average(part) if part.size else np.nan for part in np.split(by_class, ends[:-1])])


def candidate_matrix(vocabulary: Vocabulary, ontology: Ontology, types: Types = ("I", "II")) -> np.ndarray:
    """Says which classes (columns) are looked for where a class (row) is carried: bool `[classes, classes]`."""
    kinds = {types} if isinstance(types, str) else set(types)
    if not kinds or kinds - {"I", "II"}:
        raise InputError(f"the types must be from 'I' and 'II', not {sorted(map(str, kinds))}")
    relations = {"I": ontology.children, "II": ontology.ancestors}
    matrix = np.logical_or.reduce([relation_matrix(vocabulary, relations[kind]) for kind in kinds])
    matrix[[vocabulary.index(mid) for mid in NEVER_GENERATE if mid in vocabulary]] = False
    return matrix


def relation_matrix(vocabulary: Vocabulary, relation: Callable[[str], Any]) -> np.ndarray:
    """Writes a relation, such as `Ontology.children`, as bool `[classes, classes]`: in row i are the classes related to class i."""
    matrix = np.zeros((len(vocabulary), len(vocabulary)), dtype=bool)
    for i, mid in enumerate(vocabulary.mids):
        matrix[i, [vocabulary.index(other) for other in relation(mid) if other in vocabulary]] = True
    return matrix


def enhance(
    label_sets: LabelSets,
    scores: np.ndarray,
    vocabulary: Vocabulary,
    ontology: Ontology,
    threshold: str | float | np.ndarray = "mean",
    types: Types = ("I", "II"),
) -> LabelSets:
    """Does what `enhance_labels` does, on arrays; scores in a mapped file may be larger than the memory."""
    scores = np.asanyarray(scores)
    _check_scores(scores, (len(label_sets), len(vocabulary)))
    relation = csr_array(candidate_matrix(vocabulary, ontology, types))
    thresholds = threshold if isinstance(threshold, np.ndarray) else class_thresholds(scores, label_sets, threshold)
    carried = label_sets.to_sparse(len(vocabulary))
    clips, classes = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for start, block in _blocks(scores):
        has = carried[start : start + len(block)]
        # only labels that a clip came with are in `has`, so that nothing follows from an added one
        missing = (has @ relation) > has
        # a product's indices come in any order; added classes are to be in the vocabulary's
        missing.sort_indices()
        rows, columns = missing.nonzero()
        # NaN, the threshold of a class that no clip carries, is below no score
        added = block[rows, columns].astype(np.float64) > thresholds[columns]
        clips.append(rows[added].astype(np.int64) + start)
        classes.append(columns[added])
    return label_sets.append(np.concatenate(clips), np.concatenate(classes))


def enhance_labels(
    label_sets: Sequence[Sequence[str]],
    scores: np.ndarray,
    vocabulary: Vocabulary,
    ontology: Ontology,
    threshold: str | float | np.ndarray = "mean",
    types: Types = ("I", "II"),
) -> list[list[str]]:
    """Adds missing children (Type I) and ancestors (Type II) to the mids of every clip, after those that it has.

    One is added where the teacher's score is strictly greater than the class's threshold. Only labels that the clip came with
    bring others, and a class that no clip carries is never added.

    Arguments
    ---------
    scores
        `[clips, classes]`, floating-point, compared in float64.
    threshold
        "mean", "median" or a percentile (0 to 100) of a class's scores on the clips that carry it; or `[classes]`, one for each.

    Raises
    ------
    InputError
        A mid is not in the vocabulary, scores are of another shape or not finite, or for another threshold or type.

    Example
    -------
    >>> animal, dog = {"id": "animal", "name": "Animal", "child_ids": ["dog"]}, {"id": "dog", "name": "Dog", "child_ids": []}
    >>> ontology, vocabulary = Ontology([animal, dog]), Vocabulary(["dog", "animal"], ["Dog", "Animal"])
    >>> enhance_labels([["animal", "dog"], ["dog"]], np.array([[0.9, 0.5], [0.8, 0.6]]), vocabulary, ontology)
    [['animal', 'dog'], ['dog', 'animal']]
    """
    indices = []
    for clip, mids in enumerate(label_sets):
        try:
            indices.append([vocabulary.index(mid) for mid in mids])
        except InputError as error:
            raise InputError(f"labels of clip {clip}: {error}") from None
    enhanced = enhance(LabelSets.from_lists(indices), scores, vocabulary, ontology, threshold, types)
    return [[vocabulary.mids[i] for i in enhanced[clip]] for clip in range(len(enhanced))]


def enhance_annotation(
    manifest: Any,
    label_sets: LabelSets,
    vocabulary: Vocabulary,
    scores: str | Path,
    ontology: str | Path,
    threshold: str | float = "mean",
    types: Types = ("I", "II"),
) -> LabelSets:
    """Does what `enhance_labels` does, from files: what `label_enhancement` in a recipe's YAML file names.

        label_enhancement: !name:psla_sb.labels.enhancement.enhance_annotation
            scores: !ref <output_folder>/enhanced_labels
            ontology: !ref <data_folder>/ontology.json
            threshold: mean
            types: [I, II]

    Arguments
    ---------
    manifest, label_sets
        The clips, a `Manifest`, and their labels.
    scores
        A folder with `scores.npy` `[rows, classes]` and `ids.csv`, whose column `ID` says which clip each row is of. The order does
        not matter, nor do further clips; what is in the file stays on disk.

    Raises
    ------
    InputError
        A file is missing or broken, a clip has no scores, or as `enhance_labels`.

    Example
    -------
    >>> from psla_sb.dataio.manifest import Manifest
    >>> folder, vocabulary = getfixture("tmp_path"), Vocabulary(["dog", "animal"], ["Dog", "Animal"])
    >>> np.save(folder / "scores.npy", np.array([[0.8, 0.6], [0.9, 0.5]]))
    >>> _ = (folder / "ids.csv").write_text("ID\\nb\\na\\n")
    >>> _ = (folder / "ontology.json").write_text(
    ...     '[{"id": "animal", "name": "Animal", "child_ids": ["dog"]}, {"id": "dog", "name": "Dog", "child_ids": []}]')
    >>> manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [1.0, 1.0], ["dog;animal", "dog"])
    >>> labels = manifest.label_sets(vocabulary)
    >>> [row.tolist() for row in enhance_annotation(manifest, labels, vocabulary, folder, folder / "ontology.json")]
    [[0, 1], [0, 1]]
    """
    values, ids, source = read_scores(scores)
    check_classes(source, vocabulary)
    rows = manifest.rows_in(
        ids, source, " Scores of only a part of the clips can teach (teacher_scores), but cannot enhance labels."
    )
    # It is the labels that are put into the order of the scores, which may be larger than the memory. Rows of other clips get
    # no labels, so they count for no threshold and have no candidates.
    #
    #   manifest   a b        ids.csv     b x a        rows in the scores  [2, 0]
    #   labels     A B (-)    in that     B - A        clips  [1, 2, 0], of which 2 is the empty set at the end
    clips = np.full(len(ids), len(manifest))
    clips[rows] = np.arange(len(manifest))
    with_an_empty_one = LabelSets(np.append(label_sets.offsets, label_sets.offsets[-1]), label_sets.indices)
    relations = Ontology.from_json(ontology)
    try:
        enhanced = enhance(with_an_empty_one.take(clips), values, vocabulary, relations, threshold, types).take(rows)
    except InputError as error:
        raise InputError(f"label enhancement with {source}: {error}") from None
    changed = np.count_nonzero(np.diff(enhanced.offsets) > np.diff(label_sets.offsets))
    logger.info(
        "Label enhancement (threshold %s, types %s): %d labels added to %d, on %d of %d clips; scores from %s",
        *(threshold, types if isinstance(types, str) else "+".join(types)),
        *(enhanced.indices.size - label_sets.indices.size, label_sets.indices.size, changed, len(manifest), source),
    )
    warn_of_classes_without_clips(label_sets, vocabulary)
    return enhanced


def propagation_matrix(vocabulary: Vocabulary, ontology: Ontology, parents: str = "ontology") -> np.ndarray:
    """Says which classes (columns) follow from a class (row): bool `[classes, classes]`.

    Of a class with one parent its parent follows, of a parent with one parent that one too, and so on.

    Arguments
    ---------
    parents
        "ontology": all parents in the file count, also abstract ones and others that are no classes, and the way up goes through
        those. "vocabulary": parents that are classes count alone, and what is no class ends the way.

    Raises
    ------
    InputError
        Nothing follows from any class, or `parents` is something else.

    Example
    -------
    >>> below = {"thing": ["animal"], "animal": ["pet", "dog"], "pet": ["dog"], "dog": ["puppy"], "puppy": []}
    >>> ontology = Ontology({"id": mid, "name": mid, "child_ids": children} for mid, children in below.items())
    >>> propagation_matrix(Vocabulary(["puppy", "dog", "animal"], ["Puppy", "Dog", "Animal"]), ontology).astype(int)
    array([[0, 1, 0],
           [0, 0, 0],
           [0, 0, 0]])
    >>> propagation_matrix(Vocabulary(["puppy", "dog", "animal"], ["Puppy", "Dog", "Animal"]), ontology, "vocabulary").astype(int)
    array([[0, 1, 1],
           [0, 0, 1],
           [0, 0, 0]])
    """
    if parents not in PARENTS:
        raise InputError(f"parents must be {' or '.join(map(repr, PARENTS))}, where they are counted, not {parents!r}")

    def above(mid: str) -> list[str]:
        found: list[str] = []
        while len(direct := [p for p in ontology.parents(mid, abstract=True) if parents == "ontology" or p in vocabulary]) == 1:
            (mid,) = direct
            found.append(mid)
        return found

    matrix = relation_matrix(vocabulary, above)
    if not matrix.any():
        raise InputError(
            f"by the ontology no parent follows from any of the {len(vocabulary)} classes; is it that of this data set?"
        )
    return matrix


@overload
def propagate_to_parents(
    label_sets: LabelSets, vocabulary: Vocabulary, ontology: Ontology, parents: str = "ontology"
) -> LabelSets: ...


@overload
def propagate_to_parents(
    label_sets: Sequence[Sequence[int]], vocabulary: Vocabulary, ontology: Ontology, parents: str = "ontology"
) -> list[list[int]]: ...


def propagate_to_parents(
    label_sets: LabelSets | Sequence[Sequence[int]], vocabulary: Vocabulary, ontology: Ontology, parents: str = "ontology"
) -> LabelSets | list[list[int]]:
    """Adds to every clip the parents of its labels, as far up as there is one parent alone, after the labels that it has.

    Arguments
    ---------
    label_sets
        Class indices of each clip: a `LabelSets`, which is what is returned then, or lists.
    parents
        Where parents are counted, "ontology" or "vocabulary", see `propagation_matrix`.

    Raises
    ------
    InputError
        Labels are no indices, nothing follows from any class, or `parents` is something else.
    ValueError
        An index is out of range.

    Example
    -------
    >>> below = {"animal": ["pet"], "pet": ["dog"], "dog": []}
    >>> ontology = Ontology({"id": mid, "name": mid, "child_ids": children} for mid, children in below.items())
    >>> propagate_to_parents([[1], [], [0, 1]], Vocabulary(["animal", "dog"], ["Animal", "Dog"]), ontology)
    [[1, 0], [], [0, 1]]
    """
    if not isinstance(label_sets, LabelSets):
        try:
            flat = LabelSets.from_lists([[operator.index(label) for label in labels] for labels in label_sets])
        except (TypeError, OverflowError):
            raise InputError(
                "label_sets must have the labels of each clip as class indices, which Vocabulary.index gives"
            ) from None
        propagated = propagate_to_parents(flat, vocabulary, ontology, parents)
        return [propagated[clip].tolist() for clip in range(len(propagated))]
    carried = label_sets.to_sparse(len(vocabulary))
    missing = (carried @ csr_array(propagation_matrix(vocabulary, ontology, parents))) > carried
    # a product's indices come in any order; added classes are to be in the vocabulary's
    missing.sort_indices()
    return label_sets.append(*missing.nonzero())


def propagate_annotation(
    manifest: Any, label_sets: LabelSets, vocabulary: Vocabulary, ontology: str | Path, parents: str = "ontology"
) -> LabelSets:
    """Does what `propagate_to_parents` does, with an ontology's file: what `label_enhancement` in a recipe's YAML file can name.

        label_enhancement: !name:psla_sb.labels.enhancement.propagate_annotation
            ontology: !ref <data_folder>/ontology.json
            parents: ontology

    Example
    -------
    >>> from psla_sb.dataio.manifest import Manifest
    >>> path, vocabulary = getfixture("tmp_path") / "ontology.json", Vocabulary(["dog", "animal"], ["Dog", "Animal"])
    >>> _ = path.write_text(
    ...     '[{"id": "animal", "name": "Animal", "child_ids": ["dog"]}, {"id": "dog", "name": "Dog", "child_ids": []}]')
    >>> manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [1.0, 1.0], ["animal", "dog"])
    >>> [row.tolist() for row in propagate_annotation(manifest, manifest.label_sets(vocabulary), vocabulary, path)]
    [[1], [0, 1]]
    """
    relations = Ontology.from_json(ontology)
    try:
        propagated = propagate_to_parents(label_sets, vocabulary, relations, parents)
    except InputError as error:
        raise InputError(f"label enhancement with {ontology}: {error}") from None
    changed = np.count_nonzero(np.diff(propagated.offsets) > np.diff(label_sets.offsets))
    logger.info(
        "Labels propagated to parents (counted in the %s): %d labels added to %d, on %d of %d clips; by %s",
        *(parents, propagated.indices.size - label_sets.indices.size, label_sets.indices.size, changed, len(manifest), ontology),
    )
    return propagated


def warn_of_classes_without_clips(label_sets: LabelSets, vocabulary: Vocabulary) -> None:
    """Logs which classes cannot be added to any clip, having no threshold."""
    names = [vocabulary.names[c] for c in np.flatnonzero(label_sets.counts(len(vocabulary)) == 0)]
    if names:
        some = "; ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
        logger.warning("%d classes are on no clip, so they have no threshold and are not added: %s", len(names), some)


def _average(kind: str | float) -> Callable[[np.ndarray], Any]:
    if kind in ("mean", "median"):
        return getattr(np, str(kind))
    if isinstance(kind, (int, float)) and not isinstance(kind, bool) and 0 <= kind <= 100:
        return lambda values: np.percentile(values, kind)
    raise InputError(f"the threshold must be 'mean', 'median' or a percentile 0 to 100, not {kind!r}")


def _check_scores(scores: np.ndarray, shape: tuple[int, ...]) -> None:
    if scores.shape != shape:
        raise InputError(f"the teacher's scores have the shape {list(scores.shape)}, not [clips, classes] = {list(shape)}")
    if scores.dtype.kind != "f":
        raise InputError(f"the teacher's scores must be floating-point numbers, not {scores.dtype}")


def _blocks(scores: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Gives (first clip, scores of the block's clips) over all clips, and refuses what is not finite."""
    size = max(1, _BLOCK_BYTES // max(1, scores[:1].nbytes))
    mapped: Any = scores
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    # Pages read from a mapped file count as this process's memory until they are given back. Private changes ("c") would be
    # lost by that, and Windows has no such call.
    releases = isinstance(mapped, mmap.mmap) and getattr(scores, "mode", "") == "r" and hasattr(mmap, "MADV_DONTNEED")
    for start in range(0, len(scores), size):
        block = np.asarray(scores[start : start + size])
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise InputError(f"the teacher's scores of clip {start + finite.argmin()} are not all finite numbers")
        yield start, block
        if releases:
            mapped.madvise(mmap.MADV_DONTNEED)
