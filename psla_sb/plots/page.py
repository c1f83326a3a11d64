"""What the pictures of the toolkit have in common: PNG files that are fit to print.

Figures are drawn without pyplot: no display, no state that other code could see.
"""

from contextlib import contextmanager

import numpy as np
from cycler import cycler
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import EngFormatter

from psla_sb.files import atomic_write

# Okabe and Ito's colours, which colour-blind people tell apart; their pale versions differ in grey as well.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
PALE_BLUE, PALE_GREY = "#8FC1E3", "#E6E6E6"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    # names of classes and clips may contain $
    "text.parse_math": False,
    # texts are measured as they are printed
    "figure.dpi": 200,
    "text.hinting": "no_hinting",
}
# All in inches: the width of a printed page's text, the height of a labelled bar.
PAGE_WIDTH, ROW_HEIGHT = 7.2, 0.155
LONGEST_NAME = 48


@contextmanager
def page(path, height, **kwargs):
    """Gives a figure as wide as a page, and writes it as a PNG file, whole or not at all.

    Arguments
    ---------
    path : str or Path
        The file to write. Its folder is made if there is none.
    height : float
        In inches.
    **kwargs
        For `matplotlib.figure.Figure`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "empty.png"
    >>> with page(path, height=1) as figure:
    ...     _ = figure.text(0.5, 0.5, "nothing to see")
    >>> path.exists()
    True
    """
    # ticks are made while the figure is drawn, so drawing needs the style too
    with style.context(["default", STYLE]):
        figure = Figure((PAGE_WIDTH, height), **kwargs)
        FigureCanvasAgg(figure)
        yield figure
        with atomic_write(path) as temporary:
            figure.savefig(temporary)


def _log_counts(axes, axis, counts, room=2):
    """A logarithmic axis, with a place for 0 if needed; ticks are few enough for a narrow one."""
    least, most = counts.min(initial=10), counts.max(initial=10)
    lowest = least / 2 if least else -0.5
    powers = np.arange(np.ceil(np.log10(lowest)) if least else 1, np.log10(most) + 0.01, 1 if most < 10_000 else 2)
    axes.set(**{f"{axis}scale": SymmetricalLogScale(None, linthresh=1), f"{axis}lim": (lowest, room * most)})
    axes.set(**{f"{axis}ticks": [*([] if least else [0]), *10.0**powers]})
    getattr(axes, f"{axis}axis").set_major_formatter(EngFormatter(sep=""))


def _shorten(name, longest=LONGEST_NAME):
    return name if len(name) <= longest else f"{name[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"
