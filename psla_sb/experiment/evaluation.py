"""What a trained run reports: the figures of its epochs, of their weight average and of their ensemble."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from speechbrain.utils.distributed import run_on_main

from psla_sb.aggregation.averaging import average_weights
from psla_sb.aggregation.scoring import score
from psla_sb.checkpoints.run_folder import (
    CALIBRATION,
    average_path,
    best_epoch,
    clips_path,
    ema_path,
    prediction_path,
    read_results,
    snapshot_path,
    sounds_path,
    swa_path,
    write_results,
    write_scores,
)
from psla_sb.checkpoints.sources import Snapshot
from psla_sb.checkpoints.tagger_folder import trust_options
from psla_sb.checkpoints.weights import load_into, load_weights, save_weights, trained_modules
from psla_sb.dataio.audio import read_audio
from psla_sb.dataio.bad_clips import audio_check, csv_line, state_of_sounds
from psla_sb.dataio.dataset import TaggingDataset
from psla_sb.dataio.manifest import START, Manifest
from psla_sb.errors import InputError
from psla_sb.experiment import propagated
from psla_sb.experiment.averages import EMA, SWA
from psla_sb.experiment.brain import TaggingBrain, binary_cross_entropy
from psla_sb.files import read_json, wait_for, write_file
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.calibration import Calibration, expected_calibration_error, fit_calibration
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import FIGURES, METRICS, MeanScores, average_precision, f1_of, roc_auc, summarize, table_cells, table_heads
from psla_sb.prepare.annotations import official_counts

MEANING = {
    "epochs": "of the list: one entry for each epoch, scored on the validation set; in an evaluation: the epochs it is made of",
    "lr": "learning rate at the end of the epoch",
    "train_loss": "mean over the epoch's batches of the binary cross-entropy on augmented clips",
    "valid_loss": "binary cross-entropy, mean over clips and classes",
    "loss": "binary cross-entropy, mean over clips and classes",
    **{name: metric.meaning for name, metric in METRICS.items()},
    "ensemble_mAP": "mAP of the mean of the scores of all epochs so far",
    "ema_mAP": "mAP of the exponential moving average of the weights",
    "swa_mAP": "mAP of the mean of the weights of the epochs so far that are averaged",
    "tagger": "which weights the row weight_average is of, and so the tagger: the better of swa and ema on the validation set",
    "n_classes_left_out": "classes without a positive clip, which are in none of the means",
    "clips": "that the evaluation is of: annotation, number, digest of the IDs; their labels, and those of the published set",
    "calibration": "of the weight average: figures of its probabilities and decisions on the clips that the evaluation is of",
    "fitted_on": "the set that slopes, biases and thresholds (calibration.json) were fitted on, and its number of clips",
    "same_clips": "whether that is the set that the evaluation is of: F1 scores are then better than they will be on other clips",
    "criterion": "what the thresholds were chosen by",
    "n_classes_own": "classes with slope, bias and threshold of their own; those with few positive clips share theirs",
    "ECE_before": "expected calibration error of the scores, in 15 bins of as many pairs of clip and class: 0 is best",
    "ECE_after": "expected calibration error of the calibrated probabilities",
    "macro_F1": "mean over the classes with a positive clip of the F1 score at the class's threshold",
    "micro_F1": "F1 score at the thresholds, of all pairs of clip and class together",
    "evaluation": "figures on the test set, or on the validation set where there is no test set",
    propagated.KEY: "figures of the same scores on labels propagated to parents, by the ontology that propagated_labels names",
}
AVERAGE, BETTER = "weight_average", "the tagger: the better of the next two"
ROWS = {
    "chance": "chance (mean class prior)",
    "last": "last epoch",
    "best": "best epoch on the validation set",
    "last_epochs_mean": "mean of the last epochs",
    "weight_average": "average of the last epochs' weights",
    SWA: "mean of the last epochs' weights",
    EMA: "exponential moving average of weights",
    "ensemble": "ensemble of all epochs' predictions",
}


def evaluate(
    brain: TaggingBrain,
    dataset: TaggingDataset,
    name: str,
    vocabulary: Vocabulary,
    loader: Mapping[str, Any],
    valid_set: TaggingDataset | None = None,
) -> dict[str, Any]:
    """Scores the last epochs, the best epoch, the weight average and the ensemble of all epochs; adds them to `results.json`.

    `name` is "valid" if the data set is what every epoch was scored on, "test" if not; then `valid_set` is what they were scored
    on. On AudioSet there is no validation set: the evaluation clips are scored after every epoch, and those scores serve here. The
    modules get the averaged weights, of the mean of epochs and a moving average those that are better on the validation set, to
    which their probabilities and thresholds are fitted: `calibration.json`.
    """
    hparams, folder = brain.hparams, Path(brain.hparams.output_folder)
    results = run_on_main(read_results, [folder])
    epochs = results.get("epochs")
    if not epochs:
        raise InputError(f"{folder}: no trained epoch to evaluate here; train first, without --test_only")
    numbers = [epoch["epoch"] for epoch in epochs]
    averaged = brain.epochs_averaged(numbers, numbers[-1])
    # with a moving average there are two to choose from
    with_ema = getattr(hparams, "ema_decay", None) is not None
    candidates = {SWA: swa_path(folder), EMA: ema_path(folder)} if with_ema else {AVERAGE: average_path(folder)}

    def write_average() -> None:
        load_into(trained_modules(hparams.modules), average_weights([snapshot_path(folder, number) for number in averaged]))
        brain.estimate_batch_norm(trained_modules(hparams.modules))
        # what was fitted to another average must not stand beside this one
        (folder / CALIBRATION).unlink(missing_ok=True)
        save_weights(trained_modules(hparams.modules), next(iter(candidates.values())))

    run_on_main(write_average)
    for file in candidates.values():
        wait_for(file)

    def clips_of(dataset: TaggingDataset) -> Manifest:
        if not brain.debug:
            return dataset.data
        # as many as validation has scored
        n_clips = len(np.load(prediction_path(folder, f"valid_epoch_{numbers[-1]:02d}"), mmap_mode="r"))
        return Manifest(dataset.data.table.slice(0, n_clips), dataset.data.data_root, dataset.data.source)

    def scored(name: str, manifest: Manifest, check: Callable, also: Sequence[int]) -> dict[str, np.ndarray]:
        """Scores a set with the averages, whose scores are returned, and with some epochs."""
        members = {f"{name}_{which}": in_memory(brain, path) for which, path in candidates.items()}
        members |= {f"{name}_epoch_{number:02d}": in_memory(brain, snapshot_path(folder, number)) for number in also}
        scores = score(
            members,
            manifest,
            vocabulary,
            prediction_path(folder, name).parent,
            loader["batch_size"],
            loader["num_workers"],
            {"device": str(brain.device), "precision": brain.eval_precision},
            crop=getattr(hparams, "eval_crop", "first"),
            check=check,
        )
        return {which: scores[f"{name}_{which}"] for which in candidates}

    def check_of(name: str, manifest: Manifest) -> Callable:
        return audio_check(getattr(hparams, "on_bad_audio", "error"), folder, name, len(manifest))

    manifest = clips_of(dataset)
    targets, check = manifest.targets(vocabulary), check_of(name, manifest)
    again = numbers if name == "test" else run_on_main(_stale, [brain, numbers, manifest, check])
    averages = scored(name, manifest, check, again)
    held_out, held_out_targets = averages, targets
    if valid_set is not None:
        clips = clips_of(valid_set)
        held_out, held_out_targets = scored("valid", clips, check_of("valid", clips), ()), clips.targets(vocabulary)
    tagger = run_on_main(_choose, [brain, candidates, held_out, held_out_targets, {name: averages, "valid": held_out}])
    fitted = run_on_main(_calibrate, [brain, vocabulary, held_out[tagger], held_out_targets])
    return run_on_main(_report, [brain, results, name, manifest, vocabulary, averaged, targets, averages, tagger, fitted])


def _choose(
    brain: TaggingBrain,
    candidates: Mapping[str, Path],
    held_out: Mapping[str, np.ndarray],
    targets: np.ndarray,
    scored: Mapping[str, Mapping[str, np.ndarray]],
) -> str:
    """Makes the better of several averages on the validation set the weight average, in the modules too; returns its name."""
    if len(candidates) == 1:
        return AVERAGE
    folder, best = brain.hparams.output_folder, max(candidates, key=lambda name: summarize(held_out[name], targets)["mAP"])
    load_into(trained_modules(brain.hparams.modules), load_weights(candidates[best]), candidates[best])
    save_weights(trained_modules(brain.hparams.modules), average_path(folder))
    for which, of_each in scored.items():
        write_scores(folder, f"{which}_{AVERAGE}", np.asarray(of_each[best]))
    return best


def _calibrate(brain: TaggingBrain, vocabulary: Vocabulary, scores: np.ndarray, targets: np.ndarray) -> Calibration:
    """Fits the weight average's probabilities and thresholds to what it scores the validation set, and writes them."""
    calibration = fit_calibration(np.asarray(scores), targets, getattr(brain.hparams, "target_precision", None))
    calibration.write(Path(brain.hparams.output_folder) / CALIBRATION, vocabulary)
    return calibration


