"""EfficientNet as an audio encoder: log-mel features in, feature map out.

The network is that of the package `efficientnet_pytorch` (0.7.1), with its parameter names, so its weights and PSLA's
published checkpoints fit. What differs from the package: one input channel, no ImageNet classifier, PyTorch's SiLU and
channels-last memory (faster on a CPU, same numbers), and a choice between the paddings of the package's last
two versions.
"""

import copy
from itertools import pairwise
from pathlib import Path

import torch
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import get_model_params, url_map, url_map_advprop
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from psla_sb.errors import InputError

VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")
STEMS = ("random", "sum")
PADDINGS = ("tensorflow", "symmetric")
# AdvProp's weights want pixels scaled in another way than the plain ones. Here that is irrelevant: neither scaling is that
# of normalised log-mel energies, and batch normalisation absorbs the difference.
URLS = {"imagenet": url_map, "advprop": url_map_advprop}


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


class EfficientNetEncoder(EfficientNet):
    """EfficientNet without its classifier, on features `[batch, frames, mels]`.

    Frequency and time shrink by about 32. Inputs too small to give one step are filled with zeros at their end.

    Arguments
    ---------
    variant : str
        "b0" to "b7".
    pretrained : str or Path, optional
        "imagenet" or "advprop": the weights that `efficientnet_pytorch` names, downloaded once by `torch.hub`. Otherwise
        the path of such a file: a state dict with a stem of three channels, with or without `_fc`.
    stem : str
        What becomes of a pretrained stem of three channels: "random" replaces it with a random one of one channel, as PSLA
        does; "sum" adds its three filters up, as AST does.
    padding : str
        "tensorflow": a strided convolution that lacks p pixels gets floor(p / 2) before and the rest after, as in
        efficientnet_pytorch 0.7.1 and where the ImageNet weights come from. "symmetric": ceil(p / 2) on every side, as in
        0.7.0, with which PSLA's published models were trained.
    norm_momentum : float
        Batch normalisation's momentum in PyTorch's sense: the weight of the newest batch.
    drop_connect : float
        Probability, in training, that the last block is skipped; it grows linearly from 0 at the first block.
    width, depth : float, optional
        Multipliers of B0's channels and of its layers, in place of the variant's own: below 1 for networks that are smaller
        than B0, which learn faster from few clips.

    Attributes
    ----------
    out_channels : int
        Channels of the feature map.
    frames_per_step : int
        Frames of the input from a step of the feature map to the next.

    Raises
    ------
    ValueError
        If an argument is not among the choices or out of range.
    InputError
        If the pretrained weights cannot be had, or are not those of this variant.

    Example
    -------
    >>> embedding_model = EfficientNetEncoder("b0").eval()
    >>> embedding_model(torch.zeros(1, 100, 128)).shape
    torch.Size([1, 1280, 4, 3])
    """

    def __init__(
        self,
        variant="b2",
        pretrained=None,
        stem="random",
        padding="tensorflow",
        norm_momentum=0.01,
        drop_connect=0.2,
        width=None,
        depth=None,
    ):
        _check_choice("variant", variant, VARIANTS)
        _check_choice("stem", stem, STEMS)
        _check_choice("padding", padding, PADDINGS)
        if not 0 <= norm_momentum <= 1:
            raise ValueError(f"norm_momentum must be in [0, 1], not {norm_momentum}")
        if not 0 <= drop_connect < 1:
            raise ValueError(f"drop_connect must be in [0, 1), not {drop_connect}")
        scales = {"width_coefficient": width, "depth_coefficient": depth}
        for name, scale in scales.items():
            if scale is not None and not scale > 0:
                raise ValueError(f"{name.partition('_')[0]} must be above 0, not {scale}")
        options = {
            **{name: scale for name, scale in scales.items() if scale is not None},
            "include_top": False,
            "batch_norm_momentum": 1 - norm_momentum,
            "drop_connect_rate": drop_connect,
        }
        super().__init__(*get_model_params(f"efficientnet-{variant}", options))
        self._change_in_channels(1)
        self.out_channels = self._conv_head.out_channels
        self.set_swish(memory_efficient=False)
        self.padding = padding
        self._min_size = self._set_padding(symmetric=padding == "symmetric")
        if pretrained is not None:
            self._load_pretrained(pretrained, variant, stem)
        self.to(memory_format=torch.channels_last)

    def _set_padding(self, symmetric):
        """Choose every convolution's padding; return the smallest input that gives one step."""
        min_size = self.frames_per_step = 1
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

    def _load_pretrained(self, pretrained, variant, stem):
        state = _read(pretrained, variant)
        tensors = {key: value for key, value in state.items() if not str(key).startswith("_fc.")}
        # files older than PyTorch's batch counters have none, and with a fixed momentum nothing reads them
        own = self.state_dict()
        expected = {key: value.shape for key, value in own.items() if not key.endswith("num_batches_tracked")}
        rgb = "_conv_stem.weight"
        expected[rgb] = torch.Size([own[rgb].shape[0], 3, *own[rgb].shape[2:]])
        problems = [f"{key} is missing" for key in expected if key not in tensors]
        problems += [f"{key} is unknown" for key in tensors if key not in own]
        problems += [
            f"{key} is {list(getattr(tensors[key], 'shape', []))} and should be {list(shape)}"
            for key, shape in expected.items()
            if key in tensors and getattr(tensors[key], "shape", None) != shape
        ]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise InputError(
                f"{pretrained}: not efficientnet_pytorch's weights of efficientnet-{variant}: "
                f"{'; '.join(problems[:3])}{more}. Give the file of this variant, or change the variant."
            )
        tensors[rgb] = tensors[rgb].sum(1, keepdim=True) if stem == "sum" else own[rgb]
        self.load_state_dict(tensors, strict=False)

    def forward(self, feats, lens=None):
        """Encode.

        Arguments
        ---------
        feats : torch.Tensor
            `[batch, frames, mels]`, normalised.
        lens : torch.Tensor, optional
            Not used; SpeechBrain's encoders take it.

        Returns
        -------
        torch.Tensor
            Feature map `[batch, channels, freq, steps]`.
        """
        x = feats.transpose(1, 2).unsqueeze(1)
        missing = [max(0, self._min_size - size) for size in x.shape[2:]]
        if any(missing):
            x = F.pad(x, (0, missing[1], 0, missing[0]))
        return self.extract_features(x.contiguous(memory_format=torch.channels_last))


