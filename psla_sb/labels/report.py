"""What label enhancement did to the labels of a data set, and what it could do: the tables of `enhance_labels.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array

from psla_sb.labels.enhancement import Types, candidate_matrix, relation_matrix
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.vocabulary import Vocabulary


def added_labels(before: LabelSets, after: LabelSets) -> tuple[np.ndarray, np.ndarray]:
    """Finds the labels that clips have only afterwards: clips and classes, int64 `[added]` each, sorted by clip, then class."""
    old, new, n_classes = _keys(before, after)
    return np.divmod(np.setdiff1d(new, old, assume_unique=True), n_classes)


def mended(noisy: LabelSets, enhanced: LabelSets, clean: LabelSets) -> tuple[float, float]:
    """Says which part of the added labels is right (precision), and which of those taken from `clean` is back (recall).

    NaN if none was added, or none was taken away.
    """
    old, new, target, _ = _keys(noisy, enhanced, clean)
    added, lost = np.setdiff1d(new, old, assume_unique=True), np.setdiff1d(target, old, assume_unique=True)
    right = np.intersect1d(added, lost, assume_unique=True).size
    return (right / added.size if added.size else np.nan, right / lost.size if lost.size else np.nan)


def mended_by_chance(
    noisy: LabelSets, enhanced: LabelSets, clean: LabelSets, vocabulary: Vocabulary, ontology: Ontology, types: Types = ("I", "II")
) -> tuple[float, float]:
    """Says what `mended` would give on average, were as many labels drawn at random from the candidates that have a threshold."""
    carried = noisy.to_sparse(len(vocabulary))
    clips, classes = ((carried @ csr_array(candidate_matrix(vocabulary, ontology, types))) > carried).nonzero()
    known = noisy.counts(len(vocabulary))[classes] > 0
    # A random draw is right as often as all candidates together are.
    precision, _ = mended(noisy, noisy.append(clips[known], classes[known]), clean)
    n_added, n_lost = (added_labels(noisy, other)[0].size for other in (enhanced, clean))
    return precision if n_added else np.nan, precision * n_added / n_lost if n_lost else np.nan


def class_table(before: LabelSets, after: LabelSets, thresholds: np.ndarray, vocabulary: Vocabulary) -> pa.Table:
    """Tells how many clips carry each class: `mid`, `name`, `threshold` (null where there is none), `before`, `after`, `added`."""
    old, new = before.counts(len(vocabulary)), after.counts(len(vocabulary))
    columns = {"mid": vocabulary.mids, "name": vocabulary.names, "threshold": pa.array(thresholds, from_pandas=True)}
    return pa.table({**columns, "before": old, "after": new, "added": new - old})


def pair_table(
    before: LabelSets, after: LabelSets, vocabulary: Vocabulary, ontology: Ontology, types: Types = ("I", "II")
) -> pa.Table:
    """Tells which carried class brought which added one, of which type, on how many clips, most first.

    Columns `carried_mid`, `carried`, `added_mid`, `added`, `type` and `clips`. A label counts for each class that brings it.
    """
    clips, classes = added_labels(before, after)
    added = csr_array((np.ones(clips.size, np.int64), (clips, classes)), shape=(len(before), len(vocabulary)))
    together = (before.to_sparse(len(vocabulary)).astype(np.int64).T @ added).toarray()
    counts = together * candidate_matrix(vocabulary, ontology, types)
    order = np.argsort(-counts, axis=None, kind="stable")[: np.count_nonzero(counts)]
    carried, brought = np.unravel_index(order, counts.shape)
    children = relation_matrix(vocabulary, ontology.children)
    mids, names = np.array(vocabulary.mids), np.array(vocabulary.names)
    columns = {"carried_mid": mids[carried], "carried": names[carried], "added_mid": mids[brought], "added": names[brought]}
    return pa.table({**columns, "type": np.where(children[carried, brought], "I", "II"), "clips": counts[carried, brought]})


def clip_table(manifest: Any, before: LabelSets, after: LabelSets, vocabulary: Vocabulary, n_clips: int = 100) -> pa.Table:
    """Lists the clips of a `Manifest` that got most labels: `ID`, `wav`, `n_added`, `carried` and `added` (display names)."""
    clips, classes = added_labels(before, after)
    counts = np.bincount(clips, minlength=len(before))
    top = np.argsort(-counts, kind="stable")[: min(n_clips, np.count_nonzero(counts))]
    added = LabelSets(np.append(0, np.cumsum(counts)), classes)
    places = ["ID", "wav", *(["start"] if manifest.has_segments else [])]
    table = manifest.table.select(places).take(pa.array(top)).append_column("n_added", pa.array(counts[top]))
    for column, sets in (("carried", before), ("added", added)):
        names = ["; ".join(vocabulary.names[c] for c in sets[clip]) for clip in top]
        table = table.append_column(column, pa.array(names, pa.string()))
    return table


class Audit(NamedTuple):
    """Holds the gaps in the labels of a data set, as numbers of clips, int64 `[classes]` each."""

    carried: np.ndarray  # with the class
    without_parent: np.ndarray  # with the class, but not with all its direct parents that the vocabulary has
    without_child: np.ndarray  # with the class, but with none of its direct children, though the vocabulary has some


def audit(label_sets: LabelSets, vocabulary: Vocabulary, ontology: Ontology) -> Audit:
    """Counts how often a class is there without its parents or children; needs no teacher."""
    n_classes = len(vocabulary)
    carried = label_sets.to_sparse(n_classes).astype(np.int32)
    counts = np.bincount(carried.indices, minlength=n_classes)

    def gaps(relation: Callable[[str], Any], all_needed: bool) -> np.ndarray:
        relatives = relation_matrix(vocabulary, relation)
        # [clips, classes], where a class is carried: how many of its relatives are carried too, with no entry for 0
        present = carried * (carried @ csr_array(relatives.T.astype(np.int32)))
        needed = relatives.sum(axis=1) if all_needed else np.ones(n_classes, dtype=int)
        fine = np.bincount(present.indices[present.data >= needed[present.indices]], minlength=n_classes)
        return np.where(relatives.any(axis=1), counts - fine, 0)

    return Audit(counts, gaps(ontology.parents, True), gaps(ontology.children, False))


def audit_table(found: Audit, vocabulary: Vocabulary) -> pa.Table:
    """Makes a table of an audit, the classes with most gaps first: `mid`, `name`, `clips`, `without_parent`, `without_child`."""
    order = np.argsort(-(found.without_parent + found.without_child), kind="stable")
    columns = {"mid": vocabulary.mids, "name": vocabulary.names, "clips": found.carried}
    return pa.table({**columns, "without_parent": found.without_parent, "without_child": found.without_child}).take(order)


def _keys(*label_sets: LabelSets) -> tuple[Any, ...]:
    """Gives one sorted int64 array of distinct clip * classes + class for each argument, then the number of classes."""
    if len({len(sets) for sets in label_sets}) > 1:
        raise ValueError(f"label sets of different numbers of clips: {[len(sets) for sets in label_sets]}")
    n_classes = 1 + max((int(sets.indices.max()) for sets in label_sets if sets.indices.size), default=0)
    pairs = [sets.pairs(n_classes) for sets in label_sets]
    return *(clips * n_classes + classes for clips, classes in pairs), n_classes
