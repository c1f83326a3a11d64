"""Several systems on the same clips: figures and differences with their intervals, as numbers, as CSV and as tables."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psla_sb.aggregation.bootstrap import ClassFigures, bootstrap, interval, means, two_sided_p
from psla_sb.aggregation.predictions import Matched, Predictions
from psla_sb.files import atomic_write, write_file
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import METRICS, average_precision, roc_auc

HOW = (
    "low and high: percentiles of paired resamples of the clips, moved so that their mean is the value; p: twice the share of the "
    "moved differences at or beyond 0 on the smaller side"
)
# Decimals of each figure in tables.
DECIMALS = {"mAP": 4, "mAUC": 4, "d_prime": 3}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Systems that were compared, the first with each other one.

    `positives` `[classes]`, of the clips that all have; `ap`, `auc`, and the ends of the intervals of the difference of AP to the
    first system, `low` and `high`, are `[systems, classes]`, NaN where undefined; `report` is what `compare.json` has.
    """

    systems: list[Predictions]
    vocabulary: Vocabulary
    positives: np.ndarray
    ap: np.ndarray
    auc: np.ndarray
    low: np.ndarray
    high: np.ndarray
    report: dict[str, Any]

    @property
    def difference(self) -> np.ndarray:
        """AP less that of the first system, `[systems, classes]`."""
        return self.ap - self.ap[0]

    def most_different(self, system: int, top: int) -> np.ndarray:
        """The classes whose AP differs most from the first system's, at most `top`, the largest difference first."""
        size = np.abs(self.difference[system])
        return np.argsort(-size, kind="stable")[: min(top, np.count_nonzero(~np.isnan(size)))]


def compare(matched: Matched, n_resamples: int = 1000, level: float = 0.95, seed: int = 0, top: int = 10) -> Comparison:
    """Computes figures, differences to the first system, and intervals of both.

    Arguments
    ---------
    n_resamples
        Paired resamples of the clips, see `psla_sb.aggregation.bootstrap.bootstrap`.
    level
        Of the intervals: the share that covers.
    top
        Of the classes that differ most, how many the report has.
    """
    ap, auc = (np.stack([figure(one, matched.targets) for one in matched.scores]) for figure in (average_precision, roc_auc))
    resampled = bootstrap(matched.scores, matched.targets, n_resamples, seed)
    low, high = np.zeros((2, *ap.shape))
    for system in range(len(ap)):
        low[system], high[system] = interval(ap[system] - ap[0], resampled.ap[system] - resampled.ap[0], level)
    positives = matched.targets.sum(axis=0)
    reports = _reports(matched.systems, means(ClassFigures(ap[:, None], auc[:, None])), means(resampled), level)
    report = {
        "n_clips": len(matched.targets),
        "n_classes": len(positives),
        "n_classes_left_out": int((positives == 0).sum()),
        "level": level,
        "n_resamples": n_resamples,
        "seed": seed,
        "intervals": HOW,
        "systems": reports,
    }
    comparison = Comparison(matched.systems, matched.vocabulary, positives, ap, auc, low, high, report)
    for system, own in enumerate(reports[1:], 1):
        own["classes"] = [_class_report(comparison, system, c) for c in comparison.most_different(system, top).tolist()]
    return comparison


def _reports(
    systems: Sequence[Predictions], values: Mapping[str, np.ndarray], resampled: Mapping[str, np.ndarray], level: float
) -> list[dict[str, Any]]:
    """What the report says of each system; `values` are `[systems, 1]`, `resampled` `[systems, resamples]`."""
    reports: list[dict[str, Any]] = []
    for i, system in enumerate(systems):
        figures, differences = {}, {}
        for name, value in values.items():
            figures[name] = _with_interval(value[i, 0], resampled[name][i], level)
            # inf less inf
            with np.errstate(invalid="ignore"):
                difference, apart = value[i, 0] - value[0, 0], resampled[name][i] - resampled[name][0]
            differences[name] = {**_with_interval(difference, apart, level), "p": _number(two_sided_p(difference, apart))}
        report = {"name": system.name, "scores": str(system.path), "clips": system.clips.source, "n_clips": len(system.clips)}
        reports.append({**report, "figures": figures, **({"difference": differences} if i else {})})
    return reports


def _with_interval(value: float, resampled: np.ndarray, level: float) -> dict[str, float | None]:
    low, high = interval(np.asarray(value), resampled, level)
    ends = {"value": value, "low": low, "high": high, "mean_of_resamples": resampled.mean()}
    return {key: _number(number) for key, number in ends.items()}


