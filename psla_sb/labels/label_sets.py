"""The labels of many clips as two flat arrays.

Two million clips with two or three labels each are some 40 MB here and would be gigabytes as Python lists.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array


@dataclass(frozen=True, eq=False)
class LabelSets:
    """Holds one set of class indices per clip; `len()` is the number of clips. A class that a clip has twice counts once.

    Example
    -------
    >>> labels = LabelSets.from_lists([[0, 2], [], [2]])
    >>> len(labels), labels[0], labels.counts(n_classes=4)
    (3, array([0, 2], dtype=int32), array([1, 0, 2, 0]))
    >>> labels.to_multi_hot([2, 0], n_classes=4)
    array([[0., 0., 1., 0.],
           [1., 0., 1., 0.]], dtype=float32)
    """

    # compressed sparse rows: clip i has the classes indices[offsets[i] : offsets[i + 1]]
    offsets: np.ndarray  # int64 [clips + 1], not decreasing, from 0 to the number of labels
    indices: np.ndarray  # int32 [labels], clip after clip

    def __post_init__(self) -> None:
        first_and_last = (self.offsets[0], self.offsets[-1]) if len(self.offsets) else ()
        if first_and_last != (0, len(self.indices)) or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"offsets must rise from 0 to the number of labels, {len(self.indices)}")

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> "LabelSets":
        """Flattens one sequence of class indices per clip."""
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return cls(offsets, np.fromiter(chain.from_iterable(lists), np.int32, offsets[-1]))

    def digest(self) -> str:
        """Computes the SHA-256 of all labels."""
        digest = hashlib.sha256(self.offsets.astype(np.int64).data)
        digest.update(self.indices.astype(np.int32).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        i = range(len(self))[i]
        return self.indices[self.offsets[i] : self.offsets[i + 1]]

    def pairs(self, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Lists every (clip, class) pair once, in order of clip and class: clips and classes, int64 `[pairs]` each."""
        if self.indices.size and not 0 <= self.indices.min() <= self.indices.max() < n_classes:
            raise ValueError(
                f"class indices must be from 0 to {n_classes - 1}, got {self.indices.min()} to {self.indices.max()}: "
                "do labels and classes come from the same vocabulary?"
            )
        # one number per pair, in place: sorting and comparing 1 key is faster than 2, and the arrays are long
        keys = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        keys *= n_classes
        keys += self.indices
        keys.sort()
        keys = keys[np.diff(keys, prepend=-1) > 0]
        clips = keys // n_classes
        return clips, keys - clips * n_classes

    def counts(self, n_classes: int) -> np.ndarray:
        """Counts the clips that carry each class: int64 `[classes]`."""
        return np.bincount(self.pairs(n_classes)[1], minlength=n_classes)

    def to_multi_hot(self, rows: ArrayLike, n_classes: int) -> np.ndarray:
        """Gives the targets of some clips: float32 `[rows, classes]`, 1 for the classes that a clip carries."""
        return self.take(rows).to_sparse(n_classes).astype(np.float32).toarray()

    def to_sparse(self, n_classes: int) -> csr_array:
        """Gives all clips as a sparse matrix, bool `[clips, classes]`, with sorted indices."""
        clips, classes = self.pairs(n_classes)
        offsets = np.searchsorted(clips, np.arange(len(self) + 1))
        return csr_array((np.ones(classes.size, dtype=bool), classes, offsets), shape=(len(self), n_classes))

    def take(self, rows: ArrayLike) -> "LabelSets":
        """Gives the label sets of some clips, by number from 0, in the order asked for."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows must be from 0 to {len(self) - 1}, got {rows.min()} to {rows.max()}")
        starts = self.offsets[rows]
        n_labels = self.offsets[rows + 1] - starts
        offsets = np.append(0, np.cumsum(n_labels))
        # Label j of all labels of these rows lies at `starts` of its row plus j minus the labels of the rows before.
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], n_labels)
        return LabelSets(offsets, self.indices[np.repeat(starts, n_labels) + within])

    def append(self, clips: np.ndarray, classes: np.ndarray) -> "LabelSets":
        """Adds classes `[added]` at the end of the sets of clips `[added]`, which are sorted and may repeat."""
        # clip            0      1   2              old labels move to the right by what is added to the clips before,
        # labels          a b    -   c              added ones lie behind their clip's old labels and the added ones before:
        # + (0, x) (1, y) a b x  y   c              shift = [0 1 2 2]
        shift = np.append(0, np.cumsum(np.bincount(clips, minlength=len(self))))
        indices = np.empty(self.indices.size + classes.size, dtype=np.int32)
        indices[np.repeat(shift[:-1], np.diff(self.offsets)) + np.arange(self.indices.size)] = self.indices
        indices[self.offsets[clips + 1] + np.arange(classes.size)] = classes
        return LabelSets(self.offsets + shift, indices)
