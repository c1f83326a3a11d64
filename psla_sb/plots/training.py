"""The pictures of a training: its curves, the average precision of each class, example clips."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from psla_sb.checkpoints.run_folder import prediction_path, read_results
from psla_sb.lobes import chain
from psla_sb.lobes.features import KaldiFbank, n_frames_of
from psla_sb.metrics import average_precision
from psla_sb.plots.page import GREY, ORANGE, PAGE_WIDTH, PALE_BLUE, PALE_GREY, ROW_HEIGHT, STYLE, _log_counts, _shorten, page

# With more classes than fit on a page, all are drawn but only this many of the best and of the worst have room for their names.
MAX_ROWS, N_EXTREMES = 60, 20
N_EXAMPLES, N_TAGS = 12, 5


def training_curves(epochs, path):
    """Draws losses, learning rate, mAP and ensemble mAP by epoch.

    Arguments
    ---------
    epochs : list of dict
        `epochs` of `results.json`; a value that is missing, None or NaN leaves a gap.
    path : str or Path
        The PNG file to write.

    Returns
    -------
    matplotlib.figure.Figure
        What was written.

    Example
    -------
    >>> epochs = [{"epoch": 1, "lr": 1e-3, "train_loss": 0.4, "valid_loss": 0.3, "mAP": 0.2, "ensemble_mAP": 0.2}]
    >>> figure = training_curves(epochs, getfixture("tmp_path") / "training_curves.png")
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['loss (binary cross-entropy)', 'mAP (mean average precision), validation', 'learning rate']
    """
    keys = ("epoch", "lr", "train_loss", "valid_loss", "mAP", "ensemble_mAP")
    values = {key: np.array([epoch.get(key) for epoch in epochs], dtype=float) for key in keys}
    number = values["epoch"]
    with page(path, 3.4, layout="constrained") as figure:
        panels = figure.subplot_mosaic([["loss", "mAP"], ["lr", "mAP"]], height_ratios=[2, 1])
        loss, precision, rate = panels["loss"], panels["mAP"], panels["lr"]
        loss.plot(number, values["train_loss"], "s--", label="training (augmented clips)")
        loss.plot(number, values["valid_loss"], "o-", label="validation")
        loss.set(ylabel="loss (binary cross-entropy)")
        loss.tick_params(labelbottom=False)
        precision.plot(number, values["mAP"], "s--", label="each epoch" + _best(number, values["mAP"]))
        precision.plot(
            number, values["ensemble_mAP"], "o-", label="ensemble of the epochs so far" + _best(number, values["ensemble_mAP"])
        )
        precision.set(xlabel="epoch", ylabel="mAP (mean average precision), validation")
        rate.step(number, values["lr"], color=GREY, where="mid", marker="." if len(epochs) == 1 else None)
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
            # above the panel, where no curve can run through it
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        figure.align_ylabels([loss, rate])
    return figure


def _best(epochs, values):
    if not np.isfinite(values).any():
        return ""
    best = np.nanargmax(values)
    return f", best {values[best]:.3f} (epoch {epochs[best]:.0f})"


def class_ap(names, ap, train_counts, path, title="Average precision per class"):
    """Draws every class's average precision as bars, best first, beside its number of training clips.

    Up to 60 classes all have their names; with more, an overview of all comes first and the 20 best and worst have names.

    Arguments
    ---------
    names : sequence of str
        The classes.
    ap : array_like
        `[classes]`, NaN for a class without a positive clip: it is left out, and their number is stated.
    train_counts : array_like
        `[classes]`, clips.
    path : str or Path
        The PNG file to write.
    title : str
        Whose scores they are.

    Returns
    -------
    matplotlib.figure.Figure
        What was written.

    Example
    -------
    >>> figure = class_ap(["Bell", "Rain"], [0.2, 0.9], [3, 1000], getfixture("tmp_path") / "class_ap.png")
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['Rain', 'Bell']
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
    bars_height = (len(shown) + 2 * many + 1) * ROW_HEIGHT + 0.5
    overview_height = 2.4 if many else 0
    with page(path, bars_height + overview_height + 0.2 * len(lines), layout="constrained") as figure:
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
        lower = figure
        if many:
            upper, lower = figure.subfigures(2, 1, height_ratios=[overview_height, bars_height])
            top, bottom = upper.subplots(2, 1, sharex=True, height_ratios=[3, 2])
            rank = np.arange(1, defined + 1)
            top.bar(rank, ap[order], width=1, linewidth=0)
            top.axhline(mean, color="black", linestyle="--", linewidth=0.8)
            top.set(ylabel="average precision", ylim=(0, 1))
            bottom.plot(rank, train_counts[order], ".", color=ORANGE, markersize=2.5)
            bottom.set(xlabel="classes from the best to the worst", ylabel="training clips", xlim=(0.5, defined + 0.5))
            _log_counts(bottom, "y", train_counts)
            upper.align_ylabels()
        bars, counts = lower.subplots(1, 2, sharey=True, width_ratios=[3, 1])
        bars.barh(rows, ap[shown], height=0.75)
        bars.axvline(mean, color="black", linestyle="--", linewidth=0.8)
        counts.plot(train_counts[shown], rows, "o", color=ORANGE)
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        for row, value, count in zip(rows, ap[shown], train_counts[shown], strict=True):
            beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 6, "bbox": clear}
            bars.annotate(f"{value:.2f}", (value, row), **beside)
            counts.annotate(f"{count:,}", (count, row), **beside)
        if many:
            between = f"{defined - len(shown)} classes between"
            bars.text(0.01, N_EXTREMES + 0.5, between, va="center", fontsize=7, color=GREY)
        bars.set_yticks(rows, [_shorten(names[c]) for c in shown])
        bars.set(xlabel="average precision (dashed: mean)", xlim=(0, 1.08), xticks=np.linspace(0, 1, 6))
        bars.set_ylim(max(rows, default=0) + 0.7, -0.7)
        counts.set(xlabel="training clips")
        _log_counts(counts, "x", train_counts, room=12)
        for axes in (bars, counts):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
    return figure


