"""The scores of all classes along a recording, and the events in them."""

from typing import NamedTuple

import numpy as np


class Timeline(NamedTuple):
    """Holds the scores of all classes along a recording."""

    times: np.ndarray  # [steps], the middles of the steps in seconds
    scores: np.ndarray  # [steps, classes], in [0, 1]
    labels: list[str]
    mids: list[str]

    @property
    def step(self) -> float:
        """Seconds from a step to the next."""
        return self.times[1] - self.times[0] if len(self.times) > 1 else 2 * self.times[0]


class Event(NamedTuple):
    """A class that was heard from `start` to `end`, in seconds; `score` is the highest in between."""

    label: str
    start: float
    end: float
    score: float


def events(timeline: Timeline, threshold: float | np.ndarray = 0.5) -> list[Event]:
    """Finds the stretches in which a class scores at least `threshold`, in (0, 1], less their blurred edges; sorted by start.

    It may be one threshold per class, `[classes]`, such as `tagger.calibration.threshold`; of an infinite one there are no events.
    A stretch begins where the scores reach half of its first peak, if that is above the threshold, and ends where they fall to half
    of its last. None is shorter than a step.

    Example
    -------
    >>> times, scores = np.array([0.1, 0.3, 0.5, 0.7]), np.array([[0.1], [0.8], [0.9], [0.2]])
    >>> [(e.label, round(e.start, 2), round(e.end, 2), e.score) for e in events(Timeline(times, scores, ["Bell"], ["/m/1"]))]
    [('Bell', 0.21, 0.61, 0.9)]
    """
    # A model hears a little to both sides, so the scores of a loud event pass a low threshold before it begins and after its end:
    #
    #   peak            o---o         o
    #   half of it     /     \       / \      a peak ends where the scores fall below half of it, an event where they fall below
    #   threshold   o-/-------o--o--o---\-o   the threshold; its start and end are on the lines between two steps
    #                [                  ]
    if np.ndim(threshold) == 0 and not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], not {threshold}")
    if np.ndim(threshold) and (np.shape(threshold) != (len(timeline.labels),) or not np.all(np.asarray(threshold) >= 0)):
        raise ValueError(f"thresholds must be {len(timeline.labels)} numbers from 0 on, one per class, not {threshold}")
    # one row a class, with a step of silence on either side, so that edges come in pairs: up, down
    scores = np.nan_to_num(np.pad(timeline.scores.T, ((0, 0), (1, 1))))
    # in the scores' own precision; a score of 0 is no event
    thresholds = np.maximum(np.broadcast_to(threshold, len(scores)), np.finfo(np.float32).tiny).astype(scores.dtype)
    starts, stops = np.flatnonzero(np.diff((scores >= thresholds[:, None]).ravel())).reshape(-1, 2).T + 1
    classes, firsts = np.divmod(starts, scores.shape[1])
    found = []
    for c, first, last in np.transpose([classes, firsts, firsts + stops - starts - 1]).tolist():
        curve = scores[c, first - 1 : last + 2]
        start, end = first - 1 + _rise(curve, thresholds[c]), last + 1 - _rise(curve[::-1], thresholds[c])
        # what is heard in the first step or the last begins or ends with the recording; a single step is an event, all of it
        if first in (1, last):
            start = min(start, first - 0.5)
        if last in (first, len(timeline.times)):
            end = max(end, last + 0.5)
        found.append(Event(timeline.labels[c], _seconds(timeline, start), _seconds(timeline, end), curve.max().item()))
    return sorted(found, key=lambda event: event.start)


def _rise(curve: np.ndarray, threshold: float) -> float:
    """Where a curve that starts below the threshold gets up to it and to half of its first peak, in steps."""
    highest = np.maximum.accumulate(curve)
    fallen = curve[1:] < highest[1:] / 2
    peak = highest[np.argmax(fallen) if fallen.any() else -1]
    level = np.maximum(curve.dtype.type(threshold), peak / 2)
    above = np.searchsorted(highest, level)
    return above - float((curve[above] - level) / (curve[above] - curve[above - 1]))


def _seconds(timeline: Timeline, step: float) -> float:
    """When the middle of a step is, counted from 1, to the nanosecond and not before the recording; steps may be fractions."""
    return max(0.0, round(float(timeline.times[0] + (step - 1) * timeline.step), 9))


def top_classes(timeline: Timeline, k: int) -> list[int]:
    """Finds the classes with the highest peaks, best first: their indices."""
    return np.argsort(-timeline.scores.max(axis=0), kind="stable")[:k].tolist()
