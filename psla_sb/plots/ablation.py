"""The picture of an ablation: how much each change of a recipe changes the mAP."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from psla_sb.plots.page import BLUE, GREY, ORANGE, PALE_BLUE, legend_above, page, shorten

GROUPS = {
    "off": "techniques off, compared with the full recipe",
    "alone": "one technique alone, compared with the baseline",
    "varied": "other values, compared with the full recipe",
    "aggregation": "the full recipe's runs, aggregated otherwise",
}
ROW = 0.19  # inches
# An interval of two seeds can be a hundred times as long as the difference: it is cut off so many spreads of all points beyond.
BEYOND = 0.8
MINUS = "\N{MINUS SIGN}"
# White below it: the line of no difference runs through.
HEAD: dict[str, Any] = {"va": "center", "fontsize": 7, "color": GREY, "style": "italic"}
HEAD["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def ablation(entries: Sequence[Mapping[str, Any]], path: str | Path, what: str, published: str) -> Figure:
    """Draws differences in mAP as points with their 95 % intervals, by groups, and published ones as hollow diamonds.

    Arguments
    ---------
    entries
        As `variants` of an ablation's `summary.json`; those without a difference are left out.
    what
        Of which models the mAP is, for the axis.
    published
        What the hollow diamonds are, for the legend.
    """
    rows: list[tuple[float, Mapping[str, Any]]] = []
    heads: list[tuple[float, str]] = []
    y = 0.0
    for group, title in GROUPS.items():
        members = [entry for entry in entries if entry["group"] == group and entry["difference"]]
        if members:
            heads.append((y, title))
            rows += [(y + 1 + i, entry) for i, entry in enumerate(members)]
            y += len(members) + 1.4
    points = [entry["difference"]["mean"] for _, entry in rows] + [0.0]
    points += [each for _, entry in rows for each in entry["difference"]["each"]]
    points += [entry["published_difference"] for _, entry in rows if entry["published_difference"] is not None]
    room = BEYOND * max(np.ptp(points), 1e-3)
    whiskers = [end for _, entry in rows for end in entry["difference"]["interval"] or ()]
    low = max(min(points) - room, min([*points, *whiskers]))
    high = min(max(points) + room, max([*points, *whiskers]))
    margin = 0.03 * max(high - low, 1e-3)
    with page(path, ROW * y + 0.9, layout="constrained") as figure:
        axes = figure.subplots()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlim(low - margin, high + margin)
        for at, entry in rows:
            _draw(axes, at, entry)
        for at, title in heads:
            axes.text(0.005, at, title, transform=axes.get_yaxis_transform(), **HEAD)
        axes.set_yticks([at for at, _ in rows], [shorten(entry["name"], 36) for _, entry in rows])
        axes.set_ylim(y - 0.9, -0.7)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: "0" if abs(value) < 1e-9 else f"{value:+.3g}".replace("-", MINUS))
        axes.set_xlabel(f"difference in mAP, {what}")
        _legend(axes, [entry for _, entry in rows], published)
    return figure


def _draw(axes: Axes, y: float, entry: Mapping[str, Any]) -> None:
    """One row: the seeds as pale dots, the interval, the mean, the published difference, and the numbers at the right."""
    difference, text = entry["difference"], f"{entry['difference']['mean']:+.3f}"
    axes.plot(difference["each"], [y] * len(difference["each"]), "|", color=PALE_BLUE, markersize=6, zorder=2)
    if difference["interval"] is not None:
        ends, limits = difference["interval"], axes.get_xlim()
        inside = np.clip(ends, *limits)
        axes.plot(inside, [y, y], "-", color=BLUE, linewidth=1, zorder=3)
        for end, at, marker, cap in zip(ends, inside, "<>", "||", strict=True):
            # an arrow says that the interval goes on
            axes.plot(at, y, cap if end == at else marker, color=BLUE, markersize=4, zorder=3, clip_on=False)
        text += f"  [{ends[0]:+.3f}, {ends[1]:+.3f}]"
    axes.plot(difference["mean"], y, "o", color=BLUE, markersize=4.5, zorder=4)
    if entry["published_difference"] is not None:
        look: dict[str, Any] = {"markersize": 7, "markerfacecolor": "none", "markeredgewidth": 1, "zorder": 5}
        axes.plot(entry["published_difference"], y, "D", color=ORANGE, **look)
    place: dict[str, Any] = {
        "xytext": (8, 0),
        "textcoords": "offset points",
        "va": "center",
        "fontsize": 6.5,
        "annotation_clip": False,
    }
    axes.annotate(text.replace("-", MINUS), (1, y), xycoords=axes.get_yaxis_transform(), **place)


def _legend(axes: Axes, entries: Sequence[Mapping[str, Any]], published: str) -> None:
    counts = sorted({len(entry["difference"]["seeds"]) for entry in entries})
    number = "-".join(map(str, [counts[0], counts[-1]][: 1 + (len(counts) > 1)]))
    seeds = f"{number} seed{'s' * (counts[-1] > 1)}"
    has_interval = any(entry["difference"]["interval"] for entry in entries)
    label = f"mean of {seeds}, 95 % interval" if has_interval else f"difference with {seeds}"
    axes.plot([], [], "o-" if has_interval else "o", color=BLUE, markersize=4.5, linewidth=1, label=label)
    if counts[-1] > 1:
        axes.plot([], [], "|", color=PALE_BLUE, markersize=6, label="each seed")
    if any(entry["published_difference"] is not None for entry in entries):
        axes.plot([], [], "D", color=ORANGE, markersize=6, markerfacecolor="none", markeredgewidth=1, label=published)
    legend_above(axes, ncols=3)
