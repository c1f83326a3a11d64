"""What an ablation found: the figures of every run, and differences between variants over paired seeds, with PSLA's own beside."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from psla_sb.checkpoints.run_folder import read_results
from psla_sb.experiment.averages import EMA, SWA
from psla_sb.experiment.evaluation import ROWS
from psla_sb.experiment.variants import Variant, changes
from psla_sb.files import atomic_write, write_file
from psla_sb.metrics import FIGURES

COMPARED = "mAP"
# By variant and seed: what `evaluation` of the run's `results.json` says.
Evaluations = Mapping[str, Mapping[int, Mapping[str, Mapping[str, Any]]]]
# mAP published in Gong, Chung, Glass, "PSLA", 2021, arXiv 2102.01243. "rows": of one run's last or best epoch, its weight average,
# the ensemble of its epochs. "labels": of models with original labels (None) and with labels enhanced, by the threshold.
# FSD50K's rows are of a run with enhanced labels, another experiment than that of its labels.
PUBLISHED: dict[str, dict[str, dict]] = {
    "full AudioSet": {
        "rows": {"last": 0.440, "weight_average": 0.444, "ensemble": 0.453},
        "labels": {None: 0.440, "mean": 0.439, 25: 0.430, 10: 0.409, 5: 0.394},
    },
    "balanced AudioSet": {"rows": {}, "labels": {None: 0.312, "mean": 0.316, 25: 0.317, 10: 0.308, 5: 0.308}},
    "FSD50K": {"rows": {"best": 0.558, "weight_average": 0.562, "ensemble": 0.573}, "labels": {None: 0.558, "mean": 0.567}},
}


class Line(NamedTuple):
    """One line of the table: values by seed, and the name of the line that it is compared with."""

    name: str
    group: str  # as of a variant, or "aggregation"
    changes: str
    against: str | None
    values: dict[int, float]
    published: float | None = None  # PSLA's own difference


def data_set_of(recipe: str, hparams: str) -> str:
    """The data set of the published figures that stand beside those of a recipe's YAML file.

    Example
    -------
    >>> data_set_of("AudioSet", "psla_balanced_enhanced"), data_set_of("AudioSet", "mini"), data_set_of("FSD50K", "psla")
    ('balanced AudioSet', 'full AudioSet', 'FSD50K')
    """
    if recipe == "FSD50K":
        return "FSD50K"
    return "balanced AudioSet" if hparams.startswith("psla_balanced") else "full AudioSet"


def published_rows(data_set: str, row: str, compared: str) -> float | None:
    """PSLA's difference between two rows of a run's results.

    Example
    -------
    >>> published_rows("full AudioSet", "ensemble", "weight_average"), published_rows("FSD50K", "last", "weight_average")
    (0.009, None)
    """
    rows = PUBLISHED[data_set]["rows"]
    return round(rows[row] - rows[compared], 3) if row in rows and compared in rows else None


def published_labels(data_set: str, settings: Mapping[str, Any]) -> float | None:
    """PSLA's difference of the original labels to those enhanced with the threshold of a recipe.

    Example
    -------
    >>> published_labels("FSD50K", {"label_enhancement": {"scores": "scores.npy", "threshold": "mean"}})
    -0.009
    """
    labels, enhancement = PUBLISHED[data_set]["labels"], settings.get("label_enhancement")
    threshold = None
    # other rules, such as `propagate_annotation`, have no teacher's scores
    if isinstance(enhancement, Mapping) and "scores" in enhancement:
        threshold = enhancement.get("threshold", "mean")
    return round(labels[None] - labels[threshold], 3) if isinstance(threshold, (int, str)) and threshold in labels else None


def lines_of(
    variants: Sequence[Variant], evaluations: Evaluations, row: str, settings: Mapping[str, Any], data_set: str
) -> list[Line]:
    """The lines of the table: one for each variant that has a figure, and the full runs aggregated otherwise than by `row`."""
    folders = {variant.name: variant.folder for variant in variants}

    def values(name: str, one: str) -> dict[int, float]:
        return {seed: rows[one][COMPARED] for seed, rows in evaluations.get(name, {}).items() if _is_number(rows, one)}

    lines = []
    for variant in variants:
        same = variant.against is not None and folders[variant.against] == variant.folder
        published = published_labels(data_set, settings) if variant.name == "no label enhancement" else None
        against = None if same else variant.against
        lines.append(Line(variant.name, variant.group, changes(variant.overrides), against, values(variant.name, row), published))
    # without a test set the best epoch is picked on the clips that are reported on
    others = (
        ["last", "best", "weight_average", "ensemble"]
        if settings.get("test_annotation")
        else ["last", "weight_average", "ensemble"]
    )
    # of runs that have a moving average
    others += [SWA, EMA]
    for one in others:
        if one != row:
            published = published_rows(data_set, one, row)
            title = f"full, {one.replace('_', ' ')}{' epoch' * (one in ('last', 'best'))}"
            lines.append(Line(title, "aggregation", ROWS[one], "full", values("full", one), published))
    return [line for line in lines if line.values]


def _is_number(rows: Mapping[str, Mapping[str, Any]], row: str) -> bool:
    value = rows.get(row, {}).get(COMPARED)
    return isinstance(value, (int, float)) and math.isfinite(value)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> dict[str, Any]:
    """The mean difference over the seeds that both have, and its 95 % interval by Student's t on the pairs.

    Example
    -------
    >>> found = paired_difference({1: 0.5, 2: 0.6, 3: 0.8}, {1: 0.4, 2: 0.5, 3: 0.6})
    >>> found["seeds"], round(found["mean"], 4), [round(end, 4) for end in found["interval"]]
    ([1, 2, 3], 0.1333, [-0.0101, 0.2768])
    >>> paired_difference({1: 0.5}, {1: 0.25, 2: 0.5})
    {'seeds': [1], 'each': [0.25], 'mean': 0.25, 'interval': None}
    """
    seeds = sorted(values.keys() & reference.keys())
    each = np.array([values[seed] - reference[seed] for seed in seeds], dtype=float)
    mean, interval = float(each.mean()) if len(each) else None, None
    if mean is not None and len(each) > 1:
        half = stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each))
        interval = [float(mean - half), float(mean + half)]
    return {"seeds": seeds, "each": each.tolist(), "mean": mean, "interval": interval}


def summary_of(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines with their means, standard deviations and differences, as `summary.json` has them; None where there is none."""
    by_name = {line.name: line for line in lines}
    entries = []
    for line in lines:
        numbers = np.array(list(line.values.values()))
        reference = by_name.get(line.against or "")
        difference = None if reference is None else paired_difference(line.values, reference.values)
        entries.append(
            {
                "name": line.name,
                "group": line.group,
                "changes": line.changes,
                "seeds": list(line.values),
                "each": numbers.tolist(),
                "mean": float(numbers.mean()),
                "standard_deviation": float(numbers.std(ddof=1)) if len(numbers) > 1 else None,
                "against": line.against,
                "difference": difference if difference and difference["seeds"] else None,
                "published_difference": line.published,
            }
        )
    return entries


