"""Tables of clips as people have them: any delimiter, any encoding, any names of columns."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from psla_sb.dataio.containers import ENDINGS
from psla_sb.errors import InputError

DELIMITERS = "\t;,|"
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# what files of other programs begin with
NO_TEXT = {b"PK\x03\x04": "a workbook", b"\xd0\xcf\x11\xe0": "an old workbook", b"%PDF": "a PDF file", b"SQLi": "a database"}
SAMPLED_ROWS = 200


class Table(NamedTuple):
    """Holds the cells of a table, all as text; every row has as many as the header."""

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]  # in the file, of each row
    delimiter: str
    encoding: str

    def column(self, name: str) -> list[str]:
        """Gives the cells of a column."""
        place = self.header.index(name)
        return [row[place] for row in self.rows]


def read_table(path: str | Path) -> Table:
    """Reads a CSV or TSV file: UTF-8, UTF-16 or Latin-1, separated by tabs, `;`, `,` or `|`.

    An `InputError` says that it is none, or which of its rows has other columns than its header.

    >>> path = getfixture("tmp_path") / "clips.csv"
    >>> _ = path.write_bytes("file;class\\na.wav;Vögel\\n".encode("latin-1"))
    >>> read_table(path).header, read_table(path).rows
    (['file', 'class'], [['a.wav', 'Vögel']])
    """
    path = Path(path)
    text, encoding = _decoded(path)
    if not text.strip():
        raise InputError(f"{path}: nothing in it; a table has a header and a row for each clip")
    declared = re.match(r"sep=(.)\r?\n", text)
    if declared:
        # a line that is Excel's alone
        text = text[declared.end() :]
    delimiter = declared[1] if declared else _delimiter(path, text)
    rows, lines = [], []
    for line, row in _rows(path, text, delimiter):
        cells = [cell.strip() for cell in row]
        if any(cells):
            rows.append(cells)
            lines.append(line + bool(declared))
    if len(rows) < 2:
        raise InputError(f"{path}: only a header in it; a table has a header and a row for each clip")
    header, rows, lines = rows[0], rows[1:], lines[1:]
    while header and not header[-1] and all(len(row) < len(header) or not row[len(header) - 1] for row in rows):
        # columns that a spreadsheet has, and nobody has filled
        header.pop()
    header = [name or f"column {number}" for number, name in enumerate(header, 1)]
    if twice := [name for name, n in Counter(header).items() if n > 1]:
        raise InputError(f"{path}, row 1: two columns are called '{twice[0]}'; give each a name of its own")
    if sound := next((name for name in header if os.path.splitext(name)[1].lower() in ENDINGS), None):
        raise InputError(f"{path}, row 1: has '{sound}' and not names of columns; put a row such as file,label above it")
    for line, row in zip(lines, rows, strict=True):
        if any(row[len(header) :]):
            said = f"{len(row)} cells, but the header has {len(header)}; put quotes around cells that contain '{delimiter}'"
            raise InputError(f"{path}, row {line}: {said.replace(chr(9), 'a tab')}")
        row[:] = row[: len(header)] + [""] * (len(header) - len(row))
    return Table(path, header, rows, lines, delimiter, encoding)


def _decoded(path: Path) -> tuple[str, str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    for begin, what in NO_TEXT.items():
        if data.startswith(begin):
            raise InputError(f"{path}: is {what}, not a table in text; save it as CSV (in Excel: Save As, CSV UTF-8)")
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    for name in [encoding] if encoding else ["utf-8", "cp1252", "latin-1"]:
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        return text, name
    raise InputError(f"{path}: is not text; a table is a CSV or TSV file")


def _rows(path: Path, text: str, delimiter: str, strict: bool = True) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{path}, row {reader.line_num}: cannot be read ({error}); is a quote missing there?") from None


def _delimiter(path: Path, text: str) -> str:
    """Chooses the delimiter with which most rows are as long as the header; of several the one that makes most columns."""
    best = (0.0, 0, "")
    beginning = "".join(text.splitlines(keepends=True)[: SAMPLED_ROWS + 1])
    for delimiter in DELIMITERS:
        try:
            rows = [row for _, row in _rows(path, beginning, delimiter, strict=False) if any(map(str.strip, row))]
        except InputError:
            continue
        if rows and len(rows[0]) > 1:
            share = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
            best = max(best, (round(share, 1), len(rows[0]), delimiter))
    if not best[2]:
        raise InputError(f"{path}, row 1: only one column; a table needs one for the files and one for the classes, between commas")
    return best[2]


def seconds_of(text: str) -> float | None:
    """Reads a time in seconds, with a decimal point or comma, or as [hours:]minutes:seconds; None if it is none.

    >>> [seconds_of(text) for text in ("1.5", "1,5", "1:02:03.5", "soon", "")]
    [1.5, 1.5, 3723.5, None, None]
    """
    parts = text.strip().replace(",", ".").split(":")
    if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"\d+(\.\d*)?([eE][-+]?\d+)?|\.\d+", part) for part in parts):
        return None
    total = 0.0
    for part in parts:
        total = 60 * total + float(part)
    return total


def label_separator(cells: Sequence[str]) -> str:
    """Finds what separates the labels in cells: `;` or `|` if they occur, `,` if the parts are labels of other cells; or nothing.

    >>> label_separator(["dog,cat", "cat", "dog"]), label_separator(["Chirp, tweet", "Dog"]), label_separator(["a, b;c"])
    (',', '', ';')
    """
    for separator in ";|":
        if any(separator in cell for cell in cells):
            return separator
    distinct = [{part.strip() for part in cell.split(",")} - {""} for cell in set(cells)]
    counts = Counter(part for parts in distinct for part in parts)
    of_several = {part for parts in distinct if len(parts) > 1 for part in parts}
    repeated = sum(counts[part] > 1 for part in of_several)
    return "," if of_several and repeated > len(of_several) / 2 else ""
