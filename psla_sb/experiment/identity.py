"""What an output folder's run is: its settings, classes and clips; another run is refused there.

    settings    the YAML file and the command line        compared before anything is built
    contents    classes, clips, labels, processes         compared before the training

Both are in the folder's `identity.json` from the first training step on, and are compared at every start.
"""

import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hyperpyyaml.core import recursive_update
from speechbrain.utils.run_opts import RunOptions

from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.run_folder import CLASSES, HPARAMS, IDENTITY, prediction_path, read_results
from psla_sb.dataio.loudness import other_sound, some_loudness
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import rank_and_world_size
from psla_sb.errors import InputError
from psla_sb.experiment.hparams import resolve
from psla_sb.experiment.losses import DISTILLATION_WEIGHT
from psla_sb.files import write_json
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.teacher_scores import MatchedScores
from psla_sb.labels.vocabulary import Vocabulary

# Folders may be moved: what is in them is told by its content.
PLACES = ("data_folder", "output_folder", "resampled_folder")
# Of SpeechBrain's options, which may be given by the YAML file too, those that change weights.
OPTIONS = ("debug", "max_grad_norm", "skip_nonfinite_grads", "grad_accumulation_factor", "remove_vector_weight_decay")
# Keys that change no weight and no score; or whose files are compared by what they say (classes, clips, a teacher's scores); or
# that scores are stamped with (precision).
MAY_CHANGE = {
    *PLACES,
    *("class_list", "train_annotation", "valid_annotation", "test_annotation", "expected_clips", "teacher_scores"),
    *("skip_prep", "prepare", "resampled_format", "on_bad_audio", "trust"),
    *("num_workers", "valid_batch_size", "compile_model"),
    *("number_of_epochs", "epoch_counter", "patience", "average_start", "average_every", "validate_average"),
    *("published", "published_with"),
    *("target_precision", "report", "baseline", "propagated_labels"),
    *("train_logger", "track", "checkpointer"),
    *(set(RunOptions().keys()) - set(OPTIONS)),
}
OF_TEACHERS = ("distillation_weight", "distillation_temperature")
# What a file without the key means.
DEFAULTS = {
    **{"train_crop": "first", "eval_crop": "first", "distillation_weight": DISTILLATION_WEIGHT},
    **{"distillation_temperature": None, "ema_decay": None, "batch_norm_clips": None},
    **{"waveform_augment": "a list of 1", "waveform_augment.0": "= mixup"},
    "loss": "!name:psla_sb.experiment.brain.binary_cross_entropy",
    "brain_class": "!name:psla_sb.experiment.brain.TaggingBrain",
}
MOST_NAMED = 8

Settings = Mapping[str, Any]


def flat(settings: Settings) -> dict[str, Any]:
    """Lists what YAML nodes say by dotted names, each node that several keys refer to once.

    Example
    -------
    >>> import ruamel.yaml
    >>> flat(ruamel.yaml.YAML().load("classifier: !new:m.Pooling {n_heads: 4, sizes: [1, .inf]}"))
    {'classifier': '!new:m.Pooling', 'classifier.n_heads': 4, 'classifier.sizes': 'a list of 2', 'classifier.sizes.0': 1,
    'classifier.sizes.1': '.inf'}
    """
    found: dict[str, Any] = {}
    names: dict[int, str] = {}
    waiting: deque[tuple[str, Any]] = deque([("", settings)])
    # the keys of the file before what is in them: what several refer to is called as the file calls it
    while waiting:
        name, node = waiting.popleft()
        tag = getattr(getattr(node, "tag", None), "value", None)
        if not isinstance(node, dict | list):
            # once HyperPyYAML has built something, "(1, 2)" is read as a tuple, and a text before
            found[name] = _plain(getattr(node, "value", node)) if tag in (None, "!tuple") else f"{tag} {node.value}".rstrip()
        elif id(node) in names:
            found[name] = f"= {names[id(node)]}"
        else:
            names[id(node)] = name
            if name and (tag or isinstance(node, list) or not node):
                found[name] = tag or (f"a list of {len(node)}" if isinstance(node, list) else "{}")
            children = node.items() if isinstance(node, dict) else enumerate(node)
            waiting += [(f"{name}.{key}" if name else str(key), child) for key, child in children]
    return found


