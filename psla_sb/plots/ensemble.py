"""The picture of an ensemble as it grows."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from psla_sb.plots.page import GREY, page


def ensemble_curve(singles, ensembles, path, average=None):
    """Draws the mAP of an ensemble against its number of members, and each member's own as a dot.

    Arguments
    ---------
    singles : sequence of float
        mAP of each member, in the order in which they were added.
    ensembles : sequence of float
        mAP of the ensemble with each of them added.
    path : str or Path
        The PNG file to write.
    average : float, optional
        mAP of the average of the members' weights.

    Returns
    -------
    matplotlib.figure.Figure
        What was written.

    Example
    -------
    >>> figure = ensemble_curve([0.40, 0.42], [0.40, 0.45], getfixture("tmp_path") / "ensemble.png", average=0.43)
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['ensemble: 0.450 with 2 members', 'single models: 0.420 at best', 'average of weights: 0.430']
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
        # above the panel, where no curve can run through it
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=3)
    return figure
