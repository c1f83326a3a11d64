"""The sound files of a folder, and which of them a table means."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from psla_sb.dataio.containers import ENDINGS


class Files(NamedTuple):
    """Holds the sounds in a folder and below it, as paths relative to it, and the other files."""

    folder: Path
    sounds: list[str]
    others: list[str]

    def ignored(self) -> list[str]:
        """Says how many files are no sounds, by their endings; nothing if there are none."""
        if not self.others:
            return []
        endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in self.others)
        counts = ", ".join(f"{ending} {n}" for ending, n in endings.most_common(6))
        return [f"files that are no sounds, and are not used: {len(self.others)} ({counts})"]


def files_in(folder: str | Path, but: str | Path | None = None) -> Files:
    """Lists the files in a folder and below it, in order, without hidden ones and those in the folder `but`."""
    sounds, others = list[str](), list[str]()
    for path in _walk(Path(folder), os.path.realpath(but) if but else None):
        (sounds if os.path.splitext(path)[1].lower() in ENDINGS else others).append(path)
    return Files(Path(folder), sorted(sounds), sorted(others))


def _walk(folder: Path, but: str | None) -> Iterator[str]:
    seen = set[str]()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        # a link to a folder above would never end
        if real in seen or (real == but and seen):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in names:
            if not _is_hidden(name) and os.path.isfile(os.path.join(root, name)):
                yield os.path.relpath(os.path.join(root, name), folder)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


class Finder:
    """Finds the files that a table names: by their paths, or by their names alone, with or without ending.

    >>> finder = Finder([Files(Path("/d"), ["audio/a.wav", "audio/b.wav"], [])])
    >>> finder.find("b"), finder.find("elsewhere/a.wav"), finder.find("c")
    ('/d/audio/b.wav', '/d/audio/a.wav', None)
    """

    def __init__(self, folders: list[Files]) -> None:
        self.folders = [files.folder for files in folders]
        self._by_path, self._by_name = dict[str, str](), dict[str, str | None]()
        for files in folders:
            for sound in files.sounds:
                path, plain = os.path.abspath(files.folder / sound), PurePosixPath(sound)
                for name in (str(plain), str(plain.with_suffix(""))):
                    self._by_path.setdefault(name, path)
                for name in {plain.name, plain.stem}:
                    # a name that several files have finds none of them
                    if self._by_name.setdefault(name, path) != path:
                        self._by_name[name] = None

    def find(self, value: str) -> str | None:
        """Gives the path of the file that a cell of a table means; None if there is none, or there are several."""
        value = value.strip().replace("\\", "/")
        if not value:
            return None
        name = PurePosixPath(value)
        candidates = [name] if name.is_absolute() else [folder / name for folder in self.folders]
        for candidate in candidates:
            if os.path.splitext(name.name)[1].lower() in ENDINGS and os.path.isfile(candidate):
                return os.path.abspath(candidate)
        return self._by_path.get(str(name)) or self._by_name.get(name.name)

    def problem(self, value: str) -> str:
        """Says why no file was found for a cell."""
        several = PurePosixPath(value.strip().replace("\\", "/")).name in self._by_name
        return "several files have this name; give their paths in the table" if several else "no such file"
