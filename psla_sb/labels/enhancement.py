"""Label enhancement: adds the parents and children that annotators left out, where a teacher model hears them.

Section III-D of "PSLA: Improving Audio Tagging with Pretraining, Sampling, Labeling, and Aggregation" (Gong, Chung, Glass;
IEEE/ACM TASLP 29, 2021, arXiv 2102.01243). Two kinds of error are mended: a clip carries a class but not a direct child of it
that sounds too (Type I), or not one of its ancestors (Type II). A teacher's scores on the training clips decide: a missing
relative is added where its score is above what is usual on clips that do carry it.

`enhance_labels` takes and gives lists of mids; `enhance` does the same on index arrays and on memory-mapped scores, for
millions of clips.
"""

import mmap
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from psla_sb.errors import InputError
from psla_sb.labels.label_sets import LabelSets

# Human voice, Crash cymbal, Human group actions, Respiratory sounds, Domestic sounds: what carries one of these is left as it
# is, as in the published system. They are classes of FSD50K, not of AudioSet.
NEVER_GENERATE = ("/m/09l8g", "/m/0bm0k", "/t/dd00012", "/m/09hlz4", "/t/dd00071")
_BLOCK_BYTES = 2**26


def class_thresholds(scores, label_sets, kind="mean"):
    """What a teacher usually gives to clips that carry a class.

    Arguments
    ---------
    scores : numpy.ndarray or numpy.memmap [clips, classes]
        The teacher's scores, float16, float32 or float64; read in blocks of clips.
    label_sets : LabelSets, or numpy.ndarray [clips, classes]
        The labels that the clips came with; as an array, whatever is not 0 is carried. A label that a clip has twice counts
        once.
    kind : "mean", "median" or float
        A number is a percentile, 0 to 100, interpolated linearly.

    Returns
    -------
    numpy.ndarray [classes]
        float64; NaN for a class that no clip carries.

    Raises
    ------
    InputError
        If the scores have another shape, are not floating-point or not finite, or for another `kind`.

    Example
    -------
    >>> scores = np.array([[0.9, 0.5, 0.1], [0.3, 0.2, 0.1]])
    >>> class_thresholds(scores, LabelSets.from_lists([[0, 1], [0]]))
    array([0.6, 0.5, nan])
    """
    average = _average(kind)
    scores = np.asanyarray(scores)
    if not isinstance(label_sets, LabelSets):
        _check_scores(scores, np.shape(label_sets))
        carried = csr_array(np.asarray(label_sets) != 0)
    else:
        n_classes = scores.shape[1] if scores.ndim == 2 else 0
        _check_scores(scores, (len(label_sets), n_classes))
        carried = _matrix(label_sets, n_classes)
    gathered = [np.empty(0)]
    for start, stop, block in _blocks(scores):
        clips, classes = carried[start:stop].nonzero()
        gathered.append(block[clips, classes].astype(np.float64))
    by_class = np.argsort(carried.indices, kind="stable")
    counts = np.bincount(carried.indices, minlength=scores.shape[1])
    parts = np.split(np.concatenate(gathered)[by_class], np.cumsum(counts)[:-1])
    # One call of NumPy's own mean or percentile per class, so that the figures are theirs to the last bit.
    return np.array([average(part) if part.size else np.nan for part in parts])


def candidate_matrix(vocabulary, ontology, types=("I", "II")):
    """Which classes are looked for on a clip because of a class that it carries.

    Arguments
    ---------
    vocabulary : Vocabulary
    ontology : Ontology
    types : sequence of str
        "I" for direct children, "II" for all ancestors.

    Returns
    -------
    numpy.ndarray [classes, classes]
        bool; in row i are the candidates of class i. Rows of `NEVER_GENERATE` are empty.

    Raises
    ------
    InputError
        If `types` is empty or has something else than "I" and "II".

    Example
    -------
    >>> from psla_sb.labels.ontology import Ontology
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> ontology = Ontology([{"id": "animal", "name": "Animal", "child_ids": ["dog"]},
    ...                      {"id": "dog", "name": "Dog", "child_ids": []}])
    >>> candidate_matrix(Vocabulary(["dog", "animal"], ["Dog", "Animal"]), ontology, ("II",))
    array([[False,  True],
           [False, False]])
    """
    types = {types} if isinstance(types, str) else set(types)
    if not types or types - {"I", "II"}:
        raise InputError(f"label enhancement: types must be from 'I' and 'II', not {sorted(map(str, types))}")
    matrix = np.zeros((len(vocabulary), len(vocabulary)), dtype=bool)
    relations = {"I": ontology.children, "II": ontology.ancestors}
    for kind in types:
        matrix |= _related(vocabulary, relations[kind])
    matrix[[vocabulary.index(mid) for mid in NEVER_GENERATE if mid in vocabulary]] = False
    return matrix


