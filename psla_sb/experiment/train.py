"""`main`: the one body behind every recipe's `train.py`: YAML -> data -> fit -> evaluate -> a tagger's folder.

The YAML declares the whole pipeline; the recipes in this repository are the examples.
"""

import os
import signal
from pathlib import Path

import numpy as np
import speechbrain as sb
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.logger import get_logger

from psla_sb.checkpoints.definitions import plain_definitions, read_definitions
from psla_sb.checkpoints.sources import load_pretrained_tagger
from psla_sb.checkpoints.tagger_folder import export_tagger
from psla_sb.checkpoints.weights import trained_modules
from psla_sb.dataio.dataset import TaggingDataset, init_worker
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import BalancedSampler, MixupBatchSampler, class_balanced_weights
from psla_sb.errors import InputError
from psla_sb.experiment import launch
from psla_sb.experiment.brain import TaggingBrain
from psla_sb.experiment.evaluation import evaluate, example, results_table
from psla_sb.experiment.hparams import crop_of, load_hparams, prepare
from psla_sb.experiment.launch import STOP_SIGNALS, start_processes, stop
from psla_sb.labels.teacher_scores import open_scores
from psla_sb.lobes import chain
from psla_sb.lobes.features import n_samples_for

logger = get_logger(__name__)


def main(recipe, arguments=None):
    """Runs a recipe's `train.py`; what is wrong with the input is printed without a traceback.

    Arguments
    ---------
    recipe : str
        The recipe's script: a YAML file that is not found from the current folder is looked for beside it.
    arguments : list of str, optional
        The command line, by default `sys.argv[1:]`.

    Raises
    ------
    SystemExit
        With status 2, if the input is wrong or the disk is full; 75, if the run was interrupted by SIGTERM or Ctrl-C and has saved
        its state.

    Example
    -------
    >>> main("recipes/AudioSet/train.py", ["hparams/nothing.yaml"])
    Traceback (most recent call last):
    ...
    SystemExit: 2
    """
    launch.main(recipe, run, arguments)


def run(hparams_file, run_opts, overrides):
    """One experiment, from the YAML file to the figures.

    Arguments
    ---------
    hparams_file : str or Path
        The YAML file.
    run_opts : RunOptions
        SpeechBrain's run options.
    overrides : dict
        Values that replace those of the file's keys.

    Returns
    -------
    dict
        What is written to `results.json`.

    Raises
    ------
    InputError
        See the message.
    """
    run_opts = start_processes(run_opts)
    hparams = load_hparams(hparams_file, overrides)
    folder = hparams["output_folder"]
    sb.create_experiment_directory(folder, hparams_file, overrides)
    vocabulary = prepare(hparams)
    # with it a snapshot can be loaded from the run's folder alone
    run_on_main(vocabulary.to_csv, [Path(folder) / "class_labels_indices.csv"])
    n_samples = None if hparams["n_frames"] is None else n_samples_for(hparams["n_frames"], hparams["sample_rate"])
    chain.check(hparams["modules"], hparams["sample_rate"], hparams["n_classes"], n_samples)
    # what cannot be exported or saved is refused before the training, not after it
    plain_definitions(read_definitions(Path(folder) / "hyperparams.yaml"), hparams)
    hparams["checkpointer"].add_recoverables(trained_modules(hparams["modules"]))
    brain = hparams.get("brain_class", TaggingBrain)(
        hparams["modules"], hparams["optimizer"], hparams, run_opts, hparams["checkpointer"]
    )
    if hparams.get("pretrained_tagger") is not None:
        transfer = load_pretrained_tagger(hparams["pretrained_tagger"], hparams["modules"])
        logger.info("Starting from %s: %s", hparams["pretrained_tagger"], transfer)
    for signum in STOP_SIGNALS:
        signal.signal(signum, brain.request_stop)
    loader = {
        "num_workers": hparams["num_workers"],
        "worker_init_fn": init_worker,
        "pin_memory": brain.device_type == "cuda",
    }
    valid_set, _ = tagging_dataset("valid", hparams, vocabulary)
    valid_loader = {**loader, "batch_size": hparams["valid_batch_size"]}
    train_set, train_labels = tagging_dataset("train", hparams, vocabulary)
    batches = train_batches(hparams, train_labels)
    if hparams.get("on_bad_audio") == "skip":
        train_set.redraw = batches.redraw
    # opened before the training: what is wrong with it should not show days later
    name, dataset = "valid", valid_set
    if hparams["test_annotation"]:
        name, dataset = "test", tagging_dataset("test", hparams, vocabulary)[0]
    brain.fit(
        hparams["epoch_counter"],
        train_set,
        valid_set,
        train_loader_kwargs={**loader, "batch_sampler": batches},
        valid_loader_kwargs=valid_loader,
    )
    # what is scored is on disk at once: there is nothing more to save
    for signum in STOP_SIGNALS:
        signal.signal(signum, stop)
    results = evaluate(brain, dataset, name, vocabulary, valid_loader)
    if if_main_process():
        export_tagger(Path(folder) / "tagger", Path(folder) / "hyperparams.yaml", hparams, vocabulary)
        logger.info("\n%s\n\n%s", results_table(results, hparams["published"]), example(brain, dataset, vocabulary))
        # matplotlib is slow to import, and only this process draws
        from psla_sb.plots.training import write_pictures

        write_pictures(brain, dataset, name, vocabulary, train_labels)
    return results


