"""The one exception that means: the input is wrong, not the program."""

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
