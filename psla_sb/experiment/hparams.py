"""A recipe's command line and its YAML file -> what they describe, or an error that says which key is wrong."""

import argparse
import contextlib
import copy
import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.run_opts import RunOptions

from psla_sb import add_version
from psla_sb.checkpoints.definitions import definitions_text, read_yaml, refer_to_plain_attributes
from psla_sb.checkpoints.trust import as_names
from psla_sb.dataio.dataset import CROPS
from psla_sb.errors import InputError
from psla_sb.files import wait_for
from psla_sb.labels.vocabulary import Vocabulary

# Keys that a recipe's YAML file needs, besides those that its own parts refer to. Looked for before anything is done: some are
# used only at the end of a training of days.
PATH_KEYS = ("data_folder", "output_folder", "class_list", "train_annotation", "valid_annotation")
REQUIRED_KEYS = (
    *PATH_KEYS,
    *("seed", "test_annotation", "skip_prep", "prepare", "sample_rate", "n_classes", "n_frames", "num_workers"),
    *("compute_features", "mean_var_norm", "spec_augment", "embedding_model", "classifier", "modules"),
    *("balanced_sampling", "class_weight_offset", "draws_per_epoch", "replacement", "mixup_rate", "label_enhancement"),
    *("batch_size", "valid_batch_size", "optimizer", "schedule", "average_start"),
    *("epoch_counter", "train_logger", "checkpointer", "published"),
)


def prepare(hparams: Mapping[str, Any]) -> Vocabulary:
    """Runs the steps that write the annotations, unless `skip_prep` is set, and reads the `n_classes` classes."""
    if not hparams["skip_prep"]:
        for step in hparams["prepare"]:
            run_on_main(step)
    files = [hparams[key] for key in ("class_list", "train_annotation", "valid_annotation", "test_annotation") if hparams[key]]
    for file in run_on_main(lambda: list(filter(os.path.exists, files))):
        wait_for(file)
    vocabulary = Vocabulary.from_csv(hparams["class_list"])
    if len(vocabulary) != hparams["n_classes"]:
        raise InputError(
            f"{hparams['class_list']} has {len(vocabulary)} classes, but n_classes is {hparams['n_classes']}: "
            f"pass --n_classes={len(vocabulary)}"
        )
    return vocabulary


