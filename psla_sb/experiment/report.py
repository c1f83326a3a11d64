"""The report of a finished run: every figure that it shows, as JSON and CSV, then its pictures and its page.

output_folder/report.html      the page, in one file: pictures and sounds are in it
              report/          report.json, confusion.csv, reliability.csv, curves.csv, hardest_clips.csv, pictures
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy.sparse import csr_array
from sklearn.metrics import confusion_matrix, precision_recall_curve, precision_recall_fscore_support, roc_curve

from psla_sb.aggregation.bootstrap import bootstrap, interval, means
from psla_sb.checkpoints.run_folder import prediction_path, read_results
from psla_sb.checkpoints.tagger_folder import read_calibration
from psla_sb.dataio.audio import read_audio, read_blocks
from psla_sb.dataio.bad_clips import FILE, csv_line
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.files import write_file, write_json
from psla_sb.labels.calibration import FEWEST, Calibration, reliability
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import METRICS, SCORE_FLOOR, average_precision, f1_of, roc_auc, summarize
from psla_sb.plots.report_page import write_page

N_RESAMPLES, RESAMPLES_AT_ONCE = 1000, 50
N_HARDEST, N_HEARD, N_CONFUSIONS, N_NAMED = 12, 5, 200, 3
PLAYED_SECONDS, PLAYED_RATE = 10.0, 16000
GRID = np.linspace(0, 1, 201)
ALL_PAIRS, MEAN_OF_CLASSES = "all pairs of clip and class", "mean over the classes"


def write_report(folder: str | Path, name: str, manifest: Manifest, vocabulary: Vocabulary, train_labels: LabelSets) -> Path:
    """Writes the report of an evaluated run, and says where its page is.

    Arguments
    ---------
    folder
        The output folder of the run.
    name
        The set that was reported on, "valid" or "test", whose clips are those of `manifest`.
    train_labels
        Of the clips that were trained on.
    """
    folder, results = Path(folder), read_results(folder)
    scores = np.load(prediction_path(folder, f"{name}_weight_average"))
    # of a run with --debug, the first ones
    targets, calibration = manifest.targets(vocabulary)[: len(scores)] == 1, read_calibration(folder, vocabulary)
    if calibration is None or "evaluation" not in results:
        raise InputError(f"{folder}: not the folder of a run that has been evaluated: there is nothing to report")
    single = bool((targets.sum(axis=1) == 1).all() and (np.diff(train_labels.offsets) == 1).all())
    hardest = hardest_clips(manifest, vocabulary, scores, targets, calibration)
    confusion = _matrix(scores, targets) if single else None
    report = {
        "set": name,
        "fitted_on": results["calibration"]["fitted_on"],
        "same_clips": name == "valid",
        "n_clips": len(scores),
        "n_train_clips": len(train_labels),
        "n_classes": len(vocabulary),
        "n_classes_without_clips": int((~targets.any(axis=0)).sum()),
        "single_label": single,
        "epochs": results["evaluation"]["weight_average"]["epochs"],
        "tagger": results.get("tagger", "weight_average"),
        "fewest_positives": FEWEST,
        "figures": headline(scores, targets, calibration, single),
        "calibration": results["calibration"],
        "classes": class_rows(vocabulary, scores, targets, calibration),
        "confusions": confusions(vocabulary, scores, targets, calibration, confusion)[:N_CONFUSIONS],
        "hardest_clips": [{key: value for key, value in clip.items() if key not in ("wav", "seconds")} for clip in hardest],
        "bad_clips": _bad_clips(folder, name),
        "baseline": results.get("baseline"),
        "folds": results.get("folds"),
    }
    bins = reliability_rows(scores, targets, calibration)
    curves = curve_rows(vocabulary, scores, targets)
    out = folder / "report"
    write_json(out / "report.json", report)
    if confusion is None:
        _write_csv(out / "confusion.csv", ["class", "heard_instead", "clips", "decided", "missed_clips"], report["confusions"])
    else:
        rows = [[name, *row] for name, row in zip(vocabulary.names, confusion.tolist(), strict=True)]
        write_file(out / "confusion.csv", "".join(map(csv_line, [["true class (row), heard (column)", *vocabulary.names], *rows])))
    _write_csv(out / "reliability.csv", ["of", "bins", "mean", "share_of_clips_with_the_class", "pairs"], bins)
    _write_csv(out / "curves.csv", ["curve", "of", "x", "y"], curves)
    flat = [
        {
            **clip,
            "start": "" if clip["start"] is None else clip["start"],
            "labels": "; ".join(clip["labels"]),
            "heard": "; ".join(f"{one['name']} {one['score']:.2f}" for one in clip["heard"]),
        }
        for clip in hardest
    ]
    _write_csv(out / "hardest_clips.csv", ["ID", "wav", "start", "loss", "labels", "heard"], flat)
    sounds = [_sound(clip["wav"], clip["start"], clip["seconds"]) for clip in hardest]
    page = folder / "report.html"
    write_page(page, out, report, bins, curves, confusion, sounds, results["epochs"])
    return page


def headline(scores: np.ndarray, targets: np.ndarray, calibration: Calibration, single: bool) -> dict[str, dict[str, Any]]:
    """Computes the figures of the whole set, each with `low` and `high` of its interval of 95 %, by bootstrap over clips."""
    summary, decided = summarize(scores, targets), calibration.decisions(scores)
    resampled = {key: values[0] for key, values in means(bootstrap([scores], targets, N_RESAMPLES)).items()}
    hits = decided & targets
    f1 = f1_of(decided, targets)
    summary["macro_F1"] = float(np.nanmean(f1)) if targets.any() else np.nan
    summary["micro_F1"] = float(2 * hits.sum() / max(1, decided.sum() + targets.sum()))
    right = scores.argmax(axis=1) == targets.argmax(axis=1)
    found: dict[str, list[np.ndarray]] = {"macro_F1": [], "micro_F1": [], "accuracy": []}
    rng, n_clips = np.random.default_rng(0), len(scores)
    counted = [array.astype(np.float32) for array in (hits, decided, targets, right[:, None])]
    for _ in range(0, N_RESAMPLES, RESAMPLES_AT_ONCE):
        drawn = rng.integers(n_clips, size=(RESAMPLES_AT_ONCE, n_clips))
        weights = np.stack([np.bincount(row, minlength=n_clips) for row in drawn]).astype(np.float32)
        n_hits, n_decided, n_positive, n_right = (weights @ array for array in counted)
        with np.errstate(invalid="ignore"):
            of_classes = np.where(n_positive > 0, 2 * n_hits / (n_decided + n_positive), 0).sum(axis=1)
            found["macro_F1"].append(of_classes / (n_positive > 0).sum(axis=1))
            found["micro_F1"].append(2 * n_hits.sum(axis=1) / (n_decided + n_positive).sum(axis=1))
        found["accuracy"].append(n_right[:, 0] / n_clips)
    resampled |= {key: np.concatenate(values) for key, values in found.items()}
    if single:
        summary["accuracy"] = float(right.mean())
    figures = {}
    for key in (*(["accuracy"] if single else []), *METRICS, "macro_F1", "micro_F1"):
        ends = np.array(interval(np.array(summary[key]), resampled[key]))
        # moved to the value, an interval may reach over what can be
        low, high = ends if key == "d_prime" else ends.clip(0, 1)
        figures[key] = {"value": summary[key], "low": float(low), "high": float(high)}
    return figures


def class_rows(vocabulary: Vocabulary, scores: np.ndarray, targets: np.ndarray, calibration: Calibration) -> list[dict[str, Any]]:
    """Computes the figures of each class; what is undefined is NaN, a threshold that decides nothing infinite."""
    decided, positives = calibration.decisions(scores), targets.sum(axis=0)
    precision, recall, _, _ = (
        precision_recall_fscore_support(targets, decided, average=None, labels=range(len(vocabulary)), zero_division=np.nan)
        if len(vocabulary) > 1
        else _of_one_class(targets, decided)
    )
    columns = {
        "positive_clips": positives,
        "AP": average_precision(scores, targets),
        "AUC": roc_auc(scores, targets),
        "threshold": calibration.threshold,
        "own_threshold": calibration.own,
        "precision": precision,
        "recall": recall,
        "F1": f1_of(decided, targets),
    }
    rows = zip(vocabulary.names, vocabulary.mids, *(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(("name", "mid", *columns), row, strict=True)) for row in rows]


def _of_one_class(targets: np.ndarray, decided: np.ndarray) -> tuple[np.ndarray, ...]:
    found = precision_recall_fscore_support(targets[:, 0], decided[:, 0], pos_label=1, average="binary", zero_division=np.nan)
    return tuple(np.array([value], dtype=float) for value in found)


def _matrix(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return confusion_matrix(targets.argmax(axis=1), scores.argmax(axis=1), labels=range(scores.shape[1]))


def confusions(
    vocabulary: Vocabulary, scores: np.ndarray, targets: np.ndarray, calibration: Calibration, matrix: np.ndarray | None
) -> list[dict[str, Any]]:
    """Lists what is heard in place of a class, most frequent first.

    Where clips have one label each (`matrix`, true x heard), that is the best-scored class. If not: of clips that have a class
    whose score is under its threshold, the wrong class that is the most probable; `decided` says how often that one is decided.
    """
    names = vocabulary.names
    if matrix is not None:
        wrong = matrix * (1 - np.eye(len(matrix), dtype=int))
        n_clips, n_decided, n_missed = wrong, wrong, wrong.sum(axis=1)
    else:
        decided = calibration.decisions(scores)
        instead = np.where(targets, -np.inf, calibration.probabilities(scores)).argmax(axis=1)
        clips, classes = np.nonzero(targets & ~decided)
        has_wrong = np.flatnonzero(~targets.all(axis=1))
        clips, classes = (part[np.isin(clips, has_wrong)] for part in (clips, classes))
        place, shape = (classes, instead[clips]), (len(names), len(names))
        n_clips = csr_array((np.ones(len(clips), int), place), shape=shape).toarray()
        n_decided = csr_array((decided[clips, instead[clips]].astype(int), place), shape=shape).toarray()
        n_missed = np.bincount(classes, minlength=len(names))
    order = np.argsort(-n_clips, axis=None, kind="stable")[: np.count_nonzero(n_clips)]
    return [
        {
            "class": names[c],
            "heard_instead": names[other],
            "clips": int(n_clips[c, other]),
            "decided": int(n_decided[c, other]),
            "missed_clips": int(n_missed[c]),
        }
        for c, other in np.transpose(np.unravel_index(order, n_clips.shape)).tolist()
    ]


def reliability_rows(scores: np.ndarray, targets: np.ndarray, calibration: Calibration) -> list[dict[str, Any]]:
    """Sorts all pairs of clip and class into bins, by score and by calibrated probability: of as many pairs, and as wide each."""
    rows = []
    for of, values in (("score", scores), ("probability", calibration.probabilities(scores))):
        number = np.minimum((np.asarray(values) * 10).astype(int), 9).ravel()
        pairs = np.bincount(number, minlength=10)
        filled = np.maximum(pairs, 1)
        mean = np.bincount(number, np.ravel(values).astype(np.float64), 10) / filled
        wide = (mean, np.bincount(number, np.ravel(targets), 10) / filled, pairs)
        for bins, columns in (("as many pairs each", reliability(values, targets)), ("as wide each", wide)):
            keys = ("mean", "share_of_clips_with_the_class", "pairs")
            parts = (dict(zip(keys, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=True))
            rows += [{"of": of, "bins": bins, **part} for part in parts if part["pairs"]]
    return rows


def curve_rows(vocabulary: Vocabulary, scores: np.ndarray, targets: np.ndarray) -> list[dict[str, Any]]:
    """Computes precision-recall and ROC curves: of all pairs of clip and class, of the mean, the best and the worst classes."""
    ap = average_precision(scores, targets)
    order = [int(c) for c in np.argsort(-ap, kind="stable")[: np.isfinite(ap).sum()]]
    named = order if len(order) <= 2 * N_NAMED else order[:N_NAMED] + order[-N_NAMED:]
    found: dict[str, dict[str, np.ndarray]] = {"precision-recall": {}, "ROC": {}}
    if order:
        of_classes = [_curves(targets[:, c], scores[:, c]) for c in order]
        with_both = [roc for _, roc in of_classes if np.isfinite(roc).all()]
        micro = _curves(targets.ravel(), scores.ravel())
        found["precision-recall"] = {ALL_PAIRS: micro[0], MEAN_OF_CLASSES: np.mean([pr for pr, _ in of_classes], axis=0)}
        found["ROC"] = {ALL_PAIRS: micro[1], **({MEAN_OF_CLASSES: np.mean(with_both, axis=0)} if with_both else {})}
        for c in named:
            for kind, values in zip(found, of_classes[order.index(c)], strict=True):
                found[kind][vocabulary.names[c]] = values
    return [
        {"curve": kind, "of": of, "x": x, "y": y}
        for kind, curves in found.items()
        for of, values in curves.items()
        if np.isfinite(values).all()
        for x, y in zip(GRID.tolist(), values.tolist(), strict=True)
    ]


def _curves(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision at each recall of the grid, and the share of the positive clips at each share of the others; NaN without others."""
    precision, recall, _ = precision_recall_curve(positive, scores, drop_intermediate=True)
    precision_at = precision[::-1][recall[::-1].searchsorted(GRID)]
    if positive.all():
        return precision_at, np.full(len(GRID), np.nan)
    false, true, _ = roc_curve(positive, scores)
    return precision_at, np.interp(GRID, false, true)


