"""From scores to probabilities and decisions: fitted on held-out clips, kept beside a tagger as `calibration.json`.

    score  --logit-->  z  --slope * z + bias-->  --sigmoid-->  probability       per class
    score >= threshold                                         decision          per class, on the score itself

Slopes are positive, so that the order of the clips, and AP and AUC with it, stay what they are.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from psla_sb.errors import InputError
from psla_sb.files import write_json
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import CLASS_BLOCK, SCORE_FLOOR, best_f1, threshold_at_precision

# With fewer positive clips a class has no slope, bias and threshold of its own: its best threshold would be chance's.
FEWEST = 5
# Standard deviations of the priors of log(slope) and of the bias, both about 0. Of 0.1 to 1 and 0.2 to 4 these gave the best
# log-loss on other clips: of simulated classes that were off by factors around 1.5 and biases of -1 +- 1, and of the embedded data
# set's 39 classes, with 60 and 100 clips to fit on, after 4 to 40 epochs. There 5 was better than 10 and 20 for F1 as well.
SLOPE_DEVIATION, BIAS_DEVIATION = 0.5, 1.0
N_BINS = 15
MOST_STEPS, SMALL_STEP = 100, 1e-6
MEANING = {
    "probability": "of a class: 1 / (1 + exp(-(slope * log(score / (1 - score)) + bias)))",
    "threshold": "a class is decided to be in a clip whose score (not probability) is this at least; null: never",
    "positives": "clips with the class among those that this was fitted on",
    "own": f"false: fewer than {FEWEST} positives, so slope and threshold are those that all such classes share",
}


@dataclass(frozen=True, eq=False)
class Calibration:
    """Holds what turns the scores of each class into probabilities and decisions: all `[classes]`.

    `slope` is above 0; a `threshold` of infinity says that the class is never decided; `own` says whether a class has slope, bias
    and threshold of its own, or those that classes with few `positives` share. `target_precision` is None if the thresholds are
    those of the best F1 score. It was fitted on `n_clips`.

    Example
    -------
    >>> one = np.ones(2)
    >>> calibration = Calibration(2 * one, 0 * one, np.array([0.5, np.inf]), one > 0, 20 * one.astype(int), 100, None)
    >>> calibration.probabilities(np.array([[0.5, 0.8]])).round(3), calibration.decisions(np.array([[0.5, 0.8]]))
    (array([[0.5 , 0.941]]), array([[ True, False]]))
    """

    slope: np.ndarray
    bias: np.ndarray
    threshold: np.ndarray
    own: np.ndarray
    positives: np.ndarray
    n_clips: int
    target_precision: float | None

    @property
    def criterion(self) -> str:
        """Says what the thresholds were chosen by."""
        if self.target_precision is None:
            return "the best F1 score"
        return f"a precision of {self.target_precision:g} at least"

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Computes calibrated probabilities, float64, of scores `[..., classes]`."""
        return expit(self.slope * _logits(scores) + self.bias)

    def decisions(self, scores: np.ndarray) -> np.ndarray:
        """Says which classes are decided, bool, of scores `[..., classes]`."""
        return np.asarray(scores) >= self.threshold

    def write(self, path: str | Path, vocabulary: Vocabulary) -> None:
        """Writes it as JSON, which is of these classes alone."""
        columns = (self.positives.tolist(), self.own.tolist(), self.slope.tolist(), self.bias.tolist(), self.threshold.tolist())
        keys = ("mid", "name", "positives", "own", "slope", "bias", "threshold")
        rows = zip(vocabulary.mids, vocabulary.names, *columns, strict=True)
        content = {
            "criterion": self.criterion,
            "target_precision": self.target_precision,
            "fitted_on_clips": self.n_clips,
            "class_list": vocabulary.digest(),
            "meaning": MEANING,
            "classes": [dict(zip(keys, row, strict=True)) for row in rows],
        }
        write_json(path, content)

    @classmethod
    def read(cls, path: str | Path, vocabulary: Vocabulary) -> "Calibration":
        """Reads what `write` wrote; an `InputError` if it is of other classes, or no such file.

        Example
        -------
        >>> path, vocabulary = getfixture("tmp_path") / "calibration.json", Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"])
        >>> fit_calibration(np.array([[0.9, 0.1], [0.2, 0.8]]), np.eye(2)).write(path, vocabulary)
        >>> Calibration.read(path, Vocabulary(["/m/2", "/m/1"], ["Rain", "Bell"]))
        Traceback (most recent call last):
        ...
        psla_sb.errors.InputError: ...calibration.json: made for other classes, or in another order; ...
        """
        mend = "take the file away, or put back the one that was written with the tagger"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            of_classes, rows = content["class_list"], content["classes"]
            numbers = np.array([[row["slope"], row["bias"], _number(row["threshold"])] for row in rows], dtype=np.float64).T
            slope, bias, threshold = numbers
            own, positives = np.array([row["own"] for row in rows], bool), np.array([row["positives"] for row in rows], int)
            n_clips, target = int(content["fitted_on_clips"]), content["target_precision"]
            target = None if target is None else float(target)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f"{path}: not the thresholds of a tagger ({type(error).__name__}: {error}); {mend}") from None
        if of_classes != vocabulary.digest() or len(rows) != len(vocabulary):
            raise InputError(f"{path}: made for other classes, or in another order; {mend}")
        if not (np.isfinite(slope).all() and np.isfinite(bias).all() and (slope > 0).all() and (threshold >= 0).all()):
            raise InputError(f"{path}: a slope, bias or threshold is not a number that it can be; {mend}")
        return cls(slope, bias, threshold, own, positives, n_clips, target)


