"""What an output folder's run is: its settings, classes and clips; another run is refused there.

    settings    the YAML file and the command line        compared before anything is built
    contents    classes, clips, labels, processes         compared before the training

Both are in the folder's `identity.json` from the first training step on, and are compared at every start.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hyperpyyaml.core import recursive_update
from speechbrain.utils.run_opts import RunOptions

from psla_sb.checkpoints.definitions import read_yaml
from psla_sb.checkpoints.run_folder import CLASSES, HPARAMS, IDENTITY, prediction_path, read_results
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.sampler import rank_and_world_size
from psla_sb.errors import InputError
from psla_sb.files import write_json
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.vocabulary import Vocabulary

# Folders may be moved: what is in them is told by its content.
PLACES = {"data_folder", "output_folder", "resampled_folder"}
# Keys that change no weight and no score, or (classes, clips) whose files are compared by what they say, or (precision) that
# belong to what scores are stamped with.
MAY_CHANGE = PLACES | {
    *("class_list", "train_annotation", "valid_annotation", "test_annotation", "expected_clips"),
    *("skip_prep", "prepare", "resampled_format", "on_bad_audio", "trust"),
    *("num_workers", "valid_batch_size", "precision", "eval_precision", "ckpt_interval_minutes", "ckpt_interval_steps"),
    *("number_of_epochs", "epoch_counter", "average_start", "published"),
    *("train_logger", "track", "checkpointer"),
}
# Of SpeechBrain's options, which may be given by the YAML file too.
OPTIONS = (
    *("debug", "max_grad_norm", "skip_nonfinite_grads", "grad_accumulation_factor", "optimizer_step_limit"),
    "remove_vector_weight_decay",
)
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
    names: dict[int, str] = {}

    def leaves(name: str, node: Any) -> Iterator[tuple[str, Any]]:
        tag = getattr(getattr(node, "tag", None), "value", None)
        if isinstance(node, dict | list):
            if id(node) in names:
                yield name, f"= {names[id(node)]}"
                return
            names[id(node)] = name
            if name and (tag or isinstance(node, list) or not node):
                yield name, tag or (f"a list of {len(node)}" if isinstance(node, list) else "{}")
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                yield from leaves(f"{name}.{key}" if name else str(key), child)
        else:
            yield name, f"{tag} {node.value}".rstrip() if tag else _plain(node)

    return dict(leaves("", settings))


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
            if not of_name <= PLACES:
                found |= {cause: (then.get(cause), now.get(cause)) for cause in names if cause in of_name}
    # of a part that is another one altogether, what is in it is not named
    return {name: pair for name, pair in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def _with_options(settings: Settings, run_opts: RunOptions) -> dict[str, Any]:
    """Settings, and SpeechBrain's options that matter for the weights, wherever they are given."""
    given = {key: run_opts[key] for key in OPTIONS if key in run_opts.overridden_args or key not in settings}
    return {**settings, **given}


