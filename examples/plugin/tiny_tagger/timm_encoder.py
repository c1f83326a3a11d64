"""Networks of timm as encoders for psla_sb: about a thousand, of which those can be used that have a feature map over time."""

import difflib
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from psla_sb.errors import InputError
from psla_sb.lobes.pretrained import differences, encoder_state, first_three, read_state, refuse_nan

STEMS = ("sum", "random")
# Widths of the two inputs that tell which axis of a feature map is the time, and how many frames a step has.
MEL_BINS, WIDTHS = 64, (256, 1280)


class TimmEncoder(nn.Module):
    """Turns features `[batch, frames, mels]` into the last feature map of a timm network, `[batch, channels, freq, steps]`.

    The network has one input channel and no classifier. Inputs too small for it are filled with zeros at their end.

    Arguments
    ---------
    name
        The network, such as "convnext_atto", "mobilenetv4_conv_small", "tf_efficientnetv2_b0", "regnetx_002", "resnet18":
        `timm.list_models()` lists them. With `pretrained="timm"` also the weights: "resnet18.a1_in1k".
    pretrained
        "timm" downloads timm's own weights from the Hugging Face Hub, once. Otherwise the path of a file with weights of this
        network, safetensors or a state dict, also wrapped, with or without its classifier; code in it is never run. Exported
        folders contain the weights and leave this out.
    stem
        What becomes of a first convolution for the three channels of pictures: "sum" adds its filters up, "random" starts anew.
    norm_momentum
        Batch normalisation's momentum in PyTorch's sense: the weight of the newest batch. `None` leaves the network's own,
        mostly 0.1. PSLA's is 0.01.
    drop_path
        In training the branches of the network are skipped with probabilities that grow to this one from its first to its last.

    Attributes
    ----------
    out_channels, frames_per_step
        Channels of the feature map, and the frames from one of its steps to the next, both measured.

    Raises
    ------
    InputError
        There is no such network, it has no such feature map or no `drop_path`, or the weights cannot be had or are of another.

    Example
    -------
    >>> encoder = TimmEncoder("test_resnet").eval()
    >>> encoder(torch.zeros(1, 198, 64)).shape, encoder.out_channels, encoder.frames_per_step
    (torch.Size([1, 96, 2, 7]), 96, 32)
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: str | Path | None = None,
        stem: str = "sum",
        norm_momentum: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, not {stem!r}")
        if norm_momentum is not None and not 0 <= norm_momentum <= 1:
            raise ValueError(f"norm_momentum must be in [0, 1], not {norm_momentum}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), not {drop_path}")
        self.name = name
        self.network = _network(name, drop_path)
        self._measure()
        if pretrained is not None:
            self._load_pretrained(pretrained, stem)
        if norm_momentum is not None:
            for part in self.network.modules():
                if isinstance(part, _BatchNorm):
                    part.momentum = norm_momentum
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _measure(self) -> None:
        """Finds the feature map's layout, its channels and steps, and the smallest input, by trying the network."""
        self.network.eval()
        try:
            maps = [self.network(torch.zeros(1, 1, MEL_BINS, width)) for width in WIDTHS]
            shapes = [list(feature_map.shape) for feature_map in maps]
        except Exception as error:  # as many ways to refuse as there are networks
            size = f"{WIDTHS[0]} frames and {MEL_BINS} mels"
            raise InputError(f"timm's {self.name} takes no features of {size}: {type(error).__name__}: {error}") from None
        grown = [axis for axis, (one, other) in enumerate(zip(*shapes, strict=True)) if one != other]
        if len(shapes[0]) != 4 or grown not in ([2], [3]):
            given = " and ".join(f"{shape} for {width} frames" for shape, width in zip(shapes, WIDTHS, strict=True))
            raise InputError(f"timm's {self.name} has no feature map over time: it gives {given}")
        # some networks compute, and answer, in [batch, freq, steps, channels]
        self.channels_come_last, time = grown == [2], grown[0]
        self.out_channels = shapes[0][3 if self.channels_come_last else 1]
        self.frames_per_step = round((WIDTHS[1] - WIDTHS[0]) / (shapes[1][time] - shapes[0][time]))
        self.min_size = next((size for size in range(1, MEL_BINS) if self._takes(size)), MEL_BINS)
        self.network.train()

    def _takes(self, size: int) -> bool:
        try:
            return 0 not in self.network(torch.zeros(1, 1, size, size)).shape
        except Exception:  # as many ways to refuse as there are networks
            return False

    def _load_pretrained(self, pretrained: str | Path, stem: str) -> None:
        if pretrained == "timm":
            state, source = _downloaded(self.name), f"timm's weights of {self.name}"
        else:
            state, source = encoder_state(read_state(pretrained)), str(pretrained)
            # of an exported folder, or a snapshot, of this class
            state = {key.removeprefix("network."): value for key, value in state.items()}
        own = self.network.state_dict()
        heads = tuple(f"{name}." for name in self._names_of("classifier"))
        state = {key: value for key, value in state.items() if key in own or not key.startswith(heads)}
        for name in self._names_of("first_conv"):
            weight, mine = state.get(f"{name}.weight"), own.get(f"{name}.weight")
            if weight is not None and mine is not None and weight.shape[1:2] == (3,) and mine.shape[1] == 1:
                state[f"{name}.weight"] = weight.sum(1, keepdim=True) if stem == "sum" else mine
        if problems := differences(own, state):
            raise InputError(f"{source}: not weights of timm's {self.name}: {first_three(problems)}")
        refuse_nan(state, source)
        self.network.load_state_dict(state, strict=False)

    def _names_of(self, key: str) -> list[str]:
        """The names of layers in timm's description of a network: none, one or several."""
        found = self.network.pretrained_cfg.get(key)
        return [found] if isinstance(found, str) else list(found or ())

    def forward(self, feats: Tensor, lens: Tensor | None = None) -> Tensor:
        """Encodes normalised features; `lens` is not used, but SpeechBrain's encoders take it."""
        x = feats.transpose(1, 2).unsqueeze(1)
        height, width = (max(0, self.min_size - size) for size in x.shape[2:])
        if height or width:
            x = F.pad(x, (0, width, 0, height))
        feature_map = self.network(x.contiguous(memory_format=torch.channels_last))
        return feature_map.permute(0, 3, 1, 2) if self.channels_come_last else feature_map


def _network(name: str, drop_path: float) -> nn.Module:
    """Builds a network with random weights, one input channel and its whole feature map for an answer."""
    # a name with a colon would be fetched from elsewhere, also where somebody loads an exported folder
    kind = name.partition(".")[0]
    if not timm.is_model(kind):
        close = difflib.get_close_matches(kind, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() lists them"
        raise InputError(f"timm {timm.__version__} has no network {name!r}{hint}")
    options = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        return timm.create_model(name, pretrained=False, in_chans=1, num_classes=0, global_pool="", **options)
    except Exception as error:  # as many ways to refuse as there are networks
        raise InputError(f"timm's {name} cannot be made an encoder: {type(error).__name__}: {error}") from None


def _downloaded(name: str) -> dict[str, Tensor]:
    """Fetches timm's weights, with the stem for pictures and the classifier."""
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # what a network, the Hub and a file can all go wrong with
        raise InputError(
            f"timm's weights of {name} cannot be downloaded ({type(error).__name__}: {error}). Download model.safetensors of "
            f"https://huggingface.co/timm elsewhere, and give its path"
        ) from None
