"""What a trained run reports: the figures of its epochs, of their weight average and of their ensemble."""

from pathlib import Path

import numpy as np
from speechbrain.utils.distributed import if_main_process, run_on_main

from psla_sb.aggregation.averaging import average_weights
from psla_sb.aggregation.scoring import score
from psla_sb.checkpoints.run_folder import best_epoch, prediction_path, read_results, snapshot_path, write_results
from psla_sb.checkpoints.sources import Snapshot
from psla_sb.checkpoints.weights import load_into, save_weights, trained_modules
from psla_sb.dataio.bad_clips import audio_check
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.files import atomic_write
from psla_sb.inference.tagger import AudioTagger
from psla_sb.metrics import FIGURES, summarize

MEANING = {
    "epochs": "of the list: one entry for each epoch, scored on the validation set; in an evaluation: the epochs it is made of",
    "lr": "learning rate at the end of the epoch",
    "train_loss": "mean over the epoch's batches of the binary cross-entropy on augmented clips",
    "valid_loss": "binary cross-entropy, mean over clips and classes",
    "loss": "binary cross-entropy, mean over clips and classes",
    "mAP": "mean over the classes of the average precision",
    "mAUC": "mean over the classes of the area under the ROC curve",
    "d_prime": "sqrt(2) times the inverse normal CDF of mAUC",
    "ensemble_mAP": "mAP of the mean of the scores of all epochs so far",
    "n_classes_left_out": "classes without a positive clip, which are in none of the means",
    "evaluation": "figures on the test set, or on the validation set where there is no test set",
}
ROWS = {
    "chance": "chance (mean class prior)",
    "last": "last epoch",
    "best": "best epoch on the validation set",
    "last_epochs_mean": "mean of the last epochs",
    "weight_average": "average of the last epochs' weights",
    "ensemble": "ensemble of all epochs' predictions",
}


def evaluate(brain, dataset, name, vocabulary, loader_kwargs):
    """Scores the last epochs, the best epoch, the weight average and the ensemble of all epochs; adds them to `results.json`.

    On AudioSet there is no validation set: the evaluation clips are scored after every epoch, and those scores serve here.

    Arguments
    ---------
    brain : TaggingBrain
        After `fit`; its modules get the averaged weights.
    dataset : TaggingDataset
        What to report on.
    name : str
        "valid" if it is what every epoch was scored on, "test" if not.
    vocabulary : Vocabulary
        The classes.
    loader_kwargs : dict
        `batch_size` and `num_workers`.

    Returns
    -------
    dict
        What is written to `results.json`.

    Raises
    ------
    InputError
        No epoch has been trained.
    """
    hparams, folder = brain.hparams, Path(brain.hparams.output_folder)
    results = read_results(folder)
    epochs = results.get("epochs")
    if not epochs:
        raise InputError(f"{folder}: no trained epoch to evaluate here; train first, without --test_only")
    numbers = [epoch["epoch"] for epoch in epochs]
    averaged = [number for number in numbers if number >= hparams.average_start] or numbers[-1:]
    best = best_epoch(epochs)
    average = folder / "snapshots" / "average.safetensors"

    def write_average():
        load_into(trained_modules(hparams.modules), average_weights([snapshot_path(folder, number) for number in averaged]))
        save_weights(trained_modules(hparams.modules), average)

    run_on_main(write_average)
    manifest = dataset.data
    if brain.debug:
        # as many as validation has scored
        n_clips = len(np.load(prediction_path(folder, f"valid_epoch_{numbers[-1]:02d}"), mmap_mode="r"))
        manifest = Manifest(manifest.table.slice(0, n_clips), manifest.data_root, manifest.source)
    targets = manifest.label_sets(vocabulary).to_multi_hot(np.arange(len(manifest)), len(vocabulary))
    # copies of what is in memory: nothing is built again from a file
    built = {**vars(hparams), **hparams.modules}
    members = {f"{name}_weight_average": Snapshot(average, built=built)}
    if name == "test":
        members |= {f"test_epoch_{number:02d}": Snapshot(snapshot_path(folder, number), built=built) for number in numbers}
    run_opts = {"device": str(brain.device), "precision": brain.eval_precision}
    predictions = prediction_path(folder, name).parent
    scores = score(
        members,
        manifest,
        vocabulary,
        predictions,
        loader_kwargs["batch_size"],
        loader_kwargs["num_workers"],
        run_opts,
        crop=getattr(hparams, "eval_crop", "first"),
        check=audio_check(getattr(hparams, "on_bad_audio", "error"), folder, name, len(manifest)),
    )
    total = np.zeros(targets.shape)
    each = {number: {figure: epoch[figure] for figure in FIGURES} for number, epoch in zip(numbers, epochs, strict=True)}
    for number in numbers:
        scored = np.load(prediction_path(folder, f"{name}_epoch_{number:02d}"))
        total += scored
        if name == "test":
            each[number] = summarize(scored, targets)
    ensemble = total / len(numbers)
    results["evaluation"] = {
        "weight_average": {**summarize(scores[f"{name}_weight_average"], targets), "epochs": averaged},
        "last": {**{figure: each[numbers[-1]][figure] for figure in FIGURES}, "epochs": numbers[-1:]},
        "best": {**{figure: each[best][figure] for figure in FIGURES}, "epochs": [best]},
        "last_epochs_mean": {
            **{figure: float(np.mean([each[number][figure] for number in averaged])) for figure in FIGURES},
            "epochs": averaged,
        },
        "ensemble": {**summarize(ensemble, targets), "epochs": numbers},
        "chance": {"mAP": float(targets.mean(axis=0)[targets.any(axis=0)].mean())},
    }
    results["meaning"] = {**MEANING, **ROWS}
    if if_main_process():
        with atomic_write(prediction_path(folder, f"{name}_ensemble")) as temporary:
            np.save(temporary, ensemble.astype(np.float32))
        write_results(folder, results)
    return results


