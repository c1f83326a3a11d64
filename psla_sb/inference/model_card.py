"""A training run -> a folder to hand on: the tagger, its classes, a model card with figures and settings, ONNX if wanted."""

from pathlib import Path

import ruamel.yaml

from psla_sb.checkpoints.run_folder import read_results
from psla_sb.checkpoints.sources import Snapshot, run_weights
from psla_sb.files import atomic_write
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
psla_sb, a toolkit made of [PSLA](https://arxiv.org/abs/2102.01243); of the run's weights these are: {weights}.

## Use

    psla-tag --model {folder} sound.wav

```python
from psla_sb.inference.tagger import AudioTagger

tagger = AudioTagger.from_folder("{folder}")
print(tagger.tag_file("sound.wav"))
```

SpeechBrain's `EncoderClassifier.from_hparams(source="{folder}")` loads it too. Sounds are taken at {sample_rate} Hz, in mono.
{onnx}
## Figures

{figures}

## Settings of the training

{settings}
"""
ONNX = """
`model.onnx` takes `waveform`, float32 `[batch, samples]` at {sample_rate} Hz, and gives `probabilities`
`[batch, classes]`. On noise of four lengths it was within {worst:.0e} of PyTorch.
"""
WEIGHTS = {"average": "weight_average", "best": "best", "last": "last"}


def export_run(run, folder, weights="average", onnx=False, trust=()):
    """Writes a run's tagger as a folder.

    Beside the tagger itself: `class_labels_indices.csv`, the model card `README.md` and, if wanted,
    `model.onnx`.

    Arguments
    ---------
    run : str or Path
        The run's `output_folder`.
    folder : str or Path
        Where to write; made if there is none.
    weights : str or int
        "average", "best", "last" or the number of an epoch.
    onnx : bool
        Whether to write `model.onnx` too.
    trust : sequence of str
        Modules whose classes the run's model may be made of.

    Raises
    ------
    InputError
        It is not the folder of a run, these weights are not there, or ONNX's probabilities are others.
    """
    run, folder = Path(run), Path(folder)
    source = Snapshot(run_weights(run, weights), trust)
    tagger, vocabulary = AudioTagger.from_source(source, run_opts={"device": "cpu"}), source.vocabulary
    source.export(folder)
    vocabulary.to_csv(folder / "class_labels_indices.csv")
    note = ""
    if onnx:
        from psla_sb.inference.onnx_export import export_onnx

        worst = export_onnx(tagger, folder / "model.onnx")
        note = ONNX.format(sample_rate=tagger.hparams.sample_rate, worst=max(worst, 1e-7))
    results = read_results(run)
    with open(run / "hyperparams.yaml", encoding="utf-8") as stream:
        settings = ruamel.yaml.YAML().load(stream)
    card = CARD.format(
        n_classes=len(vocabulary),
        weights=f"epoch {weights}" if str(weights).isdecimal() else f"`{weights}`",
        folder=folder.name,
        sample_rate=tagger.hparams.sample_rate,
        onnx=note,
        figures=figures_table(results, weights),
        settings=settings_table(settings),
    )
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def figures_table(results, weights):
    """The figures of these weights as Markdown.

    Arguments
    ---------
    results : dict
        `results.json` of the run.
    weights : str or int
        As in `export_run`.

    Example
    -------
    >>> print(figures_table({"epochs": [{"epoch": 1, "mAP": 0.25, "mAUC": 0.5, "d_prime": 0.0}]}, 1))
    | figure | epoch 1, on the validation set |
    |---|---|
    | mAP | 0.2500 |
    | mAUC | 0.5000 |
    | d_prime | 0.0000 |
    """
    if str(weights).isdecimal():
        heading = f"epoch {weights}, on the validation set"
        figures = next(epoch for epoch in results["epochs"] if epoch["epoch"] == int(weights))
    else:
        figures = results.get("evaluation", {}).get(WEIGHTS[weights])
        if figures is None:
            return "The run has not been evaluated."
        epochs = figures["epochs"]
        heading = f"epoch {epochs[0]}" if len(epochs) == 1 else f"average of the weights of epochs {epochs[0]} to {epochs[-1]}"
    rows = [f"| {name} | {figures[name]:.4f} |" for name in FIGURES]
    return "\n".join([f"| figure | {heading} |", "|---|---|", *rows])


def settings_table(settings):
    """The plain values of a run's hyperparameters as Markdown, less those that are paths of the machine it ran on.

    Example
    -------
    >>> print(settings_table({"batch_size": 8, "data_folder": "/data", "modules": {}}))
    | key | value |
    |---|---|
    | batch_size | 8 |
    """
    plain = {
        key: value
        for key, value in settings.items()
        if (value is None or isinstance(value, str | int | float)) and not key.startswith("_") and "/" not in str(value)
    }
    return "\n".join(["| key | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in plain.items())])
