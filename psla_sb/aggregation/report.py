"""The figures of an ensemble: which members to take, what each and all of them score, as numbers, as CSV and as a table."""

import csv
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from psla_sb.files import atomic_write
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import MeanScores, average_precision, roc_auc, summarize, table_cells, table_heads


def greedy_selection(scores: Sequence[np.ndarray], targets: np.ndarray) -> tuple[list[int], list[float]]:
    """Picks members whose mean scores best, one by one and with repetition; returns them in this order, and the mAP with each.

    Each step adds the member with which the mean of all picked so far has the highest mAP, until none raises it. `scores` and
    `targets` are `[clips, classes]`, of clips on which nothing will be reported. Source: Caruana, Niculescu-Mizil, Crew and Ksikes,
    "Ensemble selection from libraries of models", ICML 2004.

    Example
    -------
    >>> targets = np.array([[1], [1], [0], [0]])
    >>> first, second, bad = np.array([[0.9], [0.2], [0.3], [0.0]]), np.array([[0.2], [0.9], [0.0], [0.3]]), 1 - targets
    >>> greedy_selection([bad, first, second], targets)
    ([1, 2], [0.833..., 1.0])
    """
    total, picked, found = np.zeros(targets.shape, np.float32), list[int](), [-1.0]

    def precision_with(one: np.ndarray) -> float:
        # the mean's AP: a factor changes no order
        return float(np.nanmean(average_precision(total + one, targets)))

    # sorting leaves Python to other threads
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(unit=" models", desc="selecting", disable=None) as bar:
        for _ in scores:
            precisions = []
            for precision in pool.map(precision_with, scores):
                precisions.append(precision)
                bar.update()
            best = int(np.argmax(precisions))
            if precisions[best] <= found[-1]:
                break
            picked.append(best)
            found.append(precisions[best])
            bar.set_postfix(members=len(picked), mAP=f"{found[-1]:.4f}")
            total += scores[best]
    return picked, found[1:]


def figures_of(scores: Mapping[str, np.ndarray], chosen: Sequence[str], targets: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Computes the figures of every model and of the ensemble as it grows; and the ensemble's scores, float64 `[clips, classes]`.

    `scores` may have a "weight_average" besides the members; a member that is chosen twice counts twice.
    """
    each = {name: summarize(one, targets) for name, one in scores.items()}
    mean, so_far = MeanScores(), []
    for name in chosen:
        ensemble = mean.add(scores[name])
        so_far.append(summarize(ensemble, targets))
    average = each.pop("weight_average", None)
    report = {
        "members": each,
        "chosen": chosen,
        "so_far": so_far,
        "ensemble": so_far[-1],
        "weight_average": average,
        "best_single": max(each, key=lambda name: each[name]["mAP"]),
    }
    return report, ensemble


def write_classes(
    path: str | Path,
    vocabulary: Vocabulary,
    targets: np.ndarray,
    ensemble: np.ndarray,
    single: np.ndarray,
    official: np.ndarray | None = None,
) -> None:
    """Writes the average precision and the area under the ROC curve of every class, of the ensemble and of the best single model.

    Also how many clips the class has, here and in the published set. A figure that is not defined, or not known, is empty.
    """
    figures = [figure(scores, targets) for scores in (ensemble, single) for figure in (average_precision, roc_auc)]
    columns = [["" if np.isnan(value) else value for value in values.tolist()] for values in figures]
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        heads = [f"{whose}_{figure}" for whose in ("ensemble", "best_single") for figure in ("AP", "AUC")]
        writer.writerow(["index", "mid", "display_name", "positive_clips", "official_clips", *heads])
        counts = targets.sum(axis=0).astype(int).tolist()
        known = [""] * len(vocabulary) if official is None else official.tolist()
        writer.writerows(zip(range(len(vocabulary)), vocabulary.mids, vocabulary.names, counts, known, *columns, strict=True))


def ensemble_table(report: Mapping[str, Any]) -> str:
    """Formats the figures of an aggregation as text.

    Example
    -------
    >>> figures = {"mAP": 0.4, "mAUC": 0.9, "d_prime": 1.812}
    >>> report = {"members": {"psla-1-epoch_01": figures}, "chosen": ["psla-1-epoch_01"], "so_far": [figures], "ensemble": figures}
    >>> report |= {"weight_average": {"none": "members have different front ends"}, "best_single": "psla-1-epoch_01"}
    >>> print(ensemble_table({**report, "selection": None, "annotation_file": "eval.csv"}))
    eval.csv                          alone                     ensemble so far
    member                              mAP    mAUC  d-prime      mAP    mAUC  d-prime
    psla-1-epoch_01                  0.4000  0.9000    1.812   0.4000  0.9000    1.812
    ensemble of 1                                              0.4000  0.9000    1.812
    best single, picked on this set  0.4000  0.9000    1.812
    no weight average: members have different front ends
    """
    best = "best single, picked on " + ("this set" if report["selection"] is None else "the selection set")
    names = [*report["members"], best, report["annotation_file"]]
    width = max(map(len, names))
    heads = table_heads()
    lines = [
        f"{report['annotation_file']:{width}}   alone{'':{len(heads) - 6}} ensemble so far",
        f"{'member':{width}}{heads}{heads}",
    ]
    for name, figures in zip(report["chosen"], report["so_far"], strict=True):
        lines.append(f"{name:{width}}{table_cells(report['members'][name])}{table_cells(figures)}")
    left_out = [name for name in report["members"] if name not in report["chosen"]]
    lines += [f"{name:{width}}{table_cells(report['members'][name])}  not selected" for name in left_out]
    ensemble = f"ensemble of {len(report['chosen'])}"
    lines.append(f"{ensemble:{width}}{'':{len(heads)}}{table_cells(report['ensemble'])}")
    lines.append(f"{best:{width}}{table_cells(report['members'][report['best_single']])}")
    if "none" in report["weight_average"]:
        lines.append(f"no weight average: {report['weight_average']['none']}")
    else:
        lines.append(f"{'weight average':{width}}{table_cells(report['weight_average'])}")
    return "\n".join(lines)
