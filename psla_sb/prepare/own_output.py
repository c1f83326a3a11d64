"""What a preparation of own sounds writes: annotations, the class list, lists of what was left out, and figures."""

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array

from psla_sb.dataio.bad_clips import csv_line
from psla_sb.dataio.manifest import Manifest
from psla_sb.files import write_file, write_json
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.prepare.own_clips import SPLITS, Clip, identifiers
from psla_sb.prepare.own_measures import Measured
from psla_sb.prepare.own_page import page
from psla_sb.prepare.splits import fold_parts

# Fewer clips of a class, and less is learned of it than its figures say
FEW_CLIPS = 10
SHOWN = 5
# Seconds that are decoded for nothing before a segment, unless its file can be sought in
LATE, SOUGHT = 60.0, (".wav", ".wave", ".flac", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64")

# What a training reads; the others only say what was found.
WRITTEN = ("train.csv", "valid.csv", "test.csv", "class_labels_indices.csv")


class Pair(NamedTuple):
    """Says that two clips, by their rows, are the same (0), or alike: that share of the bits of their fingerprints differs."""

    first: int
    second: int
    difference: float


class Prepared(NamedTuple):
    """Holds all that a preparation has found and decided, by clip where it is a sequence of clips or an array."""

    source: Path
    clips: Sequence[Clip]
    measured: Sequence[Measured]
    classes: Sequence[str]
    labels: csr_array  # [clips, classes]
    groups: np.ndarray
    parts: np.ndarray  # 0 train, 1 valid, 2 test
    folds: np.ndarray  # none: empty
    pairs: Sequence[Pair]
    said: Sequence[str]
    left_out: Sequence[tuple[str, str]]


def write_prepared(prepared: Prepared, out: Path) -> dict[str, Any]:
    """Writes all files of a preparation, the training clips last, and returns what `prepared.json` says."""
    report = report_of(prepared)
    # without it, the folder is not taken for one that is ready
    (out / "train.csv").unlink(missing_ok=True)
    n_folds = report["n_folds"]
    _remove_folds(out, n_folds)
    Vocabulary(identifiers(prepared.classes), prepared.classes).to_csv(out / "class_labels_indices.csv")
    _write_table(out / "left_out.csv", ("file", "reason"), prepared.left_out)
    heads = ("first", "second", "what", "difference", "first_labels", "second_labels", "other_labels", "first_set", "second_set")
    _write_table(out / "duplicates.csv", heads, (_pair_row(prepared, pair) for pair in prepared.pairs))
    everything = _columns(prepared)
    for k in range(n_folds):
        _write_parts(out / f"fold_{k + 1}", everything, fold_parts(prepared.folds, n_folds, k))
    write_json(out / "prepared.json", report)
    html = page(report, [_pair_row(prepared, pair) for pair in prepared.pairs], prepared.left_out)
    write_file(out / "prepared.html", _encoded(html))
    _write_parts(out, everything, prepared.parts)
    return report


def _columns(prepared: Prepared) -> dict[str, Any]:
    mids = identifiers(prepared.classes)
    labels, clips = prepared.labels, prepared.clips
    joined = [";".join(mids[c] for c in labels.indices[slice(*rows)]) for rows in itertools.pairwise(labels.indptr)]
    seconds = [one.seconds for one in prepared.measured]
    columns = {"ids": ids_of(prepared.source, clips), "wavs": [clip.path for clip in clips], "durations": seconds, "labels": joined}
    if any(clip.start is not None for clip in clips):
        columns["starts"] = [clip.start for clip in clips]
    if len(np.unique(prepared.groups)) < len(clips):
        # for whoever splits these clips again
        columns["group"] = prepared.groups.tolist()
    return columns


def ids_of(source: Path, clips: Sequence[Clip]) -> list[str]:
    """Names clips: by their files' names, or paths where these are not unique, and by the times of segments.

    >>> ids_of(Path("/d"), [Clip("/d/a/x.wav", ("a",)), Clip("/d/b/x.wav", ("b",), 0.5, 1.0), Clip("/d/b/x.flac", ("b",))])
    ['a/x.wav', 'b/x.wav_0.500-1.000', 'b/x.flac']
    """
    folder = source if source.is_dir() or not source.suffix else source.parent
    files = list(dict.fromkeys(clip.path for clip in clips))
    paths = [os.path.relpath(file, folder) for file in files]
    ways = ([os.path.splitext(os.path.basename(file))[0] for file in files], [os.path.splitext(path)[0] for path in paths], paths)
    names = dict(zip(files, next(way for way in ways if len(set(way)) == len(files)), strict=True))
    ends = ["" if clip.start is None else f"_{clip.start:.3f}-{'' if clip.end is None else f'{clip.end:.3f}'}" for clip in clips]
    ids, used = [], Counter[str]()
    for clip, end in zip(clips, ends, strict=True):
        # times that differ by less than a millisecond
        used[name := names[clip.path] + end] += 1
        ids.append(name if used[name] == 1 else f"{name}_{used[name]}")
    return ids


def _write_parts(folder: Path, columns: dict[str, Any], parts: np.ndarray) -> None:
    # the clips for training last: with them, all is there
    for part in (2, 1, 0):
        rows, path = np.flatnonzero(parts == part), folder / f"{SPLITS[part]}.csv"
        if len(rows):
            chosen = {name: [cells[row] for row in rows] for name, cells in columns.items()}
            groups = chosen.pop("group", None)
            manifest = Manifest.from_columns(**chosen)
            if groups is not None:
                manifest = Manifest(manifest.table.append_column("group", pa.array(groups)))
            manifest.to_csv(path)
        else:
            path.unlink(missing_ok=True)


def _remove_folds(out: Path, n_folds: int) -> None:
    """Removes the annotations of folds that an earlier call has written and this one does not."""
    for folder in out.glob("fold_*"):
        number = folder.name.removeprefix("fold_")
        if number.isdigit() and int(number) > n_folds:
            for name in SPLITS:
                (folder / f"{name}.csv").unlink(missing_ok=True)
            if not any(folder.iterdir()):
                shutil.rmtree(folder)


def _write_table(path: Path, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = "".join(csv_line(row) for row in (heads, *rows))
    write_file(path, _encoded(text))


def _encoded(text: str) -> bytes:
    # names of files may be no text
    return text.encode("utf-8", "backslashreplace")


def _pair_row(prepared: Prepared, pair: Pair) -> tuple[Any, ...]:
    one, other = (prepared.clips[row] for row in pair[:2])
    sets = [SPLITS[prepared.parts[row]] for row in pair[:2]]
    what, conflict = "alike" if pair.difference else "same", set(one.labels) != set(other.labels)
    labels = ["; ".join(sorted(clip.labels)) for clip in (one, other)]
    return (one.place(), other.place(), what, round(pair.difference, 3), *labels, "yes" if conflict else "no", *sets)


def report_of(prepared: Prepared) -> dict[str, Any]:
    """Computes the figures of a preparation: what `prepared.json` has."""
    clips, parts, labels = prepared.clips, prepared.parts, prepared.labels
    seconds = np.array([one.seconds for one in prepared.measured])
    by_part = np.stack([labels.T @ (parts == part).astype(np.int64) for part in range(3)])
    hours = np.stack([labels.T @ np.where(parts == part, seconds, 0.0) for part in range(3)]).sum(axis=0) / 3600
    columns = zip(prepared.classes, *by_part.tolist(), hours.tolist(), strict=True)
    n_of_split = np.bincount(parts, minlength=3).tolist()
    conflicts = sum(set(clips[pair.first].labels) != set(clips[pair.second].labels) for pair in prepared.pairs)
    crossing = sum(parts[pair.first] != parts[pair.second] for pair in prepared.pairs)
    return {
        "single_label": bool((np.diff(labels.indptr) == 1).all()),
        "n_classes": len(prepared.classes),
        "clips": dict(zip(SPLITS, n_of_split, strict=True)),
        "hours": float(seconds.sum() / 3600),
        "durations": {"median": float(np.median(seconds)), "p95": float(np.quantile(seconds, 0.95)), "max": float(seconds.max())},
        "sample_rates": _counted(str(one.rate) for one in prepared.measured),
        "positives": dict(zip(prepared.classes, by_part[0].tolist(), strict=True)),
        "n_folds": int(prepared.folds.max(initial=-1)) + 1,
        "source": str(prepared.source),
        "formats": _counted(os.path.splitext(clip.path)[1].lower().lstrip(".") for clip in clips),
        "lengths": histogram(seconds),
        "classes": [
            {"name": name, "train": train, "valid": valid, "test": test, "hours": of_class}
            for name, train, valid, test, of_class in columns
        ],
        "segments": sum(clip.start is not None for clip in clips),
        "groups": len(np.unique(prepared.groups)),
        "largest_group": int(np.bincount(prepared.groups).max()),
        "left_out": len(prepared.left_out),
        "left_out_reasons": _counted(_reason(reason) for _, reason in prepared.left_out),
        "clipped": sum(one.clipped for one in prepared.measured),
        "clipped_files": [clip.place() for clip, one in zip(clips, prepared.measured, strict=True) if one.clipped][:100],
        "duplicates": {
            "same": sum(pair.difference == 0 for pair in prepared.pairs),
            "alike": sum(pair.difference > 0 for pair in prepared.pairs),
            "label_conflicts": conflicts,
            "in_two_sets": int(crossing),
        },
        "said": list(prepared.said),
        "remarks": remarks(prepared, by_part),
    }


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _reason(reason: str) -> str:
    """Takes what tells one damaged file from another out of a reason, so that reasons can be counted."""
    known = (
        "no such file",
        "several files",
        "silent",
        "shorter than",
        "no label",
        "in no folder",
        "begins after",
        "its classes",
        "the file's name",
    )
    return reason if reason.startswith(known) else "cannot be decoded, or its row is wrong"


def histogram(seconds: np.ndarray) -> list[dict[str, Any]]:
    """Counts clips by length, in classes of 1, 2, 5, 10, ... seconds.

    >>> histogram(np.array([0.3, 4.0, 4.5, 5.0]))[0], histogram(np.array([0.3, 4.0, 4.5, 5.0]))[-1]
    ({'from': 0.2, 'to': 0.5, 'clips': 1}, {'from': 5.0, 'to': 10.0, 'clips': 1})
    """
    edges = [0.0, *(digit * 10.0**power for power in range(-2, 6) for digit in (1, 2, 5))]
    counts = np.histogram(seconds, edges)[0]
    filled = np.flatnonzero(counts)
    rows = range(filled[0], filled[-1] + 1) if len(filled) else range(0)
    return [{"from": round(edges[i], 2), "to": round(edges[i + 1], 2), "clips": int(counts[i])} for i in rows]


def remarks(prepared: Prepared, by_part: np.ndarray) -> list[str]:
    """Says what the person whose sounds these are should know before a training, the worst first."""
    clips, parts, pairs, said = prepared.clips, prepared.parts, prepared.pairs, []
    names = np.array(prepared.classes, object)
    crossing = [pair for pair in pairs if parts[pair.first] != parts[pair.second]]
    if crossing:
        said.append(
            f"pairs of clips that are the same but in two of train, valid and test, as the source has it: {len(crossing)}; figures "
            f"will be too good. The first: {_pair_text(prepared, crossing[0])}"
        )
    folds = prepared.folds
    if len(folds) and (n := sum(folds[pair.first] != folds[pair.second] for pair in pairs)):
        said.append(f"pairs of clips that are the same but in two folds: {n}; figures will be too good")
    if n := _crossing_groups(clips, parts):
        said.append(f"groups of clips in two of train, valid and test, as the source has it: {n}; figures may be too good")
    if conflicts := [pair for pair in pairs if set(clips[pair.first].labels) != set(clips[pair.second].labels)]:
        first = _pair_text(prepared, conflicts[0])
        said.append(f"pairs of clips that are the same but have different labels: {len(conflicts)}. The first: {first}")
    if pairs:
        n_same = sum(pair.difference == 0 for pair in pairs)
        kept = "" if crossing else " and are kept together"
        said.append(
            f"pairs of clips that are the same{kept}: {len(pairs)}, {n_same} of them to the sample; duplicates.csv lists them. "
            f"The first: {_pair_text(prepared, pairs[0])}"
        )
    lacking = {part: np.flatnonzero(by_part[part] == 0) for part in range(3) if (parts == part).any()}
    for part, what in ((0, "to train on, and cannot be learned"), (1, "for validation"), (2, "for testing")):
        if part in lacking and len(lacking[part]):
            said.append(f"no clips {what}: {_some(names[lacking[part]])}")
    n_groups = _groups_of_classes(prepared)
    if len(few := np.flatnonzero(n_groups == 1)):
        said.append(f"classes whose clips are all of one group, and so in one set: {_some(names[few])}")
    if len(few := np.flatnonzero((by_part[0] > 0) & (by_part[0] < FEW_CLIPS))):
        named = _some([f"{names[c]} ({by_part[0][c]})" for c in few])
        said.append(f"classes with fewer than {FEW_CLIPS} clips to train on: {named}")
    same = Counter(name.casefold() for name in prepared.classes)
    if twice := [name for name in prepared.classes if same[name.casefold()] > 1]:
        said.append(f"classes whose names differ only in capitals: {_some(twice)}")
    if n := sum(one.clipped for one in prepared.measured):
        said.append(f"clipped clips, with more than a thousandth of the samples at full scale: {n}")
    late = [clip for clip in clips if (clip.start or 0) > LATE and not clip.path.lower().endswith(SOUGHT)]
    if late:
        said.append(
            f"segments far into files of a format that must be decoded from its beginning: {len(late)}, the first in "
            f"{os.path.basename(late[0].path)}; training reads them faster from packs (psla-pack)"
        )
    if (largest := np.bincount(prepared.groups).max()) > len(clips) / 2:
        said.append(f"one group has {largest} of the {len(clips)} clips, which must all be in one set")
    return said


def _groups_of_classes(prepared: Prepared) -> np.ndarray:
    rows = np.repeat(np.arange(len(prepared.clips)), np.diff(prepared.labels.indptr))
    pairs = np.unique(np.stack([prepared.labels.indices, prepared.groups[rows]]), axis=1)
    return np.bincount(pairs[0], minlength=len(prepared.classes))


def _crossing_groups(clips: Sequence[Clip], parts: np.ndarray) -> int:
    """Counts the source's own groups that are in several sets."""
    places = {(clip.group or clip.path, part) for clip, part in zip(clips, parts.tolist(), strict=True)}
    return sum(n > 1 for n in Counter(group for group, _ in places).values())


def _pair_text(prepared: Prepared, pair: Pair) -> str:
    names = [os.path.basename(prepared.clips[row].path) for row in pair[:2]]
    labels = [", ".join(prepared.clips[row].labels) for row in pair[:2]]
    return f"{names[0]} ({labels[0]}) and {names[1]} ({labels[1]})"


def _some(names: Any) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
