"""The embedded data set: a few hundred synthetic clips in AudioSet's own layout, written in seconds.

`make demo` and the tests train on it. It stands in for AudioSet: the same files, an excerpt of the same ontology with the same
class identifiers, several labels a clip, a long tail of class frequencies, and, on request, training labels with the two kinds
of error that label enhancement mends. What a recipe does with this folder it does with the real one.

From a shell: `python -m psla_sb.dataio.mini FOLDER`.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import soundfile

from psla_sb.errors import InputError
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

_PARENTS = {name: parents for _, name, parents, *_ in (*CLASSES, *CATEGORIES)}
_STAGING = ".mini_unfinished"
_RECORD = "mini.json"


def _ancestors(name):
    return set().union(*({parent} | _ancestors(parent) for parent in _PARENTS[name]))


def closed_upward(leaves):
    """The classes among some leaf classes and all their ancestors, as a set of names.

    Example
    -------
    >>> sorted(closed_upward(["Thunder", "White noise"]))
    ['Noise', 'Thunder', 'Thunderstorm', 'White noise']
    """
    return (set(leaves).union(*map(_ancestors, leaves))) & MIDS.keys()


def plan_events(n_clips, seed, is_eval):
    """The leaf classes of each clip, as lists of one to three names.

    Low-discrepancy sequences in place of independent draws keep the counts near their expectation, so the rarest class of a
    small set is rare but there; clip i still depends on nothing but i.

    Arguments
    ---------
    n_clips : int
        Number of clips.
    seed : int or list of int
        Another seed, another plan.
    is_eval : bool
        Whether classes are about even, as in an evaluation set, or have a long tail.

    Returns
    -------
    list of list of str

    Example
    -------
    >>> plan_events(3, 0, is_eval=True)
    [['Heavy engine (low frequency)'], ['Chirp, tweet', 'Banjo'], ['Civil defense siren']]
    """
    steps = np.sqrt([1.25, 2.0, 3.0, 7.0])
    uniform = (np.random.default_rng(seed).random(4) + np.arange(n_clips)[:, None] * steps) % 1.0
    frequency = (1.0 if is_eval else TAIL_RATIO) ** -np.linspace(0, 1, len(LEAVES))
    leaves = np.searchsorted(np.cumsum(frequency / frequency.sum())[:-1], uniform[:, :3], side="right")
    if is_eval:
        leaves[:, 0] = np.arange(n_clips) % len(LEAVES)
    n_events = 1 + np.searchsorted(np.cumsum(EVENTS_PER_CLIP)[:-1], uniform[:, 3], side="right")
    return [[LEAVES[leaf] for leaf in dict.fromkeys(row[:n].tolist())] for row, n in zip(leaves, n_events, strict=True)]


def _draw_clip_id(rng, index):
    """Eleven characters; identifiers that begin with "-" or "_" trip readers, so every eighth clip has one."""
    clip_id = "".join(rng.choice(ID_ALPHABET, 11))
    return {0: "-", 8: "_"}.get(index % 16, clip_id[0]) + clip_id[1:]


def render_clip(rng, leaves, n_samples, sample_rate):
    """Mixes one event of each leaf class into a quiet background.

    Arguments
    ---------
    rng : numpy.random.Generator
        Where everything is drawn from.
    leaves : list of str
        Names of leaf classes.
    n_samples : int
        Length of the clip.
    sample_rate : int
        In Hz, at least 16000.

    Returns
    -------
    numpy.ndarray
        `[samples]`, float64, peak at most `PEAK`.

    Example
    -------
    >>> render_clip(np.random.default_rng(0), ["Drum", "Thunder"], 16000, 16000).shape
    (16000,)
    """
    wav = coloured_noise(rng, n_samples, sample_rate, slope=rng.uniform(0, 2)) * _gain(rng, BACKGROUND_DECIBELS)
    for leaf in leaves:
        n_event = int(rng.uniform(0.5, 1.0) * n_samples)
        onset = rng.integers(n_samples - n_event + 1)
        event = synthesise(leaf, rng, n_event, sample_rate)
        wav[onset : onset + n_event] += event * _gain(rng, EVENT_DECIBELS)
    return wav * min(1.0, PEAK / np.abs(wav).max())


def _gain(rng, decibels):
    return 10 ** (rng.uniform(*decibels) / 20)


def _with_errors(labels, rng, type1_rate, type2_rate):
    """Drops labels: leaf classes whose parent stays (Type I), then ancestors that have a descendant left (Type II).

    One uniform number per class decides, so the labels lost at a low rate are lost at a higher one too.
    """
    draw = dict(zip(MIDS, rng.random(len(MIDS)), strict=True))
    parents = {name: labels.intersection(_PARENTS[name]) for name in labels}
    type1 = {name for name in labels.intersection(LEAVES) if parents[name] and draw[name] < type1_rate}
    needed = set().union(*(parents[name] for name in type1))
    type2 = {name for name in labels.difference(LEAVES) - needed if draw[name] < type2_rate}
    return labels - type1 - type2


def _write_segments(path, clip_ids, starts, seconds, label_sets):
    n_labels, unique = sum(map(len, label_sets)), len(set().union(*label_sets))
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(
            "# Segments csv created by psla_sb.dataio.mini\n"
            f"# num_ytids={len(clip_ids)}, num_segs={len(clip_ids)}, "
            f"num_unique_labels={unique}, num_positive_labels={n_labels}\n"
            "# YTID, start_seconds, end_seconds, positive_labels\n"
        )
        for clip_id, start, labels in zip(clip_ids, starts, label_sets, strict=True):
            mids = ",".join(sorted(MIDS[name] for name in labels))
            file.write(f'{clip_id}, {start:.3f}, {start + seconds:.3f}, "{mids}"\n')


def _write_split(folder, split, n_clips, seconds, sample_rate, seed, type1_rate=0.0, type2_rate=0.0):
    name = SPLITS[split]
    audio = folder / "audio" / name
    audio.mkdir(parents=True)
    n_samples = round(seconds * sample_rate)
    clip_ids, starts, clean, noisy = [], [], [], []
    for index, events in enumerate(plan_events(n_clips, [seed, split], name == "eval")):
        rng = np.random.default_rng([seed, split, index])
        clip_ids.append(_draw_clip_id(rng, index))
        starts.append(10.0 * rng.integers(30))
        wav = render_clip(rng, events, n_samples, sample_rate)
        soundfile.write(audio / f"{clip_ids[-1]}.flac", wav, sample_rate, subtype="PCM_16")
        clean.append(closed_upward(events))
        # A generator of their own: the audio must not depend on the error rates.
        noisy.append(_with_errors(clean[-1], np.random.default_rng([seed, split, index, 1]), type1_rate, type2_rate))
    _write_segments(folder / f"{name}_segments.csv", clip_ids, starts, seconds, noisy)
    if type1_rate or type2_rate:
        _write_segments(folder / f"{name}_segments_clean.csv", clip_ids, starts, seconds, clean)


def _write_class_list(path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write("index,mid,display_name\n")
        file.writelines(f'{index},{mid},"{name}"\n' for index, (mid, name, _) in enumerate(CLASSES))


def write_ontology(path):
    """Writes the excerpt of AudioSet's ontology.

    Example
    -------
    >>> path = getfixture("tmp_path") / "ontology.json"
    >>> write_ontology(path)
    >>> json.loads(path.read_text())[1]["name"]
    'Bird'
    """
    nodes = [(*node, []) for node in CLASSES] + list(CATEGORIES)
    ontology = [
        {
            "id": mid,
            "name": name,
            "description": "",
            "citation_uri": "",
            "positive_examples": [],
            "child_ids": [child_id for child_id, _, parents, _ in nodes if name in parents],
            "restrictions": restrictions,
        }
        for mid, name, _, restrictions in nodes
    ]
    path.write_text(json.dumps(ontology, indent=2) + "\n", encoding="utf-8")


def write_mini_audioset(folder, n_train=500, n_eval=200, seconds=2.0, sample_rate=16000, seed=0, type1_rate=0.0, type2_rate=0.0):
    """Writes a small synthetic data set in AudioSet's own layout.

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
    folder : str or pathlib.Path
        Where to write; made if it does not exist.
    n_train, n_eval : int
        Number of clips.
    seconds : float
        Duration of each clip, at least 0.5.
    sample_rate : int
        In Hz, at least 16000 (the sounds reach up to 7 kHz).
    seed : int
        Another seed, another data set.
    type1_rate, type2_rate : float
        Probability in [0, 1] that a label that can be lost to this kind of error is.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    ValueError
        An argument is out of its range.
    InputError
        The folder holds files of these names that this function did not write.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...     folder = write_mini_audioset(tmp, n_train=4, n_eval=2, seconds=1.0)
    ...     sorted(path.name for path in folder.iterdir()), len(list(folder.glob("audio/*/*.flac")))
    (['audio', 'balanced_train_segments.csv', 'class_labels_indices.csv', 'eval_segments.csv', 'mini.json', 'ontology.json'], 6)
    """
    arguments = {
        "version": VERSION,
        "n_train": n_train,
        "n_eval": n_eval,
        "seconds": seconds,
        "sample_rate": sample_rate,
        "seed": seed,
        "type1_rate": type1_rate,
        "type2_rate": type2_rate,
    }
    if min(n_train, n_eval) < 1 or seconds < 0.5 or sample_rate < 16000 or seed < 0:
        raise ValueError(
            "need n_train and n_eval of 1 or more, seconds of 0.5 or more, sample_rate of 16000 or more and seed of 0 or more, "
            f"got {arguments}"
        )
    if not (0 <= type1_rate <= 1 and 0 <= type2_rate <= 1):
        raise ValueError(f"type1_rate and type2_rate must be in [0, 1], got {type1_rate} and {type2_rate}")

    def write(staging):
        _write_class_list(staging / "class_labels_indices.csv")
        write_ontology(staging / "ontology.json")
        _write_split(staging, 0, n_train, seconds, sample_rate, seed, type1_rate, type2_rate)
        _write_split(staging, 1, n_eval, seconds, sample_rate, seed)

    names = ["class_labels_indices.csv", "ontology.json", f"{SPLITS[0]}_segments_clean.csv"]
    names += [f"{split}_segments.csv" for split in SPLITS] + [f"audio/{split}" for split in SPLITS]
    return write_once(folder, names, arguments, write)


def write_once(folder, names, arguments, write):
    """Writes a generated data set, whole, unless it is there already. `mini.json`, written last, holds its arguments.

    Arguments
    ---------
    folder : str or pathlib.Path
        Where it goes.
    names : list of str
        Files and folders that it may consist of, relative to the folder.
    arguments : dict
        A data set of the same arguments is left alone, one of others is replaced.
    write : callable
        Writes the data set into the folder that it is given.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    InputError
        The folder holds files of these names that this function did not write.

    Example
    -------
    >>> folder = write_once(getfixture("tmp_path"), ["a"], {"size": 1}, lambda staging: (staging / "a").touch())
    >>> sorted(path.name for path in folder.iterdir())
    ['a', 'mini.json']
    """
    folder = Path(folder)
    record, staging = folder / _RECORD, folder / _STAGING
    if record.exists():
        if record.read_text(encoding="utf-8") == _to_json(arguments):
            return folder
    elif not staging.exists():
        # Neither a finished nor an interrupted write of ours: this may be somebody's real data set.
        for path in (folder / name for name in names):
            if path.exists():
                raise InputError(f"{path} exists and was not written by this function; choose another folder")

    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    record.unlink(missing_ok=True)
    write(staging)
    for name in names:
        written, target = staging / name, folder / name
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        if written.exists():
            target.parent.mkdir(exist_ok=True)
            written.rename(target)
    record.write_text(_to_json(arguments), encoding="utf-8")
    shutil.rmtree(staging)
    return folder


def _to_json(arguments):
    return json.dumps(arguments, indent=2) + "\n"


def main(argv=None):
    """Entry point of `python -m psla_sb.dataio.mini`.

    Arguments
    ---------
    argv : list of str, optional
        Command-line arguments, those of the process by default.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...     main([tmp, "--n_train=2", "--n_eval=1", "--seconds=0.5"])
    2 training and 1 evaluation clips in ...
    """
    parser = argparse.ArgumentParser(
        prog="python -m psla_sb.dataio.mini", description="Write a small synthetic data set in AudioSet's layout."
    )
    parser.add_argument("folder", help="where to write it")
    parser.add_argument("--n_train", type=int, default=500, help="training clips (default: %(default)s)")
    parser.add_argument("--n_eval", type=int, default=200, help="evaluation clips (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of each clip (default: %(default)s)")
    parser.add_argument("--sample_rate", type=int, default=16000, help="in Hz (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another data set (default: %(default)s)")
    parser.add_argument("--type1_rate", type=float, default=0.0, help="training labels: share of leaf classes left out")
    parser.add_argument("--type2_rate", type=float, default=0.0, help="training labels: share of ancestors left out")
    arguments = parser.parse_args(argv)
    try:
        write_mini_audioset(**vars(arguments))
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.n_train} training and {arguments.n_eval} evaluation clips in {arguments.folder}")


if __name__ == "__main__":
    main()