def table(entries: Sequence[Mapping[str, Any]], row: str, data_set: str) -> str:
    """The summary as a table in Markdown, which is read as it stands too.

    Example
    -------
    >>> full = Line("full", "full", "nothing", None, {1: 0.5, 2: 0.6})
    >>> other = Line("no mixup", "off", "mixup_rate=0", "full", {1: 0.4, 2: 0.52})
    >>> print(table(summary_of([full, other]), "last", "FSD50K"))
    | variant  | changes      | seeds |   mAP |    sd | difference | from | 95 % interval    |
    | -------- | ------------ | ----: | ----: | ----: | ---------: | ---- | ---------------- |
    | full     | nothing      |     2 | 0.550 | 0.071 |            |      |                  |
    | no mixup | mixup_rate=0 |     2 | 0.460 | 0.085 |     -0.090 | full | [-0.217, +0.037] |
    <BLANKLINE>
    mAP of each run's last epoch; its standard deviation over the seeds; the mean difference of runs with the
    same seed, and its 95 % interval by Student's t over these pairs.
    """
    with_published = any(entry["published_difference"] is not None for entry in entries)
    heads = ["variant", "changes", "seeds", COMPARED, "sd", "difference", "from", "95 % interval"]
    rows = [[*heads, f"PSLA ({data_set})"][: len(heads) + with_published]]
    for entry in entries:
        difference = entry["difference"] or {"mean": None, "interval": None, "seeds": entry["seeds"]}
        low_high = difference["interval"]
        paired = "" if len(difference["seeds"]) == len(entry["seeds"]) else f" ({len(difference['seeds'])} pairs)"
        cells = [entry["name"], entry["changes"].replace("|", "\\|"), str(len(entry["seeds"])), f"{entry['mean']:.3f}"]
        cells += [number(entry["standard_deviation"], ".3f"), number(difference["mean"], "+.3f") + paired]
        cells += [entry["against"] or "" if entry["difference"] else ""]
        cells += ["" if low_high is None else f"[{low_high[0]:+.3f}, {low_high[1]:+.3f}]"]
        rows.append([*cells, number(entry["published_difference"], "+.3f")][: len(rows[0])])
    notes = [
        f"{COMPARED} of each run's {_what(row)}; its standard deviation over the seeds; the mean difference of runs with the",
        "same seed, and its 95 % interval by Student's t over these pairs.",
    ]
    if with_published:
        notes.append(f"PSLA: the differences published for {data_set} (arXiv 2102.01243).")
    if all(len(entry["seeds"]) == 1 for entry in entries):
        notes.append("One seed has no standard deviation and no interval: pass --seeds=1,2,3.")
    return "\n".join([_aligned(rows), "", *notes])


