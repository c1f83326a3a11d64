"""Figures of merit of audio tagging: average precision, area under the ROC curve, d-prime, and what a stage collects for them.

A figure that is added to `METRICS` is in every row of `results.json`, in every table and on every model card.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# The range to which the loss clamps scores, in training and here.
SCORE_FLOOR = 1e-7
# Classes that are transposed and sorted together: few enough to stay in the cache, whole cache lines of every clip's row.
CLASS_BLOCK = 32


class Evaluation(NamedTuple):
    """What figures are computed from: scores and targets `[clips, classes]`, AP and AUC `[classes]`, NaN where undefined."""

    scores: np.ndarray
    targets: np.ndarray
    ap: np.ndarray
    auc: np.ndarray


class Metric(NamedTuple):
    """A figure: how it is computed, what it means, and how a table's column shows it."""

    compute: Callable[[Evaluation], float]
    meaning: str
    title: str
    column: str


METRICS = {
    "mAP": Metric(lambda e: _mean_of_defined(e.ap), "mean over the classes of the average precision", "mAP", "9.4f"),
    "mAUC": Metric(lambda e: _mean_of_defined(e.auc), "mean over the classes of the area under the ROC curve", "mAUC", "8.4f"),
    "d_prime": Metric(
        lambda e: float(d_prime(_mean_of_defined(e.auc))), "sqrt(2) times the inverse normal CDF of mAUC", "d-prime", "9.3f"
    ),
}


def table_heads() -> str:
    """The titles of all figures, as wide as what `table_cells` gives."""
    return "".join(f"{metric.title:>{metric.column.partition('.')[0]}}" for metric in METRICS.values())


def table_cells(figures: Mapping[str, Any]) -> str:
    """Figures as the cells of a table's row; those that a row lacks are left empty at its end."""
    return "".join(f"{figures[name]:{metric.column}}" for name, metric in METRICS.items() if name in figures)


def average_precision(scores: np.ndarray | torch.Tensor, targets: np.ndarray | torch.Tensor) -> np.ndarray:
    """Computes the average precision of every class: scikit-learn's `average_precision_score`, all classes at once.

    With P positive clips, the mean over them of (positives with at least this score) / (clips with at least this score).

    Arguments
    ---------
    scores
        `[clips, classes]`, any range. Compared exactly, in their own precision.
    targets
        `[clips, classes]`, 0 or 1.

    Returns
    -------
    float64 `[classes]`, NaN for a class without a positive clip.

    Raises
    ------
    ValueError
        If shapes differ, a score is NaN or a target is neither 0 nor 1.

    Example
    -------
    >>> average_precision(np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), np.array([[1, 0], [0, 0], [1, 0]]))
    array([0.8333..., nan])
    """
    return _ap_and_auc(scores, targets)[0]


def roc_auc(scores: np.ndarray | torch.Tensor, targets: np.ndarray | torch.Tensor) -> np.ndarray:
    """Computes the area under the ROC curve of every class: scikit-learn's `roc_auc_score`, all classes at once.

    The probability that a positive clip scores higher than a negative one, ties counting half (Mann-Whitney). Arguments and
    errors as of `average_precision`; NaN for a class without a positive or without a negative clip.

    Example
    -------
    >>> roc_auc(np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), np.array([[1, 0], [0, 0], [1, 0]]))
    array([0.5, nan])
    """
    return _ap_and_auc(scores, targets)[1]


