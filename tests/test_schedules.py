"""The rate at every step, against the numbers of PSLA's published training."""

import copy
import math

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from hypothesis import given, settings
from hypothesis import strategies as st

from psla_sb.experiment.schedules import ExponentialLinearScheduler, WarmupDecayScheduler


def optimizer_with(lr=1.0, n_groups=1):
    return torch.optim.Adam([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(n_groups)], lr=lr)


def rates(scheduler, optimizer, steps, epoch_ends=()):
    """The rate of every step; epoch_ends: {number of steps taken: epoch that ends then}."""
    history = []
    for step in steps:
        scheduler.on_step(optimizer, step)
        history.append(optimizer.param_groups[0]["lr"])
        if step + 1 in epoch_ends:
            scheduler.on_epoch_end(optimizer, epoch_ends[step + 1])
    return history


def test_published_warmup():
    history = rates(WarmupDecayScheduler(lr=1e-3, decay_start=35), optimizer_with(), range(1100))
    assert history[:50] == [0.0] * 50
    assert history[50:100] == pytest.approx([5e-5] * 50)
    assert history[100] == pytest.approx(1e-4)
    assert history[999] == pytest.approx(9.5e-4)
    assert history[1000:] == [1e-3] * 100


def test_halving_before_the_end_of_warmup_is_overwritten():
    scheduler = WarmupDecayScheduler(lr=1e-3, decay_start=2)
    history = rates(scheduler, optimizer_with(), range(1200), {330: 2, 1010: 7})
    assert history[329] == pytest.approx(3e-4)
    assert history[330:350] == pytest.approx([1.5e-4] * 20)
    assert history[350] == pytest.approx(3.5e-4)
    assert history[1000:1010] == [1e-3] * 10
    assert history[1010:] == [5e-4] * 190


@pytest.mark.parametrize(
    ("decay_start", "last_epoch", "decays"),
    [(35, 60, [35, 40, 45, 50, 55, 60]), (10, 30, [10, 15, 20, 25, 30]), (10, 40, [10, 15, 20, 25, 30, 35, 40])],
)
def test_published_decays(decay_start, last_epoch, decays):
    scheduler, optimizer = WarmupDecayScheduler(lr=1e-3, decay_start=decay_start), optimizer_with(lr=1e-3)
    seen = []
    for epoch in range(1, last_epoch + 1):
        before = optimizer.param_groups[0]["lr"]
        scheduler.on_epoch_end(optimizer, epoch)
        after = optimizer.param_groups[0]["lr"]
        assert after in (before, before / 2)
        if after != before:
            seen.append(epoch)
    assert seen == decays
    assert optimizer.param_groups[0]["lr"] == 1e-3 / 2 ** len(decays)


def test_every_group_whatever_its_rate_was():
    optimizer = optimizer_with(lr=7.0, n_groups=3)
    optimizer.param_groups[1]["lr"] = 3.0
    scheduler = WarmupDecayScheduler(lr=0.5, decay_start=1, warmup_steps=0, decay_factor=0.1)
    scheduler.on_step(optimizer, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 3
    scheduler.on_epoch_end(optimizer, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05] * 3
    scheduler.on_step(optimizer, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05] * 3


def test_short_warmups():
    optimizer = optimizer_with()
    shorter_than_interval = WarmupDecayScheduler(lr=1.0, decay_start=99, warmup_steps=20)
    assert rates(shorter_than_interval, optimizer, range(30)) == [0.0] * 20 + [1.0] * 10
    no_multiple = WarmupDecayScheduler(lr=1.0, decay_start=99, warmup_steps=5, warmup_interval=2)
    assert rates(no_multiple, optimizer, range(8)) == [0, 0, 0.4, 0.4, 0.8, 1, 1, 1]
    every_step = WarmupDecayScheduler(lr=1.0, decay_start=99, warmup_steps=4, warmup_interval=1)
    assert rates(every_step, optimizer, range(6)) == [0, 0.25, 0.5, 0.75, 1, 1]
    none = WarmupDecayScheduler(lr=1.0, decay_start=99, warmup_steps=0)
    assert rates(none, optimizer_with(lr=5.0), range(3)) == [1, 1, 1]


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(0, 60), warmup_steps=st.integers(0, 40), warmup_interval=st.integers(1, 50), steps=st.integers(3, 20))
def test_resumes_from_the_optimizer_alone(cut, warmup_steps, warmup_interval, steps):
    def scheduler():
        return WarmupDecayScheduler(0.1, 1, warmup_steps, warmup_interval, decay_interval=2)

    ends = {steps * epoch: epoch for epoch in range(1, 22)}
    whole = rates(scheduler(), optimizer_with(), range(60), ends)
    first = optimizer_with()
    begun = rates(scheduler(), first, range(cut), ends)
    resumed = optimizer_with(lr=123.0)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    if cut == 0:
        resumed.param_groups[0]["lr"] = 123.0  # a fresh start depends on no earlier rate
    assert begun + rates(scheduler(), resumed, range(cut, 60), ends) == whole