def tagging_dataset(name, hparams, vocabulary):
    """The data set of `train_annotation`, `valid_annotation` or `test_annotation`.

    For training, labels are enhanced, and `teacher_scores` are read, if asked for.

    Returns
    -------
    (TaggingDataset, LabelSets)

    Raises
    ------
    InputError
        The annotation is wrong, or the teacher's scores are not of its clips.
    """
    manifest = Manifest.from_file(hparams[f"{name}_annotation"], hparams["data_folder"])
    labels = manifest.label_sets(vocabulary)
    if name == "train" and hparams["label_enhancement"] is not None:
        labels = hparams["label_enhancement"](manifest, labels, vocabulary)
    sample_rate, n_frames = hparams["sample_rate"], hparams["n_frames"]
    n_samples = None if n_frames is None else n_samples_for(n_frames, sample_rate)
    teacher = None
    if name == "train" and hparams.get("teacher_scores") is not None:
        teacher = open_scores(hparams["teacher_scores"], manifest, vocabulary)
    crop = crop_of("train_crop" if name == "train" else "eval_crop", hparams)
    seed = hparams["seed"]
    dataset = TaggingDataset(manifest, labels, len(vocabulary), sample_rate, n_samples, teacher, crop, seed, compact=True)
    return dataset, labels


def train_batches(hparams, labels):
    """The batch sampler of training: class-balanced draws with replacement, or a shuffle; then mixup's partners."""
    balanced = hparams["balanced_sampling"]
    weights = (
        class_balanced_weights(labels, hparams["n_classes"], hparams["class_weight_offset"]) if balanced else np.ones(len(labels))
    )
    if balanced:
        check_weight_file(hparams["train_annotation"], weights)
    try:
        return _batches(weights, hparams)
    except ValueError as error:
        raise InputError(f"{error} (batch_size, mixup_rate, draws_per_epoch, replacement, number of processes)") from None


def _batches(weights, hparams):
    balanced = hparams["balanced_sampling"]
    sampler = BalancedSampler(weights, hparams["draws_per_epoch"], balanced and hparams["replacement"], hparams["seed"])
    return MixupBatchSampler(
        sampler,
        len(weights),
        hparams["batch_size"],
        hparams["mixup_rate"],
        hparams["seed"],
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )


def check_weight_file(annotation, weights):
    """Compares the sampling weights with those that the published code has beside its data file, and warns where they differ.

    Arguments
    ---------
    annotation : str or Path
        The training annotation. The weights of `train.json` are in `train_weight.csv`, one number a line.
    weights : np.ndarray
        float64 [clips], the ones that are used.

    Example
    -------
    >>> check_weight_file("train.csv", np.ones(3))
    """
    file = Path(annotation).with_name(f"{Path(annotation).stem}_weight.csv")
    if Path(annotation).suffix != ".json" or not file.is_file():
        return
    try:
        published = np.loadtxt(file, ndmin=1)
    except ValueError as error:
        fault = f"is not one number a line ({error})"
    else:
        if len(published) != len(weights):
            fault = f"has {len(published)} weights for {len(weights)} clips"
        else:
            n_differ = len(weights) - np.isclose(published, weights, rtol=1e-6, atol=0).sum()
            fault = f"differs in {n_differ} of {len(weights)} weights" if n_differ else None
    if fault:
        logger.warning("%s %s. It is not used: training draws with the weights computed from the labels.", file, fault)