def _number(threshold: float | None) -> float:
    return math.inf if threshold is None else threshold


def check_target_precision(value: Any, source: str | Path) -> float | None:
    """Refuses what is no precision, and none."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1):
        return None if value is None else float(value)
    raise InputError(
        f"{source}: target_precision must be above 0 and at most 1, such as 0.9, or null (thresholds by best F1), not {value!r}"
    )


def fit_calibration(scores: np.ndarray, targets: np.ndarray, target_precision: float | None = None) -> Calibration:
    """Fits probabilities and thresholds on clips that the model was not trained on.

    Each class gets the slope and the bias with the lowest log-loss, pulled to 1 and 0 by a prior; classes with fewer than 5
    positive clips share one slope, a temperature, and have no bias. Each class gets the threshold with the best F1 score, in the
    middle between two neighbouring scores; or the lowest one at which at least `target_precision` of what is decided is true, and
    an infinite one, which decides nothing, where there is none. Classes with few positive clips share the threshold that is best
    for all classes together. 20,000 clips x 527 classes take some ten seconds.

    Arguments
    ---------
    scores
        `[clips, classes]`, in [0, 1].
    targets
        `[clips, classes]`, 0 or 1.

    Example
    -------
    >>> targets = np.arange(1000)[:, None] % 5 == 0
    >>> scores = np.where(targets, 0.8, 0.4) + np.linspace(-0.1, 0.1, 1000)[:, None]
    >>> calibration = fit_calibration(scores, targets)
    >>> calibration.threshold.round(2), (calibration.decisions(scores) == targets).all()
    (array([0.6]), np.True_)
    """
    positive = np.asarray(targets) == 1
    positives = positive.sum(axis=0)
    own = positives >= FEWEST
    slope, bias = np.ones(len(own)), np.zeros(len(own))
    for start in range(0, len(own), CLASS_BLOCK):
        block = start + np.flatnonzero(own[start : start + CLASS_BLOCK])
        slope[block], bias[block] = _fit(_logits(scores[:, block]).T, positive[:, block].T)
    if (~own).any():
        shared, _ = _fit(_logits(scores[:, ~own]).reshape(1, -1), positive[:, ~own].reshape(1, -1), with_bias=False)
        slope[~own] = shared
    threshold = np.full(len(own), _thresholds(scores.reshape(-1, 1), positive.reshape(-1, 1), target_precision))
    threshold[own] = _thresholds(scores[:, own], positive[:, own], target_precision)
    return Calibration(slope, bias, threshold, own, positives, len(scores), target_precision)


def _logits(scores: np.ndarray) -> np.ndarray:
    return logit(np.clip(np.asarray(scores, np.float64), SCORE_FLOOR, 1 - SCORE_FLOOR))


def _fit(z: np.ndarray, positive: np.ndarray, with_bias: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Fits (slope, bias), `[classes]` each, to logits and targets `[classes, clips]`, by Newton's method on all classes at once."""
    # Unknowns are x = log(slope) and the bias. Of the second derivatives only the part that is never negative is taken (Fisher's
    # scoring), and a step that makes the loss larger is halved, so that each class's loss falls to its minimum.
    precision = np.array([SLOPE_DEVIATION, BIAS_DEVIATION]) ** -2
    y = positive.astype(np.float64)

    x, going = np.zeros((2, len(z))), np.arange(len(z))
    value, *rest = _loss(x, z, y, precision)
    for _ in range(MOST_STEPS):
        rise, p = rest
        weight, wrong = p * (1 - p), p - y[going]
        weighted = weight * rise
        down = -np.stack([_dot(wrong, rise), wrong.sum(1)]) - precision[:, None] * x[:, going]
        aa, ab, bb = _dot(weighted, rise) + precision[0], weighted.sum(1), weight.sum(1) + precision[1]
        step = np.stack([bb * down[0] - ab * down[1], aa * down[1] - ab * down[0]]) / (aa * bb - ab**2)
        step = step.clip(-1, 1) if with_bias else np.stack([down[0] / aa, 0 * aa]).clip(-1, 1)
        new, *rest = _loss(x[:, going] + step, z[going], y[going], precision)
        while (worse := (new > value) & (np.abs(step).max(axis=0) > SMALL_STEP)).any():
            step[:, worse] /= 2
            again = _loss(x[:, going[worse]] + step[:, worse], z[going[worse]], y[going[worse]], precision)
            for array, part in zip((new, *rest), again, strict=True):
                array[worse] = part
        x[:, going] += step
        more = np.abs(step).max(axis=0) > SMALL_STEP
        going, value, rest = going[more], new[more], [array[more] for array in rest]
        if not len(going):
            break
    return np.exp(x[0]), x[1]


