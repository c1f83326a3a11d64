"""A folder on a network file system as one of its clients finds it: what others wrote comes late, and some calls are not known.

The processes of a recipe get it by `runs.at_start`, since nothing here can mount such a file system.
"""

import builtins
import errno
import fcntl
import io
import os
import socket
import stat
import time

DELAY = 0.3  # seconds


class AppendedTo(io.TextIOWrapper):
    """A file that is open for appending: its end is where it was when this client looked last."""

    end = 0

    def seek(self, offset, whence=0):
        """To the end that this client knows of."""
        return super().seek(*((self.end, 0) if whence == os.SEEK_END else (offset, whence)))


def mount(folder, client):
    """Makes this process one on a machine of its own, `client`, to which `folder` comes over the network.

    * What another one wrote is seen a moment after the first look for it, and only if its folder was listed meanwhile. The first
      client, 0, sees all.
    * A folder cannot be flushed.
    * Two that append overwrite each other's lines, unless they have locked the file, which makes them look for its end.
    """
    real_open, real_os_open, real_stat, real_list, real_scan = builtins.open, os.open, os.stat, os.listdir, os.scandir
    real_flush, real_lock, real_replace = os.fsync, fcntl.flock, os.replace
    looked_for, listed, own = {}, {}, set()

    def inside(path):
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(f"{folder}{os.sep}")

    def is_seen(path):
        path = os.path.abspath(path)
        if client == 0 or path in own or not os.path.lexists(path) or stat.S_ISDIR(os.lstat(path).st_mode):
            return True
        first = looked_for.setdefault(path, time.monotonic())
        return listed.get(os.path.dirname(path), 0) > first + DELAY

    def look(path):
        if inside(path) and not is_seen(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_flush(descriptor)

    def open_file(file, mode="r", *args, **kwargs):
        if inside(file) and mode == "a":
            own.add(os.path.abspath(file))
            appended = AppendedTo(
                io.FileIO(real_os_open(file, os.O_WRONLY | os.O_CREAT, 0o666), "w"), kwargs.get("encoding"), newline="\n"
            )
            appended.end = os.fstat(appended.fileno()).st_size
            appended.seek(0, os.SEEK_END)
            # long enough for the others to open it too
            time.sleep(DELAY / 2)
            return appended
        if "w" in mode or "x" in mode:
            own.add(os.path.abspath(file)) if inside(file) else None
        else:
            look(file)
        return real_open(file, mode, *args, **kwargs)

    def flock(file, operation):
        real_lock(file, operation)
        if isinstance(file, AppendedTo):
            file.end = os.fstat(file.fileno()).st_size

    def replace(source, target, **kwargs):
        real_replace(source, target, **kwargs)
        own.add(os.path.abspath(target))

    def looks_first(function):
        def call(path=".", *args, **kwargs):
            look(path)
            return function(path, *args, **kwargs)

        return call

    def lists(function):
        def call(path="."):
            if inside(f"{path}/x"):
                listed[os.path.abspath(path)] = time.monotonic()
            return function(path)

        return call

    class Scan(list):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def seen_of(entries):
        return [entry for entry in entries if not inside(entry.path) or is_seen(entry.path)]

    builtins.open = io.open = open_file
    os.fsync, fcntl.flock, os.replace = fsync, flock, replace
    os.open, os.stat = looks_first(real_os_open), looks_first(real_stat)
    os.scandir = lists(lambda path: Scan(seen_of(real_scan(path))))
    os.listdir = lists(lambda path: [entry.name for entry in os.scandir(path)] if inside(f"{path}/x") else real_list(path))
    socket.gethostname = lambda: f"node{client}"
    # what opens files by itself
    import pyarrow.csv
    import safetensors.torch

    pyarrow.csv.open_csv = looks_first(pyarrow.csv.open_csv)
    safetensors.torch.load_file = looks_first(safetensors.torch.load_file)
