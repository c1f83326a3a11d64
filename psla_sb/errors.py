"""The one exception that means: the input is wrong, not the program."""


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
