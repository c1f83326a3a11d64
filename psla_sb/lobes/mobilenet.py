"""MobileNetV3 as an audio encoder, with the parameter names of EfficientAT's published networks, so that their weights fit.

Layout: Howard et al., "Searching for MobileNetV3", 2019, table 1, for spectrograms as in Schmid, Koutini, Widmer, "Efficient
Large-scale Audio Tagging via Transformer-to-CNN Knowledge Distillation", 2023 (arXiv 2211.04772).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from psla_sb.errors import InputError
from psla_sb.lobes.fused import depthwise, expand, project
from psla_sb.lobes.pretrained import differences, encoder_state, first_three, read_state, refuse_family, refuse_nan


class Row(NamedTuple):
    """Describes a block: channels before any width, and what it consists of."""

    in_channels: int
    kernel: int
    expanded: int
    out_channels: int
    has_se: bool
    activation: type[nn.Module]
    # which of the encoder's strides it has; None: 1
    stride: int | None = None


RE, HS = nn.ReLU, nn.Hardswish
ROWS = (
    Row(16, 3, 16, 16, False, RE),
    Row(16, 3, 64, 24, False, RE, stride=0),
    Row(24, 3, 72, 24, False, RE),
    Row(24, 5, 72, 40, True, RE, stride=1),
    Row(40, 5, 120, 40, True, RE),
    Row(40, 5, 120, 40, True, RE),
    Row(40, 3, 240, 80, False, HS, stride=2),
    Row(80, 3, 200, 80, False, HS),
    Row(80, 3, 184, 80, False, HS),
    Row(80, 3, 184, 80, False, HS),
    Row(80, 3, 480, 112, True, HS),
    Row(112, 3, 672, 112, True, HS),
    Row(112, 5, 672, 160, True, HS, stride=3),
    Row(160, 5, 960, 160, True, HS),
    Row(160, 5, 960, 160, True, HS),
)
STRIDES = (2, 2, 2, 2)
# weights of a published network that are no encoder's
HEAD = "classifier."


def rounded(channels: float) -> int:
    """Gives the multiple of 8 that is used for so many channels: at most a tenth fewer.

    Example
    -------
    >>> rounded(0.4 * 40), rounded(0.1 * 16), rounded(12)
    (16, 8, 16)
    """
    value = max(8, int(channels + 4) // 8 * 8)
    return value if value >= 0.9 * channels else value + 8


class _ConvNorm(nn.Sequential):
    """A convolution, its normalisation and its activation, if it has one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        momentum: float,
        activation: type[nn.Module] | None,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        parts: list[nn.Module] = [conv, nn.BatchNorm2d(out_channels, eps=1e-3, momentum=momentum)]
        super().__init__(*parts, *([] if activation is None else [activation()]))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        parts: Any = list(self)
        conv, norm, activation = parts if len(parts) == 3 else (*parts, nn.Identity())
        if conv.kernel_size == (1, 1):
            return expand(conv, norm, x, activation)
        return activation(norm(depthwise(conv, x) if conv.groups > 1 else conv(x)))


class _SqueezeExcite(nn.Module):
    """Makes a gate of the means of channels, which are `[batch, channels, 1, 1]` both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = rounded(channels / 4)
        self.fc1, self.fc2 = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)

    def forward(self, mean: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(mean.flatten(1)))))[..., None, None]


class _SqueezeExcites(nn.Module):
    """Published networks can have gates along other dimensions too; of those that there are, each has this one alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conc_se_layers = nn.ModuleList([_SqueezeExcite(channels)])

    def forward(self, mean: Tensor) -> Tensor:
        return self.conc_se_layers[0](mean)


class _Block(nn.Module):
    """An inverted residual: expand, filter each channel by itself, scale channels, project."""

    def __init__(self, row: Row, width: float, strides: Sequence[int], momentum: float) -> None:
        super().__init__()
        into, wide, out = (rounded(channels * width) for channels in (row.in_channels, row.expanded, row.out_channels))
        stride = 1 if row.stride is None else strides[row.stride]
        self.is_alike = stride == 1 and into == out
        parts: list[nn.Module] = [] if wide == into else [_ConvNorm(into, wide, momentum, row.activation)]
        parts.append(_ConvNorm(wide, wide, momentum, row.activation, row.kernel, stride, groups=wide))
        parts += [_SqueezeExcites(wide)] if row.has_se else []
        self.block = nn.Sequential(*parts, _ConvNorm(wide, out, momentum, None))

    def forward(self, x: Tensor) -> Tensor:
        y, gate = x, None
        for k in range(len(self.block) - 1):
            part = self.block[k]
            if isinstance(part, _SqueezeExcites):
                gate = part
            else:
                y = part(y)
        last: Any = self.block[-1]
        y = last[1](project(last[0], y, gate))
        return x + y if self.is_alike else y


