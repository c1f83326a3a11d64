"""The one exception that means: the input is wrong, not the program; and what becomes such an error."""

from collections.abc import Callable

import torch

KEPT = 1000  # characters of a message, at either end


class InputError(ValueError):
    """Bad input from outside: a file, a key, an option.

    The message says which file or key, what is wrong and what to do. Command-line entry points print it without a traceback
    and exit with status 2.

    Example
    -------
    >>> raise InputError("labels.csv, row 3: no such class '/m/xyz'")
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: labels.csv, row 3: no such class '/m/xyz'
    """

    def __init__(self, message=""):
        # a message quotes its input, of which a cell may have megabytes
        super().__init__(message if len(message) <= 2 * KEPT else f"{message[:KEPT]} [...] {message[-KEPT:]}")


class Interrupted(BaseException):
    """A run has saved its state and stopped, because it was asked to.

    Example
    -------
    >>> raise Interrupted
    Traceback (most recent call last):
    ...
    psla_sb.errors.Interrupted
    """


def largest_that_fits(attempt: Callable[[int], object], below: int) -> int:
    """Gives the largest of three quarters, nine sixteenths, ... of a number of clips that a GPU has memory for; 0 if there is none.

    Example
    -------
    >>> def attempt(n_clips):
    ...     if n_clips > 50:
    ...         raise torch.OutOfMemoryError
    >>> largest_that_fits(attempt, 100)
    42
    """
    n_clips = below * 3 // 4
    while n_clips:
        try:
            attempt(n_clips)
            return n_clips
        except torch.OutOfMemoryError:
            pass
        # outside of the handler, which keeps what was allocated
        torch.cuda.empty_cache()
        n_clips = n_clips * 3 // 4
    return 0
