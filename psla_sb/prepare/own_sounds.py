"""Makes a data set to train on of somebody's own sounds: fair splits, a class list, and a page that says what was found."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from psla_sb.errors import InputError
from psla_sb.files import one_process, read_json
from psla_sb.prepare.fingerprints import alike
from psla_sb.prepare.own_clips import SPLITS, Clip, Found, merged
from psla_sb.prepare.own_folders import clips_of, group_by_pattern
from psla_sb.prepare.own_measures import Measured, measure
from psla_sb.prepare.own_output import WRITTEN, Pair, Prepared, write_prepared
from psla_sb.prepare.splits import joined_groups, share_out

# More classes than this, with fewer clips of each than that, are no classes but texts
MANY_CLASSES, CLIPS_OF_MANY = 1000, 10
# An end beyond that of its recording is said if it is so far beyond, in seconds
SAID_BEYOND = 0.05


class Settings(NamedTuple):
    """Says how a source is to be read and split; see `psla-prepare --help`."""

    columns: Mapping[str, str] = {}
    label_separator: str | None = None
    audio: str | Path | None = None
    nested: str = "last"
    group_pattern: str | None = None
    valid: float = 0.15
    test: float = 0.15
    folds: int = 0
    min_clips: int = 1
    seed: int = 0
    force: bool = False


def prepare(source: str | Path, out: str | Path, settings: Settings | None = None) -> dict[str, Any]:
    """Writes annotations, a class list and a page for the clips of a folder or a table, and returns what `prepared.json` says.

    Arguments
    ---------
    source
        A folder (of a folder for each class, of recordings with Audacity's label tracks, ESC-50 or UrbanSound8K), or a table.
    out
        Gets `train.csv`, `valid.csv`, `test.csv`, `class_labels_indices.csv`, `prepared.json`, `prepared.html`, `left_out.csv` and
        `duplicates.csv`, and with folds `fold_1` and so on, each with the three annotations.

    Raises
    ------
    InputError
        The source is none of these, has too little to train on, or the folder has another source's clips.
    """
    settings, source, out = settings or Settings(), Path(os.path.abspath(source)), Path(out)
    # a folder that cannot be written to is said before hours of listening
    with one_process(out):
        check_unused(out, source, settings.force)
        return write_prepared(prepared_of(source, out, settings), out)


def prepared_of(source: Path, out: Path, settings: Settings) -> Prepared:
    """Finds the clips of a source, listens to them, and decides in which set each is."""
    found = clips_of(source, settings.columns, settings.label_separator, settings.audio, settings.nested, out)
    clips = merged(found.clips)
    if n_united := len(found.clips) - len(clips):
        found.said.append(f"rows of a clip that another row has already, whose labels are united: {n_united}")
    if not clips:
        raise InputError(f"{source}: none of its clips can be used; the first: {': '.join(found.left_out[0])}")
    if settings.group_pattern:
        clips = group_by_pattern(clips, settings.group_pattern)
    clips, measured, left_out = usable(source, clips)
    found = found._replace(left_out=[*found.left_out, *left_out])
    clips, measured, found = frequent(clips, measured, found, settings.min_clips)
    classes = classes_of(source, clips)
    labels = label_matrix(clips, classes)
    pairs = duplicates(clips, measured)
    groups = groups_of(clips, pairs)
    parts, said = parts_of(source, clips, labels, groups, settings)
    folds = folds_of(source, clips, labels, groups, settings)
    said = [*found.said, *beyond_end(clips, measured), *said]
    return Prepared(source, clips, measured, classes, labels, groups, parts, folds, pairs, said, found.left_out)


def check_unused(out: Path, source: Path, force: bool) -> None:
    """Refuses a folder with annotations of another source, and one whose own table would be overwritten."""
    written = [name for name in WRITTEN if (out / name).exists()]
    if any(source.exists() and (out / name).exists() and source.samefile(out / name) for name in written):
        raise InputError(f"{source}: would be overwritten; choose another folder for --out")
    before = (read_json(out / "prepared.json") or {}).get("source")
    if force or before == str(source) or not (before or written):
        return
    what = f"was prepared from {before}" if before else f"has a {written[0]} of another origin"
    raise InputError(f"{out}: {what}; choose another folder for --out, or replace what is there with --force")


def usable(source: Path, clips: Sequence[Clip]) -> tuple[list[Clip], list[Measured], list[tuple[str, str]]]:
    """Decodes clips: those that can be used, what was measured of them, and the others, each with the reason."""
    named = [clip for clip in clips if _is_plain(clip.path)]
    left_out = [
        (clip.path, "the file's name has a line break, or is no UTF-8; rename it") for clip in clips if not _is_plain(clip.path)
    ]
    measured = measure(named)
    left_out += [(clip.place(), one.problem) for clip, one in zip(named, measured, strict=True) if one.problem]
    kept = [(clip, one) for clip, one in zip(named, measured, strict=True) if not one.problem]
    if not kept:
        reasons = Counter(reason for _, reason in left_out)
        if set(reasons) == {"silent"}:
            raise InputError(f"{source}: all {len(clips)} clips are silent; were the right files, or the right channels, exported?")
        file, reason = left_out[0]
        raise InputError(f"{source}: none of the {len(clips)} clips can be used; the first, {file}: {reason}")
    kept_clips, kept_measured = map(list, zip(*kept, strict=True))
    beyond = [clip for clip in named if clip.start is not None]
    lost = sum(one.problem.startswith("begins after") for one in measured)
    if beyond and lost > len(beyond) / 2:
        said = f"{lost} of {len(beyond)} segments begin after the end of their files"
        raise InputError(f"{source}: {said}; if its clips are whole files, add --start-column none")
    return kept_clips, kept_measured, left_out


def _is_plain(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return not re.search(r"[\r\n]", path)


def frequent(clips: list[Clip], measured: list[Measured], found: Found, least: int) -> tuple[list[Clip], list[Measured], Found]:
    """Leaves out classes that have fewer clips, and clips that have no other class."""
    counts = Counter(label for clip in clips for label in clip.labels)
    rare = {label for label, n in counts.items() if n < least}
    if not rare:
        return clips, measured, found
    kept = [clip._replace(labels=tuple(label for label in clip.labels if label not in rare)) for clip in clips]
    rows = [row for row, clip in enumerate(kept) if clip.labels or not clips[row].labels]
    reason = f"its classes have fewer than {least} clips"
    left_out = [*found.left_out, *((clips[row].place(), reason) for row in sorted(set(range(len(clips))) - set(rows)))]
    said = [*found.said, f"classes with fewer than {least} clips, which are left out: {len(rare)}"]
    return [kept[row] for row in rows], [measured[row] for row in rows], Found([], said, left_out)


def classes_of(source: Path, clips: Sequence[Clip]) -> list[str]:
    """Lists the classes by name; an `InputError` says that they are none that can be learned."""
    counts = Counter(label for clip in clips for label in clip.labels)
    if len(counts) < 2:
        what = (
            f"all {len(clips)} clips that can be used have the one label '{next(iter(counts))}'"
            if counts
            else "no clip has a label"
        )
        raise InputError(
            f"{source}: {what}; two classes are needed, such as the sound and other sounds (--label-column names a column)"
        )
    if max(counts.values()) == 1:
        said = f"each of the {len(counts)} classes has a single clip, so that none could be learned and tested"
        raise InputError(f"{source}: {said}; are these the classes (--label-column)? If they are, add clips")
    if len(counts) > MANY_CLASSES and len(clips) < CLIPS_OF_MANY * len(counts):
        said = f"{len(counts)} classes for {len(clips)} clips; are these the classes (--label-column, --label-separator)?"
        raise InputError(f"{source}: {said} If they are, leave out the rare ones with --min-clips {CLIPS_OF_MANY}")
    return sorted(counts, key=lambda name: (name.casefold(), name))


def label_matrix(clips: Sequence[Clip], classes: Sequence[str]) -> csr_array:
    """Labels as a matrix `[clips, classes]` of 0 and 1."""
    index = {name: number for number, name in enumerate(classes)}
    columns = [index[label] for clip in clips for label in clip.labels]
    offsets = np.cumsum([0, *(len(clip.labels) for clip in clips)])
    return csr_array((np.ones(len(columns), np.int64), columns, offsets), shape=(len(clips), len(classes)))


def duplicates(clips: Sequence[Clip], measured: Sequence[Measured]) -> list[Pair]:
    """Finds clips that are the same, and those that are alike, in different files."""
    first, pairs = dict[bytes, int](), []
    for row, one in enumerate(measured):
        known = first.setdefault(one.digest, row)
        if clips[known].path != clips[row].path:
            pairs.append(Pair(known, row, 0.0))
    rows = list(first.values())
    files = np.unique([clips[row].path for row in rows], return_inverse=True)[1]
    prints = [print_ for row in rows if (print_ := measured[row].print) is not None]
    return [*pairs, *(Pair(rows[a], rows[b], max(wrong, 1e-6)) for a, b, wrong in alike(prints, files))]


def groups_of(clips: Sequence[Clip], pairs: Sequence[Pair]) -> np.ndarray:
    """Numbers the groups that must stay together: by the source's groups, recordings and duplicates."""
    numbers, files = dict[tuple[str, str], int](), dict[str, int]()
    groups = np.array([numbers.setdefault(("group", c.group) if c.group else ("file", c.path), len(numbers)) for c in clips])
    same_file = [(files.setdefault(clip.path, row), row) for row, clip in enumerate(clips)]
    return joined_groups(groups, [*same_file, *((pair.first, pair.second) for pair in pairs)])


def parts_of(
    source: Path, clips: Sequence[Clip], labels: csr_array, groups: np.ndarray, settings: Settings
) -> tuple[np.ndarray, list[str]]:
    """Decides which clips train (0), validate (1) and test (2), and says why: as the source has it, by its folds, or by shares."""
    n_groups, named, said = len(np.unique(groups)), fold_numbers(clips), []
    if any(clip.split for clip in clips):
        parts = np.array([SPLITS.index(clip.split or "train") for clip in clips])
        said.append("splits are those of the source")
        if n := sum(not clip.split for clip in clips):
            said.append(f"clips without a split, which are for training: {n}")
    elif named is not None:
        # the last one tests, the one before validates
        n_folds = named.max() + 1
        parts = np.clip(named - n_folds + 1 + (2 if settings.test else 1), 0, None)
        said.append(f"of the source's {n_folds} folds, the last {'two are' if settings.test else 'one is'} not for training")
    else:
        parts = np.zeros(len(clips), np.int64)
    shares = {part: share for part, share in ((1, settings.valid), (2, settings.test)) if share and not (parts == part).any()}
    if shares:
        rows = np.flatnonzero(parts == 0)
        _, own = np.unique(groups[rows], return_inverse=True)
        if own.max() < len(shares):
            what = f"{len(rows)} clips in {own.max() + 1} groups" if n_groups < len(clips) else f"{len(rows)} clips"
            raise InputError(f"{source}: {what} are too few to keep some for validation and test; add clips, or other groups")
        cut = share_out(labels[rows], own, [1 - sum(shares.values()), *shares.values()], settings.seed)
        parts[rows] = np.array([0, *shares])[cut]
        if said:
            said.append(f"no {' and no '.join(SPLITS[part] for part in shares)} set is there; it is cut from the training clips")
        else:
            said.append(f"split anew; groups of clips that stay together: {n_groups}")
    for part in (0, 1, *([2] if settings.test else [])):
        if not (parts == part).any():
            what = ("training", "validation", "test")[part]
            raise InputError(
                f"{source}: no clips for {what}: they are in too few groups; give other groups or splits, or more clips"
            )
    return parts, said


def fold_numbers(clips: Sequence[Clip]) -> np.ndarray | None:
    """Numbers the source's folds from 0 on, in their order; None if there are none, or some clips are in none."""
    names = {clip.fold for clip in clips}
    if "" in names or len(names) < 3:
        return None
    order = sorted(names, key=lambda name: [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", name)])
    return np.array([order.index(clip.fold) for clip in clips])


def folds_of(source: Path, clips: Sequence[Clip], labels: csr_array, groups: np.ndarray, settings: Settings) -> np.ndarray:
    """Numbers the folds of clips from 0 on, those of the source if it has some; none if none are asked for."""
    n_folds = settings.folds
    if not n_folds:
        return np.zeros(0, np.int64)
    named = fold_numbers(clips)
    if named is not None:
        if (n_there := named.max() + 1) != n_folds:
            raise InputError(f"{source}: has {n_there} folds of its own; ask for --folds {n_there}, or add --fold-column none")
        return named
    if (n_groups := groups.max() + 1) < n_folds:
        raise InputError(f"{source}: its clips are in {n_groups} groups, too few for {n_folds} folds; ask for fewer")
    return share_out(labels, groups, [1 / n_folds] * n_folds, settings.seed, train=None)


def beyond_end(clips: Sequence[Clip], measured: Sequence[Measured]) -> list[str]:
    """Says how many segments end after their recordings do."""
    wanted = np.array([np.nan if clip.end is None else clip.end - (clip.start or 0.0) for clip in clips])
    n = int((wanted - np.array([one.seconds for one in measured]) > SAID_BEYOND).sum())
    return [f"segments that end after their recordings do, and are cut there: {n}"] if n else []
