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
    "start": "start onset begin starttime startseconds starts starttimes starttimeseconds startsec startsecs begintime begintimes "
    "begintimeseconds beginseconds beginsec onsets onsetseconds onsetsec onsettime",
    "end": "end offset stop endtime endseconds ends endtimes endtimeseconds endsec endsecs offsets offsetseconds offsetsec "
    "offsettime stoptime",
    "duration": "duration length dur durations durationseconds durationsec",
    "split": "split subset set partition dataset datasetsplit usage",
    "fold": "fold folds foldid foldnumber kfold split subset",
    "group": "groupid group recordingid recording sourceid srcfile source sourcefile freesoundid fsid speakerid speaker siteid "
    "site location sessionid session subject individual patient recordist device station",
}
ROLES = tuple(NAMES)
NONE = "none"
MOST_FOLDS, LEAST_GROUPS = 20, 5
# what programs write where they know nothing
MISSING = ("", "na", "n/a", "nan", "null", "none", "-")


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
    finder.look_where(table.column(columns["file"]))
    if not any(map(finder.find, table.column(columns["file"]))):
        first = next(filter(None, table.column(columns["file"])), "")
        said = f"none of the files in column '{columns['file']}' is in {finder.folders[0]} or below, the first is '{first}'"
        raise InputError(f"{table.path}: {said}; say where they are with --audio FOLDER, or name the column with --file-column")
    if not {"start", "end"} & set(chosen) and not _by_name(free, "start") and _by_name(free, "duration"):
        # `offset` with a `duration` is where a clip begins
        take("start", next((name for name in _by_name(free, "end") if _plain(name).startswith("offset")), None))
    for role in ("start", "end", "duration", "split", "fold", "group"):
        # the end of what has no start is the length of a file
        needless = (role in ("end", "duration") and "start" not in columns) or (role == "duration" and "end" in columns)
        if role in chosen or needless or role in columns:
            continue
        named = _by_name(free, role)
        fitting = [name for name in named if _fits(role, table.column(name))]
        if role in TIMES and named and not fitting:
            _check_times(table, role, named[0])
        take(role, next(iter(fitting), None))
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
    used = {*columns.values(), *classes}
    alike = [name for role in ("start", "split", "group") if role not in columns for name in _by_name(table.header, role)]
    alike = [name for name in dict.fromkeys(alike) if name not in used]
    parts = [f"file: `{columns['file']}`"]
    if classes:
        parts.append(f"classes: {len(classes)} columns of 0 and 1, {_listed(classes)}")
    else:
        parts.append(f"labels: `{columns['label']}`" + (f" (separated by {separator})" if separator else " (one each)"))
    parts += [f"{role}: `{columns[role]}`" for role in ROLES if role in columns and role not in ("file", "label")]
    unused = [role for role in ("split", "fold", "group") if role not in columns]
    parts += [f"no {' and no '.join(unused)}"] if unused else []
    named = {"\t": "tabs", ",": "commas"}.get(table.delimiter, table.delimiter)
    read = f"rows: {len(table.rows)}, in {table.encoding}, columns between {named}"
    looked_at = (
        [f"not used, by what is in them: {_listed(alike)}; name such a column if it has times, splits or groups"] if alike else []
    )
    return [f"{', '.join(parts)}; override with --file-column NAME and so on", read, *looked_at, *_nearly(table, columns, classes)]


def _named(table: Table, role: str, name: str) -> str:
    for same in (lambda other: other == name, lambda other: other.lower() == name.lower()):
        if found := [other for other in table.header if same(other)]:
            return found[0]
    raise InputError(f"{table.path}: no column '{name}' (--{role}-column); there are {_listed(table.header)}")


def _listed(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(f"'{name[:40]}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _by_name(columns: Sequence[str], role: str) -> list[str]:
    known = NAMES[role].split()
    return sorted((name for name in columns if _plain(name) in known), key=lambda name: known.index(_plain(name)))


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
    if role in TIMES:
        known = [cell for cell in filled if cell.lower() not in MISSING]
        return bool(known) and all(seconds_of(cell) is not None for cell in known)
    if role == "split":
        return bool(filled) and splits_of(set(filled)) is not None
    if role == "fold":
        return 3 <= len(counts) <= MOST_FOLDS and len(filled) == len(cells) and all(re.search(r"\d$", cell) for cell in counts)
    return len(counts) >= LEAST_GROUPS and len(counts) < len(filled) and max(counts.values()) <= len(cells) / 2


TIMES = ("start", "end", "duration")


def _check_times(table: Table, role: str, name: str) -> None:
    """Refuses a column that is called a time, with a cell that is none: without it segments would become whole recordings."""
    cells = table.column(name)
    # of which none is a time is something else
    for row, cell in enumerate(cells if any(seconds_of(cell) is not None for cell in cells) else []):
        if cell.lower() not in MISSING and seconds_of(cell) is None:
            where = f"{table.path}, row {table.lines[row]}, column '{name}'"
            raise InputError(f"{where}: '{cell[:40]}' is no time in seconds; mend it, or add --{role}-column none")


def _label_column(table: Table, free: Sequence[str]) -> str | None:
    """Finds the column of labels: by its name, or, if no two columns are of 0 and 1, the only one of words that repeat."""
    filled = [name for name in _by_name(free, "label") if any(table.column(name))]
    if filled:
        return filled[0]
    if len([name for name in free if _is_class_column(table.column(name))]) > 1:
        return None
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
    found = [name for name in free if _is_class_column(table.column(name))]
    return found if len(found) > 1 else []


def _is_class_column(cells: Sequence[str]) -> bool:
    values = {cell.lower() for cell in cells}
    return values <= {*TRUE, *FALSE} and values != {""}


def _nearly(table: Table, columns: Mapping[str, str], classes: Sequence[str]) -> list[str]:
    """Says which columns would have a class each but for some of their cells."""
    said = []
    for name in table.header if classes else ():
        other = [row for row, cell in enumerate(table.column(name)) if cell.lower() not in (*TRUE, *FALSE)]
        if name not in {*columns.values(), *classes} and 0 < len(other) <= 0.1 * len(table.rows):
            row = other[0]
            said.append(f"not a class: `{name}`, for row {table.lines[row]} has '{table.column(name)[row][:40]}', neither 0 nor 1")
    return said


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
        text = "" if text.lower() in MISSING else text
        times[role] = seconds_of(text)
        if text and times[role] is None:
            where = f"{table.path}, row {table.lines[row]}, column '{columns[role]}'"
            raise InputError(f"{where}: '{text[:40]}' is no time in seconds; mend it, or add --{role}-column none")
    start, end = times["start"], times["end"]
    if start is None and end is not None:
        start = 0.0
    if start is not None and end is None and times["duration"] is not None:
        end = start + times["duration"]
    return start, end if start is not None else None
