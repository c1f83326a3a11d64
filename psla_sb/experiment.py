"""`main`: the one body behind every recipe's `train.py`: YAML -> data -> fit -> evaluate -> a tagger's folder.

The YAML declares the whole pipeline; the recipes in this repository are the examples.
"""

import dataclasses
import difflib
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

from psla_sb.aggregation import average_weights
from psla_sb.brain import FIGURES, Interrupted, TaggingBrain, prediction_path, read_results, trained_modules, write_results
from psla_sb.checkpoints import atomic_write, load_into, load_weights, save_weights, snapshot_path
from psla_sb.dataio.audio import AudioError
from psla_sb.dataio.dataset import TaggingDataset, end_workers, ignore_signals
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import BalancedSampler, MixupBatchSampler, class_balanced_weights
from psla_sb.errors import InputError
from psla_sb.export import export_tagger
from psla_sb.inference import AudioTagger
from psla_sb.interop import load_pretrained_tagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.features import n_samples_for
from psla_sb.metrics import summarize

logger = get_logger(__name__)

EXIT_BAD_INPUT = 2
# sysexits.h: a temporary failure, try again. torchrun does not pass it on.
EXIT_INTERRUPTED = 75
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
        With status 2, if the input is wrong; 75, if the run was interrupted by SIGTERM or Ctrl-C and has saved its state.

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
    except InputError as error:
        # a broken sound file is known only to the process that read it
        if if_main_process() or isinstance(error, AudioError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit("Stopped without saving.")
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
        "worker_init_fn": ignore_signals,
        "pin_memory": brain.device_type == "cuda",
    }
    valid_set, _ = tagging_dataset("valid", hparams, vocabulary)
    valid_loader = {**loader, "batch_size": hparams["valid_batch_size"]}
    train_set, train_labels = tagging_dataset("train", hparams, vocabulary)
    brain.fit(
        hparams["epoch_counter"],
        train_set,
        valid_set,
        train_loader_kwargs={**loader, "batch_sampler": train_batches(hparams, train_labels)},
        valid_loader_kwargs=valid_loader,
    )
    test_set = tagging_dataset("test", hparams, vocabulary)[0] if hparams["test_annotation"] else None
    results = evaluate(brain, valid_set, test_set, valid_loader)
    if if_main_process():
        export_tagger(Path(folder) / "tagger", Path(folder) / "hyperparams.yaml", brain.hparams.modules, vocabulary)
        logger.info("\n%s\n\n%s", results_table(results, hparams["published"]), example(folder, test_set or valid_set, vocabulary))
        # matplotlib is slow to import, and only this process draws
        from psla_sb.plots import write_pictures

        write_pictures(brain, test_set or valid_set, "test" if test_set else "valid", vocabulary, train_labels)
    return results


def start_processes(run_opts):
    """Joins the processes that torchrun has started, if it has.

    Returns
    -------
    RunOptions
        With defaults for where the process runs: gloo without a GPU, no progress bars where nobody looks.
    """
    defaults = {}
    if not torch.cuda.is_available():
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


