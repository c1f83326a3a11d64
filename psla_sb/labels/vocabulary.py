"""The classes of a data set: which index of a model's output is which mid and which display name.

A mid is the identifier that annotations carry (`/m/09x0r`), the display name is what people read (`Speech`). The class
lists of AudioSet, of FSD50K and of PSLA's copy of it are read as they were published.
"""

import csv
import difflib
import re
from collections.abc import Sequence

from psla_sb.errors import InputError

_HEADER_NAMES = {"index": "index", "mid": "mid", "display_name": "name", "label": "name", "name": "name"}


class Vocabulary:
    """Classes in the order of a model's outputs.

    Mids and display names are unique: annotations join mids by `;`, SpeechBrain's label encoder files hold the names.

    Arguments
    ---------
    mids : sequence of str
        One identifier per class, without `;`, `,`, quotes and line breaks.
    names : sequence of str
        One display name per class, without line breaks and ` => `.

    Raises
    ------
    InputError
        If there are no classes, or a mid or a name is empty, repeated or has one of those characters.
    ValueError
        If there are not as many names as mids.

    Example
    -------
    >>> vocabulary = Vocabulary(["/m/09x0r", "/m/0bt9lr"], ["Speech", "Dog"])
    >>> len(vocabulary), vocabulary.index("/m/0bt9lr"), vocabulary.names[1]
    (2, 1, 'Dog')
    >>> "/m/04rlf" in vocabulary
    False
    """

    def __init__(self, mids: Sequence[str], names: Sequence[str]):
        if len(mids) != len(names):
            raise ValueError(f"{len(mids)} mids but {len(names)} display names")
        if not len(mids):
            raise InputError("a vocabulary needs at least one class")
        self.mids, self.names = list(mids), list(names)
        if fault := _fault(self.mids, self.names):
            raise InputError(f"class {fault[0]}: {fault[1]}")
        self._index = {mid: i for i, mid in enumerate(self.mids)}

    @classmethod
    def from_csv(cls, path):
        """Read a class list.

        Columns are told by the header (`index`, `mid`, and `display_name`, `label` or `name`, in any order). Without a
        header the first column is the index, and of the other two the one whose values all begin with `/` has the mids.

        Arguments
        ---------
        path : path-like
            UTF-8 CSV, for example AudioSet's `class_labels_indices.csv` or FSD50K's `vocabulary.csv`.

        Returns
        -------
        Vocabulary
            In the order of the index, which need not be that of the rows.

        Raises
        ------
        InputError
            Naming file and row, if the file is unreadable or empty, a column is missing, the index is not 0, 1, 2, ...
            or a mid or name is not allowed.

        Example
        -------
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "vocabulary.csv"
        >>> _ = path.write_text("0,Bark,/m/05tny_\\n1,Dog,/m/0bt9lr\\n")
        >>> Vocabulary.from_csv(path).mids
        ['/m/05tny_', '/m/0bt9lr']
        """
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, skipinitialspace=True)
                # (line number, cells): a quoted name may span lines, so rows cannot be counted afterwards.
                rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
        except OSError as error:
            raise InputError(f"{path}: cannot read this class list ({error.strerror})") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a UTF-8 CSV file ({error})") from None
        if not rows:
            raise InputError(f"{path}: the file is empty; expected rows of index, mid and display name")
        columns, rows = _columns(path, rows)
        if not rows:
            raise InputError(f"{path}: a header but no classes")

        by_index = {}
        for line, row in rows:
            if len(row) != columns["width"]:
                raise InputError(
                    f"{path}, row {line}: {len(row)} columns instead of {columns['width']}; quote names that contain commas"
                )
            index = row[columns["index"]]
            if not re.fullmatch("[0-9]+", index):
                raise InputError(f"{path}, row {line}: the index is {index!r}, not a whole number")
            if int(index) in by_index:
                raise InputError(f"{path}, row {line}: the index {index} is there twice; number classes 0, 1, 2, ...")
            by_index[int(index)] = (line, row[columns["mid"]], row[columns["name"]])
        classes = [by_index[index] for index in sorted(by_index)]
        for expected, index in enumerate(sorted(by_index)):
            if index != expected:
                raise InputError(
                    f"{path}, row {classes[expected][0]}: the index {index} follows a gap, {expected} is missing; "
                    "number the classes 0, 1, 2, ..."
                )
        lines, mids, names = map(list, zip(*classes, strict=True))
        if fault := _fault(mids, names):
            raise InputError(f"{path}, row {lines[fault[0]]}: {fault[1]}")
        return cls(mids, names)

    def to_csv(self, path):
        """Write AudioSet's format: header `index,mid,display_name`, every name quoted.

        Arguments
        ---------
        path : path-like
            The file to write.

        Example
        -------
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "class_labels_indices.csv"
        >>> Vocabulary(["/m/0c1dj"], ["Sound, at large"]).to_csv(path)
        >>> print(path.read_text().strip())
        index,mid,display_name
        0,/m/0c1dj,"Sound, at large"
        """
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write("index,mid,display_name\n")
            for i, (mid, name) in enumerate(zip(self.mids, self.names, strict=True)):
                quoted = name.replace('"', '""')
                file.write(f'{i},{mid},"{quoted}"\n')

    def index(self, mid):
        """Index of a mid.

        Arguments
        ---------
        mid : str

        Returns
        -------
        int

        Raises
        ------
        InputError
            If the mid is not in the vocabulary; the message suggests the nearest one.

        Example
        -------
        >>> Vocabulary(["/m/09x0r", "/m/0bt9lr"], ["Speech", "Dog"]).index("dog")
        Traceback (most recent call last):
        ...
        psla_sb.errors.InputError: no class 'dog' among the 2 of the vocabulary; did you mean '/m/0bt9lr' (Dog)?
        """
        try:
            return self._index[mid]
        except KeyError:
            raise InputError(f"no class {mid!r} among the {len(self)} of the vocabulary{self._hint(mid)}") from None

    def _hint(self, mid):
        # A display name in place of a mid is the most likely mistake, so names are matched too.
        known = {key.lower(): i for keys in (self.names, self.mids) for i, key in enumerate(keys)}
        near = difflib.get_close_matches(str(mid).lower(), known, n=1)
        return f"; did you mean {self.mids[known[near[0]]]!r} ({self.names[known[near[0]]]})?" if near else ""

    def __contains__(self, mid):
        return mid in self._index

    def __len__(self):
        return len(self.mids)

    def __eq__(self, other):
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self.mids == other.mids and self.names == other.names

    __hash__ = None

    def __repr__(self):
        return f"Vocabulary({len(self)} classes, {self.names[0]!r} to {self.names[-1]!r})"


def _columns(path, rows):
    """Where index, mid and name are, and the rows without the header."""
    first = [cell.lower() for cell in rows[0][1]]
    if "mid" in first:
        columns = {_HEADER_NAMES[cell]: i for i, cell in enumerate(first) if cell in _HEADER_NAMES}
        missing = [name for name in ("index", "mid", "name") if name not in columns]
        if missing:
            raise InputError(f"{path}, row {rows[0][0]}: no column for {' and '.join(missing)}; expected index,mid,display_name")
        return columns | {"width": len(first)}, rows[1:]
    mids = [i for i in range(1, len(first)) if all(len(row) > i and row[i].startswith("/") for _, row in rows)]
    if len(first) != 3 or len(mids) != 1:
        raise InputError(f"{path}, row {rows[0][0]}: cannot tell which column is which; begin the file with index,mid,display_name")
    return {"index": 0, "mid": mids[0], "name": 3 - mids[0], "width": 3}, rows


def _fault(mids, names):
    """(index of the class, what is wrong) of the first class that cannot be in a vocabulary, or None."""
    known = {"mid": set(), "display name": set()}
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
