"""PSLA's learning rate: a warm-up in stairs by optimizer step, then halving by epoch.

Source: "PSLA: Improving Audio Tagging with Pretraining, Sampling, Labeling, and Aggregation" (Gong, Chung, Glass; IEEE/ACM
TASLP vol. 29, 2021) and its published code.
"""

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
