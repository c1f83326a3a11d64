"""`main`: the body of every recipe's `train.py`: YAML -> data -> fit -> evaluate -> a tagger's folder.

The YAML declares the whole pipeline; the recipes in this repository are the examples.
"""

import copy
import signal
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import speechbrain as sb
from hyperpyyaml import resolve_references
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.logger import get_logger
from speechbrain.utils.run_opts import RunOptions

from psla_sb.checkpoints.definitions import plain_definitions, read_definitions, read_yaml, without_pretrained
from psla_sb.checkpoints.run_folder import CLASSES, HPARAMS, read_results, write_results
from psla_sb.checkpoints.tagger_folder import read_calibration, write_tagger
from psla_sb.checkpoints.transfer import load_pretrained_tagger
from psla_sb.checkpoints.weights import trained_modules
from psla_sb.dataio.dataset import TaggingDataset, init_worker
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import BalancedSampler, MixupBatchSampler, class_balanced_weights, rank_and_world_size
from psla_sb.errors import InputError
from psla_sb.experiment import identity, launch, propagated, remarks, trackers
from psla_sb.experiment.augmenting import as_list
from psla_sb.experiment.averages import check_averages
from psla_sb.experiment.brain import TaggingBrain
from psla_sb.experiment.dry_run import dry_run
from psla_sb.experiment.evaluation import evaluate, example, results_table
from psla_sb.experiment.hparams import build_hparams, crop_of, prepare, read_settings
from psla_sb.files import put_back_on_error, wait_for, write_file
from psla_sb.labels.calibration import check_target_precision
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.teacher_scores import check_teacher, open_scores
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes import chain

logger = get_logger(__name__)

# Keys that a recipe's YAML file need not have.
OPTIONAL = (
    *("trust", "track", "compile_model", "target_precision", "report", "baseline", "propagated_labels"),
    *("ema_decay", "average_every", "validate_average", "batch_norm_clips", "distillation_temperature"),
)


