"""Files that appear whole or not at all, and folders that one process at a time writes to."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from speechbrain.utils.logger import get_logger

from psla_sb.errors import InputError

logger = get_logger(__name__)
UNFINISHED = "tmp+"
LOCK = ".lock"


@contextlib.contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turns what the several libraries raise when they cannot write into one clear `InputError`."""
    try:
        yield
    # PyTorch raises RuntimeErrors; numpy OSErrors without a number
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(next(folder for folder in Path(path).absolute().parents if folder.exists())).free // 2**20
        # what PyTorch says of a full disk is of no use
        reason = getattr(error, "strerror", None) or (str(error).partition("\n")[0] if free else "the disk is full")
        raise InputError(
            f"{path}: cannot be written ({reason}; {free} MiB are free there). All that was saved before is as it was: make room, "
            "and the same command goes on from it."
        ) from error


def flush(path: str | Path) -> None:
    """Makes the operating system write a file, or a folder's list of files, to disk."""
    # open() refuses folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives the name to write to; the file gets its own name once it is written and flushed, or never.

    The folder is made if there is none. What cannot be written is an `InputError`, and an earlier file of this name stays.

    Example
    -------
    >>> path = getfixture("tmp_path") / "results" / "figures.json"
    >>> with atomic_write(path) as temporary:
    ...     _ = temporary.write_text("{}")
    >>> path.read_text()
    '{}'
    """
    path = Path(path)
    # the name keeps its ending: numpy and others choose the format by it
    temporary = path.with_name(f"{UNFINISHED}{path.name}")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            # before the rename: a crash could otherwise leave an empty file under the right name
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes a file as `atomic_write` does; text becomes UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def one_process(folder: str | Path) -> Iterator[None]:
    """Waits until no other process on this machine, or on this file system if it can tell, is in such a block for the folder.

    The folder is made if there is none; its file `.lock` stays. The workers of a process that was killed hold the lock as well,
    until they have noticed.
    """
    lock = Path(folder) / LOCK
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        # what is in it stays
        file = open(lock, "a")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{lock.parent}: cannot be written to ({error.strerror}); choose another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process is at work in %s; waiting for it to end.", lock.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # a file system without locks: several processes at once are then the user's business
            logger.info("%s: its file system has no locks; start no second process that writes there.", lock.parent)
        yield
