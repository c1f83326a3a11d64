"""Folders of sounds as people have them: a folder for each class, Audacity's label tracks, and data sets whose layout is known."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from psla_sb.errors import InputError
from psla_sb.prepare.own_clips import Clip, Found, clean_label, splits_of
from psla_sb.prepare.own_columns import clips_of_table
from psla_sb.prepare.own_files import Files, files_in
from psla_sb.prepare.own_tables import label_separator, read_table, seconds_of

TABLE_ENDINGS = (".csv", ".tsv")
BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


class Layout(NamedTuple):
    """Says where a published data set has what, as it is unpacked."""

    name: str
    table: str
    audio: str
    columns: Mapping[str, str]


LAYOUTS = (
    Layout(
        "ESC-50",
        "meta/esc50.csv",
        "audio",
        {"file": "filename", "label": "category", "fold": "fold", "group": "src_file"} | dict.fromkeys(("start", "split"), "none"),
    ),
    Layout(
        "UrbanSound8K",
        "metadata/UrbanSound8K.csv",
        "audio",
        # its start and end are those in recordings that it does not have
        {"file": "slice_file_name", "label": "class", "fold": "fold", "group": "fsID"} | dict.fromkeys(("start", "split"), "none"),
    ),
)


def clips_of(
    source: str | Path,
    columns: Mapping[str, str],
    separator: str | None = None,
    audio: str | Path | None = None,
    nested: str = "last",
    out: str | Path | None = None,
) -> Found:
    """Finds the clips of a table, or of a folder; see `clips_of_table`, and `clips_of_folders` for `nested`.

    An `InputError` says that there is no such source, or that nothing in it is recognised.
    """
    source = Path(source)
    if source.is_file():
        if nested != "last":
            raise InputError(f"{source}: is a table, whose columns say the classes; --nested is for folders")
        return clips_of_table(read_table(source), columns, separator, audio, out)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder or file")
    for folder in [source, *sorted(path for path in source.iterdir() if path.is_dir())]:
        for layout in LAYOUTS:
            if (folder / layout.table).is_file() and (folder / layout.audio).is_dir():
                if audio or separator or nested != "last":
                    raise InputError(f"{folder}: is {layout.name}; --audio, --label-separator and --nested are not for it")
                others = files_in(source, folder).sounds if folder != source else []
                if others:
                    raise InputError(
                        f"{source}: has {layout.name} in {folder.name}, and other sounds, such as {others[0]}; name one"
                    )
                chosen = {**layout.columns, **columns}
                found = clips_of_table(read_table(folder / layout.table), chosen, "", folder / layout.audio, out)
                return found._replace(said=[f"{layout.name}, as it is published: its folds are used", *found.said[1:]])
    if columns or audio:
        raise InputError(f"{source}: is a folder; columns and --audio are for a table: psla-prepare TABLE.csv ...")
    files = files_in(source, out)
    if not files.sounds:
        raise InputError(f"{source}: no sound files in it or below; name the folder that has them, or the table that lists them")
    return clips_of_label_tracks(files, separator) or clips_of_folders(files, nested)


def clips_of_label_tracks(files: Files, separator: str | None = None) -> Found | None:
    """Finds the clips of recordings that have Audacity's labels beside them, `x.txt` for `x.wav`; None if none has.

    Each segment is a clip, with the labels of all segments of these very times; a recording's clips are a group.
    """
    texts = {os.path.splitext(name)[0]: name for name in files.others if name.lower().endswith(".txt")}
    tracks = {}
    for sound in files.sounds:
        text = texts.get(os.path.splitext(sound)[0])
        track = text and read_label_track(files.folder / text)
        if track:
            tracks[sound] = track
    if not tracks:
        return None
    _, split = _splits(files.sounds)
    if separator is None:
        separator = label_separator([label for segments, _ in tracks.values() for *_, label in segments])
    clips, n_points = [], 0
    for sound, (segments, points) in tracks.items():
        path = os.path.abspath(files.folder / sound)
        n_points += points
        for start, end, label in segments:
            labels = filter(None, map(clean_label, label.split(separator) if separator else [label]))
            clips.append(Clip(path, tuple(labels), start, end, split.get(sound, ""), sound))
    said = [f"recordings with Audacity's label tracks: {len(tracks)}; each segment is a clip, a recording's clips stay together"]
    if n_points:
        said.append(f"labels of a point in time, which are left out as they have no length: {n_points}")
    used = {texts[os.path.splitext(sound)[0]] for sound in tracks}
    rest = files._replace(others=[name for name in files.others if name not in used])
    left_out = [(os.path.abspath(files.folder / name), "no label track beside it") for name in files.sounds if name not in tracks]
    return Found(clips, [*said, *rest.ignored()], left_out)


def read_label_track(path: str | Path) -> tuple[list[tuple[float, float, str]], int] | None:
    """Reads an exported label track: segments (start, end, label), and how many labels are of a point; None if it is none.

    >>> path = getfixture("tmp_path") / "x.txt"
    >>> _ = path.write_text("0,5\\t1,25\\tdog\\n\\\\\\t100\\t8000\\n2\\t2\\tcat\\n")
    >>> read_label_track(path)
    ([(0.5, 1.25, 'dog')], 1)
    """
    try:
        data = Path(path).read_bytes()
    except OSError:
        return None
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    segments, n_points = [], 0
    for line in text.removeprefix(BYTE_ORDER_MARK).splitlines():
        # lines of spectral labels say between which frequencies they are
        if not line.strip() or line.startswith("\\"):
            continue
        start, _, rest = line.partition("\t")
        end, _, label = rest.partition("\t")
        times = seconds_of(start), seconds_of(end)
        if times[0] is None or times[1] is None:
            return None
        if times[1] > times[0] and clean_label(label):
            segments.append((times[0], times[1], clean_label(label)))
        elif times[1] <= times[0]:
            n_points += 1
    return (segments, n_points) if segments or n_points else None


def clips_of_folders(files: Files, nested: str = "last") -> Found:
    """Finds the clips of folders by class: the class is the last folder's name, with `nested="all"` also those above are.

    Folders called train, valid and test, at the top or at the bottom, are splits.
    """
    if nested not in ("last", "all"):
        raise InputError(f"--nested must be last or all, not {nested}")
    position, split = _splits(files.sounds)
    clips, left_out = [], []
    for sound in files.sounds:
        folders = list(PurePath(sound).parts[:-1])
        if split and folders:
            folders.pop(position)
        names = [name for name in map(clean_label, folders) if name]
        path = os.path.abspath(files.folder / sound)
        if not names:
            left_out.append((path, "in no folder of a class"))
            continue
        clips.append(Clip(path, tuple(names if nested == "all" else names[-1:]), split=split.get(sound, "")))
    tables = [name for name in files.others if name.lower().endswith(TABLE_ENDINGS)]
    hint = f"; or name the table that says the classes, such as {files.folder / tables[0]}" if tables else ""
    classes = Counter(label for clip in clips for label in clip.labels)
    if len(classes) < 2:
        known = f"all sounds are of one class, '{next(iter(classes))}'" if classes else "the sounds are in no folders of classes"
        raise InputError(f"{files.folder}: {known}; put the clips of each class into a folder of its own{hint}")
    said = f"a folder for each of {len(classes)} classes" + (f", in {', '.join(sorted(set(split.values())))}" if split else "")
    if any(len(PurePath(sound).parts) > 2 + bool(split) for sound in files.sounds):
        said += "; all folders above are labels too" if nested == "all" else "; the last one is the class (or --nested all)"
    return Found(clips, [said, *([] if split else _no_splits(files.sounds)), *files.ignored()], left_out)


def _splits(sounds: Sequence[str]) -> tuple[int, dict[str, str]]:
    """Finds the split of each sound, if all first folders (0), or else all last ones (-1), are names of splits; or else nothing."""
    parents = {sound: parts for sound in sounds if (parts := PurePath(sound).parts[:-1])}
    for position in (0, -1):
        if known := splits_of({parts[position] for parts in parents.values()}):
            return position, {sound: known[parts[position]] for sound, parts in parents.items()}
    return 0, {}


def _no_splits(sounds: Sequence[str]) -> list[str]:
    """Says that folders that are called like splits are none, because there are others beside them."""
    first = {PurePath(sound).parts[0] for sound in sounds if len(PurePath(sound).parts) > 2}
    named = sorted(name for name in first if splits_of({"train", name}))
    if len(named) < 2:
        return []
    return [
        f"folders {', '.join(named)} are not taken for splits, as there are others beside them: {sorted(first - set(named))[0]}"
    ]


def group_by_pattern(clips: Sequence[Clip], pattern: str) -> list[Clip]:
    """Groups clips by what a pattern finds in the names of their files: its first parentheses, or all of it.

    >>> [clip.group for clip in group_by_pattern([Clip("/d/rec7_001.wav", ("a",))], "^(.+?)_")]
    ['rec7']
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--group-pattern '{pattern}': is no regular expression ({error})") from None
    found = [compiled.search(os.path.basename(clip.path)) for clip in clips]
    if not any(found):
        raise InputError(f"--group-pattern '{pattern}': is in no file's name, such as {os.path.basename(clips[0].path)}; mend it")
    return [
        clip._replace(group=(match[1] if compiled.groups else match[0]) or "") if match else clip
        for clip, match in zip(clips, found, strict=True)
    ]
