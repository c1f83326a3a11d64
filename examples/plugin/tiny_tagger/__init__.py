"""A small ConvNeXt for audio tagging with psla_sb: no batch normalisation, nothing of psla_sb's is imported."""

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """ConvNeXt's block: depthwise 7x7 convolution, layer normalisation, two 1x1 layers.

    Source: Liu et al., "A ConvNet for the 2020s", CVPR 2022.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.narrow(F.gelu(self.widen(y))).permute(0, 3, 1, 2)


class TinyConvNeXt(nn.Module):
    """Features `[batch, frames, mels]` -> feature map `[batch, channels, freq, steps]`, both axes a 16th.

    Arguments
    ---------
    channels
        Of the feature map.
    depth
        Blocks after each of the two downsamplings.

    Attributes
    ----------
    out_channels, frames_per_step
        What poolings and timelines ask for. They may be left out: then they are measured.

    Example
    -------
    >>> import torch
    >>> TinyConvNeXt()(torch.zeros(1, 198, 64)).shape
    torch.Size([1, 64, 4, 12])
    """

    def __init__(self, channels: int = 64, depth: int = 2):
        super().__init__()
        self.out_channels, self.frames_per_step = channels, 16
        half = channels // 2
        self.layers = nn.Sequential(
            nn.Conv2d(1, half, 4, stride=4),
            *(Block(half) for _ in range(depth)),
            nn.Conv2d(half, channels, 4, stride=4),
            *(Block(channels) for _ in range(depth)),
        )

    def forward(self, feats: Tensor, lens: Tensor | None = None) -> Tensor:
        return self.layers(feats.transpose(1, 2)[:, None])
