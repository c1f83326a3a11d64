"""Files that appear whole or not at all, and folders that one process at a time writes to."""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
    except OSError as error:
        # some network file systems know no flush of a folder, and need none
        if not (os.path.isdir(path) and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def append(path: str | Path, text: str, header: str = "") -> None:
    """Appends to a file, after `header` if it is new; several processes, also on other machines, do so one after the other."""
    with write_errors(path), open(path, "a", newline="", encoding="utf-8") as file:
        # where clients of a network file system append, each to the end that it knows of, a lock makes them look again
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        file.write((header if file.seek(0, os.SEEK_END) == 0 else "") + text)
        file.flush()
        os.fsync(file.fileno())


class NotSeen(InputError):
    """A process does not see what another one has written."""


def wait_for(path: str | Path, seconds: float = 120.0) -> None:
    """Waits for a file that another machine has written: network file systems show it some time later."""
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise NotSeen(f"{path}: not seen here {seconds:.0f} s after another process has written it; is the folder shared?")
        # which makes the file system look again
        with contextlib.suppress(OSError):
            os.listdir(os.path.dirname(path) or ".")
        time.sleep(0.2)


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


@contextlib.contextmanager
def put_back_on_error(files: Iterable[Path]) -> Iterator[None]:
    """Puts back those of these files that were replaced in the block, if it ends in an error.

    >>> path = getfixture("tmp_path") / "a"
    >>> write_file(path, "before")
    >>> with contextlib.suppress(KeyError), put_back_on_error([path]):
    ...     write_file(path, "after")
    ...     raise KeyError
    >>> path.read_text(), [file.name for file in path.parent.iterdir()]
    ('before', ['a'])
    """
    kept = {file: file.with_name(f"{UNFINISHED}before+{file.name}") for file in files}
    try:
        for file, before in kept.items():
            before.unlink(missing_ok=True)
            # an annotation may be large, and a link costs nothing; not all file systems have links
            try:
                os.link(file, before)
            except OSError:
                shutil.copy2(file, before)
        yield
    except BaseException:
        for file, before in kept.items():
            if before.exists() and not (file.exists() and before.samefile(file)):
                os.replace(before, file)
        raise
    finally:
        for before in kept.values():
            before.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes a file as `atomic_write` does; text becomes UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON as the standard has it, which knows no NaN and no infinity: null stands for them."""
    write_file(path, json.dumps(_finite(content), indent=1, allow_nan=False))


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: str | Path) -> dict[str, Any] | None:
    """Reads what a JSON file says; None if it is not there, or not as it was written: what it is about is then done again."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


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
