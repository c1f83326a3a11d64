"""The scores of all classes along a recording, and the events in them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Begun(NamedTuple):
    """A class that is heard from `start` on, in seconds; its `Event` will have the same start."""

    label: str
    start: float


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
    detector = EventDetector(timeline.labels, threshold)
    found = [event for event in detector.push(timeline.times, timeline.scores, last=True) if isinstance(event, Event)]
    return sorted(found, key=lambda event: event.start)


class EventDetector:
    """Finds what `events` finds, in scores that come piece by piece; each beginning and each event is given once.

    What is given never changes. A beginning is known when the first peak is over, that is when the scores fall below half of it or
    below the threshold; with a threshold of 0.5 or more, as soon as two steps reach it. An event is known when its scores fall
    below the threshold. Memory does not grow with an event: of its scores those are kept that are higher than all before them, or
    higher or lower than all after them, a few in a curve that goes up and down.

    Arguments
    ---------
    labels
        Of the classes.
    threshold
        See `events`.

    Example
    -------
    >>> detector = EventDetector(["Bell"], threshold=0.5)
    >>> detector.push(np.array([0.1, 0.3]), np.array([[0.1], [0.8]]))
    []
    >>> detector.push(np.array([0.5]), np.array([[0.9]]))
    [Begun(label='Bell', start=0.214285714)]
    >>> detector.push(np.array([0.7]), np.array([[0.2]]))
    [Event(label='Bell', start=0.214285714, end=0.614285714, score=0.9)]
    """

    # A model hears a little to both sides, so the scores of a loud event pass a low threshold before it begins and after its end:
    #
    #   peak            o---o         o
    #   half of it     /     \       / \      a peak ends where the scores fall below half of it, an event where they fall below
    #   threshold   o-/-------o--o--o---\-o   the threshold; its start and end are on the lines between two steps
    #                [                  ]

    def __init__(self, labels: Sequence[str], threshold: float | np.ndarray = 0.5) -> None:
        if np.ndim(threshold) == 0 and not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], not {threshold}")
        if np.ndim(threshold) and (np.shape(threshold) != (len(labels),) or not np.all(np.asarray(threshold) >= 0)):
            raise ValueError(f"thresholds must be {len(labels)} numbers from 0 on, one per class, not {threshold}")
        self._labels = labels
        # a score of 0 is no event
        self._thresholds = np.maximum(np.broadcast_to(threshold, len(labels)), np.finfo(np.float32).tiny)
        self._times: list[float] = []  # of the first two steps
        self._n_steps, self._finished = 0, False
        self._before = np.zeros((1, len(labels)), np.float32)  # the scores of the last step; silence before the first
        self._open: dict[int, _Stretch] = {}  # by class

    def push(self, times: np.ndarray, scores: np.ndarray, last: bool = False) -> list[Begun | Event]:
        """Takes the next steps, their middles in seconds `[steps]` and scores `[steps, classes]`; after the `last` all ends."""
        if np.shape(scores) != (len(times), len(self._labels)):
            raise ValueError(f"scores must be [{len(times)} steps, {len(self._labels)} classes], not {list(np.shape(scores))}")
        if self._finished:
            raise ValueError("this detector has been finished; take a new one for another curve")
        self._finished = last
        self._times = [*self._times, *times[:2].tolist()][:2]
        # Columns are steps, counted from 1: the one before comes first, then the new ones, after the last one silence.
        column_0 = self._n_steps
        steps = np.arange(column_0, column_0 + 1 + len(scores) + last)
        self._n_steps += len(scores)
        silence = np.zeros((int(last), len(self._labels)), scores.dtype)
        columns = np.nan_to_num(np.concatenate([self._before.astype(scores.dtype), scores, silence])).T
        self._before = columns[:, -1:].T.copy()
        thresholds = self._thresholds.astype(scores.dtype)
        # with a column of False on either side, so that edges come in pairs: up, down
        loud = np.zeros((len(columns), columns.shape[1] + 2), bool)
        np.greater_equal(columns, thresholds[:, None], out=loud[:, 1:-1])
        found: list[Begun | Event] = []
        for up, down in np.flatnonzero(np.diff(loud.ravel())).reshape(-1, 2).tolist():
            c, first = divmod(up, loud.shape[1])
            stop = down - c * loud.shape[1]
            if first:
                new = slice(first - 1, stop + 1)
                stretch = _Stretch(column_0 + first, steps[new], columns[c, new])
            else:
                # it was loud in the column before, and has begun earlier
                stretch = self._open.pop(c)
                stretch.add(steps[1 : stop + 1], columns[c, 1 : stop + 1])
            ended, final = stop < columns.shape[1], column_0 + stop - 1
            if stretch.start is None and (ended or stretch.start_is_known(thresholds[c])):
                start = _edge(stretch.steps, stretch.scores, thresholds[c])
                # what is heard in the first step or the last begins or ends with the recording; a single step is heard all through
                start = min(start, stretch.first - 0.5) if stretch.first in (1, final) else start
                stretch.start = self._seconds(start)
                found.append(Begun(self._labels[c], stretch.start))
            if ended:
                end = _edge(stretch.steps[::-1], stretch.scores[::-1], thresholds[c])
                end = max(end, final + 0.5) if final in (stretch.first, self._n_steps) else end
                found.append(Event(self._labels[c], stretch.start, self._seconds(end), stretch.highest))
            else:
                stretch.forget()
                self._open[c] = stretch
        return found

    def finish(self) -> list[Begun | Event]:
        """Ends what has not ended; nothing may follow."""
        return self.push(np.zeros(0), self._before[:0], last=True)

    def _seconds(self, step: float) -> float:
        """When the middle of a step is, to the nanosecond and not before the recording; steps may be fractions."""
        first, *second = self._times
        apart = second[0] - first if second else 2 * first
        return max(0.0, round(first + (step - 1) * apart, 9))


class _Stretch:
    """A stretch over the threshold: what of its scores, and of the one before it, its start and its end may depend on."""

    def __init__(self, first: int, steps: np.ndarray, scores: np.ndarray) -> None:
        self.first, self.steps, self.scores = first, steps, scores
        self.highest = scores.max().item()
        self.start: Any = None  # in seconds, once it is known

    def add(self, steps: np.ndarray, scores: np.ndarray) -> None:
        self.steps, self.scores = np.append(self.steps, steps), np.append(self.scores, scores)
        self.highest = scores.max(initial=self.highest).item()

    def start_is_known(self, threshold: float) -> bool:
        """Says whether the start is final: not a single step, and its level, half of the first peak, cannot rise any more."""
        if len(self.scores) < 3:
            return False
        return threshold >= 0.5 or bool((self.scores < np.maximum.accumulate(self.scores) / 2).any())

    def forget(self) -> None:
        """Drops what no `_edge` will need, whatever follows."""
        # Half of a peak is 0.5 at most. From the end, the level is reached at what is higher than all after it, on the line to the
        # step after it. A peak ends at what is lower than all after it, if a higher one is before; beyond that nothing counts.
        scores = self.scores[::-1]
        highest, lowest = (np.append(start, of.accumulate(scores)) for start, of in ((0, np.maximum), (1, np.minimum)))
        inside = ~np.maximum.accumulate(scores < highest[1:] / 2)
        top = scores[inside].max()
        higher = inside & (scores > highest[:-1]) & ((highest[:-1] < 0.5) | (scores == top))
        lower = inside & (scores < np.minimum(lowest[:-1], 0.5)) & (highest[1:] < top)
        kept = (higher | lower | np.append(higher[1:], False))[::-1]
        if self.start is None:
            # from the start likewise, but no peak has ended, and the level is half of the highest at least
            before = np.append(0, np.maximum.accumulate(self.scores)[:-1])
            higher = (self.scores > before) & (before < 0.5) & (self.scores >= top / 2)
            kept |= higher | np.append(higher[1:], False)
        self.steps, self.scores = self.steps[kept], self.scores[kept]


def _edge(steps: np.ndarray, curve: np.ndarray, threshold: float) -> float:
    """Where a curve that starts below the threshold gets up to it and to half of its first peak, on the line between two steps."""
    highest = np.maximum.accumulate(curve)
    fallen = curve[1:] < highest[1:] / 2
    peak = highest[np.argmax(fallen) if fallen.any() else -1]
    level = np.maximum(curve.dtype.type(threshold), peak / 2)
    above = np.searchsorted(highest, level)
    part = float((curve[above] - level) / (curve[above] - curve[above - 1]))
    return steps[above].item() - part * (steps[above] - steps[above - 1]).item()


def top_classes(timeline: Timeline, k: int) -> list[int]:
    """Finds the classes with the highest peaks, best first: their indices."""
    return np.argsort(-timeline.scores.max(axis=0), kind="stable")[:k].tolist()
