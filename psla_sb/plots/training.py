"""The pictures of a training: its curves, the average precision of each class, example clips."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from psla_sb.checkpoints.run_folder import prediction_path, read_results
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes import chain
from psla_sb.lobes.features import LogMel
from psla_sb.metrics import average_precision
from psla_sb.plots import page as common
from psla_sb.plots.page import GREY, ORANGE, PAGE_WIDTH, ROW_HEIGHT, legend_above, log_counts, page, shorten

# With more classes than fit on a page, all are drawn but only this many of the best and of the worst have room for their names.
MAX_ROWS, N_EXTREMES = 60, 20
N_EXAMPLES, N_TAGS = 12, 5


def training_curves(epochs: Sequence[Mapping[str, Any]], path: str | Path) -> Figure:
    """Draws losses, learning rate, mAP and ensemble mAP by epoch.

    `epochs` are those of `results.json`; a value that is missing, None or NaN leaves a gap.
    """
    keys = ("epoch", "lr", "train_loss", "valid_loss", "mAP", "ensemble_mAP")
    number, rates, train, valid, own, ensemble = np.array([[epoch.get(key) for epoch in epochs] for key in keys], dtype=float)
    with page(path, 3.4, layout="constrained") as figure:
        panels = figure.subplot_mosaic([["loss", "mAP"], ["lr", "mAP"]], height_ratios=[2, 1])
        loss, precision, rate = panels["loss"], panels["mAP"], panels["lr"]
        loss.plot(number, train, "s--", label="training (augmented clips)")
        loss.plot(number, valid, "o-", label="validation")
        loss.set(ylabel="loss (binary cross-entropy)")
        loss.tick_params(labelbottom=False)
        precision.plot(number, own, "s--", label="each epoch" + _best(number, own))
        precision.plot(number, ensemble, "o-", label="ensemble of the epochs so far" + _best(number, ensemble))
        precision.set(xlabel="epoch", ylabel="mAP (mean average precision), validation")
        rate.step(number, rates, color=GREY, where="mid", marker="." if len(epochs) == 1 else None)
        rate.set(xlabel="epoch", ylabel="learning rate")
        rate.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        rate.yaxis.set_major_formatter("{x:g}")
        rate.margins(y=0.15)
        for axes in panels.values():
            axes.set_xlim(min(number, default=1) - 0.5, max(number, default=1) + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for axes in (precision, rate):
            axes.set_ylim(bottom=0)
        for axes in (loss, precision):
            legend_above(axes)
        figure.align_ylabels([loss, rate])
    return figure


def _best(epochs: np.ndarray, values: np.ndarray) -> str:
    if not np.isfinite(values).any():
        return ""
    best = np.nanargmax(values)
    return f", best {values[best]:.3f} (epoch {epochs[best]:.0f})"


def class_ap(
    names: Sequence[str], ap: ArrayLike, train_counts: ArrayLike, path: str | Path, title: str = "Average precision per class"
) -> Figure:
    """Draws every class's average precision as bars, best first, beside its number of training clips; both are `[classes]`.

    A class whose value is NaN, for want of a positive clip, is left out, and their number is stated. Up to 60 classes all have
    their names; with more, an overview of all comes first and the 20 best and worst have names.
    """
    ap, train_counts = np.asarray(ap, dtype=float), np.asarray(train_counts)
    defined = int(np.isfinite(ap).sum())
    order = np.argsort(-ap, kind="stable")[:defined]
    many = defined > MAX_ROWS
    shown = np.concatenate([order[:N_EXTREMES], order[-N_EXTREMES:]]) if many else order
    rows = np.arange(len(shown)) + many * 2 * (np.arange(len(shown)) >= N_EXTREMES)
    mean = ap[order].mean() if defined else np.nan
    lines = [title]
    if defined:
        lines.append(f"mAP {mean:.3f}, the mean over {defined} class{'es' * (defined != 1)}")
    if defined < len(ap):
        lines.append(f"{len(ap) - defined} of {len(ap)} classes have no positive clip here, so no AP, and are left out")
    heights = [2.4 if many else 0, (len(shown) + 2 * many + 1) * ROW_HEIGHT + 0.5]
    with page(path, sum(heights) + 0.2 * len(lines), lines, layout="constrained") as figure:
        lower: Any = figure
        if many:
            (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
            top, bottom = upper.subplots(2, 1, sharex=True, height_ratios=[3, 2])
            rank = np.arange(1, defined + 1)
            top.bar(rank, ap[order], width=1, linewidth=0)
            top.axhline(mean, color="black", linestyle="--", linewidth=0.8)
            top.set(ylabel="average precision", ylim=(0, 1))
            bottom.plot(rank, train_counts[order], ".", color=ORANGE, markersize=2.5)
            bottom.set(xlabel="classes from the best to the worst", ylabel="training clips", xlim=(0.5, defined + 0.5))
            log_counts(bottom, "y", train_counts)
            upper.align_ylabels()
        bars, counts = lower.subplots(1, 2, sharey=True, width_ratios=[3, 1])
        bars.barh(rows, ap[shown], height=0.75)
        bars.axvline(mean, color="black", linestyle="--", linewidth=0.8)
        counts.plot(train_counts[shown], rows, "o", color=ORANGE)
        for row, value, count in zip(rows, ap[shown], train_counts[shown], strict=True):
            bars.annotate(f"{value:.2f}", (value, row), **common.BESIDE)
            counts.annotate(f"{count:,}", (count, row), **common.BESIDE)
        if many:
            bars.text(0.01, N_EXTREMES + 0.5, f"{defined - len(shown)} classes between", va="center", fontsize=7, color=GREY)
        common.name_rows((bars, counts), rows, [names[c] for c in shown])
        bars.set(xlabel="average precision (dashed: mean)", xlim=(0, 1.08), xticks=np.linspace(0, 1, 6))
        counts.set(xlabel="training clips")
        log_counts(counts, "x", train_counts, room=12)
    return figure


def example_clips(clips: Sequence[Mapping[str, Any]], path: str | Path, title: str = "Example clips") -> Figure:
    """Draws a page of log-mel spectrograms, true labels above each, the best-scored tags below.

    Each of the 1 to 12 clips has `title`; `features`, log-mel energies `[frames, mels]`; `shift`, seconds from a frame to the next;
    `labels`, the names of the true classes; `tags`, pairs (name, score in [0, 1]), best first. A tag that is a true label has a
    tick, a bold name and a darker bar; the length of the bar is the score.
    """
    if not 1 <= len(clips) <= N_EXAMPLES:
        raise ValueError(f"a page has 1 to {N_EXAMPLES} clips, not {len(clips)}")
    energies = np.concatenate([np.ravel(clip["features"]) for clip in clips])
    # of all clips together, so that loud and quiet ones can be compared; not from the floor of digital silence
    lowest, highest = np.percentile(energies, [5, 99.8])
    # all in inches
    left, width, gap, top, foot = 0.48, 3.07, 0.45, 0.4, 0.52
    heading, picture, ticks, tags, space = 0.26, 0.56, 0.16, 0.49, 0.06
    cell = heading + picture + ticks + tags + space
    height = top + -(-len(clips) // 2) * cell + foot
    with page(path, height) as figure:

        def axes_at(x, y, w, h):
            return figure.add_axes((x / PAGE_WIDTH, y / height, w / PAGE_WIDTH, h / height))

        for number, clip in enumerate(clips):
            x, y = left + number % 2 * (width + gap), height - top - number // 2 * cell - heading - picture
            image, features = axes_at(x, y, width, picture), np.asarray(clip["features"])
            drawn = common.spectrogram(image, features, len(features) * clip["shift"], lowest, highest)
            image.set_ylabel("mel band", labelpad=1, fontsize=7)
            image.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            image.xaxis.set_major_formatter("{x:g} s")
            image.tick_params(labelsize=6, pad=2)
            caption = f"{shorten(clip['title'], 30)}: {'; '.join(clip['labels']) or 'no label'}"
            lines = textwrap.wrap(caption, 64, max_lines=2, placeholder=" \N{HORIZONTAL ELLIPSIS}")
            _fit(image.set_title("\n".join(lines), fontsize=6.5, pad=3), width)
            bars = axes_at(x, y - ticks - tags, width, tags)
            bars.set(xlim=(0, 1), ylim=(N_TAGS - 0.5, -0.5))
            bars.axis("off")
            for row, (name, score) in enumerate(clip["tags"][:N_TAGS]):
                right = name in clip["labels"]
                look = {"va": "center", "fontsize": 6.5, "fontweight": "bold" if right else "normal"}
                bars.barh(row, score, height=0.86, color=common.PALE_BLUE if right else common.PALE_GREY)
                _fit(bars.text(0.01 if right else 0.045, row, "✓ " * right + shorten(name), **look), 0.86 * width)
                bars.text(1, row, f"{score:.2f}", ha="right", **look)
        explanation = f"Above each clip: its name and true labels. Below: the {N_TAGS} best-scored classes (bar: score), ✓ if true."
        figure.text(left / PAGE_WIDTH, 1 - 0.06 / height, f"{title}\n{explanation}", va="top")
        scale = axes_at(left, 0.38, 2 * width + gap, 0.06)
        figure.colorbar(drawn, cax=scale, orientation="horizontal", extend="both")
        scale.tick_params(labelsize=6, pad=2)
        scale.set_xlabel("log-mel energy (natural logarithm)", labelpad=1, fontsize=7)
    return figure


def _fit(text: Text, width: float) -> None:
    """Makes letters smaller, if a text is wider than so many inches."""
    excess = text.get_window_extent().width / (0.98 * width * common.STYLE["figure.dpi"])
    text.set_fontsize(text.get_fontsize() / max(1, excess))


def write_pictures(brain: Any, dataset: Any, name: str, vocabulary: Vocabulary, train_labels: LabelSets) -> None:
    """Writes the pictures of a run into `plots/` of its output folder, once `psla_sb.experiment.evaluation` has evaluated it.

    `brain` is a `TaggingBrain`, `dataset` the `TaggingDataset` that was reported on as `name`, "valid" or "test", `train_labels`
    what was trained on.
    """
    folder, n_classes = Path(brain.hparams.output_folder), len(vocabulary)
    plots = folder / "plots"
    ensemble = np.load(prediction_path(folder, f"{name}_ensemble"))
    average = np.load(prediction_path(folder, f"{name}_weight_average"), mmap_mode="r")
    targets = dataset.data.targets(vocabulary)[: len(ensemble)]
    training_curves(read_results(folder)["epochs"], plots / "training_curves.png")
    title = "Average precision per class, of the mean of all epochs' scores (ensemble)"
    ap = average_precision(ensemble, targets)
    class_ap(vocabulary.names, ap, train_labels.counts(n_classes), plots / "class_ap.png", title)
    front_end, rate, clips = brain.hparams.modules["compute_features"], brain.hparams.sample_rate, []
    shift = chain.frame_shift(front_end, rate) / rate
    for row in np.linspace(0, len(average) - 1, min(N_EXAMPLES, len(average))).round().astype(int):
        with dataset.output_keys_as(["id", "sig", "error"]):
            item = dataset[int(row)]
        if item["error"] is not None:
            continue
        with torch.inference_mode():
            wavs = item["sig"][None].to(brain.device)
            features = chain.call(front_end, wavs, torch.ones(1, device=wavs.device))[0].cpu().numpy()
        if isinstance(front_end, LogMel):
            # without the padding, whose 0.0 would be the loudest sound
            features = features[: front_end.frames_of(len(item["sig"]))]
        labels = [vocabulary.names[c] for c in np.flatnonzero(targets[row])]
        tags = [(vocabulary.names[c], float(average[row, c])) for c in np.argsort(-average[row], kind="stable")[:N_TAGS]]
        clips.append({"title": item["id"], "features": features, "shift": shift, "labels": labels, "tags": tags})
    example_clips(clips, plots / "examples.png", "Example clips, tagged with averaged weights")
