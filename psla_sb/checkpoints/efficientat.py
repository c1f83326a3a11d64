"""EfficientAT's published MobileNetV3 networks (mn01 to mn40), read.

A published file is a state dict with `features.*`, the encoder, and `classifier.*`, the head. Width, head and classes are read off
the shapes; what these do not tell, the front end and the strides, off the file's name, such as `mn10_as_hop_5_mAP_475.pt`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ruamel.yaml
import torch
from torch import nn

from psla_sb.checkpoints.weights import below, load_into
from psla_sb.errors import InputError
from psla_sb.lobes.mobilenet import STRIDES, MobileNetV3Encoder, width_of
from psla_sb.lobes.pooling import ConvPooling, MLPPooling
from psla_sb.lobes.pretrained import read_state

SAMPLE_RATE = 32000
FIRST = "features.0.0.weight"
# names in a published head -> ours
MLP, CONV = {"2": "hidden", "5": "output"}, {"0": "conv", "1": "norm"}

TAGGER = """
sample_rate: {sample_rate}
n_frames: null
compute_features: !new:psla_sb.lobes.features.CentredFbank
    sample_rate: {sample_rate}
    n_mels: {mels}
    hop_length: {hop_length}
mean_var_norm: !new:psla_sb.lobes.features.GlobalNorm
    mean: -4.5
    std: 5.0
embedding_model: !new:psla_sb.lobes.mobilenet.MobileNetV3Encoder
    width: {width}
    strides: {strides}
classifier: !new:psla_sb.lobes.pooling.{pooling}
    {arguments}
