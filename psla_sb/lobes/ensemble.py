"""Several trained taggers with one front end as one: an encoder and a pooling in the places of a single tagger's."""

from torch import nn
from torch.nn import functional as F

from psla_sb.lobes.chain import call


class EnsembleEncoder(nn.Module):
    """The encoders of the members, side by side.

    Arguments
    ---------
    members : sequence of torch.nn.Module
        Each takes features and gives a feature map.

    Raises
    ------
    ValueError
        If there are no members.

    Example
    -------
    >>> import torch
    >>> from psla_sb.lobes.efficientnet import EfficientNetEncoder
    >>> encoder = EnsembleEncoder([EfficientNetEncoder("b0"), EfficientNetEncoder("b2")])
    >>> [feature_map.shape for feature_map in encoder.eval()(torch.zeros(1, 100, 128))]
    [torch.Size([1, 1280, 4, 3]), torch.Size([1, 1408, 4, 4])]
    """

    def __init__(self, members):
        super().__init__()
        if not members:
            raise ValueError("EnsembleEncoder needs at least one member")
        self.members = nn.ModuleList(members)

    def forward(self, feats, lens=None):
        """Encode.

        Arguments
        ---------
        feats : torch.Tensor
            `[batch, frames, mels]`, normalised.
        lens : torch.Tensor, optional
            Handed on to the members.

        Returns
        -------
        tuple of torch.Tensor
            Each member's feature map `[batch, channels, freq, steps]`.
        """
        return tuple(call(member, feats, lens) for member in self.members)


class EnsemblePooling(nn.Module):
    """The mean of the members' probabilities, each clamped to [0, 1].

    Arguments
    ---------
    members : sequence of torch.nn.Module
        Each takes the feature map of the encoder in its place.
    weights : sequence of float, optional
        How much each member counts; by default all the same.

    Raises
    ------
    ValueError
        If there are no members, there are not as many weights, or a weight is not positive.

    Example
    -------
    >>> import torch
    >>> from psla_sb.lobes.pooling import AttentionPooling, MeanPooling
    >>> pooling = EnsemblePooling([AttentionPooling(1280, 527), MeanPooling(1408, 527)], weights=[2, 1])
    >>> pooling([torch.rand(2, 1280, 4, 33), torch.rand(2, 1408, 4, 33)]).shape
    torch.Size([2, 527])
    """

    def __init__(self, members, weights=None):
        super().__init__()
        weights = [1.0] * len(members) if weights is None else list(weights)
        if not members or len(weights) != len(members) or min(weights) <= 0:
            raise ValueError(f"EnsemblePooling needs members, and for each a positive weight, not {len(members)} and {weights}")
        self.members = nn.ModuleList(members)
        self.weights = [weight / sum(weights) for weight in weights]

    def _mean(self, answers):
        return sum(weight * answer.clamp(0, 1) for weight, answer in zip(self.weights, answers, strict=True))

    def forward(self, feature_maps, lens=None):
        """Probabilities of each clip.

        Arguments
        ---------
        feature_maps : sequence of torch.Tensor
            Each member's `[batch, channels, freq, steps]`.
        lens : torch.Tensor, optional
            Handed on to the members that take it.

        Returns
        -------
        torch.Tensor
            `[batch, classes]`, float32.
        """
        return self._mean([call(member, x, lens) for member, x in zip(self.members, feature_maps, strict=True)])

    def segment_scores(self, feature_maps):
        """Scores of each step, for timelines.

        Arguments
        ---------
        feature_maps : sequence of torch.Tensor
            Each member's `[batch, channels, freq, steps]`; one with fewer steps than another has them repeated.

        Returns
        -------
        torch.Tensor
            `[batch, classes, steps]`, float32.
        """
        scores = [member.segment_scores(x) for member, x in zip(self.members, feature_maps, strict=True)]
        steps = max(one.shape[2] for one in scores)
        return self._mean([F.interpolate(one, size=steps) for one in scores])