def load_hparams(file, overrides):
    """Builds what a YAML file describes.

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
            raise InputError(
                f"{file} needs --{key}=...: the folder with the data set (the recipe's README.md says what has to be in it). "
                "Without any data, run hparams/mini.yaml: it makes its own."
            )
    missing = [key for key in REQUIRED_KEYS if key not in keys]
    if missing:
        raise InputError(f"{file} has no key {', '.join(missing)}; see recipes/AudioSet/hparams/psla.yaml for what each is")
    try:
        with open(file, encoding="utf-8") as stream:
            hparams = load_hyperpyyaml(stream, overrides)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, ruamel.yaml.YAMLError) as error:
        reason = ": ".join(map(str, error.args)) or error
        raise InputError(f"{file}: what it describes cannot be built: {type(error).__name__}: {reason}") from error
    for key in PATH_KEYS:
        if not isinstance(hparams[key], str):
            raise InputError(f"{file}: the key '{key}' must be a path, not {hparams[key]!r} (a number needs quotes: '\"2024\"')")
    return hparams


def tagging_dataset(name, hparams, vocabulary):
    """The data set of `train_annotation`, `valid_annotation` or `test_annotation`; training labels are enhanced, if asked for.

    Returns
    -------
    (TaggingDataset, LabelSets)
    """
    manifest = Manifest.from_file(hparams[f"{name}_annotation"], hparams["data_folder"])
    labels = manifest.label_sets(vocabulary)
    if name == "train" and hparams["label_enhancement"] is not None:
        labels = hparams["label_enhancement"](manifest, labels, vocabulary)
    sample_rate, n_frames = hparams["sample_rate"], hparams["n_frames"]
    n_samples = None if n_frames is None else n_samples_for(n_frames, sample_rate)
    return TaggingDataset(manifest, labels, len(vocabulary), sample_rate, n_samples), labels


def train_batches(hparams, labels):
    """The batch sampler of training: class-balanced draws with replacement, or a shuffle; then mixup's partners."""
    balanced = hparams["balanced_sampling"]
    weights = (
        class_balanced_weights(labels, hparams["n_classes"], hparams["class_weight_offset"]) if balanced else np.ones(len(labels))
    )
    if balanced:
        check_weight_file(hparams["train_annotation"], weights)
    sampler = BalancedSampler(weights, hparams["draws_per_epoch"], balanced and hparams["replacement"], hparams["seed"])
    return MixupBatchSampler(
        sampler,
        len(labels),
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


def evaluate(brain, valid_set, test_set, loader_kwargs):
    """Scores the last epochs, the best epoch, the weight average and the ensemble of all epochs; adds them to `results.json`.

    On AudioSet there is no validation set: the evaluation clips are scored after every epoch, and those scores serve here.

    Arguments
    ---------
    brain : TaggingBrain
        After `fit`.
    valid_set : TaggingDataset
        What each epoch was scored on.
    test_set : TaggingDataset or None
        What to report on, if not on `valid_set`.
    loader_kwargs : dict
        For both sets.

    Returns
    -------
    dict
        What is written to `results.json`.

    Raises
    ------
    InputError
        No epoch has been trained.
    """
    hparams = brain.hparams
    folder = hparams.output_folder
    results = read_results(folder)
    epochs = results.get("epochs")
    if not epochs:
        raise InputError(f"{folder}: no trained epoch to evaluate here; train first, without --test_only")
    numbers = [epoch["epoch"] for epoch in epochs]
    averaged = [number for number in numbers if number >= hparams.average_start] or numbers[-1:]
    best = max(epochs, key=lambda epoch: epoch["mAP"])["epoch"]

    def score(path_or_state, name, dataset):
        state = load_weights(path_or_state) if isinstance(path_or_state, Path) else path_or_state
        load_into(trained_modules(hparams.modules), state, name)
        brain.evaluate(dataset, test_loader_kwargs=dict(loader_kwargs))
        if if_main_process():
            with atomic_write(prediction_path(folder, name)) as temporary:
                np.save(temporary, brain.stats.scores.numpy())
        return brain.stats.scores.numpy(), brain.stats.targets.numpy()

    dataset, prefix = (valid_set, "valid") if test_set is None else (test_set, "test")
    average = average_weights([snapshot_path(folder, number) for number in averaged])
    scores, targets = score(average, f"{prefix}_weight_average", dataset)
    evaluation = {"weight_average": {**summarize(scores, targets), "epochs": averaged}}
    if test_set is None:
        each = {number: {name: epochs[i][name] for name in FIGURES} for i, number in enumerate(numbers)}
        total = sum(np.load(prediction_path(folder, f"valid_epoch_{number:02d}")).astype(np.float64) for number in numbers)
    else:
        each, total = {}, 0.0
        for number in numbers:
            scores, _ = score(snapshot_path(folder, number), f"test_epoch_{number:02d}", dataset)
            each[number], total = summarize(scores, targets), total + scores.astype(np.float64)
    ensemble = total / len(numbers)
    evaluation |= {
        "last": {**{name: each[numbers[-1]][name] for name in FIGURES}, "epochs": numbers[-1:]},
        "best": {**{name: each[best][name] for name in FIGURES}, "epochs": [best]},
        "last_epochs_mean": {**{name: float(np.mean([each[n][name] for n in averaged])) for name in FIGURES}, "epochs": averaged},
        "ensemble": {**summarize(ensemble, targets), "epochs": numbers},
        "chance": {"mAP": float(targets.mean(axis=0)[targets.any(axis=0)].mean())},
    }
    load_into(trained_modules(hparams.modules), average)
    results["evaluation"] = evaluation
    if if_main_process():
        with atomic_write(prediction_path(folder, f"{prefix}_ensemble")) as temporary:
            np.save(temporary, ensemble.astype(np.float32))
        save_weights(trained_modules(hparams.modules), Path(folder) / "snapshots" / "average.safetensors")
        write_results(folder, results)
    return results


def example(folder, dataset, vocabulary):
    """A clip of a data set with its true labels, and what the exported tagger says of it.

    Returns
    -------
    str
    """
    clip = dataset.data[0]
    tags = AudioTagger.from_folder(Path(folder) / "tagger").tag_file(clip["wav"])
    return "\n".join(
        [
            f"An example, {clip['wav']}",
            "  its labels: " + ", ".join(vocabulary.names[vocabulary.index(mid)] for mid in clip["labels"]),
            "  its tags:   " + ", ".join(f"{tag.label} {tag.score:.2f}" for tag in tags),
            f"Tag your own sounds: psla-tag --model {Path(folder) / 'tagger'} FILE...",
        ]
    )


ROWS = {
    "chance": "chance (mean class prior)",
    "last": "last epoch",
    "best": "best epoch on the validation set",
    "last_epochs_mean": "mean of the last epochs",
    "weight_average": "average of the last epochs' weights",
    "ensemble": "ensemble of all epochs' predictions",
}


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