def _stale(brain: TaggingBrain, numbers: Sequence[int], manifest: Manifest, check: Callable) -> list[int]:
    """Epochs whose validation scores are of sounds that have been changed since, or in another precision."""
    paths = {number: sounds_path(brain.hparams.output_folder, number) for number in numbers}
    said = {number: read_json(path) or {} for number, path in paths.items() if path.is_file()}
    now = {**state_of_sounds(manifest, check), "precision": brain.eval_precision} if said else {}
    return [number for number, sounds in said.items() if any(sounds.get(key) != value for key, value in now.items())]


def _report(
    brain: TaggingBrain,
    results: dict[str, Any],
    name: str,
    manifest: Manifest,
    vocabulary: Vocabulary,
    averaged: list[int],
    targets: np.ndarray,
    averages: Mapping[str, np.ndarray],
    tagger: str,
    calibration: Calibration,
) -> dict[str, Any]:
    """Computes the figures of what was scored, and writes them and the ensemble's scores."""
    folder, epochs = Path(brain.hparams.output_folder), results["epochs"]
    numbers = [epoch["epoch"] for epoch in epochs]
    each, mean, changed = {}, MeanScores(), False
    for number, epoch in zip(numbers, epochs, strict=True):
        scored = np.load(prediction_path(folder, f"{name}_epoch_{number:02d}"))
        ensemble = mean.add(scored)
        figures = summarize(scored, targets)
        each[number] = {figure: figures[figure] for figure in FIGURES}
        # of sounds that were changed since the epoch was trained, see `_stale`
        changed |= name == "valid" and any(each[number][figure] != epoch[figure] for figure in FIGURES)
        if changed:
            epoch |= {**each[number], "ensemble_mAP": summarize(ensemble, targets)["mAP"]}
            epoch |= {"valid_loss": figures["loss"]} if brain.loss is binary_cross_entropy else {}
    best = best_epoch(epochs)
    last_epochs_mean = {figure: float(np.mean([each[number][figure] for number in averaged])) for figure in FIGURES}
    weight_average = averages[tagger]
    of_averages = {which: {**summarize(scores, targets), "epochs": averaged} for which, scores in averages.items()}
    if EMA in of_averages:
        of_averages[EMA]["epochs"] = numbers
    if EMA in averages:
        results["tagger"] = tagger
    results["evaluation"] = {
        AVERAGE: of_averages[tagger],
        **of_averages,
        "last": {**{figure: each[numbers[-1]][figure] for figure in FIGURES}, "epochs": numbers[-1:]},
        "best": {**{figure: each[best][figure] for figure in FIGURES}, "epochs": [best]},
        "last_epochs_mean": {**last_epochs_mean, "epochs": averaged},
        "ensemble": {**summarize(ensemble, targets), "epochs": numbers},
        "chance": {"mAP": float(targets.mean(axis=0)[targets.any(axis=0)].mean())},
    }
    results["meaning"] = {**MEANING, **ROWS, **({AVERAGE: BETTER} if EMA in averages else {})}
    official = official_counts(manifest, vocabulary)
    counts = targets.sum(axis=0).astype(int)
    results["clips"] = {
        "set": name,
        "annotation": manifest.source,
        "found": len(manifest),
        "ids": manifest.digest(("ID",)),
        "classes_with_fewer": None if official is None else int((counts < official).sum()),
        "labels_found": int(counts.sum()),
        "labels_official": None if official is None else int(official.sum()),
    }
    manifest.to_clips_csv(clips_path(folder, name))
    f1 = f1_of(calibration.decisions(weight_average), targets)
    results["calibration"] = calibration_figures(calibration, weight_average, targets, f1, same_clips=name == "valid")
    write_class_figures(folder / "classes.csv", vocabulary, weight_average, targets, official, calibration.threshold, f1)
    write_scores(folder, f"{name}_ensemble", ensemble)
    ontology = getattr(brain.hparams, "propagated_labels", None)
    propagated.add_evaluation(results, folder, name, manifest, vocabulary, ontology)
    write_results(folder, results)
    return results