def _loss(x: np.ndarray, z: np.ndarray, y: np.ndarray, precision: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss `[classes]`; how each logit rises with log(slope), and the probabilities, `[classes, clips]`."""
    rise = np.exp(x[0])[:, None] * z
    t = rise + x[1][:, None]
    small = np.exp(-np.abs(t))
    # log(1 + exp(t)) - y t, where exp must not overflow
    losses = np.log1p(small).sum(1) + np.maximum(t, 0).sum(1) - _dot(y, t)
    return losses + (precision @ x**2) / 2, rise, np.where(t > 0, 1, small) / (1 + small)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", a, b)


def _thresholds(scores: np.ndarray, positive: np.ndarray, target_precision: float | None) -> np.ndarray:
    """Each class's threshold, half-way down to the next lower score; infinite where none will do."""
    found = best_f1(scores, positive)[0] if target_precision is None else threshold_at_precision(scores, positive, target_precision)
    found = np.where(np.isnan(found), np.inf, found)
    return (found + np.where(scores < found, scores, 0).max(axis=0, initial=0)) / 2


def reliability(scores: np.ndarray, targets: np.ndarray, n_bins: int = N_BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorts all pairs of clip and class by score into bins of as many pairs each: (mean score, share of positives, pairs)."""
    flat, positive = np.sort(np.asarray(scores), axis=None), np.asarray(targets) == 1
    hits, n_bins = np.sort(np.asarray(scores)[positive]), min(n_bins, len(flat))
    ends = np.cumsum(len(flat) // n_bins + (np.arange(n_bins) < len(flat) % n_bins)) if n_bins else np.zeros(0, int)
    pairs = np.diff(ends, prepend=0)
    # of equal scores that an end parts, either side gets its share of the positives: their order says nothing
    level = flat[ends - 1]
    below, hits_below = flat.searchsorted(level), hits.searchsorted(level)
    tied, hits_tied = flat.searchsorted(level, "right") - below, hits.searchsorted(level, "right") - hits_below
    hits_up_to = hits_below + (ends - below) * hits_tied / tied
    means = np.add.reduceat(flat.astype(np.float64), ends - pairs) / pairs if n_bins else np.zeros(0)
    return means, np.diff(hits_up_to, prepend=0) / pairs, pairs


def expected_calibration_error(scores: np.ndarray, targets: np.ndarray, n_bins: int = N_BINS) -> float:
    """Computes how far scores are from probabilities: the expected calibration error, in bins of equal mass.

    All pairs of clip and class are sorted by score, and shared out to `n_bins` bins of as many pairs (one more in the first ones,
    where that does not come out even; fewer bins, if there are fewer pairs). Of each bin it is the distance between the mean score
    and the share of the pairs whose clip has the class; the mean of that over the pairs is returned. 0 is best.

    Arguments
    ---------
    scores
        `[clips, classes]`, in [0, 1]; raw or calibrated.
    targets
        `[clips, classes]`, 0 or 1.

    Example
    -------
    >>> expected_calibration_error(np.array([[0.5], [0.5], [0.9], [0.9]]), np.array([[0], [1], [1], [1]]), n_bins=2)
    0.049...
    """
    mean, share, pairs = reliability(scores, targets, n_bins)
    return float((np.abs(mean - share) * pairs).sum() / pairs.sum()) if len(pairs) else math.nan
