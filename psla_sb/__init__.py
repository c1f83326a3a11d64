"""psla_sb: audio tagging with PSLA's training techniques, as parts of SpeechBrain."""

from argparse import ArgumentParser

# the one place that says it; setup.py reads this line
__version__ = "0.1.0"


def add_version(parser: ArgumentParser) -> None:
    """Adds `--version` to a command's options.

    Example
    -------
    >>> parser = ArgumentParser()
    >>> add_version(parser)
    >>> parser.parse_args(["--version"])
    Traceback (most recent call last):
    ...
    SystemExit: 0
    """
    parser.add_argument("--version", action="version", version=f"psla_sb {__version__}")
