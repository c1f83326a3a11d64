"""The picture of a recording: waveform, log-mel energies and timeline."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from psla_sb.dataio.audio import read_blocks
from psla_sb.dataio.windows import joined, windows
from psla_sb.lobes.features import KaldiFbank, frame_length_and_shift
from psla_sb.plots.page import BLUE, _shorten, page


def overview(blocks, sample_rate, seconds, n_columns=1500):
    """A recording of any length in few columns, for a picture.

    Arguments
    ---------
    blocks : iterable of torch.Tensor
        `[samples]` each, as `read_blocks` yields them.
    sample_rate : int
        In Hz.
    seconds : float
        About how long it is: what is divided into columns.
    n_columns : int
        How many columns, about.

    Returns
    -------
    (torch.Tensor, torch.Tensor, float)
        Lowest and highest sample `[columns, 2]`, mean log-mel energies `[columns, 64]`, and the seconds of a column.

    Example
    -------
    >>> extremes, energies, column = overview([torch.zeros(16000)], 16000, seconds=1.0, n_columns=50)
    >>> extremes.shape, energies.shape, column
    (torch.Size([50, 2]), torch.Size([50, 64]), 0.02)
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


def draw(path, timeline, sample_rate, picture, title):
    """Draws a recording's waveform, log-mel energies and timeline as a PNG file; see `psla_sb.plots.recording.recording`.

    Arguments
    ---------
    path : str or Path
        The recording.
    timeline : Timeline
        Of it.
    sample_rate : int
        Of the model, in Hz.
    picture : str or Path
        The PNG file to write.
    title : str
        What the recording is called.
    """
    seconds = float(timeline.times[-1] + timeline.step / 2)
    extremes, energies, column = overview(read_blocks(path, sample_rate), sample_rate, seconds)
    recording(extremes.numpy(), energies.numpy(), column, timeline, picture, title)


def recording(extremes, energies, column, timeline, path, title="Recording", n_rows=10):
    """Draws a recording's waveform, log-mel energies and the scores of its highest-scored classes, one above the other.

    Arguments
    ---------
    extremes : array_like
        `[columns, 2]`, the lowest and the highest sample of each column.
    energies : array_like
        `[columns, mels]`, log-mel energies.
    column : float
        Seconds of a column.
    timeline : psla_sb.inference.timeline.Timeline
        The scores of all classes; None draws none.
    path : str or Path
        The PNG file to write.
    title : str
        What the recording is called.
    n_rows : int
        How many classes are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        What was written.

    Example
    -------
    >>> from psla_sb.inference.timeline import Timeline
    >>> timeline = Timeline(np.array([0.16, 0.48]), np.array([[0.1, 0.2], [0.1, 0.9]]), ["Bell", "Rain"], ["/m/1", "/m/2"])
    >>> extremes, energies = np.random.rand(64, 2) - [1, 0], np.random.randn(64, 40)
    >>> figure = recording(extremes, energies, 0.01, timeline, getfixture("tmp_path") / "recording.png")
    >>> [label.get_text() for label in figure.axes[4].get_yticklabels()]
    ['Rain', 'Bell']
    """
    seconds = len(extremes) * column
    unit, scale = ("s", 1) if seconds < 300 else ("min", 60) if seconds < 3 * 3600 else ("h", 3600)
    n_shown = 0 if timeline is None else min(n_rows, len(timeline.labels))
    heights = [1, 1.3, *([] if timeline is None else [0.25 + 0.17 * n_shown])]
    with page(path, 3.0 + 0.17 * n_shown, layout="constrained") as figure:
        (wave, nothing), (image, energy_scale), *scored = figure.subplots(
            len(heights), 2, width_ratios=[50, 1], height_ratios=heights
        )
        nothing.axis("off")
        times = (np.arange(len(extremes)) + 0.5) * column / scale
        wave.fill_between(times, extremes[:, 0], extremes[:, 1], color=BLUE, linewidth=0.3)
        highest = 1.05 * np.abs(extremes).max(initial=1e-3)
        wave.set(ylim=(-highest, highest), ylabel="amplitude")
        wave.set_title(_shorten(title, 100))
        look = {"aspect": "auto", "interpolation": "nearest"}
        lowest, loudest = np.percentile(energies, [5, 99.8])
        drawn = image.imshow(
            np.transpose(energies),
            origin="lower",
            cmap="magma",
            extent=(0, seconds / scale, 0, energies.shape[1]),
            vmin=lowest,
            vmax=max(loudest, lowest + 1),
            **look,
        )
        image.set(ylabel="mel band", yticks=[0, energies.shape[1]])
        figure.colorbar(drawn, cax=energy_scale, label="log energy")
        for heat, score_scale in scored:
            _draw_scores(figure, heat, score_scale, timeline, n_shown, scale, look)
        below = scored[0][0] if scored else image
        below.set(xlabel=f"time ({unit})")
        for axes in (wave, image, below):
            axes.grid(visible=False)
            axes.set_xlim(0, seconds / scale)
            axes.tick_params(labelbottom=axes is below)
        for axes in (energy_scale, *(score_scale for _, score_scale in scored)):
            axes.tick_params(labelsize=6)
    return figure


def _draw_scores(figure, heat, score_scale, timeline, n_shown, scale, look):
    shown = np.argsort(-timeline.scores.max(axis=0), kind="stable")[:n_shown]
    # a step that is narrower than a dot of the picture must not vanish
    together = -(-len(timeline.times) // 1500)
    scores = np.pad(timeline.scores[:, shown], ((0, -len(timeline.times) % together), (0, 0)))
    scores = scores.reshape(-1, together, n_shown).max(axis=1)
    step = timeline.step * together
    drawn = heat.imshow(scores.T, cmap="Blues", extent=(0, len(scores) * step / scale, n_shown, 0), vmin=0, vmax=1, **look)
    heat.set_yticks(np.arange(n_shown) + 0.5, [_shorten(timeline.labels[c]) for c in shown])
    heat.tick_params(axis="y", length=0)
    figure.colorbar(drawn, cax=score_scale, label="score", ticks=[0, 0.5, 1])
