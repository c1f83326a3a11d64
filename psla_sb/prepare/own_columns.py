"""What the columns of a table of clips mean: guessed by their names and by what is in them, unless somebody says it."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from psla_sb.errors import InputError
from psla_sb.prepare.own_clips import Clip, Found, clean_label, splits_of
from psla_sb.prepare.own_files import Files, Finder, files_in
from psla_sb.prepare.own_tables import Table, label_separator, seconds_of

# role -> names of columns, without spaces and signs, the best ones first
NAMES = {
    "file": "file filename path filepath wav wavfile audio audiofile audiofilename audiopath soundfile sound fname slicefilename "
    "clip clipname clipid recording recordingname name id itemid",
    "label": "labels tags classes categories soundclasses eventlabels label tag class category classname soundclass eventlabel "
    "event primarylabel annotation species commonname scientificname target classlabel",
    "start": "start onset begin starttime startseconds starts begintime begintimes onsetseconds",
    "end": "end offset stop endtime endseconds ends endtimes offsetseconds",
    "duration": "duration length dur durations durationseconds",
    "split": "split subset set partition dataset datasetsplit usage",
    "fold": "fold folds foldid foldnumber kfold split subset",
    "group": "groupid group recordingid recording sourceid srcfile source sourcefile freesoundid fsid speakerid speaker siteid "
    "site location sessionid session subject individual patient recordist device station",
}
ROLES = tuple(NAMES)
NONE = "none"
MOST_FOLDS, LEAST_GROUPS = 20, 5


def clips_of_table(
    table: Table,
    chosen: Mapping[str, str],
    separator: str | None = None,
    audio: str | Path | None = None,
    out: str | Path | None = None,
) -> Found:
    """Finds the clips of a table; `chosen` names the columns of some roles, and "none" for a role that no column has.

    Files are looked for in the table's folder and below, or in the folder `audio`.
    """
    folder = Path(audio) if audio else table.path.parent
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --audio names the one with the sound files")
    files = files_in(folder, out)
    finder = Finder([files])
    columns = _columns(table, chosen, finder)
    classes = [] if "label" in columns else _class_columns(table, columns)
    if not classes and "label" not in columns:
        said = f"which column has the classes? Name it with --label-column; there are {_listed(table.header)}"
        raise InputError(f"{table.path}: {said}")
    if separator is None and not classes:
        separator = label_separator(table.column(columns["label"]))
    return _found(table, columns, classes, separator or "", finder, files)


def _columns(table: Table, chosen: Mapping[str, str], finder: Finder) -> dict[str, str]:
    """Finds which column has which role; without one for labels, classes may have a column each."""
    columns = {role: _named(table, role, name) for role, name in chosen.items() if name != NONE}
    free = [name for name in table.header if name not in columns.values()]

    def take(role: str, name: str | None) -> None:
        if name is not None:
            columns[role] = name
            free.remove(name)

    if "file" not in columns:
        take("file", _file_column(table, free, finder))
    if not any(map(finder.find, table.column(columns["file"]))):
        first = next(filter(None, table.column(columns["file"])), "")
        said = f"none of the files in column '{columns['file']}' is in {finder.folders[0]} or below, the first is '{first}'"
        raise InputError(f"{table.path}: {said}; say where they are with --audio FOLDER, or name the column with --file-column")
    for role in ("start", "end", "duration", "split", "fold", "group"):
        # the end of what has no start is the length of a file
        needless = (role in ("end", "duration") and "start" not in columns) or (role == "duration" and "end" in columns)
        if role not in chosen and not needless:
            take(role, next((name for name in _by_name(free, role) if _fits(role, table.column(name))), None))
    if "start" in columns and not {"end", "duration"} & set(columns):
        raise InputError(f"{table.path}: '{columns['start']}' has starts, but no column has ends; name it with --end-column")
    if "label" not in chosen:
        take("label", _label_column(table, free))
    return columns


def _found(table: Table, columns: Mapping[str, str], classes: Sequence[str], separator: str, finder: Finder, files: Files) -> Found:
    """Makes the clips of a table whose columns are known."""
    cells = {role: table.column(name) for role, name in columns.items()}
    of_classes = [table.header.index(name) for name in classes]
    names = [clean_label(name) for name in classes]
    splits = splits_of(set(filter(None, cells.get("split", [])))) or {}
    if cells.get("split") and not splits:
        values = _listed(sorted(set(cells["split"])))
        raise InputError(f"{table.path}, column '{columns['split']}': its values must be train, valid and test, not {values}")
    clips, left_out = [], []
    for row, path in enumerate(map(finder.find, cells["file"])):
        file = cells["file"][row]
        if path is None:
            left_out.append((file, finder.problem(file) if file else f"row {table.lines[row]} names no file"))
            continue
        if classes:
            labels = tuple(name for name, place in zip(names, of_classes, strict=True) if _is_true(table.rows[row][place]))
        else:
            cell = cells["label"][row]
            labels = tuple(filter(None, map(clean_label, cell.split(separator) if separator else [cell])))
            if not labels:
                left_out.append((path, "no label"))
                continue
        start, end = _times(table, columns, cells, row)
        if start is not None and end is not None and end <= start:
            left_out.append((path, f"row {table.lines[row]} ends before it starts"))
            continue
        split, group, fold = (cells[role][row] if role in cells else "" for role in ("split", "group", "fold"))
        clips.append(Clip(path, labels, start, end, splits.get(split, ""), group, fold))
    return Found(clips, [*_said(table, columns, classes, separator), *files.ignored()], left_out)


def _said(table: Table, columns: Mapping[str, str], classes: Sequence[str], separator: str) -> list[str]:
    """Says how the table was understood, and how to say otherwise."""
    parts = [f"file: `{columns['file']}`"]
    if classes:
        parts.append(f"classes: {len(classes)} columns of 0 and 1, `{classes[0]}` to `{classes[-1]}`")
    else:
        parts.append(f"labels: `{columns['label']}`" + (f" (separated by {separator})" if separator else " (one each)"))
    parts += [f"{role}: `{columns[role]}`" for role in ROLES if role in columns and role not in ("file", "label")]
    unused = [role for role in ("split", "fold", "group") if role not in columns]
    parts += [f"no {' and no '.join(unused)}"] if unused else []
    named = {"\t": "tabs", ",": "commas"}.get(table.delimiter, table.delimiter)
    read = f"rows: {len(table.rows)}, in {table.encoding}, columns between {named}"
    return [f"{', '.join(parts)}; override with --file-column NAME and so on", read]


def _named(table: Table, role: str, name: str) -> str:
    for same in (lambda other: other == name, lambda other: other.lower() == name.lower()):
        if found := [other for other in table.header if same(other)]:
            return found[0]
    raise InputError(f"{table.path}: no column '{name}' (--{role}-column); there are {_listed(table.header)}")


def _listed(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(f"'{name[:40]}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _by_name(columns: Sequence[str], role: str) -> list[str]:
    plain = {name: re.sub("[^a-z0-9]", "", name.lower()) for name in columns}
    known = NAMES[role].split()
    return sorted((name for name in columns if plain[name] in known), key=lambda name: known.index(plain[name]))


def _file_column(table: Table, free: Sequence[str], finder: Finder) -> str:
    """Finds the column whose cells are files that are there; of several, the one with the better name."""
    rows = range(0, len(table.rows), max(1, len(table.rows) // 500))
    named = _by_name(free, "file")
    shares = {}
    for name in free:
        cells = table.column(name)
        shares[name] = sum(finder.find(cells[row]) is not None for row in rows) / len(rows)
    best = max(shares.values(), default=0.0)
    if best > 0:
        good = [name for name in [*named, *free] if shares[name] > 0.9 * best]
        return good[0]
    if named:
        return named[0]
    said = f"no column names sound files that are in {finder.folders[0]} or below; there are {_listed(table.header)}"
    raise InputError(f"{table.path}: {said}. Say where the files are with --audio FOLDER, or name the column with --file-column")


def _fits(role: str, cells: Sequence[str]) -> bool:
    """Tells whether what is in a column can be of a role, which its name alone does not say."""
    filled = [cell for cell in cells if cell]
    counts = Counter(filled)
    if role in ("start", "end", "duration"):
        return bool(filled) and all(seconds_of(cell) is not None for cell in filled)
    if role == "split":
        return bool(filled) and splits_of(set(filled)) is not None
    if role == "fold":
        return 3 <= len(counts) <= MOST_FOLDS and len(filled) == len(cells) and all(re.search(r"\d$", cell) for cell in counts)
    return len(counts) >= LEAST_GROUPS and len(counts) < len(filled) and max(counts.values()) <= len(cells) / 2


def _label_column(table: Table, free: Sequence[str]) -> str | None:
    """Finds the column of labels: by its name, or the only one of words that repeat."""
    filled = [name for name in _by_name(free, "label") if any(table.column(name))]
    if filled:
        return filled[0]
    candidates = []
    for name in free:
        cells = [cell for cell in table.column(name) if cell]
        words = sum(seconds_of(cell) is None for cell in cells)
        if words > len(cells) / 2 and 2 <= len(set(cells)) <= len(cells) / 2:
            candidates.append(name)
    return candidates[0] if len(candidates) == 1 else None


def _class_columns(table: Table, columns: Mapping[str, str]) -> list[str]:
    """Finds the columns of a table that has one for each class, with 0 and 1."""
    free = [name for name in table.header if name not in columns.values()]
    found = [name for name in free if {cell.lower() for cell in table.column(name)} <= {*TRUE, *FALSE}]
    return found if len(found) > 1 else []


TRUE, FALSE = ("1", "1.0", "1,0", "true", "yes", "x"), ("0", "0.0", "0,0", "false", "no", "")


def _is_true(cell: str) -> bool:
    return cell.lower() in TRUE


def _times(
    table: Table, columns: Mapping[str, str], cells: Mapping[str, Sequence[str]], row: int
) -> tuple[float | None, float | None]:
    """Gives start and end of a clip; None where the cells are empty: a whole file, or to its end."""
    times = dict[str, float | None]()
    for role in ("start", "end", "duration"):
        text = cells[role][row] if role in cells else ""
        times[role] = seconds_of(text)
        if text and times[role] is None:
            where = f"{table.path}, row {table.lines[row]}, column '{columns[role]}'"
            raise InputError(f"{where}: '{text[:40]}' is no time in seconds; mend it, or add --{role}-column none")
    start, end = times["start"], times["end"]
    if start is not None and end is None and times["duration"] is not None:
        end = start + times["duration"]
    return start, end if start is not None else None