def number(value: float | None, form: str) -> str:
    """A number as text, nothing if there is none."""
    return "" if value is None else f"{value:{form}}"


def _what(row: str) -> str:
    return {"weight_average": "averaged weights of the last epochs"}.get(row, ROWS[row])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table whose columns are straight; numbers stand at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if head in ("seeds", COMPARED, "sd", "difference") or head.startswith("PSLA") else "<" for head in rows[0]]
    lines = [[f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows]
    rule = [f"{'-' * (width - 1)}{':' if side == '>' else '-'}" for side, width in zip(sides, widths, strict=True)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def write_csv(path: Path, variants: Sequence[Variant], evaluations: Evaluations) -> None:
    """Writes one row for each variant, seed and row of a run's results; a figure that is not defined is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "group", "changes", "seed", "row", *FIGURES])
    for variant in variants:
        for seed, rows in evaluations.get(variant.name, {}).items():
            for row in ROWS:
                if row in rows and row != "chance":
                    figures = [rows[row][figure] if math.isfinite(rows[row].get(figure, math.nan)) else "" for figure in FIGURES]
                    writer.writerow([variant.name, variant.group, changes(variant.overrides), seed, row, *figures])
    with atomic_write(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What `results.json` of a run that has ended says of the evaluation."""
    evaluation = read_results(folder).get("evaluation")
    return evaluation if isinstance(evaluation, dict) else None


def write_report(
    folder: Path, variants: Sequence[Variant], evaluations: Evaluations, row: str, settings: Mapping[str, Any], data_set: str
) -> str:
    """Writes `ablation.csv`, `ablation.md`, `summary.json` and, where there is a difference, `ablation.png`; returns the table."""
    entries = summary_of(lines_of(variants, evaluations, row, settings, data_set))
    text = table(entries, row, data_set)
    write_csv(folder / "ablation.csv", variants, evaluations)
    write_file(folder / "ablation.md", text + "\n")
    summary = {"figure": COMPARED, "row": row, "published": f"{data_set}, arXiv 2102.01243", "variants": entries}
    write_file(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    if any(entry["difference"] for entry in entries):
        # matplotlib is slow to import
        from psla_sb.plots.ablation import ablation

        ablation(entries, folder / "ablation.png", _what(row), f"published for {data_set}")
    return text
