"""Learning rates: PSLA's, a warm-up in stairs by optimizer step and then halving by epoch; that of later systems, by epoch; and one
for fine-tuning, by step alone.

Source of the first: "PSLA: Improving Audio Tagging with Pretraining, Sampling, Labeling, and Aggregation" (Gong, Chung, Glass;
IEEE/ACM TASLP vol. 29, 2021) and its published code.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class WarmupDecayScheduler:
    """Warms the rate up in stairs, linearly, and multiplies the current one by a factor every few epochs.

    Before the steps s = 0, `warmup_interval`, 2 `warmup_interval`, ... below `warmup_steps`, and before `warmup_steps` itself,
    the rate becomes `lr * s / warmup_steps`, whatever it was. In between it stays, so the first `warmup_interval` steps have the
    rate 0. At the end of epoch `decay_start`, and of every `decay_interval`-th epoch after it, the current rate is multiplied by
    `decay_factor`; what happens to it before the step `warmup_steps` is therefore overwritten.

    The only state is the rate in the optimizer's parameter groups, which the optimizer's own state dict carries: a resumed run
    continues exactly, and there is nothing else to save.

    Arguments
    ---------
    lr
        The full rate.
    decay_start
        The first epoch (counted from 1, as SpeechBrain does) with a decay at its end.
    warmup_steps
        Step at which the full rate is reached; 0 gives it to the first step.
    warmup_interval
        Steps between two raises. A warm-up that is shorter than this has the rate 0 until its end: choose a shorter interval.
    decay_factor
        1 switches decay off.

    Example
    -------
    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> scheduler = WarmupDecayScheduler(lr=0.1, decay_start=1, warmup_steps=4, warmup_interval=2)
    >>> rates = []
    >>> for step in range(5):
    ...     scheduler.on_step(optimizer, step)
    ...     rates.append(optimizer.param_groups[0]["lr"])
    >>> scheduler.on_epoch_end(optimizer, epoch=1)
    >>> rates, optimizer.param_groups[0]["lr"]
    ([0.0, 0.0, 0.05, 0.05, 0.1], 0.05)
    """

    lr: float
    decay_start: int
    warmup_steps: int = 1000
    warmup_interval: int = 50
    decay_interval: int = 5
    decay_factor: float = 0.5

    def __post_init__(self) -> None:
        if not (self.lr > 0 < self.decay_factor and self.warmup_steps >= 0 and min(self.warmup_interval, self.decay_interval) >= 1):
            least = "lr and decay_factor must be positive, warmup_interval and decay_interval at least 1, warmup_steps at least 0"
            raise ValueError(f"{least}, not {self}")

    def on_step(self, optimizer: Any, step: int) -> None:
        """Sets the rate of all parameter groups, if this is a step at which warm-up does; `step` is 0 before the first batch."""
        if step == self.warmup_steps:
            lr = self.lr
        elif step < self.warmup_steps and step % self.warmup_interval == 0:
            lr = self.lr * step / self.warmup_steps
        else:
            return
        for group in optimizer.param_groups:
            group["lr"] = lr

    def on_epoch_end(self, optimizer: Any, epoch: int) -> None:
        """Multiplies the rate of all parameter groups by the factor, if this epoch, counted from 1, ends with a decay."""
        if epoch >= self.decay_start and (epoch - self.decay_start) % self.decay_interval == 0:
            for group in optimizer.param_groups:
                group["lr"] *= self.decay_factor


@dataclass(eq=False)
class ExponentialLinearScheduler:
    """Raises the rate along an exponential, keeps it, and lets it fall along a line, from epoch to epoch.

    In epoch e, counted from 0, the rate is `lr` times exp(-5 (1 - max(e, 0.5) / `warmup_epochs`)^2) while e is below
    `warmup_epochs`; then 1, up to epoch `decay_start`; from there a line to `end`, which it reaches `decay_epochs` later, and `end`
    to the last epoch. Source: the schedule of PaSST (Koutini et al., Interspeech 2022) and EfficientAT (Schmid, Koutini, Widmer,
    ICASSP 2023); the ramp is that of Laine and Aila (ICLR 2017).

    The only state is the rate in the optimizer's parameter groups, as of `WarmupDecayScheduler`.

    Arguments
    ---------
    lr
        The full rate.
    warmup_epochs, decay_start, decay_epochs
        In epochs; 0 switches the warm-up off, and a start after the last epoch the fall.
    end
        What the rate falls to, as a part of the full one.

    Example
    -------
    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> scheduler = ExponentialLinearScheduler(lr=1.0, warmup_epochs=2, decay_start=3, decay_epochs=2)
    >>> rates = []
    >>> for epoch in range(1, 7):
    ...     scheduler.on_step(optimizer, epoch - 1)
    ...     rates.append(round(optimizer.param_groups[0]["lr"], 3))
    ...     scheduler.on_epoch_end(optimizer, epoch)
    >>> rates
    [0.06, 0.287, 1.0, 1.0, 0.505, 0.01]
    """

    lr: float
    warmup_epochs: int = 8
    decay_start: int = 80
    decay_epochs: int = 95
    end: float = 0.01

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 0 <= self.end <= 1 and self.warmup_epochs >= 0 <= self.decay_start and self.decay_epochs >= 1):
            wanted = "lr must be positive, end from 0 to 1, warmup_epochs and decay_start at least 0, decay_epochs at least 1"
            raise ValueError(f"{wanted}, not {self}")

    def factor(self, epoch: int) -> float:
        """Gives the part of the full rate in an epoch that is counted from 0."""
        if epoch < self.warmup_epochs:
            return math.exp(-5 * (1 - max(epoch, 0.5) / self.warmup_epochs) ** 2)
        fallen = min(1.0, max(0, epoch - self.decay_start) / self.decay_epochs)
        return 1 - (1 - self.end) * fallen

    def on_step(self, optimizer: Any, step: int) -> None:
        """Sets the rate of the first epoch, before the first batch, step 0."""
        if step == 0:
            self._set(optimizer, 0)

    def on_epoch_end(self, optimizer: Any, epoch: int) -> None:
        """Sets the rate of the next epoch; `epoch`, which has ended, is counted from 1."""
        self._set(optimizer, epoch)

    def _set(self, optimizer: Any, epoch: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.lr * self.factor(epoch)


@dataclass(eq=False)
class CosineScheduler:
    """Raises the rate linearly and lets it fall along half a cosine (Loshchilov, Hutter, "SGDR", 2017), by optimizer step.

    A parameter group's rate is multiplied by its `lr_scale`, if it has one, and is 0 before `head_steps` if it has
    `"after_head": True`: the groups of an encoder wait until a new head has learnt something. After `head_steps` the warm-up begins
    again, for all groups. The state is the step alone, so a resumed run continues exactly.

    Arguments
    ---------
    lr
        The full rate.
    n_steps
        Optimizer steps of the whole training; a `FineTuningBrain` sets it. With more epochs than before, a run that goes on has a
        rate that has fallen less.
    warmup
        The part of the steps in which the rate rises.
    end
        What the rate falls to, as a part of the full one. If the weights of many epochs are to be averaged, a rate that falls to
        nothing makes them too alike (Izmailov et al., "Averaging weights leads to wider optima and better generalization", 2018).
    head_steps
        Optimizer steps of the head alone.

    Example
    -------
    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> scheduler = CosineScheduler(lr=0.1, n_steps=6, warmup=1 / 3)
    >>> rates = []
    >>> for step in range(6):
    ...     scheduler.on_step(optimizer, step)
    ...     rates.append(round(optimizer.param_groups[0]["lr"], 3))
    >>> rates
    [0.05, 0.09, 0.065, 0.035, 0.01, 0.0]
    """

    lr: float
    n_steps: int | None = None
    warmup: float = 0.05
    end: float = 0.0
    head_steps: int = 0

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 0 <= self.warmup <= 1 and 0 <= self.end <= 1 and self.head_steps >= 0):
            raise ValueError(f"lr must be positive, warmup and end from 0 to 1, head_steps at least 0, not {self}")

    def on_step(self, optimizer: Any, step: int) -> None:
        """Sets the rates of all parameter groups; `step` is 0 before the first batch."""
        if self.n_steps is None:
            raise ValueError("CosineScheduler needs n_steps, how many optimizer steps the training has")
        head = step < self.head_steps
        # of the part that this step is in
        done, steps = (step, self.head_steps) if head else (step - self.head_steps, self.n_steps - self.head_steps)
        rise = min(1.0, (done + 1) / max(1, round(self.warmup * steps)))
        fallen = 0.0 if head else 0.5 * (1 - math.cos(math.pi * min(1.0, done / max(1, steps - 1))))
        for group in optimizer.param_groups:
            waits = head and group.get("after_head", False)
            group["lr"] = 0.0 if waits else self.lr * rise * (1 - (1 - self.end) * fallen) * group.get("lr_scale", 1.0)

    def on_epoch_end(self, optimizer: Any, epoch: int) -> None:
        """Does nothing: the rate depends on the step alone."""