def hardest_clips(
    manifest: Manifest, vocabulary: Vocabulary, scores: np.ndarray, targets: np.ndarray, calibration: Calibration
) -> list[dict[str, Any]]:
    """Lists the clips with the largest loss, with their labels and what is heard."""
    sure = np.where(targets, scores, 1 - scores).clip(SCORE_FLOOR, 1)
    losses, decided = -np.log(sure).mean(axis=1), calibration.decisions(scores)
    found = []
    for row in np.argsort(-losses, kind="stable")[:N_HARDEST].tolist():
        clip, heard = manifest[row], np.argsort(-scores[row], kind="stable")[:N_HEARD].tolist()
        found.append(
            {
                "ID": clip["id"],
                "wav": clip["wav"],
                "start": clip.get("start"),
                "seconds": clip["duration"],
                "loss": float(losses[row]),
                "labels": [vocabulary.names[c] for c in np.flatnonzero(targets[row])],
                "heard": [
                    {
                        "name": vocabulary.names[c],
                        "score": float(scores[row, c]),
                        "decided": bool(decided[row, c]),
                        "right": bool(targets[row, c]),
                    }
                    for c in heard
                ],
            }
        )
    return found


def _sound(path: str, start: float | None, seconds: float | None) -> bytes | str:
    """The first seconds of a clip as a FLAC file, or what is wrong with it."""
    n_samples = round(PLAYED_SECONDS * PLAYED_RATE)
    try:
        if start is None:
            wave = next(iter(read_blocks(path, PLAYED_RATE, PLAYED_SECONDS)))[:n_samples]
        else:
            wave = read_audio(path, PLAYED_RATE, start, seconds)[:n_samples]
    except (InputError, StopIteration) as error:
        return str(error).replace(path, Path(path).name) or "no samples"
    file = io.BytesIO()
    soundfile.write(file, wave.clamp(-1, 1).numpy(), PLAYED_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _bad_clips(folder: Path, name: str) -> list[dict[str, str]]:
    """The clips of a set that could not be read, and so were scored as silence."""
    if not (folder / FILE).is_file():
        return []
    with open(folder / FILE, newline="", encoding="utf-8") as file:
        return [{"ID": row["ID"], "error": row["error"]} for row in csv.DictReader(file) if row["set"] == name]


def _write_csv(path: Path, heads: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    write_file(path, "".join(map(csv_line, [heads, *([row[head] for head in heads] for row in rows)])))
