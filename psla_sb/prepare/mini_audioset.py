"""The embedded data set: a few hundred synthetic clips in AudioSet's own layout, written in seconds.

`make demo` and the tests train on it; what a recipe does with this folder it does with the real one.
From a shell: `python -m psla_sb.prepare.mini_audioset FOLDER`.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from psla_sb import add_version
from psla_sb.errors import InputError
from psla_sb.files import one_process
from psla_sb.prepare.mini_classes import CATEGORIES, CLASSES
from psla_sb.prepare.mini_sounds import SOUNDS, coloured_noise, synthesise

VERSION = 1  # of the sounds and the layout: a folder that another version wrote is written again

LEAVES = tuple(SOUNDS)
TAIL_RATIO = 14.0  # expected frequency of the commonest leaf class over the rarest, in training
EVENTS_PER_CLIP = (0.5, 0.3, 0.2)  # probabilities of one, two and three events
EVENT_DECIBELS = (-20.0, -4.0)  # peak of an event
BACKGROUND_DECIBELS = (-60.0, -42.0)  # root mean square of the background
PEAK = 0.95
ID_ALPHABET = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
SPLITS = ("balanced_train", "eval")

MIDS = {name: mid for mid, name, _ in CLASSES}

_NODES = (*((*node, []) for node in CLASSES), *CATEGORIES)
_PARENTS = {name: parents for _, name, parents, _ in _NODES}


def closed_upward(leaves: Sequence[str]) -> set[str]:
    """Returns the names of some leaf classes and of all their ancestors that are classes."""
    # a category in between is left out, but not its parents
    return set(leaves).union(*(closed_upward(_PARENTS[name]) for name in leaves)) & MIDS.keys()


def plan_events(n_clips: int, seed: int | list[int], is_eval: bool) -> list[list[str]]:
    """Chooses the one to three leaf classes of each clip: about evenly for evaluation, otherwise with a long tail."""
    # Low-discrepancy sequences in place of independent draws keep the counts near their expectation, so the rarest class of a
    # small set is rare but there; clip i still depends on nothing but i.
    steps = np.sqrt([1.25, 2.0, 3.0, 7.0])
    uniform = (np.random.default_rng(seed).random(4) + np.arange(n_clips)[:, None] * steps) % 1.0
    frequency = (1.0 if is_eval else TAIL_RATIO) ** -np.linspace(0, 1, len(LEAVES))
    leaves = np.searchsorted(np.cumsum(frequency / frequency.sum())[:-1], uniform[:, :3], side="right")
    if is_eval:
        leaves[:, 0] = np.arange(n_clips) % len(LEAVES)
    n_events = 1 + np.searchsorted(np.cumsum(EVENTS_PER_CLIP)[:-1], uniform[:, 3], side="right")
    return [[LEAVES[leaf] for leaf in dict.fromkeys(row[:n].tolist())] for row, n in zip(leaves, n_events, strict=True)]


def render_clip(rng: np.random.Generator, leaves: Iterable[str], n_samples: int, sample_rate: int) -> np.ndarray:
    """Mixes one event of each leaf class into a quiet background: `[samples]`, float64, peak at most `PEAK`."""
    wav = coloured_noise(rng, n_samples, sample_rate, slope=rng.uniform(0, 2)) * _gain(rng, BACKGROUND_DECIBELS)
    for leaf in leaves:
        n_event = int(rng.uniform(0.5, 1.0) * n_samples)
        onset = rng.integers(n_samples - n_event + 1)
        event = synthesise(leaf, rng, n_event, sample_rate)
        wav[onset : onset + n_event] += event * _gain(rng, EVENT_DECIBELS)
    return wav * min(1.0, PEAK / np.abs(wav).max())


def _gain(rng: np.random.Generator, decibels: tuple[float, float]) -> float:
    return 10 ** (rng.uniform(*decibels) / 20)


def _with_errors(labels: set[str], rng: np.random.Generator, type1_rate: float, type2_rate: float) -> set[str]:
    """Drops labels: leaf classes whose parent stays (Type I), then ancestors that have a descendant left (Type II)."""
    # one uniform number per class decides, so the labels lost at a low rate are lost at a higher one too
    draw = dict(zip(MIDS, rng.random(len(MIDS)), strict=True))
    parents = {name: labels.intersection(_PARENTS[name]) for name in labels}
    type1 = {name for name in labels.intersection(LEAVES) if parents[name] and draw[name] < type1_rate}
    needed = set().union(*(parents[name] for name in type1))
    type2 = {name for name in labels.difference(LEAVES) - needed if draw[name] < type2_rate}
    return labels - type1 - type2


def _write_segments(path: Path, clip_ids: list[str], starts: Sequence[float], seconds: float, label_sets: list[set[str]]) -> None:
    n_labels, unique = sum(map(len, label_sets)), len(set().union(*label_sets))
    lines = [
        "# Segments csv created by psla_sb.prepare.mini_audioset",
        f"# num_ytids={len(clip_ids)}, num_segs={len(clip_ids)}, num_unique_labels={unique}, num_positive_labels={n_labels}",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]
    mids = (",".join(sorted(MIDS[name] for name in labels)) for labels in label_sets)
    rows = zip(clip_ids, starts, mids, strict=True)
    _write_lines(path, [*lines, *(f'{clip_id}, {start:.3f}, {start + seconds:.3f}, "{mids}"' for clip_id, start, mids in rows)])


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")


def _write_split(folder: Path, split: int, n_clips: int, seconds: float, rate: int, seed: int, errors: tuple[float, float]) -> None:
    name = SPLITS[split]
    audio = folder / "audio" / name
    audio.mkdir(parents=True)
    clip_ids, starts, clean, noisy = [], [], [], []
    for index, events in enumerate(plan_events(n_clips, [seed, split], name == "eval")):
        rng = np.random.default_rng([seed, split, index])
        clip_id = "".join(rng.choice(ID_ALPHABET, 11))
        # identifiers that begin with "-" or "_" trip readers, so every eighth clip has one
        clip_ids.append({0: "-", 8: "_"}.get(index % 16, clip_id[0]) + clip_id[1:])
        starts.append(10.0 * rng.integers(30))
        wav = render_clip(rng, events, round(seconds * rate), rate)
        soundfile.write(audio / f"{clip_ids[-1]}.flac", wav, rate, subtype="PCM_16")
        clean.append(closed_upward(events))
        # a generator of their own: the audio must not depend on the error rates
        noisy.append(_with_errors(clean[-1], np.random.default_rng([seed, split, index, 1]), *errors))
    _write_segments(folder / f"{name}_segments.csv", clip_ids, starts, seconds, noisy)
    if any(errors):
        _write_segments(folder / f"{name}_segments_clean.csv", clip_ids, starts, seconds, clean)


def write_ontology(path: Path) -> None:
    """Writes the excerpt of AudioSet's ontology, in the layout of its `ontology.json`."""
    empty: dict[str, object] = {"description": "", "citation_uri": "", "positive_examples": []}
    ontology = []
    for mid, name, _, restrictions in _NODES:
        children = [child for child, _, parents, _ in _NODES if name in parents]
        ontology.append({"id": mid, "name": name, **empty, "child_ids": children, "restrictions": restrictions})
    path.write_text(json.dumps(ontology, indent=2) + "\n", encoding="utf-8")