"""


class Untold(NamedTuple):
    """Holds what the tensors of a published network do not tell."""

    hop: int = 10  # from a frame to the next, in milliseconds
    mels: int = 128
    strides: tuple[int, ...] = STRIDES


def as_strides(text: str) -> tuple[int, ...]:
    """Reads strides as published names have them.

    Example
    -------
    >>> as_strides("s2221"), as_strides("2211")
    ((2, 2, 2, 1), (2, 2, 1, 1))
    """
    if not re.fullmatch("s?[12]{4}", text):
        raise InputError(f"strides are four numbers, each 1 or 2, such as s2221, not {text!r}")
    return tuple(map(int, text.removeprefix("s")))


def untold_of(
    path: str | Path, hop: int | None = None, mels: int | None = None, strides: Sequence[int] | None = None
) -> tuple[Untold, str]:
    """Finds out what the tensors do not tell: what is given counts, then the file's name, then the published default.

    Returns it, and a text that says of each where it is from.

    Example
    -------
    >>> untold_of("mn10_as_mels_40_mAP_453.pt", hop=5)
    (Untold(hop=5, mels=40, strides=(2, 2, 2, 2)), 'hop 5 ms (given), 40 mels (by the name), strides s2222 (assumed)')
    """
    given: dict[str, Any] = {"hop": hop, "mels": mels, "strides": None if strides is None else tuple(strides)}
    found, origins = dict[str, Any](), dict[str, str]()
    for key, pattern in (("hop", r"hop_(\d+)"), ("mels", r"mels_(\d+)"), ("strides", "s([12]{4})")):
        match = re.search(rf"(?:^|_){pattern}(?=_|\.|$)", Path(path).name)
        if given[key] is not None:
            found[key], origins[key] = given[key], "given"
        elif match:
            found[key], origins[key] = as_strides(match[1]) if key == "strides" else int(match[1]), "by the name"
        else:
            origins[key] = "assumed"
    untold = Untold(**found)
    digits = "".join(map(str, untold.strides))
    texts = {"hop": f"hop {untold.hop} ms", "mels": f"{untold.mels} mels", "strides": f"strides s{digits}"}
    return untold, ", ".join(f"{texts[key]} ({origins[key]})" for key in texts)


def is_efficientat(state: Mapping[str, torch.Tensor]) -> bool:
    """Says whether a state dict looks like one of the published networks."""
    return FIRST in state and any(key.startswith("classifier.") for key in state)


def load_efficientat_checkpoint(
    path: str | Path, strides: Sequence[int] | None = None
) -> tuple[MobileNetV3Encoder, MLPPooling | ConvPooling]:
    """Loads a published network in evaluation mode, on the CPU. Code in the file is never run.

    Arguments
    ---------
    strides
        The encoder's; by default those of the file's name (`s2221`), and otherwise (2, 2, 2, 2).

    Raises
    ------
    InputError
        The file cannot be read, holds anything but tensors, or other tensors than these networks have; they are named.

    Example
    -------
    >>> path, encoder, pooling = getfixture("tmp_path") / "mn04_as.pt", MobileNetV3Encoder(0.4), ConvPooling(384, 527)
    >>> state = {"classifier.0.weight": pooling.conv.weight.data}
    >>> state |= {f"classifier.1.{key}": value for key, value in pooling.norm.state_dict().items()}
    >>> torch.save(encoder.state_dict() | state, path)
    >>> encoder, pooling = load_efficientat_checkpoint(path)
    >>> pooling(encoder(torch.zeros(1, 1000, 128))).shape
    torch.Size([1, 527])
    """
    return efficientat_modules(read_state(path), path, untold_of(path, strides=strides)[0].strides)


def efficientat_modules(
    state: Mapping[str, torch.Tensor], path: str | Path, strides: Sequence[int]
) -> tuple[MobileNetV3Encoder, MLPPooling | ConvPooling]:
    """Builds what `load_efficientat_checkpoint` returns, of a state dict."""
    width = width_of(state)
    if width is None:
        raise InputError(f"{path}: not one of EfficientAT's networks: no MobileNetV3 of a width from 0.1 to 4.0 has its tensors")
    encoder, (pooling, names) = MobileNetV3Encoder(width, strides=strides), _new_head(state, path)
    # classifier.2.weight -> classifier.hidden.weight
    ours = {f"classifier.{number}": f"classifier.{name}" for number, name in names.items()}
    parts = {key: key.rpartition(".") for key in state}
    renamed = {f"{ours.get(layer, layer)}{dot}{rest}": state[key] for key, (layer, dot, rest) in parts.items()}
    own = {"features": encoder.features, "classifier": pooling}
    load_into(own, renamed, f"{path}, read as EfficientAT's MobileNetV3 of width {width},")
    return encoder.eval(), pooling.eval()


def _new_head(state: Mapping[str, torch.Tensor], path: str | Path) -> tuple[MLPPooling | ConvPooling, dict[str, str]]:
    """The head whose tensors these are, and what its names are here."""
    head = {key: value.shape for key, value in below("classifier", state).items()}
    if [len(head.get(f"{layer}.weight", ())) for layer in MLP] == [2, 2]:
        (hidden, in_channels), n_classes = head["2.weight"], head["5.weight"][0]
        return MLPPooling(in_channels, n_classes, hidden), MLP
    if len(head.get("0.weight", ())) == 4:
        n_classes, in_channels = head["0.weight"][:2]
        return ConvPooling(in_channels, n_classes), CONV
    found = ", ".join(f"classifier.{key}" for key in [*head][:4])
    raise InputError(
        f"{path}: not a head of EfficientAT's that is known: mlp (classifier.2.*, classifier.5.*) or fully convolutional "
        f"(classifier.0.weight, classifier.1.*); it has {found}"
    )


def efficientat_definitions(encoder: MobileNetV3Encoder, pooling: MLPPooling | ConvPooling, untold: Untold) -> dict[str, Any]:
    """The definitions of a published network with its front end, as `read_definitions` gives them."""
    arguments: dict[str, int] = {"in_channels": encoder.out_channels}
    if isinstance(pooling, MLPPooling):
        arguments |= {"n_classes": pooling.output.out_features, "hidden": pooling.hidden.out_features}
    else:
        arguments["n_classes"] = pooling.conv.out_channels
    return ruamel.yaml.YAML().load(
        TAGGER.format(
            sample_rate=SAMPLE_RATE,
            mels=untold.mels,
            hop_length=untold.hop * SAMPLE_RATE // 1000,
            width=encoder.width,
            strides=list(encoder.strides),
            pooling=type(pooling).__name__,
            arguments="\n    ".join(f"{name}: {value}" for name, value in arguments.items()),
        )
    )


def efficientat_remark(state: Mapping[str, torch.Tensor], encoder: nn.Module, pooling: nn.Module, untold: str) -> str:
    """Says what a file was taken for."""
    n_classes = len(state["classifier.5.weight" if isinstance(pooling, MLPPooling) else "classifier.0.weight"])
    head = "mlp" if isinstance(pooling, MLPPooling) else "fully convolutional"
    return f"EfficientAT's MobileNetV3 of width {encoder.width}, head {head}, {n_classes} classes; {untold}"