def check_settings(folder: str | Path, file: str | Path, resolved: Settings, overrides: Settings, run_opts: RunOptions) -> None:
    """Refuses to go on in the output folder of a run with other settings than those that it was trained with.

    Arguments
    ---------
    file, overrides
        The YAML file and what the command line has of its keys.
    resolved
        Its keys without references.
    run_opts
        SpeechBrain's options.

    Raises
    ------
    InputError
        The message names each key, as the YAML file writes it, and what it was.
    """
    folder = Path(folder)
    then = _settings_of(folder)
    if then is None:
        return
    written = read_yaml(file)
    recursive_update(written, dict(overrides))
    now = flat(_with_options(resolved, run_opts))
    if not (folder / IDENTITY).is_file():
        # of a run of before there was such a file: keys that came or went since say nothing of it
        common = {name.partition(".")[0] for name in then} & {name.partition(".")[0] for name in now}
        then, now = ({name: value for name, value in one.items() if name.partition(".")[0] in common} for one in (then, now))
    found = changes(then, now, flat(written))
    n_trained, n_epochs = len(read_results(folder).get("epochs", [])), resolved.get("number_of_epochs")
    if isinstance(n_epochs, int) and n_epochs < n_trained:
        found["number_of_epochs"] = (n_trained, n_epochs)
    if found:
        said = [f"{name} was {_text(was)}, is {_text(value)}" for name, (was, value) in found.items()]
        more = [f"{len(said) - MOST_NAMED} more"] if len(said) > MOST_NAMED else []
        _refuse(folder, "; ".join(said[:MOST_NAMED] + more), _another(folder, found))


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that has been trained in a folder; None if there is none, or nothing that tells."""
    if not _has_begun(folder):
        return None
    if (folder / IDENTITY).is_file():
        return read_identity(folder)["settings"]
    return flat(read_yaml(folder / HPARAMS)) if (folder / HPARAMS).is_file() else None


def _has_begun(folder: Path) -> bool:
    return bool(read_results(folder).get("epochs")) or any(folder.glob("*/CKPT+*"))


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


def contents_of(vocabulary: Vocabulary, sets: Mapping[str, tuple[Manifest, LabelSets]]) -> dict[str, Any]:
    """What cannot be told by settings: which classes, clips and labels a run has, and by how many processes it is trained."""
    of_sets = {
        name: {"clips": len(manifest), "ids": manifest.digest(("ID",)), "labels": labels.digest()}
        for name, (manifest, labels) in sets.items()
    }
    return {"classes": vocabulary.digest(), "processes": rank_and_world_size()[1], **of_sets}


def check_contents(folder: str | Path, contents: Mapping[str, Any], finished: bool) -> None:
    """Refuses to go on in a run's folder with other classes, clips or labels; or, unless it has `finished`, other processes."""
    every = [contents] * rank_and_world_size()[1]
    if len(every) > 1:
        torch.distributed.all_gather_object(every, contents)
    if any(other != contents for other in every):
        raise InputError("the processes have read different annotations or class lists; do all machines see the same folders?")
    folder = Path(folder)
    if not _has_begun(folder):
        return
    if not (folder / IDENTITY).is_file():
        return _check_old_contents(folder, contents)
    then = read_identity(folder)["contents"]
    for name, now in contents.items():
        was = then.get(name, now)
        if was == now or (name == "processes" and finished):
            continue
        if name == "classes":
            what = "the class list has other classes, or in another order"
        elif name == "processes":
            what = f"it was trained by {was} processes, which makes its batches, not by {now}"
        elif was["clips"] != now["clips"]:
            what = f"{name}_annotation had {was['clips']} clips, and has {now['clips']}"
        elif was["ids"] != now["ids"]:
            what = f"{name}_annotation has other clips, or in another order"
        else:
            what = f"the clips of {name}_annotation have other labels"
        _refuse(folder, what, folder.with_name(f"{folder.name}-2"))
    return None


def _check_old_contents(folder: Path, contents: Mapping[str, Any]) -> None:
    """Compares what a run of before there was `identity.json` has: its class list, and its scores of the validation set."""
    classes, scores = folder / CLASSES, prediction_path(folder, "valid_epoch_01")
    if classes.is_file() and Vocabulary.from_csv(classes).digest() != contents["classes"]:
        _refuse(folder, "the class list has other classes, or in another order", folder.with_name(f"{folder.name}-2"))
    if scores.is_file() and (n_clips := len(np.load(scores, mmap_mode="r"))) != contents["valid"]["clips"]:
        what = f"valid_annotation had {n_clips} clips, and has {contents['valid']['clips']}"
        _refuse(folder, what, folder.with_name(f"{folder.name}-2"))


def write_identity(folder: str | Path, resolved: Settings, contents: Mapping[str, Any], run_opts: RunOptions) -> None:
    """Writes down what run a folder has, unless that is known."""
    folder = Path(folder)
    if not (_has_begun(folder) and (folder / IDENTITY).is_file()):
        identity = {"settings": flat(_with_options(resolved, run_opts)), "contents": dict(contents)}
        write_json(folder / IDENTITY, identity)
