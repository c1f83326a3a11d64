"""Weights from elsewhere: read without running code, taken out of what they are wrapped in, told apart where they do not fit."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from psla_sb.errors import InputError

# Beside epochs and optimizers the weights are an entry of their own.
NESTS = ("state_dict", "model", "model_state_dict")
# What DataParallel and torch.compile put before names.
WRAPPERS = ("module", "_orig_mod")
# Our own snapshots' names of the parts, and the published code's.
PARTS = {"embedding_model": ("embedding_model", "effnet"), "classifier": ("classifier", "attention")}
COUNTER = "num_batches_tracked"
# Other people's architectures, each by names that all have to be there: as tensors, or in the bytes of a file that cannot be read.
FAMILIES = {
    "AST (Audio Spectrogram Transformer)": [("v.patch_embed.proj.weight", "mlp_head."), ("audio_spectrogram_transformer.",)],
    "PANNs (such as Cnn14)": [("logmel_extractor.melW",), ("conv_block1.conv1.weight", "fc_audioset.")],
}
# As much of a file as has the names of a model's tensors in it, if they stand at its beginning.
HEAD_BYTES = 1 << 20


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict that `torch.save` or safetensors wrote, out of `{"state_dict": ...}` and the like if it is in one.

    Code in the file is never run, and anything but plain tensors is refused, with what the file looks like.

    Example
    -------
    >>> path = getfixture("tmp_path") / "epoch_3.pth"
    >>> torch.save({"epoch": 3, "state_dict": {"module.weight": torch.ones(1)}}, path)
    >>> read_state(path)
    {'module.weight': tensor([1.])}
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        state: Any = load_file(path) if _is_safetensors(path) else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # a broken file raises whatever the unpickler stumbles over; PyTorch's message advises to run the code in the file
        raise InputError(
            f"{path}: not a checkpoint that can be loaded without running code: "
            f"{looks_like(path) or 'it is damaged, or holds more than tensors'} ({type(error).__name__})"
        ) from None
    while isinstance(state, dict) and (nest := next((name for name in NESTS if isinstance(state.get(name), dict)), None)):
        state = state[nest]
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}, not a state dict: a checkpoint is a dict of names and tensors")
    for key, value in state.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not (isinstance(key, str) and plain):
            raise InputError(f"{path}: {key!r} is not a name with a plain tensor; a checkpoint holds nothing else")
    return state


def _is_safetensors(path: str | Path) -> bool:
    """Tells by the header, JSON after its length of 8 bytes: `embedding_model.ckpt` of a tagger's folder is one too."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Reads a safetensors file as a state dict on the CPU."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of weights") from None
    except (SafetensorError, OSError) as error:
        look = looks_like(path) if Path(path).is_file() else ""
        raise InputError(f"{path}: not a whole safetensors file ({error}){look and f': {look}'}") from None


def looks_like(path: str | Path) -> str:
    """Says what a file is that is no file of weights, and what to do; nothing if that is not known."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    text = head[:1024].lower()
    if b"<html" in text or b"<!doctype html" in text:
        return (
            "it looks like a web page (HTML), saved in place of the file that it links to, or with the reason why there is none: "
            "open it in a browser, and download the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself: run `git lfs pull` where it is from"
    return "it is empty: download it again" if not head else family_of(head.decode("latin-1"))


def family_of(names: str | Iterable[str]) -> str:
    """Says whose weights these are, and what to do, if they are another architecture's that is known; otherwise nothing.

    Example
    -------
    >>> family_of(["module.v.patch_embed.proj.weight", "module.mlp_head.1.weight"])
    "it looks like a checkpoint of AST (Audio Spectrogram Transformer), a network that psla_sb does not have. ..."
    >>> family_of(["effnet._conv_stem.weight"])
    ''
    """
    text = names if isinstance(names, str) else "\n".join(names)
    if "embedding_model." in text:
        # our own snapshot, of whatever part
        return ""
    for family, signs in FAMILIES.items():
        if any(all(sign in text for sign in alternative) for alternative in signs):
            return (
                f"it looks like a checkpoint of {family}, a network that psla_sb does not have. Its own code scores sounds with "
                "it, and psla-compare reads such scores (.npy); to train it here, bring the network (README, 'Bring your own part')"
            )
    return ""


def refuse_family(state: Mapping[str, Any], source: str | Path) -> None:
    """Refuses another architecture's weights, if that is known, rather than to name all of their tensors."""
    if family := family_of(map(str, state)):
        raise InputError(f"{source}: {family}")


