"""A generated FSD50K: a few hundred synthetic clips of varying length at 44.1 kHz, in the true layout and quoting.

What the FSD50K recipe does with this folder it does with the real one. Sounds and classes are those of `mini_audioset`.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from psla_sb.prepare.mini_audioset import MIDS, closed_upward, plan_events, render_clip, write_once, write_ontology
from psla_sb.prepare.mini_classes import CLASSES

VERSION = 1  # of the layout: a folder that another version wrote is written again
SHORTEST = 0.3  # seconds, as in FSD50K
NAMES = ("FSD50K.ground_truth", "FSD50K.dev_audio", "FSD50K.eval_audio", "ontology.json")
FREESOUND_IDS = 500_000

_LABELS = {name: name.replace(", ", "_and_").replace(" ", "_") for name in MIDS}


def write_mini_fsd50k(
    folder: str | Path,
    n_train: int = 300,
    n_valid: int = 60,
    n_eval: int = 100,
    seconds: float = 3.0,
    sample_rate: int = 44100,
    seed: int = 0,
) -> Path:
    """Writes a small synthetic data set in FSD50K's own layout, and returns its folder.

    In `folder`: `FSD50K.ground_truth` with `dev.csv`, `eval.csv` and `vocabulary.csv`, the 16-bit WAV files
    `FSD50K.dev_audio/<fname>.wav` and `FSD50K.eval_audio/<fname>.wav`, and an excerpt of AudioSet's `ontology.json`. Each clip has
    one to three events of leaf classes and carries these and all their ancestors; leaf classes have a long tail in dev and are
    about even in eval. Lengths are from 0.3 s to `seconds`, short ones more often. For what happens to a folder that is there see
    `write_mini_audioset`.

    Arguments
    ---------
    n_train, n_valid, n_eval
        Number of clips; the first two make up dev.
    seconds, sample_rate
        Duration of the longest clips, at least 0.3; in Hz, at least 16000.

    Example
    -------
    >>> folder = write_mini_fsd50k(getfixture("tmp_path"), n_train=3, n_valid=1, n_eval=2, seconds=0.5)
    >>> sorted(path.name for path in folder.glob("[!.]*")), len(list(folder.glob("FSD50K.dev_audio/*.wav")))
    (['FSD50K.dev_audio', 'FSD50K.eval_audio', 'FSD50K.ground_truth', 'mini.json', 'ontology.json'], 4)
    """
    arguments = {"layout": "FSD50K", "version": VERSION, "n_train": n_train, "n_valid": n_valid, "n_eval": n_eval}
    arguments |= {"seconds": seconds, "sample_rate": sample_rate, "seed": seed}
    if min(n_train, n_valid, n_eval) < 1 or seconds < SHORTEST or sample_rate < 16000 or seed < 0:
        need = f"n_train, n_valid and n_eval of 1 or more, seconds of {SHORTEST} or more, sample_rate of 16000 or more"
        raise ValueError(f"need {need} and seed of 0 or more, got {arguments}")

    def write(staging):
        truth = staging / NAMES[0]
        truth.mkdir()
        labels = sorted((_LABELS[name], mid) for mid, name, _ in CLASSES)
        _write_rows(truth / "vocabulary.csv", [[i, label, mid] for i, (label, mid) in enumerate(labels)])
        write_ontology(staging / "ontology.json")
        n_dev = n_train + n_valid
        fnames = np.random.default_rng(seed).choice(FREESOUND_IDS, n_dev + n_eval, replace=False)
        dev = _write_clips(staging / NAMES[1], fnames[:n_dev], seconds, sample_rate, seed, 0)
        evaluation = _write_clips(staging / NAMES[2], fnames[n_dev:], seconds, sample_rate, seed, 1)
        # spread over the set, as in FSD50K
        is_valid = np.diff(np.arange(n_dev + 1) * n_valid // n_dev) > 0
        rows = [[*row, "val" if valid else "train"] for row, valid in zip(dev, is_valid, strict=True)]
        _write_rows(truth / "dev.csv", [["fname", "labels", "mids", "split"], *rows])
        _write_rows(truth / "eval.csv", [["fname", "labels", "mids"], *evaluation])

    return write_once(folder, NAMES, arguments, write)


def _write_clips(folder: Path, fnames: np.ndarray, seconds: float, sample_rate: int, seed: int, split: int) -> list[list]:
    """Writes the sounds of dev (split 0) or eval (1); returns the rows of the ground truth."""
    folder.mkdir()
    rows = []
    for index, (fname, events) in enumerate(zip(fnames, plan_events(len(fnames), [seed, split], split == 1), strict=True)):
        rng = np.random.default_rng([seed, split, index])
        n_samples = round(SHORTEST * (seconds / SHORTEST) ** rng.random() * sample_rate)
        wav = render_clip(rng, events, n_samples, sample_rate)
        soundfile.write(folder / f"{fname}.wav", wav, sample_rate, subtype="PCM_16")
        names = [*events, *sorted(closed_upward(events).difference(events))]
        rows.append([fname, ",".join(_LABELS[name] for name in names), ",".join(MIDS[name] for name in names)])
    return rows


def _write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
