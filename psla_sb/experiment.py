"""`main`: the one body behind every recipe's `train.py`: YAML -> data -> fit -> evaluate -> a tagger's folder.

The YAML declares the whole pipeline; the recipes in this repository are the examples.
"""

import dataclasses
import difflib
import errno
import os
import signal
import sys
from pathlib import Path

import numpy as np
import ruamel.yaml
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import ddp_init_group, if_main_process, run_on_main
from speechbrain.utils.logger import get_logger
from speechbrain.utils.run_opts import RunOptions

from psla_sb.aggregation import open_scores
from psla_sb.brain import Interrupted, TaggingBrain
from psla_sb.dataio.audio import AudioError
from psla_sb.dataio.dataset import CROPS, TaggingDataset, collate, end_workers, init_worker
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import BalancedSampler, MixupBatchSampler, class_balanced_weights
from psla_sb.errors import InputError
from psla_sb.evaluation import evaluate, example, results_table
from psla_sb.export import export_tagger
from psla_sb.interop import load_pretrained_tagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.features import n_samples_for

logger = get_logger(__name__)

EXIT_BAD_INPUT = 2
# sysexits.h: a temporary failure, try again. torchrun does not pass it on.
EXIT_INTERRUPTED = 75
# a file size limit is how some clusters enforce a quota
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Keys that a recipe's YAML file needs, besides those that its own parts refer to. Looked for before anything is done: some are
# used only at the end of a training of days.
PATH_KEYS = ("data_folder", "output_folder", "class_list", "train_annotation", "valid_annotation")
REQUIRED_KEYS = (
    *PATH_KEYS,
    *(
        "seed",
        "test_annotation",
        "skip_prep",
        "prepare",
        "sample_rate",
        "n_classes",
        "n_frames",
        "balanced_sampling",
        "mixup_rate",
        "label_enhancement",
    ),
    *("compute_features", "mean_var_norm", "mixup", "spec_augment", "embedding_model", "classifier", "modules"),
    *("batch_size", "valid_batch_size", "class_weight_offset", "draws_per_epoch", "replacement", "num_workers"),
    *("average_start", "epoch_counter", "optimizer", "schedule", "train_logger", "checkpointer", "published"),
)