def write_mini_audioset(
    folder: str | Path,
    n_train: int = 500,
    n_eval: int = 200,
    seconds: float = 2.0,
    sample_rate: int = 16000,
    seed: int = 0,
    type1_rate: float = 0.0,
    type2_rate: float = 0.0,
) -> Path:
    """Writes a small synthetic data set in AudioSet's own layout, and returns its folder.

    In `folder`: `class_labels_indices.csv`, `ontology.json`, `balanced_train_segments.csv`, `eval_segments.csv`, and 16-bit
    FLAC files `audio/balanced_train/<id>.flac` and `audio/eval/<id>.flac`. Each clip has one to three events of the leaf
    classes, mixed at random pitch, level and onset over a quiet background, and carries these classes and all their ancestors.
    Leaf classes have a long tail in training and are about even in evaluation, where every class occurs from 20 clips on.

    With an error rate above 0 the training labels carry errors and `balanced_train_segments_clean.csv` keeps the true ones.
    A Type I error leaves out a leaf class while its parent stays, a Type II error an ancestor while a descendant stays (their
    definition: Gong, Chung, Glass, "PSLA", 2021). Leaf classes without a parent among the classes have no
    Type I errors, and no clip loses its last label. Audio and clean labels do not depend on the rates, nor does a clip on
    how many there are.

    The same arguments write the same bytes. A complete data set of the same arguments is left alone; one of others is
    replaced. `mini.json`, written last, holds the arguments.

    Arguments
    ---------
    folder
        Where to write; made if it does not exist. If it holds files of these names of another origin, `InputError` is raised.
    seconds, sample_rate
        Duration of each clip, at least 0.5; in Hz, at least 16000 (the sounds reach up to 7 kHz).
    type1_rate, type2_rate
        Probability in [0, 1] that a label that can be lost to this kind of error is.

    Example
    -------
    >>> folder = write_mini_audioset(getfixture("tmp_path"), n_train=4, n_eval=2, seconds=1.0)
    >>> sorted(path.name for path in folder.glob("[!.]*")), len(list(folder.glob("audio/*/*.flac")))
    (['audio', 'balanced_train_segments.csv', 'class_labels_indices.csv', 'eval_segments.csv', 'mini.json', 'ontology.json'], 6)
    """
    arguments = {"version": VERSION, "n_train": n_train, "n_eval": n_eval, "seconds": seconds, "sample_rate": sample_rate}
    arguments |= {"seed": seed, "type1_rate": type1_rate, "type2_rate": type2_rate}
    if min(n_train, n_eval) < 1 or seconds < 0.5 or sample_rate < 16000 or seed < 0:
        need = "n_train and n_eval of 1 or more, seconds of 0.5 or more, sample_rate of 16000 or more and seed of 0 or more"
        raise ValueError(f"need {need}, got {arguments}")
    if not (0 <= type1_rate <= 1 and 0 <= type2_rate <= 1):
        raise ValueError(f"type1_rate and type2_rate must be in [0, 1], got {type1_rate} and {type2_rate}")

    def write(staging):
        classes = (f'{index},{mid},"{name}"' for index, (mid, name, _) in enumerate(CLASSES))
        _write_lines(staging / "class_labels_indices.csv", ["index,mid,display_name", *classes])
        write_ontology(staging / "ontology.json")
        _write_split(staging, 0, n_train, seconds, sample_rate, seed, (type1_rate, type2_rate))
        _write_split(staging, 1, n_eval, seconds, sample_rate, seed, (0.0, 0.0))

    names = ["class_labels_indices.csv", "ontology.json", f"{SPLITS[0]}_segments_clean.csv"]
    names += [f"{split}_segments.csv" for split in SPLITS] + [f"audio/{split}" for split in SPLITS]
    return write_once(folder, names, arguments, write)