def best_f1(scores: np.ndarray | torch.Tensor, targets: np.ndarray | torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Finds each class's threshold with the highest F1 score, and that score: float64 `[classes]`, NaN without a positive clip.

    A clip is tagged if it scores the threshold at least. Of several thresholds that are as good it is the highest.

    Example
    -------
    >>> best_f1(np.array([[0.9], [0.8], [0.7], [0.1]]), np.array([[1], [0], [1], [0]]))
    (array([0.7]), array([0.8]))
    """
    thresholds, best = np.full((2, scores.shape[1]), np.nan)
    for c, levels, hits, tagged in _levels(scores, targets):
        f1 = 2 * hits / (tagged + hits[-1])
        thresholds[c], best[c] = levels[np.argmax(f1)], f1.max()
    return thresholds, best


def threshold_at_precision(scores: np.ndarray | torch.Tensor, targets: np.ndarray | torch.Tensor, precision: float) -> np.ndarray:
    """Finds each class's lowest threshold at which at least such a share of the tagged clips is positive: float64 `[classes]`.

    It is infinite where there is no such threshold, and NaN without a positive clip.

    Example
    -------
    >>> threshold_at_precision(np.array([[0.9], [0.8], [0.7], [0.1]]), np.array([[1], [0], [1], [0]]), 0.6)
    array([0.7])
    """
    thresholds = np.full(scores.shape[1], np.nan)
    for c, levels, hits, tagged in _levels(scores, targets):
        enough = np.flatnonzero(hits / tagged >= precision)
        thresholds[c] = levels[enough[-1]] if len(enough) else np.inf
    return thresholds


def f1_of(decided: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Computes each class's F1 score of decisions, bool `[clips, classes]`: float64 `[classes]`, NaN without a positive clip.

    Example
    -------
    >>> f1_of(np.array([[True, False], [True, True]]), np.array([[1, 0], [0, 0]]))
    array([0.6666..., nan])
    """
    positive = targets == 1
    hits, positives = (decided & positive).sum(axis=0), positive.sum(axis=0)
    return np.where(positives > 0, 2 * hits / np.maximum(decided.sum(axis=0) + positives, 1), np.nan)


def _levels(scores: Any, targets: Any) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each class with a positive clip: its scores, falling, each once; positives, and clips, with that score at least."""
    scores, targets = _to_numpy(scores), _to_numpy(targets)
    for c in np.flatnonzero(targets.any(axis=0)):
        order = np.argsort(-scores[:, c])
        column, hits = scores[order, c], np.cumsum(targets[order, c])
        # where equal scores end: no threshold parts them
        last = np.append(np.flatnonzero(np.diff(column)), len(column) - 1)
        yield int(c), column[last], hits[last], last + 1


def d_prime(auc: float | np.ndarray) -> float | np.ndarray:
    """Computes the sensitivity index: sqrt(2) times the inverse normal CDF of the area under the ROC curve.

    Example
    -------
    >>> round(d_prime(0.974), 3)
    2.748
    """
    index = math.sqrt(2) * torch.special.ndtri(torch.as_tensor(auc, dtype=torch.float64)).numpy()
    return index if np.ndim(auc) else float(index)


def summarize(scores: np.ndarray | torch.Tensor, targets: np.ndarray | torch.Tensor) -> dict[str, Any]:
    """Computes the figures of one evaluation.

    Those of `METRICS`; `loss`, the binary cross-entropy, mean over clips and classes; and `n_classes_left_out`, the number of
    classes without a positive clip, which have no AP. Arguments and errors as of `average_precision`.

    Example
    -------
    >>> scores, targets = np.array([[0.9, 0.1], [0.2, 0.2], [0.7, 0.3]]), np.array([[1, 0], [0, 0], [1, 0]])
    >>> summarize(scores, targets)
    {'mAP': 1.0, 'mAUC': 1.0, 'd_prime': inf, 'loss': 0.228..., 'n_classes_left_out': 1}
    """
    return _summarize(Evaluation(_to_numpy(scores), _to_numpy(targets), *_ap_and_auc(scores, targets)))


class TaggingStats:
    """Collects the scores of a stage, `scores` and `targets` float32 `[clips, classes]`, and computes their figures.

    Every rank fills the rows of its own clips; `reduce` adds the ranks' arrays up. As all other rows are zero, the sum is what
    one process would have collected, to the last bit, however the clips were shared out.

    Example
    -------
    >>> stats = TaggingStats(n_clips=3, n_classes=2)
    >>> stats.append([2, 0], torch.tensor([[0.7, 0.6], [0.9, 0.1]]), torch.tensor([[0, 1], [1, 0]]))
    >>> stats.append([1], torch.tensor([[0.8, 0.2]]), torch.tensor([[1, 0]]))
    >>> stats.reduce()
    >>> stats.summarize()["mAP"], stats.ap
    (1.0, array([1., 1.]))
    """

    def __init__(self, n_clips: int, n_classes: int):
        self.scores, self.targets = torch.zeros(n_clips, n_classes), torch.zeros(n_clips, n_classes)
        self._n_times = torch.zeros(n_clips, dtype=torch.int32)

    def append(self, index: Any, scores: np.ndarray | torch.Tensor, targets: np.ndarray | torch.Tensor) -> None:
        """Writes a batch, `[batch, classes]` on any device, into the rows of its clips, `index` `[batch]`."""
        index = torch.as_tensor(index, dtype=torch.int64, device="cpu")
        shape = (*index.shape, self.scores.shape[1])
        if index.ndim != 1 or tuple(scores.shape) != shape or tuple(targets.shape) != shape:
            raise ValueError(
                f"scores and targets must both be [batch, classes] = {list(shape)}, "
                f"got {list(scores.shape)} and {list(targets.shape)}"
            )
        self._n_times.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        self.scores[index] = _to_float32(scores)
        self.targets[index] = _to_float32(targets)

    def reduce(self) -> None:
        """Adds up what the ranks have collected; to be called once, on every rank. One process has only its clips checked.

        Example
        -------
        >>> TaggingStats(n_clips=2, n_classes=1).reduce()
        Traceback (most recent call last):
        ...
        RuntimeError: of 2 clips, 2 were not scored and 0 were scored more than once: rows [0, 1]
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # NCCL moves nothing but memory of the rank's GPU.
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            for array in (self._n_times, self.scores, self.targets):
                on_device = array.to(device)
                torch.distributed.all_reduce(on_device)
                array.copy_(on_device)
        self._check_complete()

    def summarize(self) -> dict[str, Any]:
        """Computes the figures of the whole set, see the function `summarize`; sets `ap` and `auc`, float64 `[classes]`."""
        self._check_complete()
        self.ap, self.auc = _ap_and_auc(self.scores, self.targets)
        return _summarize(Evaluation(self.scores.numpy(), self.targets.numpy(), self.ap, self.auc))

    def _check_complete(self) -> None:
        missing, repeated = (torch.nonzero(wrong).flatten() for wrong in (self._n_times == 0, self._n_times > 1))
        if len(missing) or len(repeated):
            rows = torch.cat([missing, repeated])[:10].tolist()
            raise RuntimeError(
                f"of {len(self._n_times)} clips, {len(missing)} were not scored and {len(repeated)} were scored more than once: "
                f"rows {rows}" + (" and others" if len(missing) + len(repeated) > 10 else "")
            )


class MeanScores:
    """The mean of several models' scores `[clips, classes]`, float64, as one after the other is added.

    Example
    -------
    >>> mean = MeanScores()
    >>> mean.add(np.float32([[0.25]])), mean.add(np.float32([[0.75]]))
    (array([[0.25]]), array([[0.5]]))
    """

    def __init__(self) -> None:
        self.total, self.n_members = np.zeros(()), 0

    def add(self, scores: np.ndarray) -> np.ndarray:
        """Adds a model's scores, and returns the mean so far."""
        self.total, self.n_members = self.total + scores.astype(np.float64), self.n_members + 1
        return self.total / self.n_members


def _to_numpy(array: Any) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def _to_float32(array: Any) -> torch.Tensor:
    return torch.as_tensor(array).detach().to("cpu", torch.float32)


def _ap_and_auc(scores: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """(AP, AUC), each float64 [classes]: both need the sorted scores, which are nearly all of the work."""
    scores, targets = _to_numpy(scores), _to_numpy(targets)
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(f"scores and targets must both be [clips, classes], got {list(scores.shape)} and {list(targets.shape)}")
    n_clips, n_classes = scores.shape
    ap, auc = np.full(n_classes, np.nan), np.full(n_classes, np.nan)
    for start in range(0, n_classes, CLASS_BLOCK):
        block = slice(start, start + CLASS_BLOCK)
        columns, labels = scores[:, block].T.copy(), targets[:, block].T.copy()
        positive = labels == 1
        if np.count_nonzero(labels) != np.count_nonzero(positive):
            raise ValueError("targets must be 0 or 1")
        hits = [np.sort(column[is_hit]) for column, is_hit in zip(columns, positive, strict=True)]
        columns.sort(axis=1)
        if np.isnan(columns[:, -1:]).any():  # sorting puts NaN last
            raise ValueError("a score is NaN")
        for c, (column, hit) in enumerate(zip(columns, hits, strict=True), start):
            n_hits, n_misses = len(hit), n_clips - len(hit)
            if n_hits == 0:
                continue
            below, not_above = column.searchsorted(hit), column.searchsorted(hit, "right")
            hits_below, hits_not_above = hit.searchsorted(hit), hit.searchsorted(hit, "right")
            ap[c] = ((n_hits - hits_below) / (n_clips - below)).mean()
            if n_misses:
                auc[c] = (below + not_above - hits_below - hits_not_above).sum() / (2 * n_hits * n_misses)
    return ap, auc


def _summarize(evaluation: Evaluation) -> dict[str, Any]:
    clamped = _to_float32(evaluation.scores).clamp(SCORE_FLOOR, 1 - SCORE_FLOOR)
    return {
        **{name: metric.compute(evaluation) for name, metric in METRICS.items()},
        "loss": F.binary_cross_entropy(clamped, _to_float32(evaluation.targets)).item(),
        "n_classes_left_out": int(np.isnan(evaluation.ap).sum()),
    }


def _mean_of_defined(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


FIGURES = tuple(METRICS)
