"""The sound files of a folder, and which of them a table means."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from psla_sb.dataio.containers import ENDINGS
from psla_sb.errors import InputError


class Files(NamedTuple):
    """Holds the sounds in a folder and below it, as paths relative to it, and the other files."""

    folder: Path
    sounds: list[str]
    others: list[str]
    links: Sequence[str] = ()  # to files that are not there

    def ignored(self) -> list[str]:
        """Says how many files are no sounds, by their endings, and how many links lead nowhere; nothing if there are none."""
        nowhere = [f"links to files that are not there: {len(self.links)}, the first is {self.links[0]}"] if self.links else []
        if not self.others:
            return nowhere
        endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in self.others)
        counts = ", ".join(f"{ending} {n}" for ending, n in endings.most_common(6))
        return [f"files that are no sounds, and are not used: {len(self.others)} ({counts})", *nowhere]


def files_in(folder: str | Path, but: str | Path | None = None) -> Files:
    """Lists the files in a folder and below it, in order, without hidden ones and those in the folder `but`.

    It is an `InputError` if a folder cannot be looked into.
    """
    sounds, others, links = list[str](), list[str](), list[str]()
    for path in _walk(Path(folder), os.path.realpath(but) if but else None):
        is_there, is_sound = os.path.isfile(Path(folder) / path), os.path.splitext(path)[1].lower() in ENDINGS
        (sounds if is_there and is_sound else others if is_there else links).append(path)
    return Files(Path(folder), sorted(sounds), sorted(others), sorted(links))


def _raise(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be looked into ({error.strerror}); its sounds would be left out") from None


def _walk(folder: Path, but: str | None) -> Iterator[str]:
    seen = set[str]()
    for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(root)
        # a link to a folder above would never end
        if real in seen or (real == but and seen):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in names:
            path = os.path.join(root, name)
            if not _is_hidden(name) and (os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))):
                yield os.path.relpath(path, folder)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def composed(name: str) -> str:
    """Writes letters with accents in the one form of Unicode that most systems use; a Mac's file names have the other one.

    >>> len("Vo\\u0308gel"), len(composed("Vo\\u0308gel"))
    (6, 5)
    """
    return unicodedata.normalize("NFC", name)


class Finder:
    """Finds the files that a table names: by their paths, or by their names alone, with or without ending.

    >>> finder = Finder([Files(Path("/d"), ["audio/a.wav", "audio/b.wav"], [])])
    >>> finder.find("b"), finder.find("elsewhere/a.wav"), finder.find("c")
    ('/d/audio/b.wav', '/d/audio/a.wav', None)
    """

    def __init__(self, folders: list[Files]) -> None:
        self.folders = [files.folder for files in folders]
        self._by_path, self._by_name = dict[str, str | None](), dict[str, str | None]()
        for files in folders:
            for sound in files.sounds:
                path, plain = os.path.abspath(files.folder / sound), PurePosixPath(composed(sound))
                for known, names in (
                    (self._by_path, {str(plain), str(plain.with_suffix(""))}),
                    (self._by_name, {plain.name, plain.stem}),
                ):
                    for name in names:
                        # a name that several files have finds none of them
                        if known.setdefault(name, path) != path:
                            known[name] = None
        self.elsewhere = True

    def look_where(self, values: Sequence[str]) -> None:
        """Decides by all cells whether paths that lead nowhere are those of another machine, whose last part alone is meant.

        They are if none of them leads to a file, and no two to the same one. Otherwise files are missing, and another one of the
        same name is not what is meant.
        """
        paths = {value for value in values if len(PurePosixPath(composed(value).replace("\\", "/")).parts) > 1}
        self.elsewhere = False
        if any(self.find(value) for value in paths):
            return
        self.elsewhere = True
        found = [path for path in map(self.find, paths) if path]
        self.elsewhere = len(set(found)) == len(found)

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
        plain = composed(str(name))
        by_name = self._by_name.get(composed(name.name)) if self.elsewhere or len(name.parts) == 1 else None
        return self._by_path.get(plain) or by_name

    def problem(self, value: str) -> str:
        """Says why no file was found for a cell."""
        name = composed(value.strip().replace("\\", "/"))
        known = self._by_name if self.elsewhere or "/" not in name else self._by_path
        several = (PurePosixPath(name).name if known is self._by_name else name) in known
        return "several files have this name; give their paths in the table" if several else "no such file"
