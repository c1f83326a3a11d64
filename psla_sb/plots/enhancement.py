"""The picture of what label enhancement added."""

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from psla_sb.plots.page import BLUE, GREY, ORANGE, ROW_HEIGHT, STYLE, _log_counts, _shorten, page


def label_changes(names, before, after, path, title="Label enhancement", n_rows=40):
    """Draws how many labels were added to each class, and what share of its clips had it already.

    Arguments
    ---------
    names : sequence of str
        The classes.
    before, after : array_like
        `[classes]`, clips that carry each class.
    path : str or Path
        The PNG file to write.
    title : str
        What was done.
    n_rows : int
        How many classes are drawn: those with most additions. How many others have additions is stated.

    Returns
    -------
    matplotlib.figure.Figure
        What was written.

    Example
    -------
    >>> path = getfixture("tmp_path") / "labels.png"
    >>> figure = label_changes(["Bell", "Rain", "Dog"], [3, 1000, 0], [4, 1300, 0], path)
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['Rain', 'Bell']
    """
    before, after = np.asarray(before), np.asarray(after)
    added = after - before
    order = np.argsort(-added, kind="stable")[: np.count_nonzero(added)]
    shown = order[:n_rows]
    rows = np.arange(len(shown))
    lines = [title, f"{before.sum():,} labels before, {added.sum():,} added, to {len(order)} of {len(names)} classes"]
    if len(order) > len(shown):
        rest = order[n_rows:]
        lines.append(f"Shown are the {len(shown)} classes with most; the other {len(rest)} got {added[rest].sum():,}")
    with page(path, (len(shown) + 1) * ROW_HEIGHT + 0.7 + 0.2 * len(lines), layout="constrained") as figure:
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
        bars, clips = figure.subplots(1, 2, sharey=True)
        bars.barh(rows, added[shown], height=0.75, color=ORANGE)
        clips.hlines(rows, before[shown], after[shown], color=GREY, linewidth=1)
        clips.plot(before[shown], rows, "o", color=BLUE, label="before")
        clips.plot(after[shown], rows, "o", color=ORANGE, label="after")
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 6}
        beside["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        for row, c in enumerate(shown):
            bars.annotate(f"{added[c]:,}", (added[c], row), **beside)
            clips.annotate(f"+{added[c] / before[c]:.0%}" if before[c] else "new", (after[c], row), **beside)
        bars.set_yticks(rows, [_shorten(names[c]) for c in shown])
        bars.set(xlabel="labels added", xlim=(0, 1.15 * added.max(initial=1)))
        bars.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        bars.xaxis.set_major_formatter(EngFormatter(sep=""))
        bars.set_ylim(max(rows, default=0) + 0.7, -0.7)
        clips.set(xlabel="clips that carry the class")
        _log_counts(clips, "x", np.concatenate([before[shown], after[shown]]), room=6)
        if len(shown) and before[shown].all():
            # from the rarest of these classes on: on a logarithmic axis a growth by half is a short line
            clips.set_xlim(left=before[shown].min() / 2)
        clips.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2)
        for axes in (bars, clips):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
    return figure