def enhance(label_sets, scores, vocabulary, ontology, threshold="mean", types=("I", "II")):
    """Add missing children and ancestors to the labels of a data set.

    A candidate is added to a clip where the teacher's score is strictly greater than the class's threshold (see
    `class_thresholds`). Only labels that the clip came with generate candidates, so nothing follows from an added label. A
    class that no clip carries is never added.

    Arguments
    ---------
    label_sets : LabelSets
        Class indices of every clip. A clip may have none, or one twice.
    scores : numpy.ndarray or numpy.memmap [clips, classes]
        The teacher's scores on these clips, float16, float32 or float64, compared in float64. They are read in blocks of
        clips, so a memory-mapped file may be larger than the memory.
    vocabulary : Vocabulary
    ontology : Ontology
    threshold : "mean", "median" or float
        See `class_thresholds`.
    types : sequence of str
        "I" adds direct children, "II" ancestors.

    Returns
    -------
    LabelSets
        Every clip's labels as they were, followed by the added ones in the order of the vocabulary.

    Raises
    ------
    InputError
        If the scores have another shape, are not floating-point or not finite, or for another threshold or type.

    Example
    -------
    >>> from psla_sb.labels.ontology import Ontology
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> ontology = Ontology([{"id": "animal", "name": "Animal", "child_ids": ["dog"]},
    ...                      {"id": "dog", "name": "Dog", "child_ids": []}])
    >>> scores = np.array([[0.9, 0.5], [0.8, 0.6]], dtype=np.float16)
    >>> labels = LabelSets.from_lists([[0, 1], [0]])
    >>> [row.tolist() for row in enhance(labels, scores, Vocabulary(["dog", "animal"], ["Dog", "Animal"]), ontology)]
    [[0, 1], [0, 1]]
    """
    scores = np.asanyarray(scores)
    _check_scores(scores, (len(label_sets), len(vocabulary)))
    relation = csr_array(candidate_matrix(vocabulary, ontology, types))
    thresholds = class_thresholds(scores, label_sets, threshold)
    carried = _matrix(label_sets, len(vocabulary))
    clips, classes = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for start, stop, block in _blocks(scores):
        has = carried[start:stop]
        missing = (has @ relation) > has
        missing.sort_indices()
        rows, columns = missing.nonzero()
        added = block[rows, columns].astype(np.float64) > thresholds[columns]
        clips.append(rows[added].astype(np.int64) + start)
        classes.append(columns[added].astype(np.int32))
    return _append(label_sets, np.concatenate(clips), np.concatenate(classes))


