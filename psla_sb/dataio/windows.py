"""Signals of any length in overlapping windows, and the values of the windows joined into one curve."""

from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence


def windows(blocks: Iterable[torch.Tensor], length: int, hop: int) -> Iterator[torch.Tensor]:
    """Cuts a signal that comes in pieces `[..., samples]` into overlapping windows `[..., length]`; the last one may be shorter.

    >>> [window.tolist() for window in windows([torch.arange(3), torch.arange(3, 7)], length=4, hop=2)]
    [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6]]
    """
    signal: Any = None
    for block in blocks:
        signal = block if signal is None else torch.cat([signal, block], dim=-1)
        while signal.shape[-1] > length:
            yield signal[..., :length]
            signal = signal[..., hop:]
    yield signal


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


def overlapped(parts: Iterable[torch.Tensor], hop: int) -> Iterator[torch.Tensor]:
    """Joins the values `[steps, ...]` of windows that start `hop` steps apart, into pieces of one curve: their weighted means.

    >>> torch.cat(list(overlapped([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([4.0, 4.0])], hop=2))).tolist()
    [1.0, 1.0, 2.5, 4.0]
    """
    # Weights of windows of 5 steps, hop 2. They fall to the ends: what stands there has been judged without what follows it.
    #
    #   1 2 3 2 1
    #       1 2 3 2 1
    #           1 2 3 2 1
    #   |-| |-|                the first `hop` steps are complete as soon as the next window is there
    total: Any = None
    for part in parts:
        rising = torch.arange(1, len(part) + 1, device=part.device, dtype=part.dtype)
        own = torch.minimum(rising, rising.flip(0)).reshape(-1, *[1] * (part.dim() - 1))
        if total is None:
            total, weight = own * part, own
            continue
        yield total[:hop] / weight[:hop]
        total, weight = _sum(total[hop:], own * part), _sum(weight[hop:], own)
    yield total / weight


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
