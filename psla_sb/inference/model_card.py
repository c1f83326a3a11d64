"""A trained model -> a folder to hand on: the tagger, its classes, a model card with figures and settings, ONNX if wanted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.run_folder import read_results
from psla_sb.checkpoints.sources import open_source
from psla_sb.checkpoints.tagger_folder import trust_options
from psla_sb.files import write_file
from psla_sb.inference.tagger import AudioTagger
from psla_sb.metrics import FIGURES

CARD = """---
library_name: speechbrain
pipeline_tag: audio-classification
tags:
- audio-tagging
- speechbrain
- psla
---
# Audio tagger, {n_classes} classes

Says what can be heard in a sound: one score in [0, 1] for each class of `class_labels_indices.csv`. Trained with
psla_sb, a toolkit made of [PSLA](https://arxiv.org/abs/2102.01243); of the weights these are: {weights}.

## Use

    psla-tag --model {folder}{trust} sound.wav

```python
from psla_sb.inference import AudioTagger

tagger = AudioTagger.from_folder("{folder}")
print(tagger.tag_file("sound.wav"))
```

SpeechBrain's `EncoderClassifier.from_hparams(source="{folder}")` loads it too. Sounds are taken at {sample_rate} Hz, in mono.
A sound of up to {window:.4g} s is one clip. A longer one is heard whole, in windows of that length that overlap by half, and a
class's score is the highest of the windows'.
{decisions}{onnx}
## Figures

{figures}

## Settings of the training

{settings}
"""
DECISIONS = """
`calibration.json` says for each class from which score on it is taken for heard, by {criterion} on {n_clips} clips that were held
out, and how a score becomes a probability; `psla-tag` and `tag_file` say both beside each score.{never}
"""
ONNX = """
`model.onnx` takes `waveform`, float32 `[batch, samples]` at {sample_rate} Hz, and gives `probabilities`
`[batch, classes]`; of a longer sound it takes one window. On noise of four lengths it was within {worst:.0e} of PyTorch. Its
metadata have the labels{more}.
"""
WEIGHTS = {"average": "weight_average", "best": "best", "last": "last"}


def export_model(
    model: str | Path,
    folder: str | Path,
    weights: str | int = "average",
    onnx: bool = False,
    labels: str | Path | None = None,
    trust: Sequence[str] = (),
) -> None:
    """Writes a trained model as a folder, with `class_labels_indices.csv`, the model card `README.md` and, if wanted, `model.onnx`.

    The arguments are those of `open_source`; of a run's folder, `weights` are "average", "best", "last" or the number of an epoch.
    """
    model, folder = Path(model), Path(folder)
    source = open_source(model, labels, trust, weights)
    tagger, vocabulary = AudioTagger.from_source(source, run_opts={"device": "cpu"}), source.vocabulary
    source.export(folder)
    vocabulary.to_csv(folder / "class_labels_indices.csv")
    rate, note = tagger.hparams.sample_rate, ""
    if onnx:
        from psla_sb.inference.onnx_export import export_onnx

        more = ", thresholds and calibration" if tagger.calibration else ""
        note = ONNX.format(sample_rate=rate, worst=max(export_onnx(tagger, folder / "model.onnx"), 1e-7), more=more)
    name, figures, settings = f"`{model.name}`", "They are not known here.", "They are not known here."
    if (model / "results.json").is_file():
        name = f"epoch {weights}" if str(weights).isdecimal() else f"`{weights}`"
        figures = figures_table(read_results(model), weights)
    if source.hparams_file.is_file():
        settings = settings_table(read_yaml(source.hparams_file))
    card = CARD.format(
        n_classes=len(vocabulary),
        weights=name,
        folder=folder.name,
        trust=trust_options(folder),
        sample_rate=rate,
        window=tagger.window / rate,
        decisions=_decisions(tagger),
        onnx=note,
        figures=figures,
        settings=settings,
    )
    write_file(folder / "README.md", card)


def _decisions(tagger: AudioTagger) -> str:
    """What the card says of thresholds, of a tagger that has some."""
    if (calibration := tagger.calibration) is None:
        return ""
    never = int(np.isinf(calibration.threshold).sum())
    said = (
        f" {never} of the {len(calibration.threshold)} classes are never taken for heard: no threshold would do." if never else ""
    )
    return DECISIONS.format(criterion=calibration.criterion, n_clips=calibration.n_clips, never=said)


def figures_table(results: Mapping[str, Any], weights: str | int) -> str:
    """Writes the figures of these weights, from a run's `results.json`, as Markdown."""
    if str(weights).isdecimal():
        heading = f"epoch {weights}, on the validation set"
        figures = next(epoch for epoch in results["epochs"] if epoch["epoch"] == int(weights))
    else:
        figures = results.get("evaluation", {}).get(WEIGHTS[str(weights)])
        if figures is None:
            return "The run has not been evaluated."
        epochs = figures["epochs"]
        heading = f"epoch {epochs[0]}" if len(epochs) == 1 else f"average of the weights of epochs {epochs[0]} to {epochs[-1]}"
    rows = [f"| {name} | {figures[name]:.4f} |" for name in FIGURES]
    return "\n".join([f"| figure | {heading} |", "|---|---|", *rows])


def settings_table(settings: Mapping[str, Any]) -> str:
    """Writes the plain values of a run's hyperparameters as Markdown, less those that are paths of the machine it ran on.

    Example
    -------
    >>> print(settings_table({"batch_size": 8, "data_folder": "/data", "modules": {}}))
    | key | value |
    |---|---|
    | batch_size | 8 |
    """
    rows = [
        f"| {key} | {value} |"
        for key, value in settings.items()
        if isinstance(value, str | int | float | None) and not key.startswith("_") and "/" not in str(value)
    ]
    return "\n".join(["| key | value |", "|---|---|", *rows])