def calibration_figures(
    calibration: Calibration, scores: np.ndarray, targets: np.ndarray, f1: np.ndarray, same_clips: bool
) -> dict[str, Any]:
    """Computes what `results.json` says of probabilities and decisions; `f1` is `[classes]`."""
    decided, positive = calibration.decisions(scores), targets == 1
    return {
        "fitted_on": {"set": "valid", "clips": calibration.n_clips},
        "same_clips": same_clips,
        "criterion": calibration.criterion,
        "target_precision": calibration.target_precision,
        "n_classes_own": int(calibration.own.sum()),
        "n_classes_never_decided": int(np.isinf(calibration.threshold).sum()),
        "ECE_before": expected_calibration_error(scores, targets),
        "ECE_after": expected_calibration_error(calibration.probabilities(scores), targets),
        "macro_F1": float(f1[~np.isnan(f1)].mean()) if positive.any() else float("nan"),
        "micro_F1": float(2 * (decided & positive).sum() / max(1, decided.sum() + positive.sum())),
    }


def write_class_figures(
    path: Path,
    vocabulary: Vocabulary,
    scores: np.ndarray,
    targets: np.ndarray,
    official: np.ndarray | None,
    thresholds: np.ndarray,
    f1: np.ndarray,
) -> None:
    """Writes each class's clips, AP, AUC, threshold and F1 score at it, as CSV; what is undefined or infinite is empty."""
    figures = [average_precision(scores, targets), roc_auc(scores, targets), thresholds, f1]
    columns = [[value if np.isfinite(value) else "" for value in values.tolist()] for values in figures]
    counts = targets.sum(axis=0).astype(int).tolist()
    known = [""] * len(vocabulary) if official is None else official.tolist()
    rows = zip(range(len(vocabulary)), vocabulary.mids, vocabulary.names, counts, known, *columns, strict=True)
    heads = ["index", "mid", "display_name", "positive_clips", "official_clips", "AP", "AUC", "threshold", "F1"]
    write_file(path, "".join(csv_line(row) for row in (heads, *rows)))


