"""The page of a run's report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psla_sb.metrics import METRICS
from psla_sb.plots.html import number, picture, player, table, text, write_html
from psla_sb.plots.report import MAX_MATRIX, confusion_picture, curves, reliability_diagram
from psla_sb.plots.training import training_curves

N_CONFUSIONS, MOST_UNHEARD = 30, 20
SETS = {"valid": "validation", "test": "test"}
MEANINGS = {
    "accuracy": ("accuracy", "share of the clips whose best-scored class is the true one"),
    **{name: (metric.title, metric.meaning) for name, metric in METRICS.items()},
    "macro_F1": ("macro F1", "mean over the classes of F1: how well deciding by the thresholds does"),
    "micro_F1": ("micro F1", "F1 of all decisions together, so that frequent classes count more"),
}
WORDS = """<p class="small">AP (average precision): how far up the clips with the class stand when all are sorted by its score; 1 is
perfect. AUC: how likely a clip with the class scores higher than one without; 0.5 is guessing. Threshold: the class is decided
to be in clips that score at least this. Precision: the share of these that have the class. Recall: the share of the class's clips
that are found. F1: the harmonic mean of the two. A dash: not defined, or no threshold. A click on a column's head sorts.</p>"""

FILES = """<h2>Files</h2><p>All figures of this page, in the folder where it lies: <code>report/report.json</code>,
<code>classes.csv</code>, and in <code>report/</code> <code>confusion.csv</code>, <code>reliability.csv</code>,
<code>curves.csv</code>, <code>hardest_clips.csv</code>.</p>"""
HARDEST = """<p>The clips with the largest loss: wrong labels, broken sounds and true mistakes are among them. \N{CHECK MARK}: the
score reaches the class's threshold. Bold: a true class.</p>"""

Report = Mapping[str, Any]


def write_page(
    path: Path,
    pictures: Path,
    report: Report,
    bins: Sequence[Mapping[str, Any]],
    curve_points: Sequence[Mapping[str, Any]],
    confusion: np.ndarray | None,
    sounds: Sequence[bytes | str],
    epochs: Sequence[Mapping[str, Any]],
) -> None:
    """Draws the pictures, and writes the page with them.

    `report` is what `report.json` has, `bins` and `curve_points` the rows of `reliability.csv` and `curves.csv`, `confusion`
    numbers of clips, true x heard, `sounds` a FLAC file, or what is wrong, for each of the hardest clips.
    """
    calibration, names = report["calibration"], [row["name"] for row in report["classes"]]
    errors = {"score": calibration["ECE_before"], "probability": calibration["ECE_after"]}
    reliability_diagram(bins, errors, pictures / "reliability.png")
    curves(curve_points, pictures / "curves.png")
    training_curves(epochs, pictures / "training_curves.png")
    with_matrix = confusion is not None and len(names) <= MAX_MATRIX
    if confusion is not None and with_matrix:
        confusion_picture(confusion, names, pictures / "confusion.png")
    parts = [
        _summary(report),
        _headline(report),
        *_folds(report["folds"]),
        "<h2>Classes</h2>",
        WORDS,
        _classes(report),
        "<h2>Thresholds and probabilities</h2>",
        _thresholds(report),
        picture(pictures / "reliability.png", "How often a class is in clips with a certain score, before and after calibration"),
        *_confusions(report, pictures / "confusion.png" if with_matrix else None),
        "<h2>Curves</h2>",
        picture(pictures / "curves.png", "Precision-recall and ROC curves"),
        "<h2>Training</h2>",
        picture(pictures / "training_curves.png", "Losses, learning rate and mAP by epoch"),
        *_hardest(report, sounds),
        *_bad_clips(report["bad_clips"]),
        FILES,
    ]
    write_html(path, "How good is this tagger?", parts)


