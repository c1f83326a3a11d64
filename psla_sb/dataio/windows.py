"""Signals of any length in overlapping windows, and the values of the windows joined into one curve."""

import numpy as np
import torch


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
