"""The picture of an ensemble as it grows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from psla_sb.plots.page import GREY, legend_above, page


def ensemble_curve(singles: Sequence[float], ensembles: Sequence[float], path: str | Path, average: float | None = None) -> Figure:
    """Draws the mAP of an ensemble against its number of members, each member's own as a dot, and that of their weight average.

    `singles` and `ensembles` are in the order in which the members were added.
    """
    number = np.arange(1, len(ensembles) + 1)
    with page(path, 3.2, layout="constrained") as figure:
        axes = figure.subplots()
        counted = f"{len(ensembles)} member{'s' * (len(ensembles) != 1)}"
        axes.plot(number, ensembles, "-", label=f"ensemble: {ensembles[-1]:.3f} with {counted}")
        axes.plot(number, singles, "o", label=f"single models: {np.nanmax(singles):.3f} at best")
        if average is not None:
            axes.axhline(average, color=GREY, linestyle="--", label=f"average of weights: {average:.3f}")
        axes.set(xlabel="members, in the order in which they were added", ylabel="mAP (mean average precision)")
        axes.set_xlim(0.5, len(ensembles) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(y=0.1)
        legend_above(axes, ncols=3)
    return figure