def main(recipe: str, arguments: list[str] | None = None) -> None:
    """Runs a recipe's `train.py`; see `psla_sb.experiment.launch.main`.

    Example
    -------
    >>> main("recipes/AudioSet/train.py", ["hparams/nothing.yaml"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    launch.main(recipe, run, arguments)


def run(hparams_file: str | Path, run_opts: RunOptions, overrides: dict[str, Any]) -> dict[str, Any]:
    """Runs one experiment, from the YAML file to the figures, which it returns as `results.json` has them."""
    run_opts = launch.start_processes(run_opts, knows_dry_run=True)
    settings = read_settings(hparams_file, overrides, optional=OPTIONAL)
    folder = Path(settings["output_folder"])
    check_target_precision(settings["target_precision"], hparams_file)
    check_averages(settings, hparams_file)
    if settings["report"] not in (None, True, False):
        raise InputError(f"{hparams_file}: report must be True or False, not {settings['report']!r}")
    identity.check_settings(folder, hparams_file, settings, overrides, run_opts)
    building = copy.deepcopy(settings)
    if identity.has_checkpoint(settings):
        # weights to start from would be fetched for nothing: a checkpoint has those to go on with
        without_pretrained(building["embedding_model"])
    hparams = build_hparams(hparams_file, building)
    # without the settings: they are written when it is known that the folder is theirs
    sb.create_experiment_directory(str(folder), save_env_desc=False)
    run_on_main(launch.write_environment, [folder])
    for remark in remarks.on_device(run_opts.device):
        logger.warning(remark)
    # a start that is refused leaves the run's annotations as they were
    files = [*folder.glob("*.csv"), *folder.glob("*.json")] if if_main_process() and identity.has_begun(folder, settings) else []
    with put_back_on_error(files):
        vocabulary = prepare(hparams)
        propagated.check_ontology(hparams.get("propagated_labels"), vocabulary)
        # what cannot be trained, saved or exported is refused before the training, not after it
        n_samples = chain.n_samples_of(hparams["modules"], hparams["n_frames"], hparams["sample_rate"])
        chain.check(hparams["modules"], hparams["sample_rate"], hparams["n_classes"], n_samples)
        valid_set, valid_labels = tagging_dataset("valid", hparams, vocabulary)
        train_set, train_labels = tagging_dataset("train", hparams, vocabulary)
        sets = {"train": (train_set.data, train_labels), "valid": (valid_set.data, valid_labels)}
        has_finished = run_opts.test_only or len(read_results(folder).get("epochs", [])) >= hparams["epoch_counter"].limit
        contents = identity.contents_of(vocabulary, sets, train_set.teacher, None if has_finished else rank_and_world_size()[1])
        identity.check_contents(folder, settings, contents)
    # opened before the training: what is wrong with it should not show days later
    name, dataset = "valid", valid_set
    if hparams["test_annotation"]:
        name, (dataset, labels) = "test", tagging_dataset("test", hparams, vocabulary)
        sets["test"] = dataset.data, labels
    for which, (manifest, labels) in sets.items():
        for remark in remarks.on_labels(which, manifest, labels, hparams["balanced_sampling"]):
            logger.warning(remark)
    hparams["checkpointer"].add_recoverables(trained_modules(hparams["modules"]))
    for key in ("loss", "brain_class"):
        if not callable(hparams.get(key) or TaggingBrain):
            raise InputError(f"{hparams_file}: '{key}' must name a class or a function (!name:...), not {hparams[key]!r}")
    for key in ("waveform_augment", "feature_augment", "spec_augment"):
        for part in as_list(hparams.get(key)):
            if not callable(part):
                # the YAML parser loses tags of a list that a comment stands before
                wrong = f"must list callables (!new:...), not {part!r}; write no comment between '{key}:' and its list"
                raise InputError(f"{hparams_file}: '{key}' {wrong}")
    brain = (hparams.get("brain_class") or TaggingBrain)(
        hparams["modules"], hparams["optimizer"], hparams, run_opts, hparams["checkpointer"]
    )
    brain.train_clips = train_set
    if hparams.get("pretrained_tagger") is not None:
        transfer = load_pretrained_tagger(hparams["pretrained_tagger"], hparams["modules"], vocabulary)
        logger.info("Starting from %s: %s", hparams["pretrained_tagger"], transfer)
    loader = {
        "num_workers": hparams["num_workers"],
        "worker_init_fn": init_worker,
        "persistent_workers": hparams["num_workers"] > 0,
        "pin_memory": brain.device_type == "cuda",
    }
    valid_loader = {**loader, "batch_size": hparams["valid_batch_size"]}
    batches = train_batches(hparams, train_labels)
    n_steps = len(batches) // brain.grad_accumulation_factor * hparams["epoch_counter"].limit
    for remark in () if brain.debug else remarks.on_schedule(hparams, min(n_steps, brain.optimizer_step_limit or n_steps)):
        logger.warning(remark)
    if hparams.get("on_bad_audio") == "skip":
        train_set.redraw = batches.redraw
    train_loader = {**loader, "batch_sampler": batches}
    if getattr(run_opts, "dry_run", False):
        tried = {"train": train_set, "valid": valid_set, name: dataset}
        said = dry_run(brain, settings, tried, {"train": train_loader, "valid": valid_loader})
        run_on_main(print, [said])
        return {}
    run_on_main(_write_settings, [folder, hparams_file, overrides, vocabulary])
    for file in (HPARAMS, CLASSES):
        wait_for(folder / file)
    known = {"settings": identity.settings_of(hparams_file, overrides, run_opts), "contents": contents}
    run_on_main(identity.write_identity, [folder, settings, known])
    definitions = plain_definitions(read_definitions(folder / HPARAMS), hparams)
    loggers = trackers.all_loggers(as_list(hparams["train_logger"]), settings["track"], folder, settings)
    brain.hparams.train_logger = loggers
    for signum in launch.STOP_SIGNALS:
        signal.signal(signum, brain.request_stop)
    brain.fit(hparams["epoch_counter"], train_set, valid_set, train_loader_kwargs=train_loader, valid_loader_kwargs=valid_loader)
    # what is scored is on disk at once: there is nothing more to save
    for signum in launch.STOP_SIGNALS:
        signal.signal(signum, launch.stop)
    results = evaluate(brain, dataset, name, vocabulary, valid_loader, valid_set if name == "test" else None)
    if if_main_process():
        calibration = read_calibration(folder, vocabulary)
        write_tagger(folder / "tagger", definitions, hparams["modules"], vocabulary, calibration)
        if hparams.get("baseline"):
            results = {**results, "baseline": _baseline(hparams, {which: clips for which, (clips, _) in sets.items()}, vocabulary)}
            write_results(folder, results)
        published, reason = hparams["published"], None
        if published:
            compared = {"train": train_set.data, name: dataset.data}
            to_go = hparams["epoch_counter"].limit - len(results["epochs"])
            reason = remarks.why_not_published(hparams_file, overrides, run_opts, compared, to_go)
        table = results_table(results, {} if reason else published)
        note = f"\nPublished figures are not beside these: {reason}." if reason else ""
        rows = results["evaluation"]
        if (first := rows.get("swa", rows["weight_average"])["epochs"][0]) < hparams["average_start"]:
            note += f"\nThe weight average is of epoch {first} alone: average_start is {hparams['average_start']}."
        if second := results.get(propagated.KEY):
            note += f"\n\n{propagated.title(results['clips'])}\n{results_table({'evaluation': second}, {})}"
        logger.info("\n%s%s\n\n%s", table, note, example(brain, dataset, vocabulary))
        # matplotlib is slow to import, and only this process draws
        from psla_sb.plots.training import write_pictures

        write_pictures(brain, dataset, name, vocabulary, train_labels)
        if settings["report"]:
            from psla_sb.experiment.report import write_report

            logger.info("The report: %s", write_report(folder, name, dataset.data, vocabulary, train_labels))
        trackers.log_results(loggers, results["evaluation"], sorted((folder / "plots").glob("*.png")))
    return results


def _baseline(hparams: dict[str, Any], clips: dict[str, Manifest], vocabulary: Vocabulary) -> dict[str, Any]:
    # scikit-learn is slow to import
    from psla_sb.experiment.baseline import baseline

    return baseline(hparams, clips, vocabulary)


def _write_settings(folder: Path, file: str | Path, overrides: dict[str, Any], vocabulary: Vocabulary) -> None:
    """Writes what a run's weights need to be loaded, as SpeechBrain does: the settings, resolved; and the classes."""
    overrides = {key: value for key, value in overrides.items() if key in read_yaml(file)}
    with open(file, encoding="utf-8") as stream:
        text = resolve_references(stream, overrides).getvalue()
    write_file(folder / HPARAMS, f"# Generated {date.today()} from:\n# {Path(file).absolute()}\n# yamllint disable\n{text}")
    vocabulary.to_csv(folder / CLASSES)


