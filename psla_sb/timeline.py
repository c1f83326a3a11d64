"""Sound of any length: overlapping windows, their values joined into one curve, and the events in a curve.

Only the curve itself grows with the recording.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from psla_sb.dataio.audio import read_blocks
from psla_sb.lobes.features import KaldiFbank, frame_length_and_shift


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
    return max(0.0, round(float(timeline.times[0] + (step - 1) * step_of(timeline)), 9))


def step_of(timeline):
    """Seconds from a step of a timeline to the next.

    Example
    -------
    >>> float(step_of(Timeline(np.array([0.25, 0.75]), np.zeros((2, 1)), ["Bell"], ["/m/1"])))
    0.5
    """
    times = timeline.times
    return times[1] - times[0] if len(times) > 1 else 2 * times[0]


def windows(blocks, length, hop):
    """Overlapping windows of a signal that comes piece by piece; the last one is what is left, up to a whole window.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        `[..., samples]` each.
    length, hop : int
        In samples, hop at most the length.

    Yields
    ------
    torch.Tensor
        `[..., length]`, the last one `[..., <= length]`.

    Example
    -------
    >>> [window.tolist() for window in windows([torch.arange(3), torch.arange(3, 7)], length=4, hop=2)]
    [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6]]
    """
    signal = None
    for block in blocks:
        signal = block if signal is None else torch.cat([signal, block], dim=-1)
        while signal.shape[-1] > length:
            yield signal[..., :length]
            signal = signal[..., hop:]
    yield signal


def batches(tensors, size):
    """Stacks consecutive tensors, as long as their shapes are the same.

    Yields
    ------
    torch.Tensor
        `[<= size, ...]`

    Example
    -------
    >>> [list(batch.shape) for batch in batches([torch.zeros(4)] * 3 + [torch.zeros(2)], size=2)]
    [[2, 4], [1, 4], [1, 2]]
    """
    waiting = []
    for tensor in tensors:
        if waiting and (len(waiting) == size or waiting[0].shape != tensor.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(tensor)
    if waiting:
        yield torch.stack(waiting)


def overlapped(parts, hop):
    """Joins the values of overlapping windows: at each step their mean, with weights that fall from a window's middle to its ends.

    What stands at the end of a window has been judged without what follows it.

    Arguments
    ---------
    parts : iterable of torch.Tensor
        `[steps, ...]` of each window.
    hop : int
        Steps from a window's start to the next one's, at most a window's steps.

    Yields
    ------
    torch.Tensor
        `[steps, ...]`, pieces of the whole.

    Example
    -------
    >>> torch.cat(list(overlapped([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([4.0, 4.0])], hop=2))).tolist()
    [1.0, 1.0, 2.5, 4.0]
    """
    total = None
    for part in parts:
        rising = torch.arange(1, len(part) + 1, device=part.device, dtype=part.dtype)
        own = torch.minimum(rising, rising.flip(0)).reshape(-1, *[1] * (part.dim() - 1))
        if total is None:
            total, weight = own * part, own
            continue
        yield total[:hop] / weight[:hop]
        total, weight = _sum(total[hop:], own * part), _sum(weight[hop:], own)
    yield total / weight


def _sum(one, other):
    """The sum of tensors of different lengths."""
    total = one.new_zeros(max(len(one), len(other)), *one.shape[1:])
    total[: len(one)] += one
    total[: len(other)] += other
    return total


def joined(parts):
    """The concatenation of many small tensors.

    None of them is kept: each would pin a piece of the heap between the large tensors that come and go meanwhile, and with the
    holes between them an hour of sound took hundreds of megabytes.

    Arguments
    ---------
    parts : iterable of torch.Tensor
        `[n, ...]` each, float32, on the CPU.

    Returns
    -------
    np.ndarray
        `[sum of n, ...]`

    Example
    -------
    >>> joined([torch.zeros(2, 3), torch.ones(1, 3)]).shape
    (3, 3)
    """
    values = bytearray()
    for part in parts:
        values += part.numpy().tobytes()
    return np.frombuffer(values, np.float32).reshape(-1, *part.shape[1:])


def top_classes(timeline, k):
    """Indices of the classes with the highest peaks, best first.

    Example
    -------
    >>> top_classes(Timeline(np.array([0.1]), np.array([[0.2, 0.9]]), ["Bell", "Rain"], ["/m/1", "/m/2"]), 1)
    [1]
    """
    return np.argsort(-timeline.scores.max(axis=0), kind="stable")[:k].tolist()


def overview(blocks, sample_rate, seconds, n_columns=1500):
    """A recording of any length in few columns, for a picture.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        `[samples]` each, as `read_blocks` yields them.
    sample_rate : int
        In Hz.
    seconds : float
        About how long it is: what is divided into columns.
    n_columns : int
        How many columns, about.

    Returns
    -------
    (torch.Tensor, torch.Tensor, float)
        Lowest and highest sample `[columns, 2]`, mean log-mel energies `[columns, 64]`, and the seconds of a column.

    Example
    -------
    >>> extremes, energies, column = overview([torch.zeros(16000)], 16000, seconds=1.0, n_columns=50)
    >>> extremes.shape, energies.shape, column
    (torch.Size([50, 2]), torch.Size([50, 64]), 0.02)
    """
    fbank, (length, shift) = KaldiFbank(sample_rate, n_mels=64), frame_length_and_shift(sample_rate)
    frames = max(1, math.ceil(seconds * sample_rate / shift / n_columns))  # a column
    column = frames * shift
    piece = column * max(1, 1000 // frames)

    def columns():
        for wave in windows(blocks, piece, piece):
            wave = F.pad(wave, (0, -len(wave) % column))
            extremes = torch.stack(torch.aminmax(wave.reshape(-1, column), dim=1), dim=1)
            energies = fbank(F.pad(wave, (0, length - shift))[None])[0].reshape(-1, frames, 64).mean(1)
            yield torch.cat([extremes, energies], dim=1)

    table = torch.from_numpy(joined(columns()))
    return table[:, :2], table[:, 2:], column / sample_rate


def draw(path, timeline, sample_rate, picture, title):
    """Draws a recording's waveform, log-mel energies and timeline as a PNG file; see `psla_sb.plots.recording`.

    Arguments
    ---------
    path : str or Path
        The recording.
    timeline : Timeline
        Of it.
    sample_rate : int
        Of the model, in Hz.
    picture : str or Path
        The PNG file to write.
    title : str
        What the recording is called.
    """
    from psla_sb.plots import recording  # matplotlib is imported only to draw

    seconds = float(timeline.times[-1] + step_of(timeline) / 2)
    extremes, energies, column = overview(read_blocks(path, sample_rate), sample_rate, seconds)
    recording(extremes.numpy(), energies.numpy(), column, timeline, picture, title)
