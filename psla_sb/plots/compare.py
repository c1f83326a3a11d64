"""The picture of a comparison of systems."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from psla_sb.plots.page import BESIDE, BLUE, GREY, ORANGE, ROW_HEIGHT, legend_above, name_rows, page, shorten

# Rows that fit on a page, and letters of a system's name.
MAX_ROWS, LONGEST = 50, 28


def comparison(report: Mapping[str, Any], path: str | Path) -> Figure:
    """Draws mAP and its difference to the first system's, with intervals, and the classes that differ most.

    `report` is what `compare.json` has.
    """
    first, *others = report["systems"]
    # two more rows for a heading and a space
    n_shown = max(1, int(MAX_ROWS / max(1, len(others)) - 2))
    blocks = [(system["name"], system["classes"][:n_shown]) for system in others if system["classes"]]
    heights = [(len(others) + 2) * ROW_HEIGHT * 1.2 + 0.5, sum(len(classes) + 1.5 for _, classes in blocks) * ROW_HEIGHT + 0.85]
    n_classes = report["n_classes"] - report["n_classes_left_out"]
    intervals = f"intervals of {100 * report['level']:g} % from resampled clips"
    title = f"{report['n_clips']:,} clips, {n_classes:,} classes; lines are {intervals}"
    with page(path, sum(heights if blocks else heights[:1]) + 0.25, [title], layout="constrained") as figure:
        upper: Any = figure
        if blocks:
            (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
            _draw_classes(lower, first["name"], blocks)
        _draw_systems(upper, [first, *others])
    return figure


def _draw_systems(figure: Any, systems: Sequence[Mapping[str, Any]]) -> None:
    rows = np.arange(len(systems))
    values, *differences = figure.subplots(1, 2 if len(systems) > 1 else 1, sharey=True, squeeze=False)[0]
    _whiskers(values, rows, [system["figures"]["mAP"] for system in systems], ".4f", BLUE)
    values.set(xlabel="mAP (mean average precision)")
    for axes in differences:
        _whiskers(axes, rows[1:], [system["difference"]["mAP"] for system in systems[1:]], "+.4f", ORANGE)
        axes.set(xlabel=f"difference of mAP to {shorten(systems[0]['name'], LONGEST)}")
    name_rows((values, *differences), rows, [shorten(system["name"], LONGEST) for system in systems])


def _draw_classes(figure: Any, first: str, blocks: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Draws AP of the first system and of another, and their difference; a block of rows, with a heading, for each other system."""
    first = shorten(first, LONGEST)
    figure.suptitle(
        f"Classes whose average precision differs most from that of {first} (positive clips)", x=0.01, ha="left", fontsize=9
    )
    precision, difference = figure.subplots(1, 2, sharey=True)
    classes = [one for _, block in blocks for one in block]
    lengths = np.array([len(block) for _, block in blocks])
    headings = np.append(0, np.cumsum(lengths + 1.5)[:-1])
    rows = np.concatenate([heading + 1 + np.arange(length) for heading, length in zip(headings, lengths, strict=True)])
    ends = np.array([[one["AP_of_first"], one["AP"]] for one in classes])
    precision.plot(ends.T, [rows, rows], "-", color=GREY, linewidth=0.8)
    precision.plot(ends[:, 0], rows, "o", color=GREY, label=first)
    precision.plot(ends[:, 1], rows, "o", color=BLUE, label="the other")
    _whiskers(difference, rows, [{**one, "value": one["difference"]} for one in classes], "+.3f", ORANGE)
    names = [shorten(name, LONGEST) for name, _ in blocks]
    names += [f"{shorten(one['name'], 36)} ({one['positive_clips']:,})" for one in classes]
    name_rows((precision, difference), np.concatenate([headings, rows]), names)
    for label in precision.get_yticklabels()[: len(headings)]:
        label.set_fontweight("bold")
    precision.set(xlabel="average precision", xlim=(-0.03, 1.03))
    difference.set(xlabel="difference of average precision")
    legend_above(precision, ncols=2)


def _whiskers(axes: Axes, rows: np.ndarray, figures: Sequence[Mapping[str, Any]], form: str, colour: str) -> None:
    """Draws values as points and their intervals as lines, and says each value at the right end; signed ones are differences."""
    columns = ([np.nan if figure[key] is None else figure[key] for figure in figures] for key in ("value", "low", "high"))
    values, lows, highs = np.array([*columns])
    axes.plot([lows, highs], [rows, rows], "-", color=colour)
    axes.plot(values, rows, "o", color=colour)
    for row, value, high in zip(rows, values, highs, strict=True):
        if not np.isnan(value):
            text = f"{value:{form}}".replace("-", "\N{MINUS SIGN}")
            axes.annotate(text, (np.nanmax([value, high]), row), **BESIDE)
    if form[0] == "+":
        axes.axvline(0, color="black", linestyle="--", linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    # room for the texts
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.2 * (right - left))
