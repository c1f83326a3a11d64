"""From an encoder's feature map to class probabilities, in float32 whatever the encoder's precision.

Formulas of attention and mean: Gong, Chung, Glass, "PSLA", IEEE/ACM TASLP 29, 2021, section III, with the published checkpoints'
names of parameters. `MLPPooling` and `ConvPooling` are the heads of EfficientAT (Schmid, Koutini, Widmer, arXiv 2211.04772).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psla_sb.lobes.features import float32_matmul, full_float32


def _convs(in_channels: int, n_classes: int, n_heads: int = 1) -> Any:
    """Makes the 1x1 convolution of a single head, or those of several; published models start them differently."""
    if n_heads > 1:
        return nn.ModuleList(nn.Conv2d(in_channels, n_classes, kernel_size=1) for _ in range(n_heads))
    conv: Any = nn.Conv2d(in_channels, n_classes, kernel_size=1)
    bound = (6 / in_channels) ** 0.5
    nn.init.uniform_(conv.weight, -bound, bound)
    nn.init.zeros_(conv.bias)
    return conv


def _check_sizes(**sizes: int) -> None:
    if wrong := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"must be at least 1: {wrong}")


def _steps(feature_map: Tensor) -> Tensor:
    """Brings a feature map to `[batch, steps, channels]`, float32: the mean over frequency, if it has any."""
    x = feature_map.float()
    return (x.mean(2) if x.dim() == 4 else x).transpose(1, 2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1)}


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")


def _activated(conv: nn.Conv2d, x: Tensor, activation: str = "sigmoid") -> Tensor:
    # [batch, steps, channels] -> [batch, steps, classes]: a 1x1 convolution is a matrix product
    weight, bias = conv.weight.flatten(1), conv.bias
    # the CPU's own order of operations: what was computed there stays the same to the last bit
    logits = float32_matmul(x, weight.T) + bias if x.is_cuda and bias is not None else F.linear(x, weight, bias)
    return ACTIVATIONS[activation](logits)


class AttentionPooling(nn.Module):
    """Pools class probabilities `[batch, classes]` over the steps of a feature map with the weights that each head gives them.

    With x the mean of the feature map over frequency, head h has a = clamp(sigmoid(A_h x), 1e-7, 1 - 1e-7), divided by its
    sum over the steps, and c = sigmoid(C_h x); its answer is the sum over the steps of a * c. The module's answer is the
    sum of the heads' answers, weighted with the learnable `head_weight` (a single head has none).

    Arguments
    ---------
    activation
        "sigmoid": a clip has any number of labels. "softmax": it has one; c = softmax(C_h x) over the classes, and the answers are
        divided by their sum over the classes.

    Example
    -------
    >>> AttentionPooling(in_channels=1408, n_classes=527, n_heads=4)(torch.rand(2, 1408, 4, 33)).shape
    torch.Size([2, 527])
    """

    def __init__(self, in_channels: int, n_classes: int, n_heads: int = 4, activation: str = "sigmoid") -> None:
        super().__init__()
        _check_sizes(in_channels=in_channels, n_classes=n_classes, n_heads=n_heads)
        _check_activation(activation)
        self.n_heads, self.activation = n_heads, activation
        self.att, self.cla = (_convs(in_channels, n_classes, n_heads) for _ in range(2))
        if n_heads > 1:
            self.head_weight = nn.Parameter(torch.full((n_heads,), 1 / n_heads))

    def _heads(self) -> Iterable[tuple[nn.Conv2d, nn.Conv2d, Any]]:
        return [(self.att, self.cla, 1.0)] if self.n_heads == 1 else zip(self.att, self.cla, self.head_weight, strict=True)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Takes `[batch, channels, freq, steps]` or `[batch, channels, steps]`; in evaluation mode clamps to [0, 1]."""
        with full_float32(feature_map.device):
            x = _steps(feature_map)
            answer: Any = 0.0
            if x.is_cuda:
                answer = self._heads_at_once(x)
            else:
                for att, cla, weight in self._heads():
                    attention = _activated(att, x).clamp(1e-7, 1 - 1e-7)
                    answer = answer + weight * ((attention * _activated(cla, x, self.activation)).sum(1) / attention.sum(1))
            if self.activation == "softmax":
                # attention differs between the classes, so what it has pooled is no distribution any more
                answer = answer.clamp(min=0.0)
                answer = answer / answer.sum(1, keepdim=True).clamp(min=1e-7)
        # head weights can push it a little out of [0, 1]; in training that is the loss's business, as in the published system
        return answer if self.training else answer.clamp(0.0, 1.0)

    def _heads_at_once(self, x: Tensor) -> Tensor:
        """Multiplies with all heads' weights at once, which a GPU does faster."""
        heads = list(self._heads())
        convs = [att for att, _, _ in heads] + [cla for _, cla, _ in heads]
        biases: list[Any] = [conv.bias for conv in convs]
        matrix, bias = torch.cat([conv.weight.flatten(1) for conv in convs]).T, torch.cat(biases)
        # [batch, steps, 2, heads, classes]
        attention, scores = (float32_matmul(x, matrix) + bias).unflatten(2, (2, len(heads), -1)).unbind(2)
        attention, scores = torch.sigmoid(attention).clamp(1e-7, 1 - 1e-7), ACTIVATIONS[self.activation](scores)
        answers = (attention * scores).sum(1) / attention.sum(1)
        return answers[:, 0] if self.n_heads == 1 else (answers * self.head_weight[:, None]).sum(1)

    def segment_scores(self, feature_map: Tensor) -> Tensor:
        """Scores each step for timelines, `[batch, classes, steps]`: the heads' c weighted with `head_weight`, in [0, 1]."""
        # Attention is left out on purpose: it compares the steps of one clip with each other, so with it a sound that fills
        # the clip would score low at every step, and scores would depend on how long the clip is.
        with full_float32(feature_map.device):
            x = _steps(feature_map)
            scores: Any = sum(weight * _activated(cla, x, self.activation) for _, cla, weight in self._heads())
        return scores.clamp(0, 1).transpose(1, 2)