def example(brain, dataset, vocabulary):
    """A data set's first clip that can be read, with its true labels, and what the weight average says of it.

    Returns
    -------
    str
    """
    folder = Path(brain.hparams.output_folder)
    clip = dataset.data[next(row for row in range(len(dataset)) if dataset[row]["error"] is None)]
    average = Snapshot(folder / "snapshots" / "average.safetensors", built={**vars(brain.hparams), **brain.hparams.modules})
    tags = AudioTagger.from_source(average, run_opts={"device": str(brain.device)}).tag_file(clip["wav"])
    return "\n".join(
        [
            f"An example, {clip['wav']}",
            "  its labels: " + ", ".join(vocabulary.names[vocabulary.index(mid)] for mid in clip["labels"]),
            "  its tags:   " + ", ".join(f"{tag.label} {tag.score:.2f}" for tag in tags),
            f"Tag your own sounds: psla-tag --model {folder / 'tagger'} FILE...",
        ]
    )


def results_table(results, published):
    """The figures of a run as text, next to published ones.

    Arguments
    ---------
    results : dict
        What `evaluate` returns.
    published : dict of str to float
        mAP as published, for rows that have one.

    Example
    -------
    >>> print(results_table({"evaluation": {"last": {"mAP": 0.43, "mAUC": 0.97, "d_prime": 2.66}}}, {"last": 0.44}))
                                              mAP    mAUC  d-prime  published
    last epoch                             0.4300  0.9700    2.660      0.440
    """
    lines = [f"{'':36}{'mAP':>9}{'mAUC':>8}{'d-prime':>9}" + (f"{'published':>11}" if published else "")]
    for key, title in ROWS.items():
        if key in results["evaluation"]:
            figures = results["evaluation"][key]
            line = f"{title:36}{figures['mAP']:9.4f}"
            if "mAUC" in figures:
                line += f"{figures['mAUC']:8.4f}{figures['d_prime']:9.3f}"
            lines.append(line + (f"{published[key]:11.3f}" if key in published else ""))
    return "\n".join(lines)
