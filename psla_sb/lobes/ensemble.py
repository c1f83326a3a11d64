"""Several trained taggers with one front end as one: an encoder and a pooling in the places of a single tagger's."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from psla_sb.lobes.chain import call


class EnsembleEncoder(nn.Module):
    """Runs the members' encoders side by side: features `[batch, frames, mels]` to a tuple of each member's feature map."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("EnsembleEncoder needs at least one member")
        self.members = nn.ModuleList(members)

    def forward(self, feats: Tensor, lens: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(call(member, feats, lens) for member in self.members)


class EnsemblePooling(nn.Module):
    """Takes the weighted mean of the members' probabilities, each clamped to [0, 1]; without weights all count the same."""

    def __init__(self, members: Sequence[nn.Module], weights: Iterable[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(members) if weights is None else list(weights)
        if not members or len(weights) != len(members) or min(weights) <= 0:
            raise ValueError(f"EnsemblePooling needs members, and for each a positive weight, not {len(members)} and {weights}")
        self.members = nn.ModuleList(members)
        self.weights = [weight / sum(weights) for weight in weights]

    def _mean(self, answers: Sequence[Tensor]) -> Any:
        return sum(weight * answer.clamp(0, 1) for weight, answer in zip(self.weights, answers, strict=True))

    def forward(self, feature_maps: Sequence[Tensor], lens: Tensor | None = None) -> Tensor:
        """Gives `[batch, classes]`, float32, of each member's feature map."""
        return self._mean([call(member, x, lens) for member, x in zip(self.members, feature_maps, strict=True)])

    def segment_scores(self, feature_maps: Sequence[Tensor]) -> Tensor:
        """Scores each step for timelines, `[batch, classes, steps]`; a member with fewer steps has them repeated."""
        members: Any = self.members
        scores = [member.segment_scores(x) for member, x in zip(members, feature_maps, strict=True)]
        steps = max(one.shape[2] for one in scores)
        return self._mean([F.interpolate(one, size=steps) for one in scores])
