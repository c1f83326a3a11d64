"""Figures of merit of audio tagging: average precision, area under the ROC curve, d-prime, and what a stage collects for them."""

import math

import numpy as np
import torch
import torch.nn.functional as F

# The range to which the loss clamps scores, in training and here.
SCORE_FLOOR = 1e-7
# Classes that are transposed and sorted together: few enough to stay in the cache, whole cache lines of every clip's row.
CLASS_BLOCK = 32


def average_precision(scores, targets):
    """Average precision of every class: scikit-learn's `average_precision_score`, all classes at once.

    With P positive clips, the mean over them of (positives with at least this score) / (clips with at least this score).

    Arguments
    ---------
    scores : np.ndarray | torch.Tensor
        [clips, classes], any range. Compared exactly, in their own precision.
    targets : np.ndarray | torch.Tensor
        [clips, classes], 0 or 1.

    Returns
    -------
    np.ndarray
        float64 [classes], NaN for a class without a positive clip.

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


def roc_auc(scores, targets):
    """Area under the ROC curve of every class: scikit-learn's `roc_auc_score`, all classes at once.

    The probability that a positive clip scores higher than a negative one, ties counting half (Mann-Whitney).

    Arguments
    ---------
    scores : np.ndarray | torch.Tensor
        [clips, classes], any range. Compared exactly, in their own precision.
    targets : np.ndarray | torch.Tensor
        [clips, classes], 0 or 1.

    Returns
    -------
    np.ndarray
        float64 [classes], NaN for a class without a positive or without a negative clip.

    Raises
    ------
    ValueError
        If shapes differ, a score is NaN or a target is neither 0 nor 1.

    Example
    -------
    >>> roc_auc(np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), np.array([[1, 0], [0, 0], [1, 0]]))
    array([0.5, nan])
    """
    return _ap_and_auc(scores, targets)[1]


def d_prime(auc):
    """Sensitivity index: sqrt(2) times the inverse normal CDF of the area under the ROC curve.

    Arguments
    ---------
    auc : float | np.ndarray
        Area under the ROC curve, 0 to 1.

    Returns
    -------
    float | np.ndarray
        float64 of the same shape.

    Example
    -------
    >>> round(d_prime(0.974), 3)
    2.748
    """
    index = math.sqrt(2) * torch.special.ndtri(torch.as_tensor(auc, dtype=torch.float64)).numpy()
    return index if np.ndim(auc) else float(index)


def summarize(scores, targets):
    """The figures of one evaluation.

    Arguments
    ---------
    scores : np.ndarray | torch.Tensor
        [clips, classes], probabilities.
    targets : np.ndarray | torch.Tensor
        [clips, classes], 0 or 1.

    Returns
    -------
    dict
        `mAP` and `mAUC`, means over the classes that have one; `d_prime` of mAUC; `loss`, the binary cross-entropy, mean over
        clips and classes; `n_classes_left_out`, the number of classes without a positive clip, which have no AP.

    Raises
    ------
    ValueError
        If shapes differ, a score is NaN or a target is neither 0 nor 1.

    Example
    -------
    >>> scores, targets = np.array([[0.9, 0.1], [0.2, 0.2], [0.7, 0.3]]), np.array([[1, 0], [0, 0], [1, 0]])
    >>> summarize(scores, targets)
    {'mAP': 1.0, 'mAUC': 1.0, 'd_prime': inf, 'loss': 0.228..., 'n_classes_left_out': 1}
    """
    return _summarize(scores, targets, *_ap_and_auc(scores, targets))


class TaggingStats:
    """The scores of a stage, by clip, and the figures that follow from them.

    Every rank fills the rows of its own clips; `reduce` adds the ranks' arrays up. As all other rows are zero, the sum is what
    one process would have collected, to the last bit, however the clips were shared out.

    Arguments
    ---------
    n_clips : int
        Number of clips in the whole set.
    n_classes : int
        Number of classes.

    Attributes
    ----------
    scores, targets : torch.Tensor
        float32 [clips, classes].
    ap, auc : np.ndarray
        float64 [classes], NaN where undefined; there after `summarize`.

    Example
    -------
    >>> stats = TaggingStats(n_clips=3, n_classes=2)
    >>> stats.append([2, 0], torch.tensor([[0.7, 0.6], [0.9, 0.1]]), torch.tensor([[0, 1], [1, 0]]))
    >>> stats.append([1], torch.tensor([[0.8, 0.2]]), torch.tensor([[1, 0]]))
    >>> stats.reduce()
    >>> stats.summarize()["mAP"]
    1.0
    >>> stats.ap
    array([1., 1.])
    """

    def __init__(self, n_clips, n_classes):
        self.scores = torch.zeros(n_clips, n_classes)
        self.targets = torch.zeros(n_clips, n_classes)
        self._n_times = torch.zeros(n_clips, dtype=torch.int32)

    def append(self, index, scores, targets):
        """Write a batch into the rows of its clips.

        Arguments
        ---------
        index : array_like
            [batch], the clips' rows in the whole set.
        scores, targets : torch.Tensor | np.ndarray
            [batch, classes], on any device.

        Raises
        ------
        ValueError
            If the shapes do not fit.

        Example
        -------
        >>> stats = TaggingStats(n_clips=2, n_classes=1)
        >>> stats.append([1], torch.tensor([[0.5]]), torch.tensor([[1]]))
        >>> stats.scores
        tensor([[0.0000],
                [0.5000]])
        """
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

    def reduce(self):
        """Add up what the ranks have collected; to be called once, on every rank. One process has only its clips checked.

        Raises
        ------
        RuntimeError
            If a clip was scored by no rank or more than once.

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

    def summarize(self):
        """The figures of the whole set, see the function `summarize`; sets `ap` and `auc`.

        Returns
        -------
        dict
            `mAP`, `mAUC`, `d_prime`, `loss`, `n_classes_left_out`.

        Raises
        ------
        RuntimeError
            If a clip was not scored or more than once.
        ValueError
            If a score is NaN or a target is neither 0 nor 1.

        Example
        -------
        >>> stats = TaggingStats(n_clips=2, n_classes=1)
        >>> stats.append([0, 1], torch.tensor([[0.5], [0.5]]), torch.tensor([[1], [0]]))
        >>> stats.summarize()
        {'mAP': 0.5, 'mAUC': 0.5, 'd_prime': 0.0, 'loss': 0.693..., 'n_classes_left_out': 0}
        """
        self._check_complete()
        self.ap, self.auc = _ap_and_auc(self.scores, self.targets)
        return _summarize(self.scores, self.targets, self.ap, self.auc)

    def _check_complete(self):
        missing, repeated = (torch.nonzero(wrong).flatten() for wrong in (self._n_times == 0, self._n_times > 1))
        if len(missing) or len(repeated):
            rows = torch.cat([missing, repeated])[:10].tolist()
            raise RuntimeError(
                f"of {len(self._n_times)} clips, {len(missing)} were not scored and {len(repeated)} were scored more than once: "
                f"rows {rows}" + (" and others" if len(missing) + len(repeated) > 10 else "")
            )


def _to_numpy(array):
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def _to_float32(array):
    return torch.as_tensor(array).detach().to("cpu", torch.float32)


def _ap_and_auc(scores, targets):
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


def _summarize(scores, targets, ap, auc):
    mean_auc = _mean_of_defined(auc)
    clamped = _to_float32(scores).clamp(SCORE_FLOOR, 1 - SCORE_FLOOR)
    return {
        "mAP": _mean_of_defined(ap),
        "mAUC": mean_auc,
        "d_prime": d_prime(mean_auc),
        "loss": F.binary_cross_entropy(clamped, _to_float32(targets)).item(),
        "n_classes_left_out": int(np.isnan(ap).sum()),
    }


def _mean_of_defined(values):
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


FIGURES = ("mAP", "mAUC", "d_prime")