def test_from_yaml():
    hparams = load_hyperpyyaml(
        "schedule: !new:psla_sb.experiment.schedules.WarmupDecayScheduler\n  lr: 0.001\n  decay_start: 35\n  decay_factor: 0.5\n"
    )
    optimizer = optimizer_with()
    hparams["schedule"].on_step(optimizer, 500)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


@pytest.mark.parametrize(
    "wrong", [{"lr": 0}, {"lr": -1}, {"warmup_steps": -1}, {"warmup_interval": 0}, {"decay_interval": 0}, {"decay_factor": 0}]
)
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WarmupDecayScheduler(**{"lr": 1.0, "decay_start": 1, **wrong})


def published_factor(epoch, warmup=8, start=80, length=95, last=0.01):
    """PaSST's and EfficientAT's, of epochs from 0, restated from its description."""
    if epoch < warmup:
        return math.exp(-5.0 * (1.0 - min(max(epoch, 0.5), warmup) / warmup) ** 2)
    if epoch <= start:
        return 1.0
    return last + (1 - last) * (length - epoch + start) / length if epoch - start < length else last


def test_exponential_warmup_and_linear_fall():
    scheduler, optimizer, found = ExponentialLinearScheduler(lr=8e-4), optimizer_with(lr=5.0), []
    for epoch in range(1, 201):
        scheduler.on_step(optimizer, 100 * (epoch - 1))
        scheduler.on_step(optimizer, 100 * (epoch - 1) + 1)
        found.append(optimizer.param_groups[0]["lr"] / 8e-4)
        scheduler.on_epoch_end(optimizer, epoch)
    assert found == pytest.approx([published_factor(epoch) for epoch in range(200)], abs=1e-12)
    # by hand: e = 0 counts as 0.5; half of the fall is at 80 + 47.5
    assert found[0] == pytest.approx(math.exp(-5 * (15 / 16) ** 2))
    assert (found[8], found[80], found[175], found[199]) == (1.0, 1.0, pytest.approx(0.01), pytest.approx(0.01))


def test_exponential_linear_resumes_from_the_optimizer_alone():
    whole, first = ExponentialLinearScheduler(1.0, 3, 4, 5), optimizer_with()
    for epoch in range(1, 4):
        whole.on_step(first, 10 * (epoch - 1))
        whole.on_epoch_end(first, epoch)
    resumed = optimizer_with(lr=123.0)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    again = ExponentialLinearScheduler(1.0, 3, 4, 5)
    for epoch in range(4, 12):
        for optimizer, scheduler in ((first, whole), (resumed, again)):
            scheduler.on_step(optimizer, 10 * (epoch - 1))
        assert first.param_groups[0]["lr"] == resumed.param_groups[0]["lr"] == whole.factor(epoch - 1)
        for optimizer, scheduler in ((first, whole), (resumed, again)):
            scheduler.on_epoch_end(optimizer, epoch)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"end": 2}, {"warmup_epochs": -1}, {"decay_start": -1}, {"decay_epochs": 0}])
def test_wrong_arguments_of_the_exponential_linear_scheduler(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExponentialLinearScheduler(**{"lr": 1.0, **wrong})