def _class_report(comparison: Comparison, system: int, c: int) -> dict[str, Any]:
    numbers = {"AP_of_first": comparison.ap[0], "AP": comparison.ap[system], "difference": comparison.difference[system]}
    numbers |= {"low": comparison.low[system], "high": comparison.high[system]}
    what = {"index": c, "mid": comparison.vocabulary.mids[c], "name": comparison.vocabulary.names[c]}
    return {**what, "positive_clips": int(comparison.positives[c]), **{key: _number(row[c]) for key, row in numbers.items()}}


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None


def write_comparison(comparison: Comparison, folder: str | Path) -> None:
    """Writes `compare.json`, and `classes.csv` with the figures of every class; one that is not defined is empty there."""
    write_file(Path(folder) / "compare.json", json.dumps(comparison.report, indent=1, allow_nan=False))
    heads, columns = ["index", "mid", "display_name", "positive_clips"], []
    for i, system in enumerate(comparison.systems):
        figures = {"AP": comparison.ap[i], "AUC": comparison.auc[i]}
        if i:
            figures |= {"difference": comparison.difference[i], "low": comparison.low[i], "high": comparison.high[i]}
        heads += [f"{system.name}_{figure}" for figure in figures]
        columns += [["" if np.isnan(value) else value for value in values.tolist()] for values in figures.values()]
    vocabulary, counts = comparison.vocabulary, comparison.positives.tolist()
    with atomic_write(Path(folder) / "classes.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(heads)
        writer.writerows(zip(range(len(vocabulary)), vocabulary.mids, vocabulary.names, counts, *columns, strict=True))


def comparison_table(report: Mapping[str, Any]) -> str:
    """Formats what `compare.json` has as text: the systems' figures, their differences, the classes that differ most."""
    n_classes, left_out, systems = report["n_classes"], report["n_classes_left_out"], report["systems"]
    first, *others = systems
    width = max(12, *(len(system["name"]) for system in systems))
    heads = "".join(f"{METRICS[figure].title + ' [low, high]':>28}" for figure in DECIMALS)
    lines = [
        f"{report['n_clips']:,} clips that all have, {n_classes - left_out:,} classes"
        + (f" ({left_out} of {n_classes:,} have no positive clip there, and are left out)" if left_out else ""),
        f"intervals of {100 * report['level']:g} % from {report['n_resamples']:,} paired resamples of the clips",
        "",
        f"{'':{width}}{'common clips':>20}{heads}",
    ]
    for system in systems:
        counted = f"{report['n_clips']:,} of {system['n_clips']:,}"
        lines.append(f"{system['name']:{width}}{counted:>20}{_cells(system['figures'])}")
    if others:
        lines += ["", f"difference to {first['name']}", f"{'':{width}}{'p (mAP)':>20}{heads}"]
    for system in others:
        apart = system["difference"]
        lines.append(f"{system['name']:{width}}{_text(apart['mAP']['p'], '.3f'):>20}{_cells(apart, '+')}")
    for system in others:
        lines += ["", *_class_lines(system, first["name"])]
    return "\n".join(lines)


def _cells(figures: Mapping[str, Mapping[str, float | None]], sign: str = "") -> str:
    return "".join(f"{_span(figures[name], f'{sign}.{decimals}f'):>28}" for name, decimals in DECIMALS.items())


def _span(figure: Mapping[str, float | None], form: str) -> str:
    value, low, high = (_text(figure[key], form) for key in ("value" if "value" in figure else "difference", "low", "high"))
    return f"{value} [{low}, {high}]"


def _text(number: float | None, form: str) -> str:
    return "-" if number is None else f"{number:{form}}"


def _class_lines(system: Mapping[str, Any], first: str) -> list[str]:
    """The classes that differ most, in columns: names of classes contain commas."""
    rows = system["classes"]
    width = max(8, *(len(row["name"]) for row in rows)) if rows else 8
    names = [name if len(name) <= 20 else f"{name[:19]}\N{HORIZONTAL ELLIPSIS}" for name in (first, system["name"])]
    wide = [max(8, len(name) + 2) for name in names]
    lines = [
        f"the {len(rows)} classes whose AP differs most between {first} and {system['name']}",
        f"{'':{width}}{'positives':>11}{names[0]:>{wide[0]}}{names[1]:>{wide[1]}}{'difference [low, high]':>30}",
    ]
    for row in rows:
        cells = f"{_text(row['AP_of_first'], '.4f'):>{wide[0]}}{_text(row['AP'], '.4f'):>{wide[1]}}"
        lines.append(f"{row['name']:{width}}{row['positive_clips']:>11,}{cells}{_span(row, '+.4f'):>30}")
    return lines