def tagging_dataset(name: str, hparams: dict[str, Any], vocabulary: Vocabulary) -> tuple[TaggingDataset, LabelSets]:
    """The data set of `train_annotation`, `valid_annotation` or `test_annotation`, and its labels.

    For training, labels are enhanced, and `teacher_scores` are read, if asked for.
    """
    manifest = Manifest.from_file(hparams[f"{name}_annotation"], hparams["data_folder"])
    labels, teacher = manifest.label_sets(vocabulary), None
    if name == "train" and hparams["label_enhancement"] is not None:
        labels = hparams["label_enhancement"](manifest, labels, vocabulary)
    if name == "train" and hparams.get("teacher_scores") is not None:
        teacher = open_scores(hparams["teacher_scores"], manifest, vocabulary)
        figures = check_teacher(teacher, labels, hparams["teacher_scores"])
        logger.info("The teacher's mAP on the training labels is %.4f, by chance it would be %.4f", *figures)
    crop = crop_of("train_crop" if name == "train" else "eval_crop", hparams)
    rate, seed = hparams["sample_rate"], hparams["seed"]
    n_samples = chain.n_samples_of(hparams["modules"], hparams["n_frames"], rate)
    dataset = TaggingDataset(manifest, labels, len(vocabulary), rate, n_samples, teacher, crop, seed, compact=True)
    return dataset, labels


def train_batches(hparams: dict[str, Any], labels: LabelSets) -> MixupBatchSampler:
    """The batch sampler of training: class-balanced draws with replacement, or a shuffle; then mixup's partners."""
    balanced, weights = hparams["balanced_sampling"], np.ones(len(labels))
    if balanced:
        weights = class_balanced_weights(labels, hparams["n_classes"], hparams["class_weight_offset"])
        check_weight_file(hparams["train_annotation"], weights)
    rank, world_size = rank_and_world_size()
    try:
        sampler = BalancedSampler(weights, hparams["draws_per_epoch"], balanced and hparams["replacement"], hparams["seed"])
        return MixupBatchSampler(
            sampler, len(weights), hparams["batch_size"], hparams["mixup_rate"], hparams["seed"], rank=rank, world_size=world_size
        )
    except ValueError as error:
        raise InputError(f"{error} (batch_size, mixup_rate, draws_per_epoch, replacement, number of processes)") from None


def check_weight_file(annotation: str | Path, weights: np.ndarray) -> None:
    """Compares the sampling weights with those that the published code has beside its data file, and warns where they differ.

    The weights of `train.json` are in `train_weight.csv`, one number a line.
    """
    file = Path(annotation).with_name(f"{Path(annotation).stem}_weight.csv")
    if Path(annotation).suffix != ".json" or not file.is_file():
        return
    fault = None
    try:
        published = np.loadtxt(file, ndmin=1)
    except ValueError as error:
        fault = f"is not one number a line ({error})"
    else:
        if len(published) != len(weights):
            fault = f"has {len(published)} weights for {len(weights)} clips"
        elif n_differ := len(weights) - np.isclose(published, weights, rtol=1e-6, atol=0).sum():
            fault = f"differs in {n_differ} of {len(weights)} weights"
    if fault:
        logger.warning("%s %s. It is not used: training draws with the weights computed from the labels.", file, fault)
