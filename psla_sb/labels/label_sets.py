"""The labels of many clips as two flat arrays.

Two million clips with two or three labels each are some 40 MB here and would be gigabytes as Python lists.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
from scipy.sparse import csr_array


@dataclass(frozen=True, eq=False)
class LabelSets:
    """One set of class indices per clip, in compressed sparse row form.

    Clip `i` has the classes `indices[offsets[i] : offsets[i + 1]]`; `len()` is the number of clips.

    Arguments
    ---------
    offsets : np.ndarray
        int64 [clips + 1], not decreasing, from 0 to the number of labels.
    indices : np.ndarray
        int32 [labels], class indices, clip after clip. A class that is given twice for one clip counts once.

    Raises
    ------
    ValueError
        If the offsets do not fit the indices.

    Example
    -------
    >>> labels = LabelSets.from_lists([[0, 2], [], [2]])
    >>> len(labels), labels[0]
    (3, array([0, 2], dtype=int32))
    >>> labels.counts(n_classes=4)
    array([1, 0, 2, 0])
    >>> labels.to_multi_hot([2, 0], n_classes=4)
    array([[0., 0., 1., 0.],
           [1., 0., 1., 0.]], dtype=float32)
    """

    offsets: np.ndarray
    indices: np.ndarray

    def __post_init__(self):
        first_and_last = (self.offsets[0], self.offsets[-1]) if len(self.offsets) else ()
        if first_and_last != (0, len(self.indices)) or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"offsets must rise from 0 to the number of labels, {len(self.indices)}")

    @classmethod
    def from_lists(cls, lists):
        """Flatten a sequence with one sequence of class indices per clip.

        Example
        -------
        >>> LabelSets.from_lists([[5], [1, 3]]).offsets
        array([0, 1, 3])
        """
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, lists), np.int64, len(lists)), out=offsets[1:])
        return cls(offsets, np.fromiter(chain.from_iterable(lists), np.int32, offsets[-1]))

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        return self.indices[self.offsets[i] : self.offsets[i + 1]]

    def pairs(self, n_classes):
        """Every (clip, class) pair once, in order of clip and class.

        Arguments
        ---------
        n_classes : int
            Number of classes.

        Returns
        -------
        clips, classes : np.ndarray
            int64 [pairs] each.

        Raises
        ------
        ValueError
            If a class index is negative or not below `n_classes`.

        Example
        -------
        >>> LabelSets.from_lists([[7, 0, 7], [3]]).pairs(n_classes=8)
        (array([0, 0, 1]), array([0, 7, 3]))
        """
        _check_range(self.indices, n_classes)
        keys = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        keys *= n_classes
        keys += self.indices
        keys.sort()
        keys = keys[np.diff(keys, prepend=-1) > 0]
        clips = keys // n_classes
        return clips, keys - clips * n_classes

    def counts(self, n_classes):
        """Number of clips that carry each class, int64 [classes].

        Raises
        ------
        ValueError
            If a class index is negative or not below `n_classes`.

        Example
        -------
        >>> LabelSets.from_lists([[1], [1, 0]]).counts(n_classes=3)
        array([1, 2, 0])
        """
        return np.bincount(self.pairs(n_classes)[1], minlength=n_classes)

    def to_multi_hot(self, rows, n_classes):
        """Targets of some clips.

        Arguments
        ---------
        rows : array_like
            Clip numbers [rows], from 0, in any order.
        n_classes : int
            Number of classes.

        Returns
        -------
        np.ndarray
            float32 [rows, classes], 1 for the classes that a clip carries and 0 elsewhere.

        Raises
        ------
        ValueError
            If a class index of these clips is negative or not below `n_classes`.
        IndexError
            If there is no such clip.

        Example
        -------
        >>> LabelSets.from_lists([[1], [1, 0]]).to_multi_hot([1], n_classes=3)
        array([[1., 1., 0.]], dtype=float32)
        """
        taken = self.take(rows)
        _check_range(taken.indices, n_classes)
        targets = np.zeros((len(taken), n_classes), np.float32)
        targets[np.repeat(np.arange(len(taken)), np.diff(taken.offsets)), taken.indices] = 1
        return targets

    def to_sparse(self, n_classes):
        """All clips as a sparse matrix.

        Arguments
        ---------
        n_classes : int
            Number of classes.

        Returns
        -------
        scipy.sparse.csr_array
            bool [clips, classes], indices sorted.

        Raises
        ------
        ValueError
            If a class index is negative or not below `n_classes`.

        Example
        -------
        >>> LabelSets.from_lists([[2, 0, 2], []]).to_sparse(n_classes=3).toarray()
        array([[ True, False,  True],
               [False, False, False]])
        """
        clips, classes = self.pairs(n_classes)
        offsets = np.searchsorted(clips, np.arange(len(self) + 1))
        return csr_array((np.ones(classes.size, dtype=bool), classes, offsets), shape=(len(self), n_classes))

    def take(self, rows):
        """The label sets of some clips, in the order asked for.

        Arguments
        ---------
        rows : array_like
            Clip numbers [rows], from 0, in any order.

        Returns
        -------
        LabelSets

        Raises
        ------
        IndexError
            If there is no such clip.

        Example
        -------
        >>> [clip.tolist() for clip in LabelSets.from_lists([[5], [1, 3]]).take([1, 0, 1])]
        [[1, 3], [5], [1, 3]]
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows must be from 0 to {len(self) - 1}, got {rows.min()} to {rows.max()}")
        starts = self.offsets[rows]
        n_labels = self.offsets[rows + 1] - starts
        offsets = np.concatenate([[0], np.cumsum(n_labels)])
        # Label j of all labels of these rows lies at `starts` of its row plus j minus the labels of the rows before.
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], n_labels)
        return LabelSets(offsets, self.indices[np.repeat(starts, n_labels) + within])

    def append(self, clips, classes):
        """Label sets with one more class at the end of some clips.

        Arguments
        ---------
        clips : np.ndarray
            int64 [added], sorted; a clip may be there several times.
        classes : np.ndarray
            int32 [added], class indices.

        Returns
        -------
        LabelSets

        Example
        -------
        >>> labels = LabelSets.from_lists([[5], [], [2]])
        >>> [clip.tolist() for clip in labels.append(np.array([0, 0, 1]), np.array([1, 3, 4]))]
        [[5, 1, 3], [4], [2]]
        """
        shift = np.concatenate([[0], np.cumsum(np.bincount(clips, minlength=len(self)))])
        indices = np.empty(self.indices.size + classes.size, dtype=np.int32)
        indices[np.repeat(shift[:-1], np.diff(self.offsets)) + np.arange(self.indices.size)] = self.indices
        indices[self.offsets[clips + 1] + np.arange(classes.size)] = classes
        return LabelSets(self.offsets + shift, indices)


def _check_range(classes, n_classes):
    if classes.size and not 0 <= classes.min() <= classes.max() < n_classes:
        raise ValueError(
            f"class indices must be from 0 to {n_classes - 1}, got {classes.min()} to {classes.max()}: "
            "do labels and classes come from the same vocabulary?"
        )
