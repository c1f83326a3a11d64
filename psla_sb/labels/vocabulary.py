"""The classes of a data set: which index of a model's output is which mid and which display name.

A mid is the identifier that annotations carry (`/m/09x0r`), the display name is what people read (`Speech`).
"""

import csv
import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from psla_sb.errors import InputError
from psla_sb.files import write_file

_HEADER_NAMES = {"index": "index", "mid": "mid", "display_name": "name", "label": "name", "name": "name"}
_Rows = list[tuple[int, list[str]]]  # (line number, cells)


class Vocabulary:
    """Holds classes in the order of a model's outputs: a unique mid and a unique display name for each.

    Mids have no `;`, `,`, quotes and line breaks, names no line breaks and ` => `: annotations join mids by `;`, and SpeechBrain's
    label encoder files hold the names.

    Example
    -------
    >>> vocabulary = Vocabulary(["/m/09x0r", "/m/0bt9lr"], ["Speech", "Dog"])
    >>> len(vocabulary), vocabulary.index("/m/0bt9lr"), vocabulary.names[1], "/m/04rlf" in vocabulary
    (2, 1, 'Dog', False)
    """

    def __init__(self, mids: Sequence[str], names: Sequence[str]) -> None:
        if len(mids) != len(names):
            raise ValueError(f"{len(mids)} mids but {len(names)} display names")
        if not len(mids):
            raise InputError("a vocabulary needs at least one class")
        self.mids, self.names = list(mids), list(names)
        if fault := _fault(self.mids, self.names):
            raise InputError(f"class {fault[0]}: {fault[1]}")
        self._index = {mid: i for i, mid in enumerate(self.mids)}

    @classmethod
    def from_csv(cls, path: str | Path) -> "Vocabulary":
        """Reads a class list: AudioSet's, FSD50K's, PSLA's copy of it, or an own one; UTF-8, the rows in any order.

        Columns are told by the header (`index`, `mid`, and `display_name`, `label` or `name`, in any order). Without a
        header the first column is the index, and of the other two the one whose values all begin with `/` has the mids.

        Raises
        ------
        InputError
            Naming file and row, if the file is unreadable or empty, a column is missing, the index is not 0, 1, 2, ...
            or a mid or name is not allowed.

        Example
        -------
        >>> path = getfixture("tmp_path") / "vocabulary.csv"
        >>> _ = path.write_text("0,Bark,/m/05tny_\\n1,Dog,/m/0bt9lr\\n")
        >>> Vocabulary.from_csv(path).mids
        ['/m/05tny_', '/m/0bt9lr']
        """
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, skipinitialspace=True)
                # A quoted name may span lines, so rows cannot be counted afterwards.
                rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
        except OSError as error:
            raise InputError(f"{path}: cannot read this class list ({error.strerror})") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a UTF-8 CSV file ({error})") from None
        if not rows:
            raise InputError(f"{path}: the file is empty; expected rows of index, mid and display name")
        columns, width, rows = _columns(path, rows)
        if not rows:
            raise InputError(f"{path}: a header but no classes")

        classes = []
        for line, row in rows:
            if len(row) != width:
                raise InputError(f"{path}, row {line}: {len(row)} columns instead of {width}; quote names that contain commas")
            index, mid, name = (row[columns[what]] for what in ("index", "mid", "name"))
            if not re.fullmatch("[0-9]+", index):
                raise InputError(f"{path}, row {line}: the index is {index!r}, not a whole number")
            classes.append((int(index), line, mid, name))
        for expected, (found, line, *_) in enumerate(sorted(classes)):
            if found != expected:
                wrong = "is there twice" if found < expected else f"follows a gap, {expected} is missing"
                raise InputError(f"{path}, row {line}: the index {found} {wrong}; number the classes 0, 1, 2, ...")
        _, lines, mids, names = zip(*sorted(classes), strict=True)
        if fault := _fault(mids, names):
            raise InputError(f"{path}, row {lines[fault[0]]}: {fault[1]}")
        return cls(mids, names)

    def to_csv(self, path: str | Path) -> None:
        """Writes AudioSet's format: header `index,mid,display_name`, every name quoted."""
        quoted = [name.replace('"', '""') for name in self.names]
        lines = [f'{i},{mid},"{name}"\n' for i, (mid, name) in enumerate(zip(self.mids, quoted, strict=True))]
        write_file(path, "".join(["index,mid,display_name\n", *lines]))

    def digest(self) -> str:
        """Computes the SHA-256 of the mids, which tells whether scores are of these classes in this order."""
        return hashlib.sha256(json.dumps(self.mids).encode()).hexdigest()

    def index(self, mid: str) -> int:
        """Looks up a mid; the error for one that is not there suggests the nearest."""
        try:
            return self._index[mid]
        except KeyError:
            raise InputError(f"no class {mid!r} among the {len(self)} of the vocabulary{self._hint(mid)}") from None

    def _hint(self, mid: str) -> str:
        # A display name in place of a mid is the most likely mistake, so names are matched too.
        known = {key.lower(): i for keys in (self.names, self.mids) for i, key in enumerate(keys)}
        near = difflib.get_close_matches(str(mid).lower(), known, n=1)
        return f"; did you mean {self.mids[known[near[0]]]!r} ({self.names[known[near[0]]]})?" if near else ""

    def __contains__(self, mid: str) -> bool:
        return mid in self._index

    def __len__(self) -> int:
        return len(self.mids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.mids == other.mids and self.names == other.names

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} classes, {self.names[0]!r} to {self.names[-1]!r})"


def _columns(path: str | Path, rows: _Rows) -> tuple[dict[str, int], int, _Rows]:
    """Finds where index, mid and name are and how many columns there are; gives the rows without the header too."""
    line, first = rows[0][0], [cell.lower() for cell in rows[0][1]]
    if "mid" in first:
        columns = {_HEADER_NAMES[cell]: i for i, cell in enumerate(first) if cell in _HEADER_NAMES}
        if missing := [name for name in ("index", "mid", "name") if name not in columns]:
            raise InputError(f"{path}, row {line}: no column for {' and '.join(missing)}; expected index,mid,display_name")
        return columns, len(first), rows[1:]
    mids = [i for i in range(1, len(first)) if all(len(row) > i and row[i].startswith("/") for _, row in rows)]
    if len(first) != 3 or len(mids) != 1:
        raise InputError(f"{path}, row {line}: cannot tell which column is which; begin the file with index,mid,display_name")
    return {"index": 0, "mid": mids[0], "name": 3 - mids[0]}, 3, rows


def _fault(mids: Sequence[str], names: Sequence[str]) -> tuple[int, str] | None:
    """Gives (index of the class, what is wrong) of the first class that cannot be in a vocabulary."""
    known: dict[str, set[str]] = {"mid": set(), "display name": set()}
    for i, (mid, name) in enumerate(zip(mids, names, strict=True)):
        for what, text in (("mid", mid), ("display name", name)):
            if not text.strip():
                return i, f"the {what} is empty"
            if text != text.strip() or "\n" in text or "\r" in text:
                return i, f"the {what} {text!r} has spaces around it or a line break in it"
            if text in known[what]:
                return i, f"the {what} {text!r} is there twice; every class needs its own"
            known[what].add(text)
        if re.search('[;,"]', mid):
            return i, f"the mid {mid!r} contains ';', ',' or a quote; annotation files separate mids with them"
        if " => " in name:
            return i, f"the display name {name!r} contains ' => ', which SpeechBrain's label encoder files cannot hold"
    return None
