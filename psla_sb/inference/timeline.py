"""Sound of any length: overlapping windows, their values joined into one curve, and the events in a curve.

Only the curve itself grows with the recording.
"""

from typing import NamedTuple

import numpy as np


class Timeline(NamedTuple):
    """The scores of all classes along a recording.

    `times` are the middles of the steps in seconds, `[steps]`; `scores` is `[steps, classes]`, in [0, 1]; `labels` and `mids` name
    the classes.

    Example
    -------
    >>> Timeline(np.array([0.1, 0.3]), np.zeros((2, 1)), ["Bell"], ["/m/1"]).scores.shape
    (2, 1)
    """

    times: np.ndarray
    scores: np.ndarray
    labels: list
    mids: list

    @property
    def step(self):
        """Seconds from a step to the next."""
        return self.times[1] - self.times[0] if len(self.times) > 1 else 2 * self.times[0]


class Event(NamedTuple):
    """A class that was heard from `start` to `end`, in seconds; `score` is the highest in between.

    Example
    -------
    >>> Event("Bell", 1.0, 2.5, 0.9).label
    'Bell'
    """

    label: str
    start: float
    end: float
    score: float


def events(timeline, threshold=0.5):
    """The stretches in which a class scores at least a threshold, each less its blurred edges.

    A model hears a little to both sides, so that the scores of a loud event pass a low threshold before it begins. An event is said
    to begin where the scores reach half of their first peak, if that is above the threshold, and to end where they fall to half of
    the last one; between two steps, on the straight line from one score to the next. A peak ends where the scores are below half
    of it. No event is shorter than a step.

    Arguments
    ---------
    timeline : Timeline
        What `AudioTagger.tag_timeline` returns.
    threshold : float
        In (0, 1].

    Returns
    -------
    list of Event
        By time of start.

    Raises
    ------
    ValueError
        If the threshold is not in (0, 1].

    Example
    -------
    >>> times, scores = np.array([0.1, 0.3, 0.5, 0.7]), np.array([[0.1], [0.8], [0.9], [0.2]])
    >>> [(e.label, round(e.start, 2), round(e.end, 2), e.score) for e in events(Timeline(times, scores, ["Bell"], ["/m/1"]))]
    [('Bell', 0.21, 0.61, 0.9)]
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], not {threshold}")
    threshold = float(threshold)
    # one row a class, with a step of silence on either side
    scores = np.nan_to_num(np.pad(timeline.scores.T, ((0, 0), (1, 1))))
    edges = np.flatnonzero(np.diff((scores >= threshold).ravel())) + 1
    classes, firsts = np.divmod(edges[::2], scores.shape[1])
    lasts = firsts + (edges[1::2] - edges[::2]) - 1
    found = []
    for c, first, last in zip(classes.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
        curve = scores[c, first - 1 : last + 2]
        start, end = first - 1 + _rise(curve, threshold), last + 1 - _rise(curve[::-1], threshold)
        # what is heard in the first step or the last begins or ends with the recording; a single step is an event, all of it
        if first in (1, last):
            start = min(start, first - 0.5)
        if last in (first, len(timeline.times)):
            end = max(end, last + 0.5)
        found.append(Event(timeline.labels[c], _seconds(timeline, start), _seconds(timeline, end), curve.max().item()))
    return sorted(found, key=lambda event: event.start)


def _rise(curve, threshold):
    """Where a curve that starts below the threshold gets up to it and to half of its first peak, in steps."""
    highest = np.maximum.accumulate(curve)
    fallen = curve[1:] < highest[1:] / 2
    peak = highest[np.argmax(fallen) if fallen.any() else -1]
    level = np.maximum(curve.dtype.type(threshold), peak / 2)
    above = np.searchsorted(highest, level)
    return above - float((curve[above] - level) / (curve[above] - curve[above - 1]))


def _seconds(timeline, step):
    """When the middle of a step is, counted from 1, to the nanosecond and not before the recording; steps may be fractions."""
    return max(0.0, round(float(timeline.times[0] + (step - 1) * timeline.step), 9))


def top_classes(timeline, k):
    """Indices of the classes with the highest peaks, best first.

    Example
    -------
    >>> top_classes(Timeline(np.array([0.1]), np.array([[0.2, 0.9]]), ["Bell", "Rain"], ["/m/1", "/m/2"]), 1)
    [1]
    """
    return np.argsort(-timeline.scores.max(axis=0), kind="stable")[:k].tolist()