def example_clips(clips, path, title="Example clips"):
    """Draws a page of log-mel spectrograms, true labels above each, the best-scored tags below.

    A tag that is a true label has a tick, a bold name and a darker bar; the length of the bar is the score.

    Arguments
    ---------
    clips : list of dict
        At most 12, with `title`; `features`, an array `[frames, mels]` of log-mel energies; `shift`, seconds from a frame to the
        next; `labels`, the names of the true classes; `tags`, a list of (name, score in [0, 1]), best first.
    path : str or Path
        The PNG file to write.
    title : str
        Whose scores they are.

    Returns
    -------
    matplotlib.figure.Figure
        What was written.

    Raises
    ------
    ValueError
        There are no clips or more than 12.

    Example
    -------
    >>> clip = {"title": "a", "features": np.random.randn(98, 64), "shift": 0.01, "labels": ["Bell"], "tags": [("Bell", 0.9)]}
    >>> figure = example_clips([clip], getfixture("tmp_path") / "examples.png")
    >>> [text.get_text() for text in figure.axes[1].texts]
    ['✓ Bell', '0.90']
    """
    if not 1 <= len(clips) <= N_EXAMPLES:
        raise ValueError(f"a page has 1 to {N_EXAMPLES} clips, not {len(clips)}")
    energies = np.concatenate([np.ravel(clip["features"]) for clip in clips])
    # of all clips together, so that loud and quiet ones can be compared; not from the floor of digital silence
    lowest, highest = np.percentile(energies, [5, 99.8])
    # all in inches
    left, width, gap, top, foot = 0.48, 3.07, 0.45, 0.4, 0.52
    heading, spectrogram, ticks, tags, space = 0.26, 0.56, 0.16, 0.49, 0.06
    cell = heading + spectrogram + ticks + tags + space
    height = top + -(-len(clips) // 2) * cell + foot
    with page(path, height) as figure:

        def axes_at(x, y, w, h):
            return figure.add_axes((x / PAGE_WIDTH, y / height, w / PAGE_WIDTH, h / height))

        for number, clip in enumerate(clips):
            x, y = left + number % 2 * (width + gap), height - top - number // 2 * cell - heading - spectrogram
            frames, mels = np.shape(clip["features"])
            image = axes_at(x, y, width, spectrogram)
            drawn = image.imshow(
                np.transpose(clip["features"]),
                origin="lower",
                aspect="auto",
                cmap="magma",
                extent=(0, frames * clip["shift"], 0, mels),
                vmin=lowest,
                vmax=highest,
            )
            image.grid(visible=False)
            image.set_yticks([0, mels])
            image.set_ylabel("mel band", labelpad=1, fontsize=7)
            image.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            image.xaxis.set_major_formatter("{x:g} s")
            image.tick_params(labelsize=6, pad=2)
            caption = f"{_shorten(clip['title'], 30)}: {'; '.join(clip['labels']) or 'no label'}"
            lines = textwrap.wrap(caption, 64, max_lines=2, placeholder=" \N{HORIZONTAL ELLIPSIS}")
            _fit(image.set_title("\n".join(lines), fontsize=6.5, pad=3), width)
            bars = axes_at(x, y - ticks - tags, width, tags)
            bars.set(xlim=(0, 1), ylim=(N_TAGS - 0.5, -0.5))
            bars.axis("off")
            for row, (name, score) in enumerate(clip["tags"][:N_TAGS]):
                right = name in clip["labels"]
                look = {"va": "center", "fontsize": 6.5, "fontweight": "bold" if right else "normal"}
                bars.barh(row, score, height=0.86, color=PALE_BLUE if right else PALE_GREY)
                _fit(bars.text(0.01 if right else 0.045, row, "✓ " * right + _shorten(name), **look), 0.86 * width)
                bars.text(1, row, f"{score:.2f}", ha="right", **look)
        explanation = f"Above each clip: its name and true labels. Below: the {N_TAGS} best-scored classes (bar: score), ✓ if true."
        figure.text(left / PAGE_WIDTH, 1 - 0.06 / height, f"{title}\n{explanation}", va="top")
        scale = axes_at(left, 0.38, 2 * width + gap, 0.06)
        figure.colorbar(drawn, cax=scale, orientation="horizontal", extend="both")
        scale.tick_params(labelsize=6, pad=2)
        scale.set_xlabel("log-mel energy (natural logarithm)", labelpad=1, fontsize=7)
    return figure


def _fit(text, width):
    """Makes letters smaller, if a text is wider than so many inches."""
    excess = text.get_window_extent().width / (0.98 * width * text.figure.dpi)
    text.set_fontsize(text.get_fontsize() / max(1, excess))


def write_pictures(brain, dataset, name, vocabulary, train_labels):
    """Writes the pictures of a run into `plots/` of its output folder.

    Arguments
    ---------
    brain : TaggingBrain
        After `psla_sb.experiment.evaluation.evaluate`.
    dataset : TaggingDataset
        The set that was reported on.
    name : str
        What the names of its predictions begin with: "valid" or "test".
    vocabulary : Vocabulary
        The classes.
    train_labels : LabelSets
        Of the training set, as trained on.
    """
    folder, n_classes = Path(brain.hparams.output_folder), len(vocabulary)
    ensemble = np.load(prediction_path(folder, f"{name}_ensemble"))
    average = np.load(prediction_path(folder, f"{name}_weight_average"), mmap_mode="r")
    targets = dataset.data.label_sets(vocabulary).to_multi_hot(np.arange(len(ensemble)), n_classes)
    training_curves(read_results(folder)["epochs"], folder / "plots" / "training_curves.png")
    class_ap(
        vocabulary.names,
        average_precision(ensemble, targets),
        train_labels.counts(n_classes),
        folder / "plots" / "class_ap.png",
        "Average precision per class, of the mean of all epochs' scores (ensemble)",
    )
    front_end, rate, clips = brain.hparams.modules["compute_features"], brain.hparams.sample_rate, []
    shift = chain.frame_shift(front_end, rate)
    for row in np.linspace(0, len(average) - 1, min(N_EXAMPLES, len(average))).round().astype(int):
        with dataset.output_keys_as(["id", "sig", "error"]):
            item = dataset[int(row)]
        if item["error"] is not None:
            continue
        with torch.inference_mode():
            wavs = item["sig"][None].to(brain.device)
            features = chain.call(front_end, wavs, torch.ones(1, device=wavs.device))[0].cpu().numpy()
        if isinstance(front_end, KaldiFbank):
            # without the padding, whose 0.0 would be the loudest sound
            features = features[: n_frames_of(len(item["sig"]), rate)]
        best = np.argsort(-average[row], kind="stable")[:N_TAGS]
        clips.append(
            {
                "title": item["id"],
                "features": features,
                "shift": shift / rate,
                "labels": [vocabulary.names[c] for c in np.flatnonzero(targets[row])],
                "tags": [(vocabulary.names[c], float(average[row, c])) for c in best],
            }
        )
    title = "Example clips, tagged with the average of the last epochs' weights"
    example_clips(clips, folder / "plots" / "examples.png", title)
