"""Which clips train, validate and test: groups of clips shared out so that every class has its share in every part.

The algorithm is iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data", ECML
PKDD 2011), of groups in place of single clips.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components


def joined_groups(groups: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Numbers the groups of clips, `[clips]`, after groups that a pair of clips connects became one.

    >>> joined_groups(np.array([0, 0, 1, 2]), [(1, 3)]).tolist()
    [0, 0, 1, 0]
    """
    n = len(groups)
    # each clip is connected with the node of its group
    first = np.concatenate([np.arange(n), np.array([a for a, _ in pairs], int)])
    second = np.concatenate([n + groups, np.array([b for _, b in pairs], int)])
    size = n + int(groups.max(initial=-1)) + 1
    _, component = connected_components(
        coo_array((np.ones(len(first), np.int8), (first, second)), shape=(size, size)), directed=False
    )
    return np.unique(component[:n], return_inverse=True)[1].astype(np.int64)


def share_out(labels: csr_array, groups: np.ndarray, shares: Sequence[float], seed: int = 0, train: int | None = 0) -> np.ndarray:
    """Shares clips out to parts, and returns the part of each, `[clips]`; clips of a group stay together.

    Arguments
    ---------
    labels
        `[clips, classes]`, 1 where a clip has a label; a clip may have none.
    groups
        The number of each clip's group, from 0 on.
    shares
        Of the clips, by part; they sum to 1.
    seed
        Of ties.
    train
        The part that gets a clip of each class at any price, if there is one; the other parts get one of each class that has as
        many groups as there are parts, where the other classes of these groups leave a choice.

    Example
    -------
    >>> labels = csr_array(np.repeat(np.eye(2), 10, axis=0))
    >>> parts = share_out(labels, np.arange(20), [0.6, 0.2, 0.2])
    >>> [np.bincount(parts[:10]).tolist(), np.bincount(parts[10:]).tolist()]
    [[6, 2, 2], [6, 2, 2]]
    """
    n_groups = int(groups.max(initial=-1)) + 1
    ones, clips = np.ones(len(groups), np.int64), np.arange(len(groups))
    counts = csr_array(coo_array((ones, (groups, clips)), shape=(n_groups, len(groups))) @ labels.astype(np.int64))
    counts.eliminate_zeros()
    part = _stratified(counts, np.bincount(groups, minlength=n_groups), np.asarray(shares, float), np.random.default_rng(seed))
    if train is not None:
        _mend(part, counts, np.bincount(groups, minlength=n_groups), len(shares), train)
    return part[groups]


def _stratified(counts: csr_array, sizes: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gives the part of each group; the class with the fewest groups left comes first, as its choice is the smallest."""
    n_groups, n_classes = counts.shape
    wanted = shares[:, None] * np.asarray(counts.sum(axis=0))[None]
    room = shares * sizes.sum()
    by_class, shuffled = counts.tocsc(), rng.permutation(n_groups)
    part, left, has = np.full(n_groups, -1), np.diff(by_class.indptr), np.zeros((len(shares), n_classes), bool)

    def put(group: int, chosen: int) -> None:
        row = slice(counts.indptr[group], counts.indptr[group + 1])
        classes = counts.indices[row]
        part[group] = chosen
        wanted[chosen, classes] -= counts.data[row]
        room[chosen] -= sizes[group]
        left[classes] -= 1
        has[chosen, classes] = True

    while left.any():
        c = int(np.where(left > 0, left, n_groups + 1).argmin())
        rows = slice(by_class.indptr[c], by_class.indptr[c + 1])
        of_class, amounts = by_class.indices[rows], by_class.data[rows]
        for group in of_class[np.lexsort((shuffled[of_class], -amounts))]:
            if part[group] >= 0:
                continue
            without = np.flatnonzero(~has[:, c])
            if len(without) >= left[c]:
                # there are no more groups than parts without the class
                put(group, int(without[np.lexsort((-room[without], -shares[without]))[0]]))
            else:
                put(group, int(np.lexsort((-room, -wanted[:, c]))[0]))
    unlabelled = np.flatnonzero(part < 0)
    for group in unlabelled[np.lexsort((shuffled[unlabelled], -sizes[unlabelled]))]:
        put(group, int(room.argmax()))
    return part


def _mend(part: np.ndarray, counts: csr_array, sizes: np.ndarray, n_parts: int, train: int) -> None:
    """Moves groups until each class is in training, and then until it is in each part, if no part loses a class by that.

    A group that went to a part for its rarest class took its other classes with it.
    """
    n_classes = counts.shape[1]
    by_class = counts.tocsc()
    rows = np.repeat(np.arange(len(part)), np.diff(counts.indptr))
    # groups with the class in each part
    present = np.zeros((n_parts, n_classes), np.int64)
    np.add.at(present, (part[rows], counts.indices), 1)

    def move(group: int, to: int) -> None:
        classes = counts.indices[counts.indptr[group] : counts.indptr[group + 1]]
        present[part[group], classes] -= 1
        present[to, classes] += 1
        part[group] = to

    def losses(group: int) -> int:
        classes = counts.indices[counts.indptr[group] : counts.indptr[group + 1]]
        return int((present[part[group], classes] == 1).sum())

    n_groups = np.diff(by_class.indptr)
    for to in [train, *(other for other in range(n_parts) if other != train)]:
        needed = n_groups > 0 if to == train else n_groups >= n_parts
        for c in np.flatnonzero(needed & (present[to] == 0)):
            if present[to, c]:
                # a move for another class brought it
                continue
            groups = by_class.indices[by_class.indptr[c] : by_class.indptr[c + 1]]
            group = min(groups.tolist(), key=lambda group: (losses(group), sizes[group]))
            if to == train or losses(group) == 0:
                move(group, to)


def fold_parts(folds: np.ndarray, n_folds: int, k: int) -> np.ndarray:
    """Parts 0 (train), 1 (validation), 2 (test) of clips when fold `k`, from 0 on, tests and the next one validates.

    >>> fold_parts(np.array([0, 1, 2, 3]), 4, 3).tolist()
    [1, 0, 0, 2]
    """
    return np.select([folds == k, folds == (k + 1) % n_folds], [2, 1], 0)
