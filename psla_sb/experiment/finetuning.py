"""Training from weights that know something already: the head first, smaller rates below, and an end when nothing gets better."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from psla_sb.errors import InputError
from psla_sb.experiment.brain import EPSILON, TaggingBrain, binary_cross_entropy
from psla_sb.experiment.schedules import CosineScheduler


def parameter_groups(modules: Mapping[str, nn.Module], layer_decay: float) -> list[dict[str, Any]]:
    """Puts parameters into an optimizer's groups: those of the head, and of the encoder one group for each layer.

    A layer's `lr_scale` is `layer_decay` to the power of how deep it lies, from 0 for the last layer to 1 for the first one. Layers
    are told by the order in which the encoder has them: for nearly all networks it is the one in which they are computed.

    Example
    -------
    >>> modules = {"embedding_model": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "classifier": nn.Linear(2, 1)}
    >>> [(group["lr_scale"], len(group["params"])) for group in parameter_groups(modules, layer_decay=0.25)]
    [(1.0, 2), (0.25, 2), (1.0, 2)]
    """
    groups: list[dict[str, Any]] = []
    for name, module in modules.items():
        if name != "embedding_model" and isinstance(module, nn.Module) and any(True for _ in module.parameters()):
            groups.append({"params": list(module.parameters()), "lr_scale": 1.0, "after_head": False})
    layers = [list(layer.parameters(recurse=False)) for layer in modules["embedding_model"].modules()]
    layers = [layer for layer in layers if layer]
    for i, layer in enumerate(layers):
        depth = 1 - i / max(1, len(layers) - 1)
        groups.append({"params": layer, "lr_scale": layer_decay**depth, "after_head": True})
    return groups


def cross_entropy(probabilities: Tensor, targets: Tensor, activation: str = "sigmoid") -> Tensor:
    """The loss that belongs to a head's activation: "sigmoid", any number of labels, or "softmax", one label for each clip.

    The first is `binary_cross_entropy`. The second is the mean over clips of -sum(t log p), with targets t divided by their sum: a
    mixture of two clips has two labels.

    Example
    -------
    >>> import torch
    >>> cross_entropy(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[1.0, 0.0, 0.0]]), "softmax")
    tensor(0.6931)
    """
    if activation == "sigmoid":
        return binary_cross_entropy(probabilities, targets)
    return -(targets / targets.sum(1, keepdim=True).clamp(min=EPSILON) * probabilities.log()).sum(1).mean()


class FineTuningBrain(TaggingBrain):
    """Trains like a `TaggingBrain`, with a ladder of rates and an early end; the YAML's `schedule` is a `CosineScheduler`.

    Further hyperparameters:

    * `layer_decay`: the rate of the encoder's first layer, as a part of that of its last one, see `parameter_groups`;
    * `head_epochs`: so many epochs the head is trained alone, before the encoder is; 0 for none;
    * `patience`: after so many epochs without a higher validation mAP the training ends; as many as there are for never.
    """

    def init_optimizers(self) -> None:
        """Makes SpeechBrain's optimizer, in the form that the device has, of groups with rates of their own."""
        super().init_optimizers()
        for optimizer in (self.optimizers_dict or {}).values():
            optimizer.param_groups.clear()
            for group in parameter_groups(self.hparams.modules, self.hparams.layer_decay):
                optimizer.add_param_group(group)

    def on_fit_start(self) -> None:
        """As `TaggingBrain`'s; tells the schedule how many steps there are."""
        super().on_fit_start()
        schedule = self.hparams.schedule
        if not isinstance(schedule, CosineScheduler):
            raise InputError(f"FineTuningBrain needs a CosineScheduler as schedule, not a {type(schedule).__qualname__}")
        accumulated = self.grad_accumulation_factor
        schedule.n_steps = max(1, self.total_steps // accumulated)
        schedule.head_steps = (self.n_steps or 0) * self.hparams.head_epochs // accumulated
