"""From an encoder's feature map to class probabilities: attention pooling with one or several heads, and mean pooling.

Formulas: Gong, Chung, Glass, "PSLA: Improving Audio Tagging with Pretraining, Sampling, Labeling, and Aggregation",
IEEE/ACM TASLP 29, 2021, section III. Parameter names and shapes are those of the published checkpoints. Everything is
computed in float32, whatever the encoder's precision.
"""

import torch
from torch import nn
from torch.nn import functional as F

from psla_sb.lobes.features import full_float32


def _uniform_conv(in_channels, n_classes):
    conv = nn.Conv2d(in_channels, n_classes, kernel_size=1)
    bound = (6 / in_channels) ** 0.5
    nn.init.uniform_(conv.weight, -bound, bound)
    nn.init.zeros_(conv.bias)
    return conv


def _check_sizes(**sizes):
    wrong = {name: size for name, size in sizes.items() if size < 1}
    if wrong:
        raise ValueError(f"must be at least 1: {wrong}")


def _steps(feature_map):
    """A feature map -> `[batch, steps, channels]`, float32: the mean over frequency, if it has any."""
    x = feature_map.float()
    return (x.mean(2) if x.dim() == 4 else x).transpose(1, 2)


def _sigmoid_of(conv, x):
    """`[batch, steps, channels]` -> `[batch, steps, classes]`; a 1x1 convolution is a matrix product."""
    return torch.sigmoid(F.linear(x, conv.weight.flatten(1), conv.bias))


class AttentionPooling(nn.Module):
    """Pool class probabilities over the steps with the weights that each head gives them.

    With x the mean of the feature map over frequency, head h has a = clamp(sigmoid(A_h x), 1e-7, 1 - 1e-7), divided by its
    sum over the steps, and c = sigmoid(C_h x); its answer is the sum over the steps of a * c. The module's answer is the
    sum of the heads' answers, weighted with the learnable `head_weight` (a single head has none).

    Arguments
    ---------
    in_channels : int
        Channels of the feature map.
    n_classes : int
    n_heads : int
        At least 1; published models have 4 or 1.

    Raises
    ------
    ValueError
        If an argument is below 1.

    Example
    -------
    >>> classifier = AttentionPooling(in_channels=1408, n_classes=527)
    >>> classifier(torch.rand(2, 1408, 4, 33)).shape
    torch.Size([2, 527])
    """

    def __init__(self, in_channels, n_classes, n_heads=4):
        super().__init__()
        _check_sizes(in_channels=in_channels, n_classes=n_classes, n_heads=n_heads)
        self.n_heads = n_heads
        if n_heads == 1:
            self.att = _uniform_conv(in_channels, n_classes)
            self.cla = _uniform_conv(in_channels, n_classes)
        else:
            self.att = nn.ModuleList(nn.Conv2d(in_channels, n_classes, kernel_size=1) for _ in range(n_heads))
            self.cla = nn.ModuleList(nn.Conv2d(in_channels, n_classes, kernel_size=1) for _ in range(n_heads))
            self.head_weight = nn.Parameter(torch.full((n_heads,), 1 / n_heads))

    def _heads(self):
        """Each head's two convolutions and its weight."""
        if self.n_heads == 1:
            return [(self.att, self.cla, 1.0)]
        return zip(self.att, self.cla, self.head_weight, strict=True)

    def forward(self, feature_map):
        """Probabilities of each clip.

        Arguments
        ---------
        feature_map : torch.Tensor
            `[batch, channels, freq, steps]` or `[batch, channels, steps]`

        Returns
        -------
        torch.Tensor
            `[batch, classes]`, float32. Head weights that sum to more than 1 can push them out of [0, 1]; in evaluation mode they
            are clamped to it.
        """
        with full_float32(feature_map.device):
            x, answer = _steps(feature_map), 0.0
            for att, cla, weight in self._heads():
                attention = _sigmoid_of(att, x).clamp(1e-7, 1 - 1e-7)
                pooled = (attention * _sigmoid_of(cla, x)).sum(1) / attention.sum(1)
                answer = answer + weight * pooled
        return answer if self.training else answer.clamp(0.0, 1.0)

    def segment_scores(self, feature_map):
        """Scores of each step, for timelines: the heads' c weighted with `head_weight`, clamped to [0, 1].

        Attention is left out on purpose: it compares the steps of one clip with each other, so with it a sound that fills
        the clip would score low at every step, and scores would depend on how long the clip is.

        Arguments
        ---------
        feature_map : torch.Tensor
            `[batch, channels, freq, steps]` or `[batch, channels, steps]`

        Returns
        -------
        torch.Tensor
            `[batch, classes, steps]`, float32.
        """
        with full_float32(feature_map.device):
            x = _steps(feature_map)
            scores = sum(weight * _sigmoid_of(cla, x) for _, cla, weight in self._heads())
        return scores.clamp(0, 1).transpose(1, 2)


class MeanPooling(nn.Module):
    """The mean over the steps of sigmoid(C x), with x the mean of the feature map over frequency.

    Arguments
    ---------
    in_channels : int
        Channels of the feature map.
    n_classes : int

    Raises
    ------
    ValueError
        If an argument is below 1.

    Example
    -------
    >>> MeanPooling(in_channels=1280, n_classes=200)(torch.rand(2, 1280, 4, 33)).shape
    torch.Size([2, 200])
    """

    def __init__(self, in_channels, n_classes):
        super().__init__()
        _check_sizes(in_channels=in_channels, n_classes=n_classes)
        self.cla = _uniform_conv(in_channels, n_classes)

    def forward(self, feature_map):
        """Probabilities of each clip.

        Arguments
        ---------
        feature_map : torch.Tensor
            `[batch, channels, freq, steps]` or `[batch, channels, steps]`

        Returns
        -------
        torch.Tensor
            `[batch, classes]`, float32.
        """
        return self.segment_scores(feature_map).mean(2)

    def segment_scores(self, feature_map):
        """Scores of each step, sigmoid(C x), for timelines.

        Arguments
        ---------
        feature_map : torch.Tensor
            `[batch, channels, freq, steps]` or `[batch, channels, steps]`

        Returns
        -------
        torch.Tensor
            `[batch, classes, steps]`, float32.
        """
        with full_float32(feature_map.device):
            return _sigmoid_of(self.cla, _steps(feature_map)).transpose(1, 2)
