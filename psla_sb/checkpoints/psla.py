"""PSLA's published checkpoints, read and written.

A published checkpoint is a state dict with `effnet.*` (efficientnet_pytorch's names) and `attention.*`, usually behind the prefix
`module.` that DataParallel adds. What kind of model it is of is read off its tensors.
"""

import functools
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ruamel.yaml
import torch
from torch import nn

from psla_sb.checkpoints.weights import below, load_into
from psla_sb.errors import InputError
from psla_sb.files import atomic_write
from psla_sb.lobes.efficientnet import LITE, VARIANTS, EfficientNetEncoder
from psla_sb.lobes.pooling import AttentionPooling, MeanPooling
from psla_sb.lobes.pretrained import WRAPPERS, bare, read_state, refuse_family, refuse_nan, unwrapped_names

# efficientnet-pytorch 0.7.0, with which the published models were trained, pads so
PUBLISHED_PADDING = "symmetric"
AUDIOSET_FRAMES = 1056

TAGGER = """
sample_rate: 16000
compute_features: !new:psla_sb.lobes.features.KaldiFbank
    sample_rate: 16000
    n_mels: 128
    n_frames: {n_frames}
mean_var_norm: !new:psla_sb.lobes.features.GlobalNorm
    mean: -4.6476
    std: 4.5699
embedding_model: !new:psla_sb.lobes.efficientnet.EfficientNetEncoder
    variant: {variant}
    padding: {padding}
classifier: !new:psla_sb.lobes.pooling.{pooling}
    {arguments}
"""


def load_psla_checkpoint(
    path: str | Path, padding: str = PUBLISHED_PADDING
) -> tuple[EfficientNetEncoder, AttentionPooling | MeanPooling]:
    """Loads the model in a checkpoint of the published code, or of others that use its layout, in evaluation mode, on the CPU.

    Variant, kind of pooling, heads and classes are read off the tensors. Keys with and without `module.` and `_orig_mod.` are
    read; leftovers of the ImageNet classifier (`effnet._fc.*`) are ignored. Code in the file is never run.

    Arguments
    ---------
    padding
        The encoder's, "symmetric" or "tensorflow", which the file does not tell. Official models were trained with "symmetric".

    Raises
    ------
    InputError
        The file cannot be read, holds anything but tensors, or has tensors missing, too many, or of wrong shapes; they are named.
    ValueError
        There is no such padding.

    Example
    -------
    >>> path = getfixture("tmp_path") / "best_audio_model.pth"
    >>> save_psla_checkpoint(path, EfficientNetEncoder("b0"), AttentionPooling(1280, 527, n_heads=4))
    >>> encoder, pooling = load_psla_checkpoint(path)
    >>> pooling(encoder(torch.zeros(1, 1056, 128))).shape
    torch.Size([1, 527])
    """
    return psla_modules(read_state(path), path, padding)


def is_psla(state: Mapping[str, torch.Tensor]) -> bool:
    """Says whether a state dict looks like a published checkpoint."""
    return any(bare(key).startswith("effnet.") for key in state)


def psla_modules(
    state: Mapping[str, torch.Tensor], path: str | Path, padding: str = PUBLISHED_PADDING
) -> tuple[EfficientNetEncoder, AttentionPooling | MeanPooling]:
    """Builds what `load_psla_checkpoint` returns, of a state dict."""
    state = {key.replace("._orig_mod.", "."): value for key, value in state.items()}
    refuse_family(state, path)
    prefix = next((found[1] for key in state if (found := re.match(rf"((?:(?:{'|'.join(WRAPPERS)})\.)*)effnet\.", key))), "")
    effnet, attention = f"{prefix}effnet", f"{prefix}attention"
    state = {key: value for key, value in state.items() if not key.startswith(f"{effnet}._fc.")}
    variant = _variant_of(below(effnet, state))
    if variant is None:
        raise InputError(f"{path}: not a PSLA checkpoint: it has no tensor 'effnet.*' of an EfficientNet{hint_of(state)}")
    refuse_nan(state, path)
    encoder = EfficientNetEncoder(variant, padding=padding)
    pooling = _new_pooling(below(attention, state), encoder.out_channels)
    load_into({effnet: encoder, attention: pooling}, state, f"{path}, read as a PSLA checkpoint of efficientnet-{variant},")
    return encoder.eval(), pooling.eval()


def save_psla_checkpoint(path: str | Path, encoder: EfficientNetEncoder, pooling: AttentionPooling | MeanPooling) -> None:
    """Writes a model in the layout of the published code, with the prefix `module.` that its DataParallel reads and writes.

    The published code computes the same only with the padding of the efficientnet_pytorch that it runs with, and has 4 heads
    wherever there is more than one.
    """
    modules = {"module.effnet": encoder, "module.attention": pooling}
    state = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    with atomic_write(path) as temporary:
        torch.save({key: value.cpu().contiguous() for key, value in state.items()}, temporary)


def psla_definitions(
    encoder: EfficientNetEncoder, pooling: AttentionPooling | MeanPooling, n_frames: int = AUDIOSET_FRAMES
) -> dict[str, Any]:
    """The definitions of a published model with the published front end, as `read_definitions` gives them."""
    conv = pooling.cla if isinstance(pooling.cla, nn.Conv2d) else pooling.cla[0]
    arguments = {"in_channels": encoder.out_channels, "n_classes": conv.out_channels}
    if isinstance(pooling, AttentionPooling):
        arguments["n_heads"] = pooling.n_heads
    return ruamel.yaml.YAML().load(
        TAGGER.format(
            n_frames=n_frames,
            variant=_variant_of(encoder.state_dict()),
            padding=encoder.padding,
            pooling=type(pooling).__name__,
            arguments="\n    ".join(f"{name}: {value}" for name, value in arguments.items()),
        )
    )


def hint_of(state: Mapping[str, torch.Tensor]) -> str:
    """What to do with other files that people have."""
    names = unwrapped_names(state)
    if below("embedding_model", names):
        return "; it is psla_sb's own snapshot: give its run's folder to psla-export, or it, as .safetensors, to pretrained_tagger"
    return "; it is an EfficientNet without a pooling, such as ImageNet's: give it to pretrained" if "_bn0.weight" in names else ""


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@functools.cache
def _layouts() -> dict[str, dict[str, torch.Size]]:
    """Each variant's names and shapes."""
    with torch.device("meta"):
        return {variant: _shapes(EfficientNetEncoder(variant).state_dict()) for variant in VARIANTS if variant not in LITE}


def _variant_of(state: Mapping[str, torch.Tensor]) -> str | None:
    """The variant with which a state dict has the most tensors in common, None if there is none in common."""
    in_common = {variant: len(layout.items() & _shapes(state).items()) for variant, layout in _layouts().items()}
    return max(in_common, key=in_common.__getitem__) if any(in_common.values()) else None


def _new_pooling(state: Mapping[str, torch.Tensor], in_channels: int) -> AttentionPooling | MeanPooling:
    """The pooling whose tensors these are, as far as they agree with each other."""
    sizes = [len(value) for key, value in state.items() if value.dim() and key != "head_weight"]
    n_classes = max(1, statistics.mode(sizes)) if sizes else 1
    heads = {match[1] for key in state if (match := re.match(r"(?:att|cla)\.(\d+)\.", key))}
    if heads or any(key.startswith("att.") for key in state):
        return AttentionPooling(in_channels, n_classes, max(1, len(heads)))
    return MeanPooling(in_channels, n_classes)
