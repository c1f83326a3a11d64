"""The picture of what label enhancement added."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike

from psla_sb.plots.page import BESIDE, BLUE, GREY, ORANGE, ROW_HEIGHT, legend_above, log_counts, name_rows, page


def label_changes(
    names: Sequence[str], before: ArrayLike, after: ArrayLike, path: str | Path, title: str = "Label enhancement", n_rows: int = 40
) -> Figure:
    """Draws how many labels were added to each class, and what share of its clips had it already.

    `before` and `after` are `[classes]`, clips that carry each class. Of more than `n_rows` classes, those with most are drawn.
    """
    before, after = np.asarray(before), np.asarray(after)
    added = after - before
    order = np.argsort(-added, kind="stable")[: np.count_nonzero(added)]
    shown, rest = order[:n_rows], order[n_rows:]
    rows = np.arange(len(shown))
    lines = [title, f"{before.sum():,} labels before, {added.sum():,} added, to {len(order)} of {len(names)} classes"]
    if len(rest):
        lines.append(f"Shown are the {len(shown)} classes with most; the other {len(rest)} got {added[rest].sum():,}")
    with page(path, (len(shown) + 1) * ROW_HEIGHT + 0.7 + 0.2 * len(lines), lines, layout="constrained") as figure:
        bars, clips = figure.subplots(1, 2, sharey=True)
        bars.barh(rows, added[shown], height=0.75, color=ORANGE)
        clips.hlines(rows, before[shown], after[shown], color=GREY, linewidth=1)
        clips.plot(before[shown], rows, "o", color=BLUE, label="before")
        clips.plot(after[shown], rows, "o", color=ORANGE, label="after")
        for row, c in enumerate(shown):
            bars.annotate(f"{added[c]:,}", (added[c], row), **BESIDE)
            clips.annotate(f"+{added[c] / before[c]:.0%}" if before[c] else "new", (after[c], row), **BESIDE)
        name_rows((bars, clips), rows, [names[c] for c in shown])
        bars.set(xlabel="labels added", xlim=(0, 1.15 * added.max(initial=1)))
        bars.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        bars.xaxis.set_major_formatter(EngFormatter(sep=""))
        clips.set(xlabel="clips that carry the class")
        log_counts(clips, "x", np.concatenate([before[shown], after[shown]]), room=6)
        if len(shown) and before[shown].all():
            # from the rarest of these classes on: on a logarithmic axis a growth by half is a short line
            clips.set_xlim(left=before[shown].min() / 2)
        legend_above(clips, ncols=2)
    return figure
