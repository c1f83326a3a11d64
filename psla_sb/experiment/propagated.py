"""A run's second evaluation: the same scores, against labels that are propagated to parents (`propagated_labels`)."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from psla_sb.checkpoints.run_folder import prediction_path
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.labels.enhancement import propagate_to_parents, propagation_matrix
from psla_sb.labels.ontology import Ontology
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import summarize

KEY = "evaluation_propagated"


def check_ontology(file: Any, vocabulary: Vocabulary) -> None:
    """Refuses, before the training, what `propagated_labels` names if it is no ontology by which a parent follows from a class."""
    if file is None:
        return
    if not isinstance(file, str | Path):
        raise InputError(f"propagated_labels must be null or the path of an ontology.json, not {file!r}")
    try:
        propagation_matrix(vocabulary, Ontology.from_json(file))
    except InputError as error:
        raise InputError(
            f"propagated_labels: {error}" if str(file) in str(error) else f"propagated_labels: {file}: {error}"
        ) from None


def add_evaluation(
    results: dict[str, Any], folder: Path, name: str, manifest: Manifest, vocabulary: Vocabulary, file: str | Path | None
) -> None:
    """Adds to a run's results the figures of its evaluation's rows on propagated labels, or takes out those of before.

    `name` is of the set ("valid" or "test") whose scores are in the folder; `manifest` has its clips.
    """
    results.pop(KEY, None)
    if file is None:
        return
    labels = propagate_to_parents(manifest.label_sets(vocabulary), vocabulary, Ontology.from_json(file))
    targets = labels.to_multi_hot(np.arange(len(labels)), len(vocabulary))
    results["clips"]["labels_propagated"] = int(targets.sum(dtype=np.float64))
    results[KEY] = evaluation_of(results["evaluation"], lambda row: prediction_path(folder, f"{name}_{row}"), targets)


def evaluation_of(evaluation: Mapping[str, Any], path_of: Callable[[str], Path], targets: np.ndarray) -> dict[str, Any]:
    """Computes each row of an evaluation again, against other targets `[clips, classes]`.

    The scores of a row lie under its name; where they do not, its figures are the means over its epochs.
    """

    @functools.cache
    def figures(name: str) -> Mapping[str, Any]:
        return summarize(np.load(path_of(name)), targets)

    second = {}
    for row, first in evaluation.items():
        if row == "chance":
            each: list[Mapping[str, Any]] = [{"mAP": float(targets.mean(axis=0)[targets.any(axis=0)].mean())}]
        elif path_of(row).is_file():
            each = [figures(row)]
        else:
            each = [figures(f"epoch_{number:02d}") for number in first["epochs"]]
        means = {key: value if len(each) == 1 else float(np.mean([one[key] for one in each])) for key, value in each[0].items()}
        second[row] = {key: means.get(key, value) for key, value in first.items()}
    return second


def title(clips: Mapping[str, Any]) -> str:
    """The title of the table of these figures, from what `results.json` says of the clips.

    Example
    -------
    >>> title({"found": 100, "labels_found": 254, "labels_propagated": 357})
    'On labels propagated to parents, 3.57 a clip in place of 2.54:'
    """
    before, after = (clips[key] / clips["found"] for key in ("labels_found", "labels_propagated"))
    return f"On labels propagated to parents, {after:.2f} a clip in place of {before:.2f}:"
