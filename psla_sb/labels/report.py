"""What label enhancement did to the labels of a data set, and what it could do: the tables of `enhance_labels.py`.

`added_labels` compares labels; `class_table`, `pair_table` and `clip_table` say where they grew; `mended` says how many of them
are right, where the true labels are known; `audit` needs no teacher and counts gaps.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array

from psla_sb.labels.enhancement import candidate_matrix, relation_matrix


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
    >>> from psla_sb.labels.label_sets import LabelSets
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
    >>> from psla_sb.labels.label_sets import LabelSets
    >>> sets = LabelSets.from_lists
    >>> mended(sets([[0], [1]]), sets([[0, 2], [1, 3]]), sets([[0, 2], [1, 0]]))
    (0.5, 0.5)
    """
    old, new, target, _ = _keys(noisy, enhanced, clean)
    added, lost = np.setdiff1d(new, old, assume_unique=True), np.setdiff1d(target, old, assume_unique=True)
    right = np.intersect1d(added, lost, assume_unique=True).size
    return (right / added.size if added.size else np.nan, right / lost.size if lost.size else np.nan)


def mended_by_chance(noisy, enhanced, clean, vocabulary, ontology, types=("I", "II")):
    """What `mended` is to be compared with: as many labels, drawn from the candidates at random.

    Arguments
    ---------
    noisy, enhanced, clean : LabelSets
        See `mended`.
    vocabulary : Vocabulary
    ontology : Ontology
    types : sequence of str
        See `psla_sb.labels.enhancement.candidate_matrix`.

    Returns
    -------
    precision, recall : float
        The means over all draws of as many of the candidates that have a threshold as were added; NaN as in `mended`.

    Raises
    ------
    ValueError
        If the three are not of as many clips.

    Example
    -------
    >>> from psla_sb.labels.label_sets import LabelSets
    >>> from psla_sb.labels.ontology import Ontology
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> ontology = Ontology([{"id": "animal", "name": "Animal", "child_ids": ["dog", "cat"]},
    ...                      {"id": "dog", "name": "Dog", "child_ids": []}, {"id": "cat", "name": "Cat", "child_ids": []}])
    >>> vocabulary = Vocabulary(["animal", "cat", "dog"], ["Animal", "Cat", "Dog"])
    >>> noisy, enhanced, clean = map(LabelSets.from_lists, ([[0], [1, 2]], [[0, 1], [1, 2]], [[0, 1], [1, 2]]))
    >>> mended(noisy, enhanced, clean), mended_by_chance(noisy, enhanced, clean, vocabulary, ontology)
    ((1.0, 1.0), (0.3333333333333333, 0.3333333333333333))
    """
    carried = noisy.to_sparse(len(vocabulary))
    missing = (carried @ csr_array(candidate_matrix(vocabulary, ontology, types))) > carried
    clips, classes = missing.nonzero()
    known = noisy.counts(len(vocabulary))[classes] > 0
    precision, _ = mended(noisy, noisy.append(clips[known], classes[known]), clean)
    n_added, n_lost = (added_labels(noisy, other)[0].size for other in (enhanced, clean))
    return precision if n_added else np.nan, precision * n_added / n_lost if n_lost else np.nan


def class_table(before, after, thresholds, vocabulary):
    """How many clips carry each class.

    Arguments
    ---------
    before, after : LabelSets
        Of the same clips.
    thresholds : numpy.ndarray [classes]
        See `psla_sb.labels.enhancement.class_thresholds`.
    vocabulary : Vocabulary

    Returns
    -------
    pyarrow.Table
        Columns `mid`, `name`, `threshold` (null where there is none), `before`, `after` and `added` (clips), in the order of the
        vocabulary.

    Example
    -------
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> from psla_sb.labels.label_sets import LabelSets
    >>> before, after = LabelSets.from_lists([[0], [1]]), LabelSets.from_lists([[0, 1], [1]])
    >>> class_table(before, after, np.array([0.5, 0.25]), Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"])).to_pylist()[1]
    {'mid': '/m/2', 'name': 'Rain', 'threshold': 0.25, 'before': 1, 'after': 2, 'added': 1}
    """
    old, new = before.counts(len(vocabulary)), after.counts(len(vocabulary))
    columns = {"mid": vocabulary.mids, "name": vocabulary.names, "threshold": pa.array(thresholds, from_pandas=True)}
    return pa.table({**columns, "before": old, "after": new, "added": new - old})


