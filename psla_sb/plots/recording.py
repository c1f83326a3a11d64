"""The picture of a recording: waveform, log-mel energies and timeline."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from psla_sb.dataio.audio import read_blocks
from psla_sb.dataio.windows import joined, windows
from psla_sb.lobes.features import KaldiFbank, frame_length_and_shift
from psla_sb.plots.page import BLUE, page, shorten, spectrogram


def overview(blocks: Iterable[Tensor], sample_rate: int, seconds: float, n_columns: int = 1500) -> tuple[Tensor, Tensor, float]:
    """Shrinks a recording of any length, about so many seconds, to about so many columns; `blocks` are as of `read_blocks`.

    Returns the lowest and the highest sample `[columns, 2]`, mean log-mel energies `[columns, 64]`, and the seconds of a column.
    """
    fbank, (length, shift) = KaldiFbank(sample_rate, n_mels=64), frame_length_and_shift(sample_rate)
    frames = max(1, math.ceil(seconds * sample_rate / shift / n_columns))  # a column
    column = frames * shift
    piece = column * max(1, 1000 // frames)

    def columns():
        for wave in windows(blocks, piece, piece):
            wave = F.pad(wave, (0, -len(wave) % column))
            extremes = torch.stack(torch.aminmax(wave.reshape(-1, column), dim=1), dim=1)
            energies = fbank(F.pad(wave, (0, length - shift))[None])[0].reshape(-1, frames, 64).mean(1)
            yield torch.cat([extremes, energies], dim=1)

    table = torch.from_numpy(joined(columns()))
    return table[:, :2], table[:, 2:], column / sample_rate


def draw(path: str | Path, timeline: Any, sample_rate: int, picture: str | Path, title: str) -> None:
    """Draws the recording in the file `path` with its `Timeline`, as `recording` does, into the PNG file `picture`."""
    seconds = float(timeline.times[-1] + timeline.step / 2)
    extremes, energies, column = overview(read_blocks(path, sample_rate), sample_rate, seconds)
    recording(extremes.numpy(), energies.numpy(), column, timeline, picture, title)


def recording(
    extremes: ndarray, energies: ndarray, column: float, timeline: Any, path: str | Path, title: str = "Recording", n_rows: int = 10
) -> Figure:
    """Draws a recording's waveform, log-mel energies and the scores of its highest-scored classes, one above the other.

    `extremes`, `energies` and `column` are as of `overview`; `timeline` is a `Timeline`, or None, which draws no scores.
    """
    seconds = len(extremes) * column
    unit, scale = ("s", 1) if seconds < 300 else ("min", 60) if seconds < 3 * 3600 else ("h", 3600)
    end = seconds / scale
    n_shown = 0 if timeline is None else min(n_rows, len(timeline.labels))
    heights = [1, 1.3, *([] if timeline is None else [0.25 + 0.17 * n_shown])]
    with page(path, 3.0 + 0.17 * n_shown, layout="constrained") as figure:
        panels = figure.subplots(len(heights), 2, width_ratios=[50, 1], height_ratios=heights)
        (wave, image, *_), (nothing, *scales) = panels.T
        nothing.axis("off")
        times = (np.arange(len(extremes)) + 0.5) * column / scale
        wave.fill_between(times, extremes[:, 0], extremes[:, 1], color=BLUE, linewidth=0.3)
        highest = 1.05 * np.abs(extremes).max(initial=1e-3)
        wave.set(ylim=(-highest, highest), ylabel="amplitude")
        wave.set_title(shorten(title, 100))
        lowest, loudest = np.percentile(energies, [5, 99.8])
        drawn = spectrogram(image, energies, end, lowest, max(loudest, lowest + 1), interpolation="nearest")
        image.set(ylabel="mel band")
        figure.colorbar(drawn, cax=scales[0], label="log energy")
        if timeline is not None:
            _draw_scores(figure, panels[2, 0], panels[2, 1], timeline, n_shown, scale)
        below = panels[-1, 0]
        below.set(xlabel=f"time ({unit})")
        for axes in panels[:, 0]:
            axes.grid(visible=False)
            axes.set_xlim(0, end)
            axes.tick_params(labelbottom=axes is below)
        for axes in scales:
            axes.tick_params(labelsize=6)
    return figure


def _draw_scores(figure: Figure, heat: Axes, score_scale: Axes, timeline: Any, n_shown: int, scale: float) -> None:
    shown = np.argsort(-timeline.scores.max(axis=0), kind="stable")[:n_shown]
    # a step that is narrower than a dot of the picture must not vanish
    together = -(-len(timeline.times) // 1500)
    scores = np.pad(timeline.scores[:, shown], ((0, -len(timeline.times) % together), (0, 0)))
    scores = scores.reshape(-1, together, n_shown).max(axis=1)
    extent = (0, len(scores) * timeline.step * together / scale, n_shown, 0)
    drawn = heat.imshow(scores.T, cmap="Blues", aspect="auto", interpolation="nearest", extent=extent, vmin=0, vmax=1)
    heat.set_yticks(np.arange(n_shown) + 0.5, [shorten(timeline.labels[c]) for c in shown])
    heat.tick_params(axis="y", length=0)
    figure.colorbar(drawn, cax=score_scale, label="score", ticks=[0, 0.5, 1])