def refuse_nan(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuses weights that are not numbers: whatever is computed with them is none either.

    Example
    -------
    >>> refuse_nan({"classifier.bias": torch.tensor([0.0, float("nan")])}, "model.pth")
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: model.pth: 1 of the 2 numbers of 'classifier.bias' are NaN...
    """
    # infinity may be meant, as in the masks of attention
    wrong = [key for key, value in state.items() if value.is_floating_point() and value.isnan().any()]
    if wrong:
        first, more = state[wrong[0]], f" (and some of {len(wrong) - 1} other tensors)" if len(wrong) > 1 else ""
        raise InputError(
            f"{source}: {int(first.isnan().sum())} of the {first.numel()} numbers of {wrong[0]!r} are NaN{more}: the training "
            "that wrote it had failed, or the file is damaged. Take the weights of an earlier epoch, or download the file again"
        )


def bare(key: str) -> str:
    """A tensor's name without what DataParallel and torch.compile have put before it and into it.

    Example
    -------
    >>> bare("module._orig_mod.effnet._orig_mod._bn0.weight")
    'effnet._bn0.weight'
    """
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def unwrapped_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes wrappers away that stand before names, as far as that leaves the names different.

    Example
    -------
    >>> list(unwrapped_names({"module.module.a.weight": torch.ones(1), "_orig_mod.b.module.weight": torch.ones(1)}))
    ['a.weight', 'b.module.weight']
    """
    names = {key: key for key in state}
    for key in state:
        while names[key].partition(".")[0] in WRAPPERS and "." in names[key]:
            names[key] = names[key].partition(".")[2]
    counts = Counter(names.values())
    return {name if counts[name] == 1 else key: state[key] for key, name in names.items()}


def part_of(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part, "embedding_model" or "classifier", by its own names: from a snapshot, or the published code's file.

    Example
    -------
    >>> part_of("embedding_model", {"module.effnet._bn0.bias": torch.ones(1), "module.attention.cla.bias": torch.ones(1)})
    {'_bn0.bias': tensor([1.])}
    """
    state = unwrapped_names(state)
    for called in PARTS.get(name, (name,)):
        if part := {key.removeprefix(f"{called}."): value for key, value in state.items() if key.startswith(f"{called}.")}:
            return part
    return {}


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's tensors, by its own names: of a model's, those of its encoder; of an encoder's own file, all."""
    return part_of("embedding_model", state) or unwrapped_names(state)


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Lists what a state dict lacks of a model's, has besides, or has in another shape; counters of batches do not matter.

    Example
    -------
    >>> differences({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(3), "c": torch.ones(1)})
    ['b is missing', 'c is unknown', 'a is [3] and should be [2]']
    """
    # files older than PyTorch's counters have none, and with a fixed momentum nothing reads them
    shapes = {key: (list(state[key].shape), list(value.shape)) for key, value in own.items() if key in state}
    return [
        *(f"{key} is missing" for key in own if key not in state and not key.endswith(COUNTER)),
        *(f"{key} is unknown" for key in state if key not in own),
        *(f"{key} is {there} and should be {here}" for key, (there, here) in shapes.items() if there != here),
    ]


def first_three(problems: Sequence[str]) -> str:
    """Writes the first of many, and how many more there are."""
    return "; ".join(problems[:3]) + (f" (and {len(problems) - 3} more)" if len(problems) > 3 else "")


def adapted(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives tensors the names that a model has for them, wrappers aside, and a model's counters to files older than those.

    Arguments
    ---------
    state
        What was read.
    own
        The model's state dict. What both call alike is left alone, and so is what it is not sure about.

    Example
    -------
    >>> adapted({"a._orig_mod.weight": torch.ones(1)}, {"a.weight": torch.zeros(1)})
    {'a.weight': tensor([1.])}
    """
    counts, theirs = Counter(map(bare, own)), Counter(map(bare, state))
    names = {bare(key): key for key in own if counts[bare(key)] == 1}
    found = {key if key in own or theirs[bare(key)] > 1 else names.get(bare(key), key): value for key, value in state.items()}
    # nothing reads them where the momentum is fixed
    counters = {key: value for key, value in own.items() if key.endswith(f".{COUNTER}") and key not in found}
    return {**found, **counters}
