"""How far figures of merit would move with other clips: a paired bootstrap over clips, of all systems and classes at once.

A resample of N clips draws N of them with replacement; it is kept as how often each clip was drawn, its weights. Scores are sorted
once, whatever the number of resamples, and the weighted figures are those of the drawn rows, ties included.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from tqdm import tqdm

from psla_sb.metrics import d_prime

# Weights that are held at a time, in all, and those that one product of matrices takes: the latter stay in the cache.
HELD_WEIGHTS, SHEET_WEIGHTS, SHEET_RESAMPLES = 1 << 26, 1 << 24, 64


class ClassFigures(NamedTuple):
    """AP and AUC of every class in every resample, float64 `[systems, resamples, classes]`, NaN where undefined."""

    ap: np.ndarray
    auc: np.ndarray


def bootstrap(systems: Sequence[np.ndarray], targets: np.ndarray, n_resamples: int = 1000, seed: int = 0) -> ClassFigures:
    """Computes the figures of every class on resampled clips, the same clips for all systems.

    On a terminal a bar shows the progress. 1,000 resamples of 20,000 clips x 527 classes take half a minute for two systems.

    Arguments
    ---------
    systems
        Scores `[clips, classes]` of each, any range, finite.
    targets
        `[clips, classes]`, 0 or 1.

    Example
    -------
    >>> targets = np.array([[1, 0], [0, 1], [0, 0], [1, 1]])
    >>> good, bad = 0.8 * targets, np.array([[0.1, 0.2], [0.2, 0.1], [0.3, 0.1], [0.4, 0.2]])
    >>> resampled = bootstrap([good, bad], targets, n_resamples=100)
    >>> resampled.ap.shape, float(np.nanmin(resampled.ap[0])), bool((resampled.ap[1] < 1).any())
    ((2, 100, 2), 1.0, True)
    """
    positive = targets == 1
    n_clips, n_classes = positive.shape
    ap, auc = np.empty((2, len(systems), n_resamples, n_classes))
    held = min(n_resamples, max(1, HELD_WEIGHTS // n_clips))
    rng, n_blocks = np.random.default_rng(seed), -(-n_resamples // held)
    with tqdm(total=n_blocks * n_classes, desc="Resampling", unit=" classes", disable=None) as bar:
        for start in range(0, n_resamples, held):
            sheets = list(_sheets(rng, n_clips, min(held, n_resamples - start)))
            block = slice(start, start + held)
            for c in range(n_classes):
                for system, scores in enumerate(systems):
                    ap[system, block, c], auc[system, block, c] = weighted_figures(scores[:, c], positive[:, c], sheets)
                bar.update()
    return ClassFigures(ap, auc)


def _sheets(rng: np.random.Generator, n_clips: int, n_resamples: int) -> Iterator[np.ndarray]:
    """Draws resamples: sheets of weights `[clips, some of the resamples]`. What is drawn does not depend on the sheets' size."""
    # up to 2^24 float32 counts exactly
    dtype = np.float32 if n_clips <= 1 << 24 else np.float64
    width = min(SHEET_RESAMPLES, max(1, SHEET_WEIGHTS // n_clips))
    for start in range(0, n_resamples, width):
        sheet = np.empty((n_clips, min(width, n_resamples - start)), dtype)
        for column in sheet.T:
            column[:] = np.bincount(rng.integers(n_clips, size=n_clips), minlength=n_clips)
        yield sheet


def weighted_figures(scores: np.ndarray, positive: np.ndarray, sheets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Computes (AP, AUC) of one class under every weighting of the clips, float64 `[weightings]` each, NaN where undefined.

    They are those of `psla_sb.metrics` on clips that are repeated as often as their weight says. `scores` and `positive` (bool) are
    `[clips]`; each sheet has weights `[clips, weightings]`.

    Example
    -------
    >>> weights = np.float32([[1, 1], [1, 2], [1, 0]])
    >>> weighted_figures(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), [weights])
    (array([0.8333..., 1. ]), array([0.5, 1. ]))
    """
    if not positive.any():
        undefined = np.full(sum(sheet.shape[1] for sheet in sheets), np.nan)
        return undefined, undefined
    # Only the scores of positive clips matter, each once: the levels. Clips in ascending order fall into stretches,
    #
    #     clips         . . . | + + . | . . | + . | .          + positive, . not
    #     stretch          0      1      2     3    4          even: strictly between levels, odd: at a level
    #     boundaries   0       below  not_above ...    N
    #
    # and a product with a matrix that has a row of ones for each stretch sums the weights of its clips, in all resamples at once.
    order = np.argsort(scores)
    ascending, hits = scores[order], order[positive[order]]
    levels, first_hit = np.unique(scores[hits], return_index=True)
    below, not_above = ascending.searchsorted(levels), ascending.searchsorted(levels, "right")
    boundaries = np.concatenate([[0], np.stack([below, not_above], axis=1).ravel(), [len(order)]])
    stretches, at_levels = _row_sums(order, boundaries, len(order)), _row_sums(hits, [*first_hit, len(hits)], len(order))
    found = [_figures_of_levels(stretches @ sheet, at_levels @ sheet) for sheet in sheets]
    ap, auc = (np.concatenate(column) for column in zip(*found, strict=True))
    return ap, auc


def _row_sums(columns: np.ndarray, boundaries: Sequence[int] | np.ndarray, n_clips: int) -> csr_array:
    """A matrix of ones, a row for the columns between two neighbouring boundaries each."""
    ones = np.ones(len(columns), np.float32)
    return csr_array((ones, columns.astype(np.int32), np.asarray(boundaries, np.int32)), shape=(len(boundaries) - 1, n_clips))


def _figures_of_levels(clips: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(AP, AUC), `[weightings]` each, of the clips in each stretch and the positive ones at each level, as sums of weights."""
    tied, up_to = clips[1::2], clips.cumsum(axis=0, dtype=np.float64)
    hits = hits.astype(np.float64)
    hits_up_to = hits.cumsum(axis=0)
    n_clips, n_hits, below, hits_below = up_to[-1], hits_up_to[-1], up_to[:-1:2], hits_up_to - hits
    # where no clip of the level was drawn, and none above, the quotient's factor `hits` is 0
    precision = (n_hits - hits_below) / np.maximum(n_clips - below, 1)
    misses_below = below - hits_below + (tied - hits) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        ap = (hits * precision).sum(axis=0) / n_hits
        auc = (hits * misses_below).sum(axis=0) / (n_hits * (n_clips - n_hits))
    return ap, auc


def means(figures: ClassFigures) -> dict[str, np.ndarray]:
    """Computes mAP, mAUC and d', each `[systems, resamples]`: in every resample over the classes that have a value there."""
    mean_ap, mean_auc = (_mean_of_defined(values) for values in figures)
    return {"mAP": mean_ap, "mAUC": mean_auc, "d_prime": np.asarray(d_prime(mean_auc))}


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(axis=-1) / defined.sum(axis=-1)


def interval(value: np.ndarray, resampled: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Computes (lowest, highest) of the interval of values `[...]` from their resamples `[resamples, ...]`; NaN where undefined.

    The percentiles of the resamples, moved so that their mean is the value. A resample has some clips several times, so a class has
    fewer different positives in it, and average precision of fewer positives is higher on average: on AudioSet's evaluation clips
    the plain percentiles of mAP may lie above the mAP itself. In differences of two systems this cancels out, nearly.

    Example
    -------
    >>> [round(float(end), 3) for end in interval(np.array(0.5), np.linspace(0.6, 0.8, 201), level=0.9)]
    [0.41, 0.59]
    """
    with warnings.catch_warnings():
        # a class that no resample has, and d' of a perfect system, have no interval
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nanquantile(_centred(value, resampled), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def two_sided_p(difference: float, resampled: np.ndarray) -> float:
    """Computes the two-sided p value of a difference from its resamples `[resamples]`; NaN if one is not finite.

    Twice the share of the resamples, moved as `interval` does, that lie at or beyond 0 on the smaller side, with one more counted
    there: 2 / (resamples + 1) at least. It is at most about 0.05 where the interval of 95 % leaves out 0.

    Example
    -------
    >>> two_sided_p(0.5, np.linspace(0.01, 0.99, 99)), two_sided_p(0.105, np.linspace(0.01, 0.99, 99))
    (0.02, 0.8)
    """
    centred = _centred(difference, resampled)
    if not np.isfinite(centred).all():
        return math.nan
    beyond = min((centred <= 0).sum(), (centred >= 0).sum())
    return min(1.0, 2 * (int(beyond) + 1) / (len(centred) + 1))


def _centred(value: np.ndarray | float, resampled: np.ndarray) -> np.ndarray:
    return resampled + (value - _mean_of_defined(np.moveaxis(resampled, 0, -1)))
