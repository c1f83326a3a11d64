"""What the pictures of the toolkit have in common: PNG files that are fit to print.

Figures are drawn without pyplot: no display, no state that other code could see.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import EngFormatter

from psla_sb.files import atomic_write

# Okabe and Ito's colours, which colour-blind people tell apart; their pale versions differ in grey as well.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
PALE_BLUE, PALE_GREY = "#8FC1E3", "#E6E6E6"
STYLE: dict[str, Any] = {
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
# Where the text of `annotate` stands: to the right of its point.
BESIDE: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 6}
BESIDE["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_DRAWING = threading.RLock()  # matplotlib's style is the process's own


@contextmanager
def page(path: str | Path, height: float, title: Sequence[str] = (), **kwargs: Any) -> Iterator[Figure]:
    """Gives a figure as wide as a page, `height` in inches, and writes it as a PNG file, whole or not at all.

    The lines of the title stand above everything; `kwargs` are for `matplotlib.figure.Figure`.
    """
    # ticks are made while the figure is drawn, so drawing needs the style too
    with _DRAWING, style.context(["default", STYLE]):
        figure = Figure((PAGE_WIDTH, height), **kwargs)
        FigureCanvasAgg(figure)
        if title:
            figure.suptitle("\n".join(title), x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
        yield figure
        with atomic_write(path) as temporary:
            figure.savefig(temporary)


def shorten(name: str, longest: int = 48) -> str:
    """Cuts a name that is too long, with an ellipsis at its end."""
    return name if len(name) <= longest else f"{name[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


def legend_above(axes: Axes, **kwargs: Any) -> None:
    """Puts the legend above the panel, where no curve can run through it."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, **kwargs)


def name_rows(panels: Sequence[Axes], rows: np.ndarray, names: Sequence[str]) -> None:
    """Names the rows of panels with a common y axis, from the top down, without lines across."""
    for axes in panels:
        axes.set_yticks(rows, [shorten(name) for name in names])
        axes.set_ylim(max(rows, default=0) + 0.7, -0.7)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)


def log_counts(axes: Axes, axis: str, counts: np.ndarray, room: float = 2) -> None:
    """Makes an axis logarithmic, with a place for 0 if needed; ticks are few enough for a narrow one."""
    least, most = counts.min(initial=10), counts.max(initial=10)
    lowest = least / 2 if least else -0.5
    powers = np.arange(np.ceil(np.log10(lowest)) if least else 1, np.log10(most) + 0.01, 1 if most < 10_000 else 2)
    axes.set(**{f"{axis}scale": SymmetricalLogScale(None, linthresh=1), f"{axis}lim": (lowest, room * most)})
    axes.set(**{f"{axis}ticks": [*([] if least else [0]), *10.0**powers]})
    getattr(axes, f"{axis}axis").set_major_formatter(EngFormatter(sep=""))


def spectrogram(axes: Axes, energies: np.ndarray, end: float, lowest: float, highest: float, **kwargs: Any) -> AxesImage:
    """Draws log-mel energies `[frames, mels]` from 0 to `end`, in whatever unit the axis has."""
    extent = (0, end, 0, energies.shape[1])
    drawn = axes.imshow(energies.T, origin="lower", aspect="auto", cmap="magma", extent=extent, vmin=lowest, vmax=highest, **kwargs)
    axes.set_yticks([0, energies.shape[1]])
    axes.grid(visible=False)
    return drawn
