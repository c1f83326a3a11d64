"""What training minimises: the cross-entropy with labels, and with what a teacher scores."""

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-7
DISTILLATION_WEIGHT = 9.0  # by default


def binary_cross_entropy(probabilities: Tensor, targets: Tensor) -> Tensor:
    """The mean over clips and classes of the binary cross-entropy of probabilities `[batch, classes]` with targets in [0, 1].

    PyTorch's own function stops the program where a probability is not a number; this one gives a loss that is none.

    Example
    -------
    >>> binary_cross_entropy(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    tensor(0.6931)
    """
    p, t = probabilities, targets
    return -(t * p.log() + (1 - t) * (1 - p).log()).mean()


def softened(scores: Tensor, temperature: float) -> Tensor:
    """Gives sigmoid(logit / temperature) of probabilities, in float32; with more than 1 they say less surely what they say.

    Example
    -------
    >>> softened(torch.tensor([0.5, 0.9]), 2.0)
    tensor([0.5000, 0.7500])
    """
    scores = scores.float()
    return scores if temperature == 1 else torch.sigmoid(torch.logit(scores, EPSILON) / temperature)


def with_teacher(loss: Callable[[Tensor, Tensor], Tensor], probabilities: Tensor, targets: Tensor, weight: float) -> Tensor:
    """Computes (labels + w teacher) / (1 + w), of the losses of probabilities `[batch, classes]` with labels and teacher's scores.

    `targets` are the labels, or, `[batch, 2 classes]`, the labels and the scores. Source: Hinton, Vinyals, Dean, "Distilling the
    knowledge in a neural network", 2015; for audio tagging, with w = 9, Schmid, Koutini, Widmer, ICASSP 2023.

    Example
    -------
    >>> with_teacher(binary_cross_entropy, torch.tensor([[0.5]]), torch.tensor([[1.0, 0.5]]), weight=9.0)
    tensor(0.6931)
    """
    n_classes = probabilities.shape[1]
    of_labels = loss(probabilities, targets[:, :n_classes])
    if targets.shape[1] == n_classes:
        return of_labels
    return (of_labels + weight * loss(probabilities, targets[:, n_classes:])) / (1 + weight)
