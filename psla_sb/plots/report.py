"""The pictures of a run's report: what scores promise and keep, curves, which class is taken for which."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from psla_sb.plots.page import BLUE, GREY, ORANGE, legend_above, page, shorten

# Classes that a matrix has room for, and for numbers in its cells.
MAX_MATRIX, MAX_NUMBERS = 40, 20
COLOURS = {"score": ORANGE, "probability": BLUE}

Rows = Sequence[Mapping[str, Any]]


def reliability_diagram(bins: Rows, errors: Mapping[str, float], path: str | Path) -> Figure:
    """Draws how often a class is in clips with a certain score, before and after calibration; `errors` are the ECE of both.

    `bins` are rows of `reliability.csv`.
    """
    names = {"score": "score, before", "probability": "probability, after calibration"}
    # of many classes nearly all scores are near 0
    logarithmic = float(np.median(_columns(bins, "score", "as many pairs each")[0])) < 0.05
    with page(path, 3.6, layout="constrained") as figure:
        panels = figure.subplot_mosaic([["wide", "many"], ["count", "many"]], height_ratios=[3, 1])
        wide, count, many = panels["wide"], panels["count"], panels["many"]
        for shift, (of, colour) in zip((-0.017, 0.017), COLOURS.items(), strict=True):
            mean, share, pairs = _columns(bins, of, "as wide each")
            wide.plot(mean, share, "o-", clip_on=False, color=colour, label=f"{names[of]} (ECE {errors[of]:.4f})")
            count.bar((np.floor(mean * 10).clip(0, 9) + 0.5) / 10 + shift, pairs, 0.032, color=colour, log=True)
            mean, share, _ = _columns(bins, of, "as many pairs each")
            shown = (mean > 0) & (share > 0) if logarithmic else share >= 0
            many.plot(mean[shown], share[shown], "o-", clip_on=False, color=colour)
        wide.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of clips with the class")
        wide.tick_params(labelbottom=False)
        count.set(xlim=(0, 1), xlabel="score, or probability (10 bins as wide each)", ylabel="pairs")
        many.set(xlabel="the same, in 15 bins of as many pairs each", ylabel="share of clips with the class")
        if logarithmic:
            many.set(xscale="log", yscale="log")
        else:
            many.set(xlim=(0, 1), ylim=(0, 1))
        # powers of ten would be formulas
        for axis, form in ((many.xaxis, "{x:g}"), (many.yaxis, "{x:g}"), (count.yaxis, EngFormatter(sep=""))):
            axis.set_major_formatter(form)
            axis.set_minor_formatter(NullFormatter())
        count.set_ylim(bottom=0.5)
        for axes in (wide, many):
            lowest, highest = np.array([axes.get_xlim(), axes.get_ylim()]).T
            ends = [max(lowest), min(highest)]
            axes.plot(ends, ends, "--", color=GREY, linewidth=0.8, zorder=0)
        legend_above(wide)
        many.set_title("all pairs of clip and class; dashed: as it should be", fontsize=7)
    return figure


def _columns(bins: Rows, of: str, kind: str) -> np.ndarray:
    keys = ("mean", "share_of_clips_with_the_class", "pairs")
    rows = [[row[key] for key in keys] for row in bins if row["of"] == of and row["bins"] == kind]
    return np.array(rows, dtype=float).reshape(-1, 3).T


def curves(rows: Rows, path: str | Path) -> Figure:
    """Draws precision-recall and ROC curves; `rows` are those of `curves.csv`."""
    names = list(dict.fromkeys(row["of"] for row in rows))
    with page(path, 3.3 + 0.14 * -(-len(names) // 2), layout="constrained") as figure:
        axes: list[Axes] = list(figure.subplots(1, 2))
        lines = []
        for panel, kind in zip(axes, ("precision-recall", "ROC"), strict=True):
            for number, name in enumerate(names):
                points = np.array([[row["x"], row["y"]] for row in rows if row["curve"] == kind and row["of"] == name]).reshape(
                    -1, 2
                )
                line, *_ = panel.plot(*points.T, **_look(number))
                if panel is axes[0]:
                    lines.append(line)
            panel.set(xlim=(0, 1), ylim=(0, 1.02))
        axes[0].set(
            xlabel="recall: share of a class's clips that are found", ylabel="precision: share of what is found that is right"
        )
        axes[1].set(xlabel="share of the other clips that are found", ylabel="share of a class's clips that are found")
        if lines:
            figure.legend(lines, [shorten(name, 44) for name in names], loc="outside upper left", ncols=2)
    return figure


def _look(number: int) -> dict[str, Any]:
    """Of all, and of the mean, thick; then of single classes."""
    if number < 2:
        return {"color": ("black", BLUE)[number], "linewidth": 2}
    colours = ("#009E73", "#56B4E9", "#E69F00", "#CC79A7", ORANGE, GREY)
    return {"color": colours[(number - 2) % len(colours)], "linestyle": ("-", "--")[number >= 5], "linewidth": 1}


def confusion_picture(matrix: np.ndarray, names: Sequence[str], path: str | Path) -> Figure:
    """Draws which share of each class's clips (row) is taken for which class (column); `matrix` has numbers of clips."""
    n_classes, totals = len(names), matrix.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, matrix / np.maximum(totals, 1), np.nan)
    # with room for names below
    height = min(4.6, 1.2 + 0.3 * n_classes) + 1.4
    with page(path, height, layout="compressed") as figure:
        axes = figure.subplots()
        drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.grid(visible=False)
        labels = [shorten(name, 24) for name in names]
        axes.set_xticks(range(n_classes), labels, rotation=90)
        axes.set_yticks(range(n_classes), [f"{name} ({total:,})" for name, total in zip(labels, totals[:, 0], strict=True)])
        axes.set(xlabel="heard: the class with the highest score", ylabel="true class (clips)")
        axes.tick_params(length=0)
        if n_classes <= MAX_NUMBERS:
            for row, column in np.argwhere(matrix > 0):
                colour = "white" if shares[row, column] > 0.6 else "black"
                axes.text(column, row, f"{matrix[row, column]}", ha="center", va="center", fontsize=6, color=colour)
        figure.colorbar(drawn, ax=axes, label="share of the class's clips", shrink=0.6)
    return figure
