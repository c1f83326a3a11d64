"""Signals of any length in overlapping windows, and the values of the windows joined into one curve."""

from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

# Blocks that are kept as they came: small ones would cost more by their number than by what is in them.
MOST_BLOCKS = 64


class Stage(Protocol):
    """Makes pieces of one kind out of pieces of another, as they come; each gives what it made complete."""

    def push(self, piece: torch.Tensor, /) -> list[torch.Tensor]:
        """Takes the next piece."""

    def finish(self) -> list[torch.Tensor]:
        """Gives the rest."""


def through(stage: Stage, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields what a stage makes of all pieces."""
    for piece in pieces:
        yield from stage.push(piece)
    yield from stage.finish()


class Windows:
    """Cuts a signal that comes in pieces `[..., samples]` into overlapping windows `[..., length]`; the last one may be shorter.

    Example
    -------
    >>> windows = Windows(length=4, hop=2)
    >>> [[window.tolist() for window in windows.push(block)] for block in (torch.arange(3), torch.arange(3, 7))]
    [[], [[0, 1, 2, 3], [2, 3, 4, 5]]]
    >>> windows.finish()
    [tensor([4, 5, 6])]
    """

    def __init__(self, length: int, hop: int) -> None:
        self._length, self._hop = length, hop
        self._blocks: list[torch.Tensor] = []
        self._n_samples = 0

    def push(self, block: torch.Tensor) -> list[torch.Tensor]:
        """Takes the next samples, and gives the windows that more samples follow."""
        self._blocks.append(block)
        self._n_samples += block.shape[-1]
        if self._n_samples <= self._length and len(self._blocks) < MOST_BLOCKS:
            return []
        signal, found = torch.cat(self._blocks, dim=-1) if len(self._blocks) > 1 else block, []
        while signal.shape[-1] > self._length:
            found.append(signal[..., : self._length])
            signal = signal[..., self._hop :]
        self._blocks, self._n_samples = [signal], signal.shape[-1]
        return found

    def finish(self) -> list[torch.Tensor]:
        """Gives the last window."""
        return [torch.cat(self._blocks, dim=-1)] if self._blocks else []


def windows(blocks: Iterable[torch.Tensor], length: int, hop: int) -> Iterator[torch.Tensor]:
    """Cuts a signal as `Windows` does.

    >>> [window.tolist() for window in windows([torch.arange(3), torch.arange(3, 7)], length=4, hop=2)]
    [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6]]
    """
    return through(Windows(length, hop), blocks)


def covering(blocks: Iterable[torch.Tensor], length: int, hop: int, longest: int = 0) -> Iterator[torch.Tensor]:
    """Cuts a signal that comes in pieces `[samples]` into windows `[length]`, `hop` apart, of which the last ends where it ends.

    A signal that is not longer than a window, or than `longest`, is yielded as it is.

    >>> [window.tolist() for window in covering([torch.arange(3), torch.arange(3, 8)], length=4, hop=2)]
    [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    >>> [window.tolist() for window in covering([torch.arange(5)], length=4, hop=2)]
    [[0, 1, 2, 3], [1, 2, 3, 4]]
    """
    blocks = iter(blocks)
    start = next(blocks)
    while len(start) <= max(length, longest):
        block = next(blocks, None)
        if block is None:
            yield start
            return
        start = torch.cat([start, block])
    before = None
    blocks = chain([start], blocks)
    for window in windows(blocks, length, hop):
        # only the last one can be shorter
        yield window if before is None or len(window) == length else torch.cat([before[:hop], window])[-length:]
        before = window


def batches(tensors: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Stacks consecutive tensors to `[<= size, ...]`, as long as their shapes are the same."""
    for _, alike in groupby(tensors, key=lambda tensor: tensor.shape):
        while batch := list(islice(alike, size)):
            yield torch.stack(batch)


class Overlap:
    """Joins the values `[steps, ...]` of windows that start `hop` steps apart, into pieces of one curve: their weighted means.

    Example
    -------
    >>> overlap = Overlap(hop=2)
    >>> overlap.push(torch.tensor([1.0, 1.0, 1.0])), overlap.push(torch.tensor([4.0, 4.0])), overlap.finish()
    ([tensor([1., 1.])], [tensor([2.5000, 4.0000])], [tensor([])])
    """

    # Weights of windows of 5 steps, hop 2. They fall to the ends: what stands there has been judged without what follows it.
    #
    #   1 2 3 2 1
    #       1 2 3 2 1
    #           1 2 3 2 1
    #   |-| |-|                the first `hop` steps of a window are complete with it: the next one begins after them

    def __init__(self, hop: int) -> None:
        self._hop = hop
        self._total: Any = None  # of weighted values, and of weights: of steps that may not be complete
        self._weight: Any = None

    def push(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Takes the next window's values, and gives the steps that no window that follows has."""
        rising = torch.arange(1, len(part) + 1, device=part.device, dtype=part.dtype)
        own = torch.minimum(rising, rising.flip(0)).reshape(-1, *[1] * (part.dim() - 1))
        if self._total is None:
            total, weight = own * part, own
        else:
            total, weight = _sum(self._total, own * part), _sum(self._weight, own)
        self._total, self._weight = total[self._hop :], weight[self._hop :]
        return [total[: self._hop] / weight[: self._hop]]

    def finish(self) -> list[torch.Tensor]:
        """Gives the rest."""
        return [] if self._total is None else [self._total / self._weight]


def overlapped(parts: Iterable[torch.Tensor], hop: int) -> Iterator[torch.Tensor]:
    """Joins values as `Overlap` does.

    >>> torch.cat(list(overlapped([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([4.0, 4.0])], hop=2))).tolist()
    [1.0, 1.0, 2.5, 4.0]
    """
    return through(Overlap(hop), parts)


def _sum(*tensors: torch.Tensor) -> torch.Tensor:
    """Adds tensors of different lengths."""
    return pad_sequence(list(tensors)).sum(dim=1)


def joined(parts: Iterable[torch.Tensor]) -> np.ndarray:
    """Concatenates many small tensors `[n, ...]`, float32, on the CPU, and keeps none of them."""
    # Each would pin a piece of the heap between the large tensors that come and go meanwhile: with the holes between them an hour
    # of sound took hundreds of megabytes.
    values = bytearray()
    for part in parts:
        values += part.numpy().tobytes()
    return np.frombuffer(values, np.float32).reshape(-1, *part.shape[1:])