def _summary(report: Report) -> str:
    epochs, n = report["epochs"], report["n_clips"]
    of = f"epoch {epochs[0]}" if len(epochs) == 1 else f"the average of the weights of epochs {epochs[0]} to {epochs[-1]}"
    if report.get("tagger") == "ema":
        of = f"the moving average of the weights of epochs {epochs[0]} to {epochs[-1]}"
    said = (
        f"Trained on {report['n_train_clips']:,} clips of {report['n_classes']:,} classes. What follows is what {of} scores the "
        f"{n:,} clips of the {SETS[report['set']]} set, which it was not trained on."
    )
    if lacking := report["n_classes_without_clips"]:
        said += f" {lacking:,} classes are in none of these clips: nothing can be said of them."
    if n < 100:
        said += f" <b>{n} clips are few: figures and intervals are rough.</b>"
    return f"<p>{said}</p>"


def _headline(report: Report) -> str:
    baseline = report["baseline"]
    rows = []
    for key, figure in report["figures"].items():
        name, meaning = MEANINGS[key]
        cells = [name, (figure["value"], number(figure["value"]))]
        cells.append(f"{number(figure['low'])} to {number(figure['high'])}")
        if baseline:
            cells.append((baseline.get(key), number(baseline.get(key))))
        rows.append([*cells, meaning])
    heads = ["figure", "value", "95 % interval", *(["baseline"] if baseline else []), "what it is"]
    said = "<h2>Figures</h2>" + table(heads, rows)
    said += (
        '<p class="small">The intervals say how far a figure would move with other clips of the same kind (bootstrap over clips).'
    )
    said += f" Baseline: {text(baseline.get('what', ''))}." if baseline else ""
    if report["same_clips"]:
        said += (
            " The thresholds were chosen on these very clips, so both F1 figures are better than they will be on others;"
            " a test set (<code>test_annotation</code>) would tell."
        )
    return said + "</p>"


def _folds(folds: Mapping[str, Any] | None) -> list[str]:
    if not folds:
        return []
    rows = [
        [METRICS[key].title, (value["mean"], f"{number(value['mean'])} ± {number(value['std'])}"), *_each(value)]
        for key, value in folds.items()
        if key in METRICS and isinstance(value, Mapping)
    ]
    pooled = [
        f"{METRICS[key].title} {number(value)}"
        for key, value in (folds.get("pooled") or {}).items()
        if key in METRICS and not isinstance(value, Mapping)
    ]
    heads = [
        "figure",
        "mean ± standard deviation",
        *(f"fold {i + 1}" for i in range(max((len(row) - 2 for row in rows), default=0))),
    ]
    said = f"Trained {folds.get('n_folds', '')} times, each time without another part of the clips, and scored on that part."
    said += f" All parts together: {', '.join(pooled)}." if pooled else ""
    return ["<h2>Cross-validation</h2>", f"<p>{text(said)}</p>", table(heads, rows) if rows else ""]


def _each(value: Mapping[str, Any]) -> list[tuple[Any, str]]:
    return [(one, number(one)) for one in value.get("each", [])]


def _classes(report: Report) -> str:
    rows = []
    for row in report["classes"]:
        threshold = number(row["threshold"]) + "*" * (not row["own_threshold"])
        cells = [(row[key], number(row[key])) for key in ("AP", "AUC")]
        after = [(row[key], number(row[key])) for key in ("precision", "recall", "F1")]
        rows.append([row["name"], row["positive_clips"], *cells, (row["threshold"], threshold), *after])
    heads = ["class", "clips with it", "AP", "AUC", "threshold", "precision", "recall", "F1"]
    shared = sum(not row["own_threshold"] for row in report["classes"])
    notes = []
    if shared:
        notes.append(
            f"* {shared} classes with fewer than {report['fewest_positives']} clips to choose one on share their threshold."
        )
    if unheard := [row["name"] for row in report["classes"] if _as_good_as_always(row, report["n_clips"])]:
        more = f", and {len(unheard) - MOST_UNHEARD} more" if len(unheard) > MOST_UNHEARD else ""
        names = text("; ".join(unheard[:MOST_UNHEARD]) + more)
        notes.append(f"F1 is hardly above what deciding the class for every clip would give: {names}.")
    return table(heads, rows, by_click=True) + "".join(f'<p class="small">{note}</p>' for note in notes)


