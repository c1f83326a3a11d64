"""What a run leaves in its output folder, under which names, and what its `results.json` says."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from psla_sb.errors import InputError
from psla_sb.files import atomic_write, write_json

# The run's settings, resolved, as SpeechBrain writes them; and its classes: with both a snapshot can be loaded.
HPARAMS, CLASSES = "hyperparams.yaml", "class_labels_indices.csv"
# What the run is, see `psla_sb.experiment.identity`.
IDENTITY = "identity.json"
# The probabilities and thresholds of a run's weight average, or of a tagger's folder, see `psla_sb.labels.calibration`.
CALIBRATION = "calibration.json"


def snapshot_path(folder: str | Path, epoch: int) -> Path:
    """Where the weights of an epoch are.

    Example
    -------
    >>> str(snapshot_path("results", 3))
    'results/snapshots/epoch_03.safetensors'
    """
    return Path(folder) / "snapshots" / f"epoch_{epoch:02d}.safetensors"


def average_path(folder: str | Path) -> Path:
    """Where the average of the weights is: the one of them that is the better on the validation set."""
    return Path(folder) / "snapshots" / "average.safetensors"


def swa_path(folder: str | Path) -> Path:
    """Where the mean of some epochs' weights is, in a run that has a moving average as well."""
    return Path(folder) / "snapshots" / "swa.safetensors"


def ema_path(folder: str | Path) -> Path:
    """Where the exponential moving average of the weights is, of the last epoch."""
    return Path(folder) / "snapshots" / "ema.safetensors"


def prediction_path(folder: str | Path, name: str) -> Path:
    """Where the scores of a set are, as a float32 array `[clips, classes]` in the annotation's order.

    Example
    -------
    >>> str(prediction_path("results", "valid_epoch_03"))
    'results/predictions/valid_epoch_03.npy'
    """
    return Path(folder) / "predictions" / f"{name}.npy"


def clips_path(folder: str | Path, name: str) -> Path:
    """Where it says of which clips the scores of a set ("valid" or "test") are."""
    return Path(folder) / "predictions" / f"{name}_clips.csv"


def write_scores(folder: str | Path, name: str, scores: np.ndarray) -> None:
    """Writes the scores of a set, whole or not at all."""
    with atomic_write(prediction_path(folder, name)) as temporary:
        np.save(temporary, scores.astype(np.float32, copy=False))


def sounds_path(folder: str | Path, epoch: int) -> Path:
    """Where it says of which sounds the validation scores of an epoch are."""
    return prediction_path(folder, f"valid_epoch_{epoch:02d}").with_suffix(".json")


def read_results(folder: str | Path) -> dict[str, Any]:
    """What `results.json` of a run says so far, NaN where it has null; nothing if there is none.

    Example
    -------
    >>> read_results(getfixture("tmp_path"))
    {}
    """
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); put back the one that the run wrote") from None
    if not isinstance(results, dict) or not isinstance(results.get("epochs", []), list):
        raise InputError(f"{path}: not the figures of a run; put back the file that the run wrote")
    return _nan_of_null(results)


def _nan_of_null(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _nan_of_null(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_nan_of_null(value) for value in content]
    return math.nan if content is None else content


def write_results(folder: str | Path, results: dict[str, Any]) -> None:
    """Writes `results.json` of a run, whole or not at all."""
    write_json(Path(folder) / "results.json", results)


def trained_epochs(folder: str | Path) -> list[dict[str, Any]]:
    """The figures of the epochs that a run has trained; an `InputError` if there are none."""
    epochs = read_results(folder).get("epochs")
    if not epochs:
        raise InputError(f"{folder}: not the output folder of a run that has trained an epoch, and not the folder of a tagger")
    return epochs


def best_epoch(epochs: list[dict[str, Any]]) -> int:
    """The number of the epoch with the highest mAP on the validation set.

    Example
    -------
    >>> best_epoch([{"epoch": 1, "mAP": 0.2}, {"epoch": 2, "mAP": 0.1}])
    1
    """
    return max(epochs, key=lambda epoch: -math.inf if math.isnan(epoch["mAP"]) else epoch["mAP"])["epoch"]