def _plain(value: Any) -> Any:
    """As JSON keeps it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) and math.isfinite(value) else _text(value)


def _text(value: Any) -> str:
    """As YAML writes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return "null" if value is None else str(value)


def changes(then: Settings, now: Settings, written: Settings) -> dict[str, tuple[Any, Any]]:
    """Finds the settings that differ and may not, as {name: (then, now)}; what only follows from others is not named.

    All are of `flat`: the run's settings and the present ones, resolved, and the present ones as the YAML file writes them, with
    the references that it has.
    """
    names = dict.fromkeys([*then, *now])
    differing = [name for name in names if then.get(name) != now.get(name)]
    differs = set(differing) | {name.partition(".")[0] for name in differing}

    def causes(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        # the longest part of the name that the file has: what is below it comes from a reference
        parts = name.split(".")
        at = next((key for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in written), name)
        referred = set(re.findall(r"<(\w+)", str(written.get(at, "")))) & differs - seen
        if not referred:
            return {name}
        below = {other for key in referred for other in differing if other == key or other.startswith(f"{key}.")}
        return set().union(*(causes(other, seen | referred) for other in below)) or {name}

    found: dict[str, tuple[Any, Any]] = {}
    for name in differing:
        if name.partition(".")[0] not in MAY_CHANGE:
            of_name = causes(name)
            if not of_name <= set(PLACES):
                found |= {cause: (then.get(cause), now.get(cause)) for cause in names if cause in of_name}
    # of a part that is another one altogether, what is in it is not named
    return {name: pair for name, pair in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def _with_options(settings: Settings, run_opts: RunOptions) -> dict[str, Any]:
    """Settings, and SpeechBrain's options that matter for the weights, wherever they are given."""
    given = {key: run_opts[key] for key in OPTIONS if key in run_opts.overridden_args or key not in settings}
    return {**settings, **given}


def check_settings(folder: str | Path, file: str | Path, settings: Settings, overrides: Settings, run_opts: RunOptions) -> None:
    """Refuses to go on in the output folder of a run with other settings than those that it was trained with.

    Arguments
    ---------
    file, overrides, settings
        The YAML file, what the command line has of its keys, and its keys without references.
    run_opts
        SpeechBrain's options.

    Raises
    ------
    InputError
        The message names each key, as the YAML file writes it, and what it was.
    """
    folder = Path(folder).absolute()
    if not has_begun(folder, settings):
        return
    if (folder / IDENTITY).is_file():
        then, now = read_identity(folder)["settings"], settings_of(file, overrides, run_opts)
    elif (folder / HPARAMS).is_file():
        # of a run of before there was an identity: keys that came or went since say nothing of it
        then, now = flat(read_yaml(folder / HPARAMS)), flat(_with_options(settings, run_opts))
        keys = [{name.partition(".")[0] for name in one} for one in (then, now)]
        common = (keys[0] & keys[1]) | set(DEFAULTS)
        then, now = ({name: value for name, value in one.items() if name.partition(".")[0] in common} for one in (then, now))
    elif has_checkpoint(settings):
        where = checkpoints_folder(settings)
        raise InputError(f"{where} has the checkpoints of a run, but not of {folder}: choose another checkpoints_dir")
    else:
        return
    written = read_yaml(file)
    recursive_update(written, dict(overrides))
    then, now = ({**_defaults(one), **one} for one in (then, now))
    if then.get("teacher_scores") is None and now.get("teacher_scores") is None:
        # which are of no matter without one, and had other values in the files of before
        then, now = ({name: value for name, value in one.items() if name not in OF_TEACHERS} for one in (then, now))
    found = changes(then, now, flat(written))
    n_trained, n_epochs = len(read_results(folder).get("epochs", [])), _limit(settings)
    if n_epochs is not None and n_epochs < n_trained:
        found["number_of_epochs"] = (n_trained, n_epochs)
    if found:
        said = [f"{name} was {_text(was)}, is {_text(value)}" for name, (was, value) in found.items()]
        more = [f"{len(said) - MOST_NAMED} more"] if len(said) > MOST_NAMED else []
        _refuse(folder, "; ".join(said[:MOST_NAMED] + more), _another(folder, found))


def _defaults(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in DEFAULTS.items() if name.partition(".")[0] not in settings}


def _limit(settings: Settings) -> int | None:
    counter = settings.get("epoch_counter")
    limit = counter.get("limit") if isinstance(counter, Mapping) else None
    return limit if isinstance(limit, int) else None


def settings_of(file: str | Path, overrides: Settings, run_opts: RunOptions) -> dict[str, Any]:
    """Lists the settings of a YAML file and the command line, wherever its folders are."""
    keys = read_yaml(file)
    places = {key: key.upper() for key in PLACES if keys.get(key, overrides.get(key)) is not None}
    known = {key: value for key, value in {**overrides, **places}.items() if key in keys}
    # of keys that the file need not have
    more = {key: overrides[key] for key in DEFAULTS if key in overrides and key not in keys}
    return flat(_with_options({**resolve(file, known), **more}, run_opts))


def checkpoints_folder(settings: Settings) -> Path:
    """Where a run's checkpoints are."""
    checkpointer = settings.get("checkpointer")
    folder = checkpointer.get("checkpoints_dir") if isinstance(checkpointer, Mapping) else None
    return Path(folder) if isinstance(folder, str) else Path(settings["output_folder"]) / "save"


def has_checkpoint(settings: Settings) -> bool:
    """Tells whether there is a checkpoint to go on from."""
    return any(checkpoints_folder(settings).glob("CKPT+*/CKPT.yaml"))


def has_begun(folder: Path, settings: Settings) -> bool:
    """Tells whether something was trained in an output folder."""
    return bool(read_results(folder).get("epochs")) or has_checkpoint(settings)


def _another(folder: Path, found: Mapping[str, tuple[Any, Any]]) -> Path:
    """A name for the folder of a run with these settings."""
    name, (_, value) = next(iter(found.items()))
    ending = re.sub(r"[^\w.=+-]+", "_", f"{name.rpartition('.')[2]}={_text(value)}")[:40]
    return folder.with_name(f"{folder.name}-{ending}")


def _refuse(folder: Path, what: str, another: Path) -> None:
    raise InputError(
        f"{folder} has a run of its own: {what}. Go on with what it was, or choose another folder: --output_folder={another}"
    )


def read_identity(folder: str | Path) -> dict[str, Any]:
    """What the `identity.json` of a run says."""
    path = Path(folder) / IDENTITY
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); put back the one that the run wrote") from None
    if not (isinstance(identity, dict) and all(isinstance(identity.get(key), dict) for key in ("settings", "contents"))):
        raise InputError(f"{path}: does not say what run this is; put back the file that the run wrote")
    return identity


def contents_of(
    vocabulary: Vocabulary, sets: Mapping[str, tuple[Manifest, LabelSets]], teacher: Any, processes: int | None
) -> dict[str, Any]:
    """What settings do not tell: which classes, clips and labels a run has, a teacher's scores, how many processes train.

    `processes` is None if nothing is trained any more; how training clips sound is then of no matter.
    """
    of_sets = {
        name: {"clips": len(manifest), "ids": manifest.digest(("ID",)), "labels": labels.digest()}
        for name, (manifest, labels) in sets.items()
    }
    names = hashlib.sha256(json.dumps([vocabulary.mids, vocabulary.names]).encode()).hexdigest()
    sounds = some_loudness(sets["train"][0]) if "train" in sets and processes is not None else None
    return {
        "classes": names,
        "teacher_scores": _digest_of(teacher),
        # nothing is trained any more without processes
        "teacher_loss": None if teacher is None or processes is None else "mean",
        "processes": processes,
        "train_sounds": sounds,
        **of_sets,
    }


def _digest_of(scores: Any) -> str | None:
    """Of a thousand rows, as there are gigabytes of them; and of which clip has which row, if they were matched by ID."""
    if scores is None:
        return None
    rows = np.linspace(0, len(scores) - 1, min(1000, len(scores))).astype(int)
    digest = hashlib.sha256(str(scores.shape).encode() + np.ascontiguousarray(scores[rows]).tobytes())
    if isinstance(scores, MatchedScores):
        digest.update(scores.rows.tobytes())
    return digest.hexdigest()


def check_contents(folder: str | Path, settings: Settings, contents: Mapping[str, Any]) -> None:
    """Refuses to go on in a run's folder with other classes, clips or labels, or to train it by other processes."""
    every = [contents] * rank_and_world_size()[1]
    if len(every) > 1:
        torch.distributed.all_gather_object(every, contents)
    first = every[0]
    if any({**other, "train_sounds": 0} != {**first, "train_sounds": 0} for other in every) or any(
        _difference("train_sounds", first["train_sounds"], other["train_sounds"]) for other in every
    ):
        raise InputError(
            "the processes have read different annotations, class lists or sounds; do all machines see the same folders?"
        )
    folder = Path(folder).absolute()
    if not has_begun(folder, settings):
        return
    what = _old_differences(folder, contents)
    if (folder / IDENTITY).is_file():
        then = read_identity(folder)["contents"]
        what = (_difference(name, then.get(name), now) for name, now in contents.items())
    for difference in filter(None, what):
        _refuse(folder, difference, folder.with_name(f"{folder.name}-2"))


def _difference(name: str, was: Any, now: Any) -> str | None:
    if was == now or (name == "processes" and None in (was, now)):
        return None
    if name == "train_sounds":
        # none in a run of before they were measured, nor if a person has taken them out
        clip = other_sound(was, now) if isinstance(was, Mapping) and isinstance(now, Mapping) else None
        return clip and (
            f"training clip '{clip}' was {was[clip]['file']}, and {now[clip]['file']} is another sound "
            f"(if it is meant to be, take train_sounds out of {IDENTITY})"
        )
    if name == "classes":
        return "the class list has other classes or names, or in another order"
    if name == "teacher_scores":
        return "teacher_scores has other scores"
    if name == "teacher_loss":
        # in a run of before there was this entry
        return (
            "its loss was the sum of the labels' and the teacher's, which is their mean by distillation_weight now" if now else None
        )
    if name == "processes":
        return f"it was trained by {was} processes, which makes its batches, not by {now}"
    if was["clips"] != now["clips"]:
        return f"{name}_annotation had {was['clips']} clips, and has {now['clips']}"
    if was["ids"] != now["ids"]:
        return f"{name}_annotation has other clips, or in another order"
    return f"the clips of {name}_annotation have other labels"


def _old_differences(folder: Path, contents: Mapping[str, Any]) -> Iterator[str | None]:
    """Compares what a run of before there was `identity.json` has: its class list, and its scores of the validation set."""
    classes, scores = folder / CLASSES, prediction_path(folder, "valid_epoch_01")
    if classes.is_file():
        vocabulary = Vocabulary.from_csv(classes)
        yield _difference("classes", contents_of(vocabulary, {}, None, None)["classes"], contents["classes"])
    if scores.is_file() and (n_clips := len(np.load(scores, mmap_mode="r"))) != contents["valid"]["clips"]:
        yield f"valid_annotation had {n_clips} clips, and has {contents['valid']['clips']}"


def write_identity(folder: str | Path, settings: Settings, identity: Mapping[str, Any]) -> None:
    """Writes down what run a folder has, unless that is known; `identity` has `settings` and `contents`."""
    path = Path(folder) / IDENTITY
    known = read_identity(folder) if has_begun(Path(folder), settings) and path.is_file() else None
    if known is None:
        write_json(path, identity)
    elif not isinstance(known["contents"].get("train_sounds"), Mapping):
        write_json(path, {**known, "contents": {**known["contents"], "train_sounds": identity["contents"]["train_sounds"]}})