class MeanPooling(nn.Module):
    """Takes the mean over the steps of sigmoid(C x), with x the mean of the feature map over frequency: `[batch, classes]`.

    Example
    -------
    >>> MeanPooling(in_channels=1280, n_classes=200)(torch.rand(2, 1280, 4, 33)).shape
    torch.Size([2, 200])
    """

    def __init__(self, in_channels: int, n_classes: int) -> None:
        super().__init__()
        _check_sizes(in_channels=in_channels, n_classes=n_classes)
        self.cla = _convs(in_channels, n_classes)

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.segment_scores(feature_map).mean(2)

    def segment_scores(self, feature_map: Tensor) -> Tensor:
        """Scores each step, sigmoid(C x), for timelines: `[batch, classes, steps]`."""
        with full_float32(feature_map.device):
            return _activated(self.cla, _steps(feature_map)).transpose(1, 2)


class MLPPooling(nn.Module):
    """Gives probabilities `[batch, classes]` of the feature map's mean over frequency and time, by a network of one hidden layer.

    sigmoid(W dropout(hardswish(V x + b)) + c). In EfficientAT's files V is `classifier.2`, and W is `classifier.5`.

    Arguments
    ---------
    hidden
        Size of the hidden layer; 1280 times the width, rounded to 8, in EfficientAT's networks.
    dropout
        Share of the hidden layer that is left out in training.

    Example
    -------
    >>> MLPPooling(in_channels=384, n_classes=527, hidden=512)(torch.rand(2, 384, 4, 32)).shape
    torch.Size([2, 527])
    """

    def __init__(self, in_channels: int, n_classes: int, hidden: int = 1280, dropout: float = 0.2) -> None:
        super().__init__()
        _check_sizes(in_channels=in_channels, n_classes=n_classes, hidden=hidden)
        self.hidden, self.output = nn.Linear(in_channels, hidden), nn.Linear(hidden, n_classes)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.hidden, self.output):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, feature_map: Tensor) -> Tensor:
        with full_float32(feature_map.device):
            return self._probabilities(_steps(feature_map).mean(1))

    def segment_scores(self, feature_map: Tensor) -> Tensor:
        """Scores each step as if it was the clip, for timelines: `[batch, classes, steps]`."""
        with full_float32(feature_map.device):
            return self._probabilities(_steps(feature_map)).transpose(1, 2)

    def _probabilities(self, x: Tensor) -> Tensor:
        return torch.sigmoid(_linear(self.output, self.dropout(F.hardswish(_linear(self.hidden, x)))))


class ConvPooling(nn.Module):
    """Gives probabilities `[batch, classes]`: the sigmoid of the mean, over the feature map, of a normalised 1x1 convolution.

    In EfficientAT's files ("fully convolutional", `_fc`) the convolution, which has no bias, is `classifier.0`, and its batch
    normalisation `classifier.1`.

    Example
    -------
    >>> ConvPooling(in_channels=960, n_classes=527)(torch.rand(2, 960, 4, 32)).shape
    torch.Size([2, 527])
    """

    def __init__(self, in_channels: int, n_classes: int) -> None:
        super().__init__()
        _check_sizes(in_channels=in_channels, n_classes=n_classes)
        self.conv, self.norm = nn.Conv2d(in_channels, n_classes, kernel_size=1, bias=False), nn.BatchNorm2d(n_classes)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def forward(self, feature_map: Tensor) -> Tensor:
        with full_float32(feature_map.device):
            return torch.sigmoid(self._logits(feature_map).mean(2))

    def segment_scores(self, feature_map: Tensor) -> Tensor:
        """Scores each step, the sigmoid of its mean over frequency, for timelines: `[batch, classes, steps]`."""
        with full_float32(feature_map.device):
            return torch.sigmoid(self._logits(feature_map))

    def _logits(self, feature_map: Tensor) -> Tensor:
        """Scores each step before the sigmoid, `[batch, classes, steps]`."""
        if not self.norm.training:
            # both are linear, so the mean over frequency may come first
            x = _steps(feature_map)
            x = float32_matmul(x, self.conv.weight.flatten(1).T).transpose(1, 2)
            return self.norm(x[:, :, None])[:, :, 0]
        # [batch, channels, freq, steps] -> [batch, freq, steps, classes]
        x = feature_map.float() if feature_map.dim() == 4 else feature_map.float()[:, :, None]
        x = float32_matmul(x.permute(0, 2, 3, 1), self.conv.weight.flatten(1).T)
        return self.norm(x.permute(0, 3, 1, 2)).mean(2)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return float32_matmul(x, layer.weight.T) + layer.bias