def in_memory(brain: TaggingBrain, snapshot: Path) -> Snapshot:
    """A snapshot of the run that is in memory: its modules are copied, and nothing is built again from a file."""
    return Snapshot(snapshot, built={**vars(brain.hparams), **brain.hparams.modules})


def example(brain: TaggingBrain, dataset: TaggingDataset, vocabulary: Vocabulary) -> str:
    """A data set's first clip that can be read, with its true labels, and what the weight average says of it."""
    folder = Path(brain.hparams.output_folder)
    clip = dataset.data[next(row for row in range(len(dataset)) if dataset[row]["error"] is None)]
    tagger = AudioTagger.from_source(in_memory(brain, average_path(folder)), run_opts={"device": str(brain.device)})
    sound: Any = clip["wav"]
    rate, segment = dataset.sample_rate, ""
    if (start := clip.get(START)) is not None:
        sound, segment = read_audio(sound, rate, start, clip["duration"]), f", from {start:.2f} s on"
    return "\n".join(
        [
            f"An example, {clip['wav']}{segment}",
            "  its labels: " + "; ".join(vocabulary.names[vocabulary.index(mid)] for mid in clip["labels"]),
            "  its tags:   " + "; ".join(f"{tag.label} {tag.score:.2f}" for tag in tagger.tag_file(sound, sample_rate=rate)),
            f"Tag your own sounds: psla-tag --model {folder / 'tagger'}{trust_options(folder / 'tagger')} FILE...",
        ]
    )


def results_table(results: Mapping[str, Any], published: Mapping[str, float]) -> str:
    """The figures of a run as text, next to published ones.

    Example
    -------
    >>> print(results_table({"evaluation": {"last": {"mAP": 0.43, "mAUC": 0.97, "d_prime": 2.66}}}, {"last": 0.44}))
                                              mAP    mAUC  d-prime  published
    last epoch                             0.4300  0.9700    2.660      0.440
    """
    lines = [f"{'':36}{table_heads()}" + (f"{'published':>11}" if published else "")]
    for key, title in ROWS.items():
        if key in results["evaluation"]:
            if key == AVERAGE and EMA in results["evaluation"]:
                title = BETTER
            cells = table_cells(results["evaluation"][key])
            lines.append(f"{title:36}{cells}" + (f"{published[key]:11.3f}" if key in published else ""))
    if baseline := results.get("baseline"):
        lines.append(f"{'logistic regression on mel bands':36}{table_cells(baseline)}")
    return "\n".join(lines)
