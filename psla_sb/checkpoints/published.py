"""Checkpoints that others have published, of whichever family: PSLA's own, and EfficientAT's MobileNetV3."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from psla_sb.checkpoints.efficientat import (
    efficientat_definitions,
    efficientat_modules,
    efficientat_remark,
    is_efficientat,
    untold_of,
)
from psla_sb.checkpoints.psla import AUDIOSET_FRAMES, PUBLISHED_PADDING, hint_of, is_psla, psla_definitions, psla_modules
from psla_sb.errors import InputError
from psla_sb.lobes.pretrained import read_state, refuse_family, refuse_nan, unwrapped_names

FAMILIES = (
    "PSLA's EfficientNets (tensors effnet.* and attention.*) and EfficientAT's MobileNetV3, mn01 to mn40 (tensors features.* and "
    "classifier.*)"
)
OPTIONS = {"PSLA": ("padding", "n_frames"), "EfficientAT": ("hop", "mels", "strides")}


class PublishedModel(NamedTuple):
    """A published checkpoint, read: its modules, their definitions, and what was assumed of it."""

    encoder: nn.Module
    pooling: nn.Module
    definitions: Mapping[str, Any]
    remark: str


def read_published(path: str | Path, options: Mapping[str, Any]) -> PublishedModel:
    """Finds out of which family a file is, and reads it.

    Arguments
    ---------
    options
        What the file does not tell; None stands for what is published. Of PSLA's `padding` and `n_frames`, of EfficientAT's `hop`
        (milliseconds), `mels` and `strides`.

    Raises
    ------
    InputError
        The file is of no known family, is not what it seems to be, or has options of the other family.

    Example
    -------
    >>> import torch
    >>> path = getfixture("tmp_path") / "resnet.pt"
    >>> torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    >>> read_published(path, {})
    Traceback (most recent call last):
    ...
    psla_sb.errors.InputError: ...resnet.pt: of no family that is known. Known are PSLA's EfficientNets ...
    """
    state = read_state(path)
    bare_state = unwrapped_names(state)
    given = {name: value for name, value in options.items() if value is not None}
    if is_efficientat(bare_state):
        state = bare_state
        refuse_nan(state, path)
        _refuse_others(path, "EfficientAT", given)
        untold, text = untold_of(path, **given)
        network, head = efficientat_modules(state, path, untold.strides)
        remark = efficientat_remark(state, network, head, text)
        return PublishedModel(network, head, efficientat_definitions(network, head, untold), remark)
    if is_psla(state):
        _refuse_others(path, "PSLA", given)
        padding, n_frames = given.get("padding", PUBLISHED_PADDING), given.get("n_frames", AUDIOSET_FRAMES)
        encoder, pooling = psla_modules(state, path, padding)
        definitions = psla_definitions(encoder, pooling, n_frames)
        variant = definitions["embedding_model"]["variant"]
        remark = f"PSLA's efficientnet-{variant}; padding {padding}, {n_frames} frames"
        return PublishedModel(encoder, pooling, definitions, remark)
    refuse_family(state, path)
    begins = f"It begins with {', '.join([*state][:3])}" if state else "It is empty"
    raise InputError(f"{path}: of no family that is known{hint_of(state)}. Known are {FAMILIES}. {begins}")


def _refuse_others(path: str | Path, family: str, given: Mapping[str, Any]) -> None:
    if others := [name for name in given if name not in OPTIONS[family]]:
        own = ", ".join(OPTIONS[family])
        raise InputError(f"{path}: is of {family}'s family, to which {', '.join(others)} does not apply; its options are {own}")