def crop_of(key: str, hparams: Mapping[str, Any]) -> str:
    """What `train_crop` or `eval_crop` says, by default the first samples.

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


@dataclass(frozen=True)
class CommandLine(RunOptions):
    """SpeechBrain's command line, whose overrides of YAML keys keep `=` and `: ` in their values and cannot be abbreviated.

    `dry_run` asks `train.py` to say what it would do.

    Example
    -------
    >>> file, run_opts, overrides = CommandLine.from_command_line_args(["psla.yaml", "--device=cpu", "--data_folder=/d/a=b"])
    >>> file, run_opts["device"], overrides
    ('psla.yaml', 'cpu', {'data_folder': '/d/a=b'})
    """

    dry_run: bool = False

    @classmethod
    def _create_parser(cls) -> argparse.ArgumentParser:
        parser = RunOptions._create_parser()
        add_version(parser)
        said = "of train.py: prepare the data, try some steps, and say what the run would be and how long it would take"
        parser.add_argument("--dry_run", action="store_true", help=said)
        parser.allow_abbrev = False
        for action in parser._actions:
            if action.dest == "optimizer_step_limit":
                # SpeechBrain leaves it a string, which no step number is equal to or above
                action.type = int
        parser.description = (
            "Does what a YAML file says. --KEY=VALUE overrides any key of the file. --trust MODULE, which can be repeated, names a "
            "module whose classes a model that is loaded may be made of."
        )
        return parser

    @staticmethod
    def _convert_to_yaml(overrides: list[str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        trusted: list[str] = []
        arguments = list(overrides)
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
            if key == "trust" and isinstance(values[key], (str, list)):
                # as at every other command it can be given several times
                trusted += as_names(values[key])
        return {**values, "trust": trusted} if trusted else values


def load_hparams(
    file: str | Path,
    overrides: Mapping[str, Any],
    required: Sequence[str] = REQUIRED_KEYS,
    paths: Sequence[str] = PATH_KEYS,
    if_there: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Builds what a YAML file describes, with overrides of its keys, and of keys that it need not have (`if_there`).

    What is wrong with the file, or with an override, is an `InputError`: it is said before anything is built, if that can be known.

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
    return build_hparams(file, read_settings(file, overrides, required, paths, if_there), paths)


def read_settings(
    file: str | Path,
    overrides: Mapping[str, Any],
    required: Sequence[str] = REQUIRED_KEYS,
    paths: Sequence[str] = PATH_KEYS,
    if_there: Mapping[str, Any] | None = None,
    optional: Sequence[str] = ("trust",),
) -> dict[str, Any]:
    """Reads a YAML file with overrides, and resolves its references; arguments and errors are those of `load_hparams`."""
    keys = read_yaml(file)
    # what can be told to a recipe whose YAML file is of before there were such keys
    extra, given = {key: overrides.get(key, keys.get(key)) for key in optional}, {*overrides, "trust"}
    extra["trust"] = as_names(extra["trust"])
    overrides = {key: value for key, value in overrides.items() if key not in extra}
    overrides = {key: value for key, value in (if_there or {}).items() if key in keys} | overrides
    check_keys(file, keys, overrides, required)
    # before anything is built: building makes folders
    check_paths(file, {key: overrides[key] for key in paths if isinstance(overrides.get(key, ""), (int, float, type(None)))})
    resolved = resolve(file, overrides)
    # what the file says of them may refer to other keys
    return {**resolved, **{key: value if key in given or key not in resolved else resolved[key] for key, value in extra.items()}}


def check_keys(file: str | Path, keys: Mapping[str, Any], overrides: Mapping[str, Any], required: Sequence[str]) -> None:
    """Refuses overrides of keys that a file does not have, and a file without a key that is needed or without its value.

    Example
    -------
    >>> check_keys("mini.yaml", {"n_mels": 64}, {"mels": 32}, ["n_mels"])
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: mini.yaml has no key 'mels'. Did you mean 'n_mels'?
    """
    for key in overrides:
        if key not in keys:
            near = _near(key, list(map(str, keys)), list(RunOptions().keys()))
            raise InputError(f"{file} has no key '{key}'." + (f" Did you mean '{near}'?" if near else ""))
        if isinstance(overrides[key], Mapping) and not isinstance(keys[key], Mapping):
            # HyperPyYAML changes parts of blocks alone
            said = f"an override {{...}} changes parts of a block, and {file} has none at '{key}'"
            raise InputError(f"--{key}: {said}; write the block into the file, or take a recipe that has it")
    for key, value in keys.items():
        placeholder = getattr(value, "tag", None) is not None and value.tag.value == "!PLACEHOLDER"
        if placeholder and key not in overrides:
            what = (
                "the folder with the data set, see the recipe's README.md" if key == "data_folder" else "see the key in that file"
            )
            raise InputError(f"{file} needs --{key}=... ({what}). Without any data, run hparams/mini.yaml: it makes its own.")
        if placeholder and key == "data_folder" and not Path(str(overrides[key])).is_dir():
            raise InputError(f"{overrides[key]}: no such folder, which --data_folder names")
    missing = [key for key in required if key not in keys]
    if missing:
        raise InputError(f"{file} has no key {', '.join(missing)}; see recipes/AudioSet/hparams/psla.yaml for what each is")


def _near(key: str, keys: list[str], options: list[str]) -> str | None:
    """The key, or option, that one of another spelling is most likely to mean."""
    # `epochs` means number_of_epochs rather than debug_epochs, which has more letters of it
    containing = [other for other in keys if len(key) > 4 and key in other]
    both = keys + options
    near = difflib.get_close_matches(key, both, n=1, cutoff=0.75) or containing or difflib.get_close_matches(key, both, n=1)
    return near[0] if near else None


def build_hparams(file: str | Path, settings: Mapping[str, Any], paths: Sequence[str] = PATH_KEYS) -> dict[str, Any]:
    """Builds what `read_settings` has read of a file."""
    # parts of one's own may lie in a file beside the YAML file, or where the command is run
    sys.path += [folder for folder in (str(Path(file).resolve().parent), os.getcwd()) if folder not in sys.path]
    plain = {key: settings[key] for key in ("trust", "track") if key in settings}
    resolved = copy.deepcopy({key: value for key, value in settings.items() if key not in plain})
    with build_errors(file):
        if "embedding_model" in resolved:
            refer_to_plain_attributes(resolved, resolved)
        hparams = load_hyperpyyaml(definitions_text(resolved))
    check_paths(file, {key: hparams[key] for key in paths})
    return {**hparams, **plain}


def resolve(file: str | Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a YAML file says, with overrides of its keys, its references resolved; nothing is built.

    Example
    -------
    >>> file = getfixture("tmp_path") / "mine.yaml"
    >>> _ = file.write_text("lr: 0.1\\nschedule: !new:mine.Schedule {lr: !ref <lr>}")
    >>> resolve(file, {"lr": 0.5})["schedule"]["lr"]
    0.5
    """
    with build_errors(file), open(file, encoding="utf-8") as stream:
        return ruamel.yaml.YAML().load(resolve_references(stream, overrides).getvalue())


@contextlib.contextmanager
def build_errors(file: str | Path) -> Iterator[None]:
    """Turns what other people's constructors raise into an `InputError` that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = ": ".join(map(str, error.args)) or str(error)
        if isinstance(error, ImportError) and "psla_sb." in reason:
            reason += ". Modules have moved: CHANGELOG.md says where to"
        raise InputError(f"{file}: what it describes cannot be built: {type(error).__name__}: {reason}") from error


def check_paths(file: str | Path, values: Mapping[str, Any]) -> None:
    """Refuses values of path keys that are no text.

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
