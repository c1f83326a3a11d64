"""`main`: the one body behind every recipe's `train.py`: YAML -> data -> fit -> evaluate -> a tagger's folder.

The YAML declares the whole pipeline; the recipes in this repository are the examples.
"""

import dataclasses
import errno
import os
import signal
import sys
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.distributed import ddp_init_group, if_main_process, run_on_main
from speechbrain.utils.logger import get_logger

from psla_sb.brain import Interrupted, TaggingBrain
from psla_sb.checkpoints import trained_modules
from psla_sb.command_line import CommandLine, load_hparams
from psla_sb.dataio.audio import AudioError
from psla_sb.dataio.dataset import CROPS, TaggingDataset, end_workers, init_worker
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import BalancedSampler, MixupBatchSampler, class_balanced_weights
from psla_sb.definitions import plain_definitions, read_definitions
from psla_sb.errors import InputError
from psla_sb.evaluation import evaluate, example, results_table
from psla_sb.export import export_tagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes import chain
from psla_sb.lobes.features import n_samples_for
from psla_sb.score_files import open_scores
from psla_sb.sources import load_pretrained_tagger

logger = get_logger(__name__)

EXIT_BAD_INPUT = 2
# sysexits.h: a temporary failure, try again. torchrun does not pass it on.
EXIT_INTERRUPTED = 75
# a file size limit is how some clusters enforce a quota
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(recipe, arguments=None, job=None):
    """Runs a recipe; what is wrong with the input is printed without a traceback.

    Arguments
    ---------
    recipe : str
        The recipe's script: a YAML file that is not found from the current folder is looked for beside it.
    arguments : list of str, optional
        The command line, by default `sys.argv[1:]`.
    job : callable, optional
        What is done with the YAML file, the run options and the overrides, by default `run`.

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
    handlers = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    try:
        file, run_opts, overrides = CommandLine.from_command_line_args(arguments)
        beside = Path(recipe).resolve().parent / file
        if not Path(file).is_file() and not beside.is_file():
            raise InputError(f"{file}: no such file, neither here nor in {beside.parent.parent}")
        try:
            torch.empty(0, device=run_opts.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"--device={run_opts.device} cannot be used: {reason}") from None
        (job or run)(file if Path(file).is_file() else beside, run_opts, overrides)
    except Interrupted:
        if if_main_process():
            print("Interrupted, and saved. The same command goes on from here.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        file = error.filename2 or error.filename or "a file of the output folder"
        print(
            f"error: {file}: cannot be written ({error.strerror}). All that was saved before is as it was: make room, and the same "
            "command goes on from it.",
            file=sys.stderr,
        )
        sys.exit(EXIT_BAD_INPUT)
    except InputError as error:
        # a broken sound file is known only to the process that read it
        if if_main_process() or isinstance(error, AudioError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit("Stopped at once. The same command goes on from what was saved last.")
    finally:
        for signum, handler in zip(STOP_SIGNALS, handlers, strict=True):
            signal.signal(signum, handler)
        end_workers()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


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
        from psla_sb.plots import write_pictures

        write_pictures(brain, dataset, name, vocabulary, train_labels)
    return results


def stop(signum, frame):
    """A signal handler for where nothing has to be saved first.

    Example
    -------
    >>> stop(signal.SIGTERM, None)
    Traceback (most recent call last):
    ...
    psla_sb.brain.Interrupted
    """
    raise Interrupted


def start_processes(run_opts):
    """Joins the processes that torchrun has started, if it has.

    Returns
    -------
    RunOptions
        With defaults for where the process runs: gloo without a GPU, no progress bars where nobody looks.

    Example
    -------
    >>> start_processes(CommandLine.from_dictionary({"noprogressbar": True})).noprogressbar
    True
    """
    defaults = {}
    if not torch.cuda.is_available() or str(run_opts.device).startswith("cpu"):
        defaults["distributed_backend"] = "gloo"
    if not sys.stderr.isatty():
        defaults["noprogressbar"] = True
    defaults = {key: value for key, value in defaults.items() if key not in run_opts.overridden_args}
    run_opts = dataclasses.replace(run_opts, **defaults, overridden_args=run_opts.overridden_args | set(defaults))
    ddp_init_group(run_opts)
    return run_opts


def prepare(hparams):
    """Runs the steps that write the annotations, unless `skip_prep` is set.

    Returns
    -------
    Vocabulary
        The classes.

    Raises
    ------
    InputError
        A step fails, or there are not `n_classes` classes.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> hparams = {"skip_prep": True, "prepare": [], "class_list": folder / "classes.csv", "n_classes": 2}
    >>> Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]).to_csv(hparams["class_list"])
    >>> prepare(hparams)
    Vocabulary(2 classes, 'Bell' to 'Rain')
    """
    if not hparams["skip_prep"]:
        for step in hparams["prepare"]:
            run_on_main(step)
    vocabulary = Vocabulary.from_csv(hparams["class_list"])
    if len(vocabulary) != hparams["n_classes"]:
        raise InputError(
            f"{hparams['class_list']} has {len(vocabulary)} classes, but n_classes is {hparams['n_classes']}: "
            f"pass --n_classes={len(vocabulary)}"
        )
    return vocabulary


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


def crop_of(key, hparams):
    """What `train_crop` or `eval_crop` says, by default the first samples.

    Raises
    ------
    InputError
        There is no such crop.

    Example
    -------
    >>> crop_of("eval_crop", {"eval_crop": "random"})
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: eval_crop must be one of first, centre, not 'random'
    """
    crop, allowed = hparams.get(key, "first"), [name for name in CROPS if key == "train_crop" or name != "random"]
    if crop not in allowed:
        raise InputError(f"{key} must be one of {', '.join(allowed)}, not {crop!r}")
    return crop


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