def pair_table(before, after, vocabulary, ontology, types=("I", "II")):
    """Which carried label brought which added one.

    Arguments
    ---------
    before, after : LabelSets
        Of the same clips.
    vocabulary : Vocabulary
    ontology : Ontology
    types : sequence of str
        What was asked for; see `psla_sb.labels.enhancement.candidate_matrix`.

    Returns
    -------
    pyarrow.Table
        Columns `carried_mid`, `carried`, `added_mid`, `added`, `type` ("I": the added class is a child, "II": an ancestor) and
        `clips`, most clips first. An added label that several carried ones have as a candidate counts for each of them.

    Example
    -------
    >>> from psla_sb.labels.ontology import Ontology
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> ontology = Ontology([{"id": "animal", "name": "Animal", "child_ids": ["dog"]},
    ...                      {"id": "dog", "name": "Dog", "child_ids": []}])
    >>> from psla_sb.labels.label_sets import LabelSets
    >>> before, after = LabelSets.from_lists([[0], [0, 1]]), LabelSets.from_lists([[0, 1], [0, 1]])
    >>> pair_table(before, after, Vocabulary(["dog", "animal"], ["Dog", "Animal"]), ontology).to_pylist()
    [{'carried_mid': 'dog', 'carried': 'Dog', 'added_mid': 'animal', 'added': 'Animal', 'type': 'II', 'clips': 1}]
    """
    n_classes = len(vocabulary)
    added = added_labels(before, after)
    matrix = csr_array((np.ones(added[0].size, np.int64), added), shape=(len(before), n_classes))
    together = (before.to_sparse(n_classes).astype(np.int64).T @ matrix).toarray()
    counts = together * candidate_matrix(vocabulary, ontology, types)
    carried, brought = np.nonzero(counts)
    order = np.argsort(-counts[carried, brought], kind="stable")
    carried, brought = carried[order], brought[order]
    children = relation_matrix(vocabulary, ontology.children)
    mids, names = np.array(vocabulary.mids), np.array(vocabulary.names)
    return pa.table(
        {
            **{"carried_mid": mids[carried], "carried": names[carried], "added_mid": mids[brought], "added": names[brought]},
            "type": np.where(children[carried, brought], "I", "II"),
            "clips": counts[carried, brought],
        }
    )


def clip_table(manifest, before, after, vocabulary, n_clips=100):
    """The clips that got most labels.

    Arguments
    ---------
    manifest : Manifest
        The clips.
    before, after : LabelSets
        Their labels.
    vocabulary : Vocabulary
    n_clips : int
        How many at most.

    Returns
    -------
    pyarrow.Table
        Columns `ID`, `wav`, `n_added`, `carried` and `added` (display names, joined by "; "), most additions first.

    Example
    -------
    >>> from psla_sb.dataio.manifest import Manifest
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [1.0, 1.0], ["/m/1", "/m/2"])
    >>> from psla_sb.labels.label_sets import LabelSets
    >>> before, after = LabelSets.from_lists([[0], [1]]), LabelSets.from_lists([[0], [1, 0]])
    >>> clip_table(manifest, before, after, Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"])).to_pylist()
    [{'ID': 'b', 'wav': 'b.wav', 'n_added': 1, 'carried': 'Rain', 'added': 'Bell'}]
    """
    clips, classes = added_labels(before, after)
    counts = np.bincount(clips, minlength=len(before))
    top = np.argsort(-counts, kind="stable")[: min(n_clips, np.count_nonzero(counts))]

    def names(indices):
        return "; ".join(vocabulary.names[c] for c in indices)

    first = np.searchsorted(clips, top)
    table = manifest.table.select(["ID", "wav"]).take(pa.array(top))
    columns = {
        "n_added": pa.array(counts[top]),
        "carried": pa.array([names(before[clip]) for clip in top], pa.string()),
        "added": pa.array([names(classes[i : i + counts[clip]]) for i, clip in zip(first, top, strict=True)], pa.string()),
    }
    return pa.table({**{name: table[name] for name in table.column_names}, **columns})


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
    >>> from psla_sb.labels.label_sets import LabelSets
    >>> labels = LabelSets.from_lists([[0], [0, 1], [1], [1]])
    >>> found = audit(labels, Vocabulary(["dog", "animal"], ["Dog", "Animal"]), ontology)
    >>> found.without_parent, found.without_child
    (array([1, 0]), array([0, 2]))
    """
    n_classes = len(vocabulary)
    carried = label_sets.to_sparse(n_classes).astype(np.int32)
    counts = np.bincount(carried.indices, minlength=n_classes)

    def gaps(relation, all_needed):
        relatives = relation_matrix(vocabulary, relation)
        present = carried * (carried @ csr_array(relatives.T.astype(np.int32)))
        needed = relatives.sum(axis=1) if all_needed else np.ones(n_classes, dtype=int)
        fine = np.bincount(present.indices[present.data >= needed[present.indices]], minlength=n_classes)
        return np.where(relatives.any(axis=1), counts - fine, 0)

    return Audit(counts, gaps(ontology.parents, True), gaps(ontology.children, False))


def audit_table(found, vocabulary):
    """An audit as a table.

    Arguments
    ---------
    found : Audit
    vocabulary : Vocabulary

    Returns
    -------
    pyarrow.Table
        Columns `mid`, `name`, `clips`, `without_parent` and `without_child`, the classes with most gaps first.

    Example
    -------
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> found = Audit(np.array([3, 5]), np.array([1, 0]), np.array([0, 2]))
    >>> audit_table(found, Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"])).to_pylist()[0]
    {'mid': '/m/2', 'name': 'Rain', 'clips': 5, 'without_parent': 0, 'without_child': 2}
    """
    order = np.argsort(-(found.without_parent + found.without_child), kind="stable")
    columns = {"mid": vocabulary.mids, "name": vocabulary.names, "clips": found.carried}
    return pa.table({**columns, "without_parent": found.without_parent, "without_child": found.without_child}).take(order)


def _keys(*label_sets):
    """One sorted int64 array of distinct clip * classes + class for each argument, then the number of classes."""
    if len({len(sets) for sets in label_sets}) > 1:
        raise ValueError(f"label sets of different numbers of clips: {[len(sets) for sets in label_sets]}")
    n_classes = 1 + max((int(sets.indices.max()) for sets in label_sets if sets.indices.size), default=0)
    pairs = [sets.pairs(n_classes) for sets in label_sets]
    return *(clips * n_classes + classes for clips, classes in pairs), n_classes
