"""A trained model -> a folder to hand on: the tagger, its classes, a model card with figures and settings, ONNX if wanted."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.hub import PREFIX, Address, push
from psla_sb.checkpoints.run_folder import read_results
from psla_sb.checkpoints.sources import open_source
from psla_sb.checkpoints.tagger_folder import trust_options
from psla_sb.dataio.manifest import Manifest
from psla_sb.files import write_file
from psla_sb.inference.tagger import AudioTagger
from psla_sb.metrics import FIGURES

CARD = """---
{metadata}
---
# Audio tagger, {n_classes} classes

Says what can be heard in a sound: one score in [0, 1] for each class of `class_labels_indices.csv`. Trained with
psla_sb, a toolkit made of [PSLA](https://arxiv.org/abs/2102.01243); of the weights these are: {weights}.

## Use

    psla-tag --model {address}{trust} sound.wav

```python
from psla_sb.inference import AudioTagger

tagger = AudioTagger.{loaded}
print(tagger.tag_file("sound.wav"))
```

SpeechBrain's `EncoderClassifier.from_hparams(source="{source}")` loads it too. Sounds are taken at {sample_rate} Hz, in mono.
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
INT8 = """
`model_int8.onnx` is the same with the encoder in 8 bits. On {clips} clips that were not used to make it, {mAP}its scores differ
by {mean:.4f} on average and by {most:.2f} at most.
"""
WEIGHTS = {"average": "weight_average", "best": "best", "last": "last"}


def export_model(
    model: str | Path,
    folder: str | Path,
    weights: str | int = "average",
    onnx: bool = False,
    labels: str | Path | None = None,
    trust: Sequence[str] = (),
    licence: str | None = None,
    datasets: Sequence[str] = (),
    repository: str | None = None,
    int8: Manifest | None = None,
) -> str | None:
    """Writes a trained model as a folder, with `class_labels_indices.csv`, the model card `README.md` and, if wanted, `model.onnx`.

    The arguments are those of `open_source`; of a run's folder, `weights` are "average", "best", "last" or the number of an epoch.

    Arguments
    ---------
    licence, datasets
        For the card, as Hugging Face calls them.
    repository
        What the folder will be on Hugging Face, such as `owner/name`; its weights are then one file, `model.safetensors`.
    int8
        Clips with labels, by which `model_int8.onnx` is written as well. What it loses is returned, and stands in the card.
    """
    folder = Path(folder)
    source = open_source(model, labels, trust, weights)
    tagger, vocabulary = AudioTagger.from_source(source, run_opts={"device": "cpu"}), source.vocabulary
    source.export(folder, one_file=repository is not None)
    vocabulary.to_csv(folder / "class_labels_indices.csv")
    rate, note, loss = tagger.hparams.sample_rate, "", None
    if onnx or int8 is not None:
        from psla_sb.inference.onnx_export import export_onnx

        more = ", thresholds and calibration" if tagger.calibration else ""
        note = ONNX.format(sample_rate=rate, worst=max(export_onnx(tagger, folder / "model.onnx"), 1e-7), more=more)
    if int8 is not None:
        from psla_sb.inference.onnx_int8 import quantize_onnx

        lost = quantize_onnx(folder / "model.onnx", folder / "model_int8.onnx", int8, vocabulary, rate, tagger.window)
        kept = "" if lost["mAP"] is None else f"its mAP is {lost['mAP_int8']:.4f} in place of {lost['mAP']:.4f}, and "
        loss = INT8.format(clips=lost["clips"], mAP=kept, **lost["changed"])
    name, results, figures, settings = f"`{Path(model).name}`", {}, "They are not known here.", "They are not known here."
    if (Path(model) / "results.json").is_file():
        name, results = f"epoch {weights}" if str(weights).isdecimal() else f"`{weights}`", read_results(model)
        figures = figures_table(results, weights)
    if source.hparams_file.is_file():
        settings = settings_table(read_yaml(source.hparams_file))
    where = {"address": folder.name, "source": folder.name, "loaded": f'from_folder("{folder.name}")'}
    if repository is not None:
        where = {"address": f"{PREFIX}{repository}", "source": repository, "loaded": f'from_any("{PREFIX}{repository}")'}
    card = CARD.format(
        metadata=metadata(repository or folder.name, figures_of(results, weights), licence, datasets),
        n_classes=len(vocabulary),
        weights=name,
        **where,
        trust=trust_options(folder),
        sample_rate=rate,
        window=tagger.window / rate,
        decisions=_decisions(tagger),
        onnx=note + (loss or ""),
        figures=figures,
        settings=settings,
    )
    write_file(folder / "README.md", card)
    return loss and loss.strip()


def push_model(
    model: str | Path, repository: str, folder: str | Path | None = None, private: bool = False, **options: Any
) -> tuple[Address, str | None]:
    """Writes a trained model as `export_model` does, whose options these are, and uploads it.

    Returns the address of the commit, and what `export_model` does.

    Arguments
    ---------
    repository, private
        See `psla_sb.checkpoints.hub.push`.
    folder
        What is uploaded stays there; None for nowhere.
    """
    repository = repository.removeprefix(PREFIX)
    with tempfile.TemporaryDirectory() as temporary:
        loss = export_model(model, folder or temporary, repository=repository, **options)
        return push(folder or temporary, repository, private), loss


def metadata(name: str, figures: Mapping[str, Any] | None, licence: str | None, datasets: Sequence[str]) -> str:
    """Writes the head of a model card, YAML that Hugging Face reads.

    Example
    -------
    >>> print(metadata("owner/name", None, "cc-by-4.0", []))
    library_name: speechbrain
    license: cc-by-4.0
    pipeline_tag: audio-classification
    tags:
    - audio-tagging
    - speechbrain
    - psla
    """
    known: dict[str, Any] = {}
    if figures is not None:
        # model-index wants a data set; which one it was nobody has said
        of = datasets[0] if datasets else "evaluation set of the run"
        rows = [EvalResult("audio-classification", of, of, metric, round(figures[metric], 4)) for metric in FIGURES]
        known = {
            "metrics": list(FIGURES),
            "model_name": name,
            "eval_results": [row for row in rows if not math.isnan(row.metric_value)],
        }
    data = ModelCardData(
        license=licence,
        library_name="speechbrain",
        tags=["audio-tagging", "speechbrain", "psla"],
        datasets=list(datasets) or None,
        pipeline_tag="audio-classification",
        **known,
    )
    return data.to_yaml().strip()


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
    figures = figures_of(results, weights)
    if figures is None:
        return "The run has not been evaluated."
    if str(weights).isdecimal():
        heading = f"epoch {weights}, on the validation set"
    else:
        epochs = figures["epochs"]
        heading = f"epoch {epochs[0]}" if len(epochs) == 1 else f"average of the weights of epochs {epochs[0]} to {epochs[-1]}"
    rows = [f"| {name} | {figures[name]:.4f} |" for name in FIGURES]
    return "\n".join([f"| figure | {heading} |", "|---|---|", *rows])


def figures_of(results: Mapping[str, Any], weights: str | int) -> Mapping[str, Any] | None:
    """The figures of these weights in a run's `results.json`; None if there are none."""
    if str(weights).isdecimal():
        return next((epoch for epoch in results.get("epochs", []) if epoch["epoch"] == int(weights)), None)
    return results.get("evaluation", {}).get(WEIGHTS[str(weights)])


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
