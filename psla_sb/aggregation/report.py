"""The figures of an ensemble: which members to take, what each and all of them score, as numbers, as CSV and as a table."""

import csv

import numpy as np

from psla_sb.files import atomic_write
from psla_sb.metrics import average_precision, roc_auc, summarize


def greedy_selection(scores, targets):
    """Members whose mean scores best, picked one after another and with repetition.

    Each step adds the member with which the mean of all picked so far has the highest mAP. There are as many steps as members; of
    the ensembles passed on the way the best one is taken, the smaller one of equals. Source: Caruana, Niculescu-Mizil, Crew and
    Ksikes, "Ensemble selection from libraries of models", ICML 2004.

    Arguments
    ---------
    scores : sequence of array_like
        For each member `[clips, classes]`.
    targets : np.ndarray
        `[clips, classes]`, 0 or 1; of clips on which nothing will be reported.

    Returns
    -------
    (list of int, list of float)
        The members picked, in this order, and the mAP with each.

    Example
    -------
    >>> targets = np.array([[1], [1], [0], [0]])
    >>> first, second, bad = np.array([[0.9], [0.2], [0.3], [0.0]]), np.array([[0.2], [0.9], [0.0], [0.3]]), 1 - targets
    >>> greedy_selection([bad, first, second], targets)
    ([1, 2], [0.833..., 1.0])
    """
    total, picked, found = np.zeros(targets.shape), [], []
    for _ in scores:
        # the mean's AP: a factor changes no order
        precisions = [np.nanmean(average_precision(total + one, targets)) for one in scores]
        picked.append(int(np.argmax(precisions)))
        found.append(float(precisions[picked[-1]]))
        total += scores[picked[-1]]
    best = int(np.argmax(found)) + 1
    return picked[:best], found[:best]


def figures_of(scores, chosen, targets):
    """The figures of every model and of the ensemble as it grows.

    Arguments
    ---------
    scores : dict of str to array_like
        `[clips, classes]` of every member, and of "weight_average" if there is one.
    chosen : list of str
        The ensemble's members; one that is there twice counts twice.
    targets : np.ndarray
        `[clips, classes]`, 0 or 1.

    Returns
    -------
    (dict, np.ndarray)
        Figures, and the ensemble's scores, float64 `[clips, classes]`.

    Example
    -------
    >>> targets = np.array([[1], [1], [0], [0]])
    >>> scores = {"a": np.array([[0.9], [0.2], [0.3], [0.0]]), "b": np.array([[0.2], [0.9], [0.0], [0.3]])}
    >>> report, ensemble = figures_of(scores, ["a", "b"], targets)
    >>> report["members"]["a"]["mAP"], report["ensemble"]["mAP"], report["best_single"]
    (0.833..., 1.0, 'a')
    """
    each = {name: summarize(one, targets) for name, one in scores.items()}
    total, so_far = np.zeros(targets.shape), []
    for n_members, name in enumerate(chosen, 1):
        total += scores[name]
        so_far.append(summarize(total / n_members, targets))
    average = each.pop("weight_average", None)
    report = {
        "members": each,
        "chosen": chosen,
        "so_far": so_far,
        "ensemble": so_far[-1],
        "weight_average": average,
        "best_single": max(each, key=lambda name: each[name]["mAP"]),
    }
    return report, total / len(chosen)


def write_classes(path, vocabulary, targets, ensemble, single):
    """Writes the average precision and the area under the ROC curve of every class, of the ensemble and of the best single model.

    Arguments
    ---------
    path : str or Path
        The CSV file; a figure that is not defined is empty.
    vocabulary : Vocabulary
        The classes.
    targets, ensemble, single : np.ndarray
        `[clips, classes]`

    Example
    -------
    >>> from psla_sb.labels.vocabulary import Vocabulary
    >>> path, scores = getfixture("tmp_path") / "classes.csv", np.array([[0.9, 0.1], [0.2, 0.1]])
    >>> write_classes(path, Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]), np.array([[1, 0], [0, 0]]), scores, 1 - scores)
    >>> print(path.read_text().strip())
    index,mid,display_name,positive_clips,ensemble_AP,ensemble_AUC,best_single_AP,best_single_AUC
    0,/m/1,Bell,1,1.0,1.0,0.5,0.0
    1,/m/2,Rain,0,,,,
    """
    figures = [figure(scores, targets) for scores in (ensemble, single) for figure in (average_precision, roc_auc)]
    columns = [["" if np.isnan(value) else value for value in values.tolist()] for values in figures]
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        heads = [f"{whose}_{figure}" for whose in ("ensemble", "best_single") for figure in ("AP", "AUC")]
        writer.writerow(["index", "mid", "display_name", "positive_clips", *heads])
        counts = targets.sum(axis=0).astype(int).tolist()
        writer.writerows(zip(range(len(vocabulary)), vocabulary.mids, vocabulary.names, counts, *columns, strict=True))


def ensemble_table(report):
    """The figures of an aggregation as text.

    Arguments
    ---------
    report : dict
        What `aggregate` returns.

    Returns
    -------
    str

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

    def cells(figures):
        return f"{figures['mAP']:9.4f}{figures['mAUC']:8.4f}{figures['d_prime']:9.3f}"

    best = "best single, picked on " + ("this set" if report["selection"] is None else "the selection set")
    names = [*report["members"], best, report["annotation_file"]]
    width = max(map(len, names))
    heads = f"{'mAP':>9}{'mAUC':>8}{'d-prime':>9}"
    lines = [f"{report['annotation_file']:{width}}   alone{'':20} ensemble so far", f"{'member':{width}}{heads}{heads}"]
    for name, figures in zip(report["chosen"], report["so_far"], strict=True):
        lines.append(f"{name:{width}}{cells(report['members'][name])}{cells(figures)}")
    left_out = [name for name in report["members"] if name not in report["chosen"]]
    lines += [f"{name:{width}}{cells(report['members'][name])}  not selected" for name in left_out]
    ensemble = f"ensemble of {len(report['chosen'])}"
    lines.append(f"{ensemble:{width}}{'':26}{cells(report['ensemble'])}")
    lines.append(f"{best:{width}}{cells(report['members'][report['best_single']])}")
    if "none" in report["weight_average"]:
        lines.append(f"no weight average: {report['weight_average']['none']}")
    else:
        lines.append(f"{'weight average':{width}}{cells(report['weight_average'])}")
    return "\n".join(lines)