def fold_norms(module):
    """A copy for evaluation, whose encoders compute the same in fewer passes over memory.

    Each batch normalisation is folded into the convolution before it. Where the package pads one side more than the other, which
    copies the input, the kernel gets zeros on the side of less padding instead, and the convolution pads both sides alike.
    Activations overwrite what the convolutions gave.

    Arguments
    ---------
    module : torch.nn.Module
        An `EfficientNetEncoder`, or a module that has some; in evaluation mode.

    Returns
    -------
    torch.nn.Module
        Gives the same numbers but for rounding, faster.

    Example
    -------
    >>> encoder = EfficientNetEncoder("b0").eval()
    >>> len(list(encoder.modules())) > len([m for m in fold_norms(encoder).modules() if not isinstance(m, nn.Identity)])
    True
    """
    module = copy.deepcopy(module)
    encoders = [encoder for encoder in module.modules() if isinstance(encoder, EfficientNetEncoder)]
    for part in [part for encoder in encoders for part in encoder.modules()]:
        # the package registers every normalisation right after its convolution
        children = list(part.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(part, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(part, norm_name, nn.Identity())
        if hasattr(part, "_swish"):
            part._swish = nn.SiLU(inplace=True)
    for conv in [part for encoder in encoders for part in encoder.modules() if isinstance(part, nn.Conv2d)]:
        if not isinstance(conv.static_padding, nn.Identity):
            before, after = conv.static_padding.padding[:2]
            zeros = after - before
            conv.weight = nn.Parameter(F.pad(conv.weight.detach(), (zeros, 0, zeros, 0)), requires_grad=False)
            conv.kernel_size, conv.padding, conv.static_padding = conv.weight.shape[2:], (after, after), nn.Identity()
    return module.to(memory_format=torch.channels_last)


def _read(pretrained, variant):
    """A state dict from a file or the package's URL; never runs code that the file contains."""
    if pretrained in URLS:
        url = URLS[pretrained][f"efficientnet-{variant}"]
        file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        missing = f"{url}: cannot be downloaded. Download it elsewhere and put it at {file}"
    else:
        file = Path(pretrained)
        missing = f"{file}: cannot be read. Give {', '.join(URLS)}, or the path of a weights file"
    try:
        if pretrained in URLS:
            # no check_hash: nobody says that the digits in these file names are SHA-256; every tensor's shape is checked
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{missing} ({error})") from error
    except Exception as error:  # a broken file raises whatever the unpickler stumbles over
        # PyTorch's own message advises to run the code in the file
        raise InputError(f"{file}: not weights that can be loaded without running code; replace it") from error
    if not isinstance(state, dict):
        raise InputError(f"{file}: holds a {type(state).__name__}, not a state dict of efficientnet-{variant}")
    return state
