"""PSLA's learning rate: a warm-up in stairs by optimizer step, then halving by epoch.

Source: "PSLA: Improving Audio Tagging with Pretraining, Sampling, Labeling, and Aggregation" (Gong, Chung, Glass; IEEE/ACM
TASLP vol. 29, 2021) and its published code.
"""


class WarmupDecayScheduler:
    """Linear warm-up in stairs and step decay of the current rate.

    Before the steps s = 0, `warmup_interval`, 2 `warmup_interval`, ... below `warmup_steps`, and before `warmup_steps` itself,
    the rate becomes `lr * s / warmup_steps`, whatever it was. In between it stays, so the first `warmup_interval` steps have the
    rate 0. At the end of epoch `decay_start`, and of every `decay_interval`-th epoch after it, the current rate is multiplied by
    `decay_factor`; what happens to it before the step `warmup_steps` is therefore overwritten.

    The only state is the rate in the optimizer's parameter groups, which the optimizer's own state dict carries: a resumed run
    continues exactly, and there is nothing else to save.

    Arguments
    ---------
    lr : float
        The full rate.
    decay_start : int
        The first epoch (counted from 1, as SpeechBrain does) with a decay at its end.
    warmup_steps : int
        Step at which the full rate is reached; 0 gives it to the first step.
    warmup_interval : int
        Steps between two raises. A warm-up that is shorter than this has the rate 0 until its end: choose a shorter interval
        with it.
    decay_interval : int
        Epochs between two decays.
    decay_factor : float
        What a decay multiplies the current rate by; 1 switches decay off.

    Raises
    ------
    ValueError
        If a rate or factor is not positive, an interval is below 1 or `warmup_steps` below 0.

    Example
    -------
    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> scheduler = WarmupDecayScheduler(lr=0.1, decay_start=2, warmup_steps=4, warmup_interval=2)
    >>> step = 0
    >>> for epoch in range(1, 4):
    ...     for _ in range(3):
    ...         scheduler.on_step(optimizer, step)
    ...         print(step, optimizer.param_groups[0]["lr"])
    ...         step += 1
    ...     scheduler.on_epoch_end(optimizer, epoch)
    0 0.0
    1 0.0
    2 0.05
    3 0.05
    4 0.1
    5 0.1
    6 0.05
    7 0.05
    8 0.05
    """

    def __init__(self, lr, decay_start, warmup_steps=1000, warmup_interval=50, decay_interval=5, decay_factor=0.5):
        if not (lr > 0 and decay_factor > 0 and warmup_steps >= 0 and warmup_interval >= 1 and decay_interval >= 1):
            raise ValueError(
                "lr and decay_factor must be positive, warmup_interval and decay_interval at least 1, warmup_steps at least "
                f"0; got {lr=}, {decay_factor=}, {warmup_interval=}, {decay_interval=}, {warmup_steps=}"
            )
        self.lr = lr
        self.decay_start = decay_start
        self.warmup_steps = warmup_steps
        self.warmup_interval = warmup_interval
        self.decay_interval = decay_interval
        self.decay_factor = decay_factor

    def on_step(self, optimizer, step):
        """Set the rate of all parameter groups, if this step is one at which warm-up does.

        Arguments
        ---------
        optimizer : torch.optim.Optimizer
            Its parameter groups are changed in place.
        step : int
            Number of optimizer steps taken so far: 0 before the first batch.

        Example
        -------
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> WarmupDecayScheduler(lr=1e-3, decay_start=35).on_step(optimizer, 50)
        >>> optimizer.param_groups[0]["lr"]
        5e-05
        """
        if step == self.warmup_steps:
            lr = self.lr
        elif step < self.warmup_steps and step % self.warmup_interval == 0:
            lr = self.lr * step / self.warmup_steps
        else:
            return
        for group in optimizer.param_groups:
            group["lr"] = lr

    def on_epoch_end(self, optimizer, epoch):
        """Multiply the current rate of all parameter groups by the factor, if this epoch is one that ends with a decay.

        Arguments
        ---------
        optimizer : torch.optim.Optimizer
            Its parameter groups are changed in place.
        epoch : int
            The epoch that has ended, counted from 1.

        Example
        -------
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> WarmupDecayScheduler(lr=1.0, decay_start=35).on_epoch_end(optimizer, 40)
        >>> optimizer.param_groups[0]["lr"]
        0.5
        """
        if epoch >= self.decay_start and (epoch - self.decay_start) % self.decay_interval == 0:
            for group in optimizer.param_groups:
                group["lr"] *= self.decay_factor