def enhance_labels(label_sets, scores, vocabulary, ontology, threshold="mean", types=("I", "II")):
    """`enhance` for label sets written as lists of mids.

    Arguments
    ---------
    label_sets : list of list of str
        Mids of every clip.
    scores : numpy.ndarray or numpy.memmap [clips, classes]
        The teacher's scores on these clips.
    vocabulary : Vocabulary
    ontology : Ontology
    threshold : "mean", "median" or float
        See `class_thresholds`.
    types : sequence of str
        "I" adds direct children, "II" ancestors.

    Returns
    -------
    list of list of str
        Every clip's mids as they were, followed by the added ones in the order of the vocabulary.

    Raises
    ------
    InputError
        As `enhance`, and if a mid is not in the vocabulary.

    Example
    -------
    >>> from psla_sb.labels.ontology import Ontology
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> ontology = Ontology([{"id": "animal", "name": "Animal", "child_ids": ["dog"]},
    ...                      {"id": "dog", "name": "Dog", "child_ids": []}])
    >>> vocabulary = Vocabulary(["dog", "animal"], ["Dog", "Animal"])
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


def added_labels(before, after):
    """The labels that clips have afterwards and had not before.

    Arguments
    ---------
    before, after : LabelSets
        Of the same clips.

    Returns
    -------
    clips, classes : numpy.ndarray [added]
        int64; one pair per added label, sorted by clip, then by class.

    Raises
    ------
    ValueError
        If the two are not of as many clips.

    Example
    -------
    >>> added_labels(LabelSets.from_lists([[3], [0]]), LabelSets.from_lists([[3], [0, 2]]))
    (array([1]), array([2]))
    """
    old, new, n_classes = _keys(before, after)
    return np.divmod(np.setdiff1d(new, old, assume_unique=True), n_classes)


def mended(noisy, enhanced, clean):
    """How well enhancement brought back labels that had been taken away.

    Arguments
    ---------
    noisy : LabelSets
        Labels with some taken away.
    enhanced : LabelSets
        `noisy` after enhancement.
    clean : LabelSets
        The labels before some were taken away.

    Returns
    -------
    precision : float
        Which part of the added labels is right; NaN if none was added.
    recall : float
        Which part of the labels taken away is back; NaN if none was taken away.

    Raises
    ------
    ValueError
        If the three are not of as many clips.

    Example
    -------
    >>> sets = LabelSets.from_lists
    >>> mended(sets([[0], [1]]), sets([[0, 2], [1, 3]]), sets([[0, 2], [1, 0]]))
    (0.5, 0.5)
    """
    old, new, target, _ = _keys(noisy, enhanced, clean)
    added, lost = np.setdiff1d(new, old, assume_unique=True), np.setdiff1d(target, old, assume_unique=True)
    right = np.intersect1d(added, lost, assume_unique=True).size
    return (right / added.size if added.size else np.nan, right / lost.size if lost.size else np.nan)


class Audit(NamedTuple):
    """Gaps in the labels of a data set, as numbers of clips per class, int64 [classes] each.

    Example
    -------
    >>> Audit(carried=np.array([3]), without_parent=np.array([1]), without_child=np.array([0])).without_parent
    array([1])
    """

    carried: np.ndarray
    """Clips that carry the class."""
    without_parent: np.ndarray
    """Clips that carry the class and lack one of its direct parents, of those in the vocabulary."""
    without_child: np.ndarray
    """Clips that carry the class and none of its direct children, though the vocabulary has some."""


def audit(label_sets, vocabulary, ontology):
    """Count how often a class is there without its parents or children.

    Arguments
    ---------
    label_sets : LabelSets
    vocabulary : Vocabulary
    ontology : Ontology

    Returns
    -------
    Audit

    Example
    -------
    >>> from psla_sb.labels.ontology import Ontology
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> ontology = Ontology([{"id": "animal", "name": "Animal", "child_ids": ["dog"]},
    ...                      {"id": "dog", "name": "Dog", "child_ids": []}])
    >>> labels = LabelSets.from_lists([[0], [0, 1], [1], [1]])
    >>> found = audit(labels, Vocabulary(["dog", "animal"], ["Dog", "Animal"]), ontology)
    >>> found.without_parent, found.without_child
    (array([1, 0]), array([0, 2]))
    """
    n_classes = len(vocabulary)
    carried = _matrix(label_sets, n_classes).astype(np.int32)
    counts = np.bincount(carried.indices, minlength=n_classes)

    def gaps(relation, all_needed):
        relatives = _related(vocabulary, relation)
        present = carried * (carried @ csr_array(relatives.T.astype(np.int32)))
        needed = relatives.sum(axis=1) if all_needed else np.ones(n_classes, dtype=int)
        fine = np.bincount(present.indices[present.data >= needed[present.indices]], minlength=n_classes)
        return np.where(relatives.any(axis=1), counts - fine, 0)

    return Audit(counts, gaps(ontology.parents, True), gaps(ontology.children, False))


def _average(kind):
    if kind in ("mean", "median"):
        return getattr(np, kind)
    if isinstance(kind, (int, float)) and not isinstance(kind, bool) and 0 <= kind <= 100:
        return lambda values: np.percentile(values, kind)
    raise InputError(f"label enhancement: the threshold must be 'mean', 'median' or a percentile 0 to 100, not {kind!r}")


def _check_scores(scores, shape):
    if scores.shape != tuple(shape):
        raise InputError(f"the teacher's scores have the shape {list(scores.shape)}, not [clips, classes] = {list(shape)}")
    if scores.dtype.kind != "f":
        raise InputError(f"the teacher's scores must be floating-point numbers, not {scores.dtype}")


def _blocks(scores):
    """Yield (start, stop, scores [clips of the block, classes]) over all clips, refusing what is not finite."""
    size = max(1, _BLOCK_BYTES // max(1, scores[:1].nbytes))
    mapped = scores
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
        yield start, start + len(block), block
        if releases:
            mapped.madvise(mmap.MADV_DONTNEED)


def _matrix(label_sets, n_classes):
    """Label sets as a sparse bool matrix [clips, classes], repeated labels once, indices sorted."""
    clips, classes = label_sets.pairs(n_classes)
    offsets = np.searchsorted(clips, np.arange(len(label_sets) + 1))
    return csr_array((np.ones(classes.size, dtype=bool), classes, offsets), shape=(len(label_sets), n_classes))


def _related(vocabulary, relation):
    """bool [classes, classes]: column j of row i is set if relation(i) has j."""
    matrix = np.zeros((len(vocabulary), len(vocabulary)), dtype=bool)
    for i, mid in enumerate(vocabulary.mids):
        matrix[i, [vocabulary.index(other) for other in relation(mid) if other in vocabulary]] = True
    return matrix


def _keys(*label_sets):
    """One sorted int64 array of distinct clip * classes + class for each argument, then the number of classes."""
    if len({len(sets) for sets in label_sets}) > 1:
        raise ValueError(f"label sets of different numbers of clips: {[len(sets) for sets in label_sets]}")
    n_classes = 1 + max((int(sets.indices.max()) for sets in label_sets if sets.indices.size), default=0)
    pairs = [sets.pairs(n_classes) for sets in label_sets]
    return *(clips * n_classes + classes for clips, classes in pairs), n_classes


def _append(label_sets, clips, classes):
    """Label sets with classes added to the end of clips, which are sorted."""
    more = np.bincount(clips, minlength=len(label_sets))
    shift = np.concatenate([[0], np.cumsum(more)])
    indices = np.empty(label_sets.indices.size + classes.size, dtype=np.int32)
    old = np.repeat(shift[:-1], np.diff(label_sets.offsets)) + np.arange(label_sets.indices.size)
    indices[old] = label_sets.indices
    indices[label_sets.offsets[clips + 1] + np.arange(classes.size)] = classes
    return LabelSets(label_sets.offsets + shift, indices)