def _as_good_as_always(row: Mapping[str, Any], n_clips: int) -> bool:
    """Whether a class's scores say nothing: F1 is hardly that of deciding it always, twice its clips of its and all clips."""
    always = 2 * row["positive_clips"] / (n_clips + row["positive_clips"])
    return always < 1 and row["F1"] < always + 0.05


def _thresholds(report: Report) -> str:
    said, fitted = report["calibration"], report["fitted_on"]
    never = said["n_classes_never_decided"]
    told = [
        f"Thresholds by {said['criterion']}, on the {fitted['clips']:,} clips of the validation set",
        f" (of {never} classes none would do: they are never decided)." if never else ".",
        " A score of 0.7 need not mean that the class is in 7 of 10 such clips; calibration makes probabilities of scores.",
        " Expected calibration error (how far they are off; 0 is best): ",
        f"{number(said['ECE_before'], '.4f')} of the scores, {number(said['ECE_after'], '.4f')} of the probabilities.",
        " They were fitted on these very clips." if report["same_clips"] else "",
        " Here calibration has not helped: it takes more validation clips." if said["ECE_after"] > said["ECE_before"] else "",
        " The tagger's folder has both (<code>calibration.json</code>), and <code>psla-tag</code> says them beside each score.",
    ]
    return f"<p>{''.join(told)}</p>"


def _confusions(report: Report, drawn: Path | None) -> list[str]:
    found = report["confusions"][:N_CONFUSIONS]
    parts = ["<h2>What is taken for what</h2>"]
    if drawn is not None:
        parts.append(picture(drawn, "Which share of each class's clips is taken for which class"))
    if not found:
        return [*parts, "<p>No class was missed.</p>"]
    if report["single_label"]:
        heads, said = ["class", "heard instead", "clips", "clips in which the class was missed"], "The most frequent mistakes:"
        rows = [[row["class"], row["heard_instead"], row["clips"], row["missed_clips"]] for row in found]
    else:
        said = (
            "Of the clips that have a class whose score is under its threshold: which wrong class is the most probable there, and "
            "how often it is decided."
        )
        heads = ["class that was missed", "heard instead", "clips", "of them decided", "clips in which it was missed"]
        rows = [[row["class"], row["heard_instead"], row["clips"], row["decided"], row["missed_clips"]] for row in found]
    return [*parts, f"<p>{said}</p>", table(heads, rows, by_click=True)]


def _hardest(report: Report, sounds: Sequence[bytes | str]) -> list[str]:
    parts = ["<h2>Clips that it is most wrong about</h2>", HARDEST]
    for clip, sound in zip(report["hardest_clips"], sounds, strict=True):
        heard = ", ".join(
            f'<span class="{"right " * one["right"]}{"decided" * one["decided"]}">{text(one["name"])}</span> {one["score"]:.2f}'
            for one in clip["heard"]
        )
        played = player(sound) if isinstance(sound, bytes) else f"<p><b>{text(sound)}</b></p>"
        labels = text("; ".join(clip["labels"]) or "none")
        parts.append(
            f'<div class="clip"><p><b>{text(clip["ID"])}</b> <span class="small">loss {clip["loss"]:.3f}</span></p>{played}'
            f"<p>Labels: {labels}</p><p>Heard: {heard}</p></div>"
        )
    return parts


def _bad_clips(bad: Sequence[Mapping[str, str]]) -> list[str]:
    if not bad:
        return []
    said = f"<p>{len(bad)} clips could not be read. They were scored as silence, and count in all figures.</p>"
    return ["<h2>Broken clips</h2>", said, table(["clip", "what is wrong"], [[one["ID"], one["error"]] for one in bad])]