class MobileNetV3Encoder(nn.Module):
    """Turns features `[batch, frames, mels]` into a feature map `[batch, channels, freq, steps]`, both about 32 times smaller.

    EfficientAT's mn10 is the width 1.0, mn04 is 0.4. The parameters have the names of its published files, `features.*`; the
    `classifier.*` in these is a head, see `MLPPooling` and `ConvPooling`.

    Arguments
    ---------
    width
        Multiplies all channels, which are then rounded to multiples of 8.
    pretrained
        The path of a published file of this width, such as `mn10_im.pt` (ImageNet). Its head is left out, and a stem of three
        channels becomes one of their sum.
    strides
        Of the four blocks, in time and frequency, that make the map smaller; before them the stem halves it. Some published
        networks have (2, 2, 2, 1), which they call s2221, or (2, 2, 1, 1).
    norm_momentum
        Batch normalisation's momentum in PyTorch's sense: the weight of the newest batch.

    Raises
    ------
    InputError
        If the pretrained weights cannot be read, or are not those of this width.

    Example
    -------
    >>> embedding_model = MobileNetV3Encoder(width=0.4).eval()
    >>> embedding_model(torch.zeros(1, 100, 128)).shape, embedding_model.out_channels, embedding_model.frames_per_step
    (torch.Size([1, 384, 4, 4]), 384, 32)
    """

    def __init__(
        self,
        width: float = 1.0,
        pretrained: str | Path | None = None,
        strides: Sequence[int] = STRIDES,
        norm_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        strides = tuple(strides)
        if not width > 0:
            raise ValueError(f"width must be above 0, not {width}")
        if len(strides) != 4 or not set(strides) <= {1, 2}:
            raise ValueError(f"strides must be four numbers, each 1 or 2, not {list(strides)}")
        if not 0 <= norm_momentum <= 1:
            raise ValueError(f"norm_momentum must be in [0, 1], not {norm_momentum}")
        self.width, self.strides = width, strides
        last = rounded(160 * width)
        self.out_channels = 6 * last
        # every convolution is padded alike on both sides, so that steps are centred on frames 0, 32, ...
        self.step_offset, self.frames_per_step = 0, 2
        for stride in strides:
            self.frames_per_step *= stride
        self.features = nn.Sequential(
            _ConvNorm(1, rounded(16 * width), norm_momentum, HS, kernel=3, stride=2),
            *(_Block(row, width, strides, norm_momentum) for row in ROWS),
            _ConvNorm(last, self.out_channels, norm_momentum, HS),
        )
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out")
            elif isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, 0, 0.01)
                nn.init.zeros_(part.bias)
        if pretrained is not None:
            self._load_pretrained(pretrained)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's annotations lack it

    def forward(self, feats: Tensor, lens: Tensor | None = None) -> Tensor:
        """Encodes normalised features; `lens` is not used, but SpeechBrain's encoders take it."""
        return self.features(feats.transpose(1, 2).unsqueeze(1).contiguous(memory_format=torch.channels_last))

    def _load_pretrained(self, path: str | Path) -> None:
        tensors, stem = encoder_state(read_state(path)), "features.0.0.weight"
        state = {key: value for key, value in tensors.items() if not key.startswith(HEAD)}
        if getattr(state.get(stem), "shape", None) == (rounded(16 * self.width), 3, 3, 3):
            state[stem] = state[stem].sum(1, keepdim=True)
        if problems := differences(self.state_dict(), state):
            refuse_family(state, path)
            found = width_of(state)
            is_of = "" if found in (None, self.width) else f" They are those of width {found}."
            raise InputError(
                f"{path}: not EfficientAT's weights of a MobileNetV3 of width {self.width}: {first_three(problems)}."
                f"{is_of} Give the file of this width, or change the width."
            )
        refuse_nan(state, path)
        self.load_state_dict(state, strict=False)


def width_of(state: Mapping[Any, Any]) -> float | None:
    """Finds the width, in tenths up to 4, of a published network by the shapes of its weights.

    None, if no network has such a last convolution; if none has all of them, the first that has.

    Example
    -------
    >>> width_of(MobileNetV3Encoder(width=0.5).state_dict())
    0.5
    """
    own = {key: value for key, value in state.items() if not str(key).startswith(HEAD)}
    last, widths = list(getattr(own.get("features.16.0.weight"), "shape", [])), [tenths / 10 for tenths in range(1, 41)]
    widths = [width for width in widths if last[:2] == [6 * rounded(160 * width), rounded(160 * width)]]
    for width in widths:
        with torch.device("meta"):
            encoder = MobileNetV3Encoder(width)
        if not differences(encoder.state_dict(), own):
            return width
    return widths[0] if widths else None