class CommandLine(RunOptions):
    """SpeechBrain's command line, whose overrides of YAML keys keep `=` and `: ` in their values and cannot be abbreviated.

    Example
    -------
    >>> file, run_opts, overrides = CommandLine.from_command_line_args(["psla.yaml", "--device=cpu", "--data_folder=/d/a=b"])
    >>> file, run_opts["device"], overrides
    ('psla.yaml', 'cpu', {'data_folder': '/d/a=b'})
    """

    @classmethod
    def _create_parser(cls):
        parser = RunOptions._create_parser()
        parser.allow_abbrev = False
        for action in parser._actions:
            if action.dest == "optimizer_step_limit":
                # SpeechBrain leaves it a string, which no step number is equal to or above
                action.type = int
        parser.description = "Trains a tagger as a YAML file says, and evaluates it. --KEY=VALUE overrides any key of the file."
        return parser

    @staticmethod
    def _convert_to_yaml(overrides):
        values, arguments = {}, list(overrides)
        while arguments:
            argument = arguments.pop(0)
            if not argument.startswith("--"):
                raise InputError(f"'{argument}': an override of a YAML key is written --KEY=VALUE")
            key, equals, value = argument[2:].partition("=")
            if not equals:
                if not arguments or arguments[0].startswith("--"):
                    raise InputError(f"'{argument}' has no value: an override of a YAML key is written --KEY=VALUE")
                value = arguments.pop(0)
            try:
                values[key] = ruamel.yaml.YAML().load(value)
            except ruamel.yaml.YAMLError:
                values[key] = value
            # a path with '#', ': ' or a date in it is text; so is all that is not meant as YAML
            number = isinstance(values[key], (bool, int, float)) or values[key] is None
            if not value.lstrip().startswith(("{", "[", "!", '"', "'")) and ("#" in value or not number):
                values[key] = value
        return values


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
    brain = TaggingBrain(hparams["modules"], hparams["optimizer"], hparams, run_opts, hparams["checkpointer"])
    if hparams.get("pretrained_tagger") is not None:
        transfer = load_pretrained_tagger(hparams["pretrained_tagger"], hparams["modules"])
        logger.info("Starting from %s: %s", hparams["pretrained_tagger"], transfer)
    for signum in STOP_SIGNALS:
        signal.signal(signum, brain.request_stop)
    loader = {
        "num_workers": hparams["num_workers"],
        "worker_init_fn": init_worker,
        "collate_fn": collate,
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
        export_tagger(Path(folder) / "tagger", Path(folder) / "hyperparams.yaml", brain.hparams.modules, vocabulary)
        logger.info("\n%s\n\n%s", results_table(results, hparams["published"]), example(folder, dataset, vocabulary))
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
    >>> start_processes(RunOptions.from_dictionary({"noprogressbar": True})).noprogressbar
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


def load_hparams(file, overrides, required=REQUIRED_KEYS, paths=PATH_KEYS):
    """Builds what a YAML file describes.

    Arguments
    ---------
    file : str or Path
        The YAML file.
    overrides : dict
        Values that replace those of its keys.
    required, paths : sequence of str
        Keys that must be there, and those of them whose values must be paths; by default those of a training.

    Raises
    ------
    InputError
        The file is not YAML, an override names no key of it, a key that must be given is not, or something that the file
        describes cannot be built.

    Example
    -------
    >>> file = getfixture("tmp_path") / "psla.yaml"
    >>> _ = file.write_text("\\n".join(f"{key}: x" for key in REQUIRED_KEYS))
    >>> load_hparams(file, {"data_folder": "/data"})["data_folder"]
    '/data'
    >>> load_hparams(file, {"data_folder": "/data", "batchsize": 1})
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: ...psla.yaml has no key 'batchsize'. Did you mean 'batch_size'?
    """
    try:
        keys = ruamel.yaml.YAML().load(Path(file).read_text(encoding="utf-8"))
    except (ruamel.yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a YAML file: {error}") from None
    if not isinstance(keys, dict):
        raise InputError(f"{file}: has no keys; recipes/AudioSet/hparams/psla.yaml is an example of a recipe's file")
    for key in overrides:
        if key not in keys:
            near = difflib.get_close_matches(key, [*map(str, keys), *RunOptions().keys()], n=1)
            raise InputError(f"{file} has no key '{key}'." + (f" Did you mean '{near[0]}'?" if near else ""))
    for key, value in keys.items():
        if getattr(value, "tag", None) is not None and value.tag.value == "!PLACEHOLDER" and key not in overrides:
            what = (
                "the folder with the data set, see the recipe's README.md" if key == "data_folder" else "see the key in that file"
            )
            raise InputError(f"{file} needs --{key}=... ({what}). Without any data, run hparams/mini.yaml: it makes its own.")
    missing = [key for key in required if key not in keys]
    if missing:
        raise InputError(f"{file} has no key {', '.join(missing)}; see recipes/AudioSet/hparams/psla.yaml for what each is")
    # before anything is built: building makes folders
    check_paths(file, {key: overrides[key] for key in paths if isinstance(overrides.get(key, ""), (int, float, type(None)))})
    try:
        with open(file, encoding="utf-8") as stream:
            hparams = load_hyperpyyaml(stream, overrides)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, ruamel.yaml.YAMLError) as error:
        reason = ": ".join(map(str, error.args)) or error
        raise InputError(f"{file}: what it describes cannot be built: {type(error).__name__}: {reason}") from error
    check_paths(file, {key: hparams[key] for key in paths})
    return hparams


def check_paths(file, values):
    """Refuses values of path keys that are no text.

    Raises
    ------
    InputError
        One is not.

    Example
    -------
    >>> check_paths("mini.yaml", {"output_folder": 2024})
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: mini.yaml: the key 'output_folder' must be a path, not 2024 (a number needs quotes: '"2024"')
    """
    for key, value in values.items():
        if not isinstance(value, str):
            raise InputError(f"{file}: the key '{key}' must be a path, not {value!r} (a number needs quotes: '\"2024\"')")


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
    return TaggingDataset(manifest, labels, len(vocabulary), sample_rate, n_samples, teacher, crop, hparams["seed"]), labels


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