def write_once(folder: str | Path, names: Sequence[str], arguments: dict, write: Callable[[Path], None]) -> Path:
    """Writes a generated data set, of files and folders of these names, unless one of the same arguments is there already.

    `write` gets a folder to write into. Of several processes that ask at once the first one writes, and the others wait. Another
    generated data set is replaced; files of these names that are of another origin raise `InputError`.
    """
    folder = Path(folder)
    record, staging = folder / "mini.json", folder / ".mini_unfinished"
    made_with = json.dumps(arguments, indent=2) + "\n"

    def is_written() -> bool:
        return record.is_file() and record.read_text(encoding="utf-8") == made_with

    # asked first: a process that is writing removes it last
    unfinished = staging.exists()
    if is_written():
        return folder
    if not unfinished and not record.exists():
        # neither a finished nor an interrupted write of ours: this may be somebody's real data set
        for path in (folder / name for name in names):
            if path.exists():
                raise InputError(f"{path} exists and was not written by this function; choose another folder")
    with one_process(folder):
        # another process may have written it in the meantime
        if not is_written():
            _replace(folder, names, write, staging)
            # last: it says that all is there
            record.write_text(made_with, encoding="utf-8")
            shutil.rmtree(staging)
    return folder


def _replace(folder: Path, names: Sequence[str], write: Callable[[Path], None], staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (folder / "mini.json").unlink(missing_ok=True)
    write(staging)
    for name in names:
        written, target = staging / name, folder / name
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        if written.exists():
            target.parent.mkdir(exist_ok=True)
            written.rename(target)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line of this module."""
    description = "Write a small synthetic data set in AudioSet's layout."
    parser = argparse.ArgumentParser("python -m psla_sb.prepare.mini_audioset", description=description)
    add_version(parser)
    parser.add_argument("folder", help="where to write it")
    for name, default, said in (
        ("n_train", 500, "training clips (default: %(default)s)"),
        ("n_eval", 200, "evaluation clips (default: %(default)s)"),
        ("seconds", 2.0, "duration of each clip (default: %(default)s)"),
        ("sample_rate", 16000, "in Hz (default: %(default)s)"),
        ("seed", 0, "another seed, another data set (default: %(default)s)"),
        ("type1_rate", 0.0, "training labels: share of leaf classes left out"),
        ("type2_rate", 0.0, "training labels: share of ancestors left out"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=said)
    arguments = parser.parse_args(argv)
    try:
        write_mini_audioset(**vars(arguments))
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.n_train} training and {arguments.n_eval} evaluation clips in {arguments.folder}")


if __name__ == "__main__":
    main()
