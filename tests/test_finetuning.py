"""Fine-tuning: the rate by step, the ladder of rates, the loss of either kind of head, and the early end."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from psla_sb.experiment.brain import binary_cross_entropy
from psla_sb.experiment.finetuning import FineTuningBrain, cross_entropy, parameter_groups
from psla_sb.experiment.schedules import CosineScheduler
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.mobilenet import MobileNetV3Encoder
from psla_sb.lobes.pooling import AttentionPooling


def rates(scheduler, n_steps, groups=({},)):
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in groups], lr=7.0)
    found = []
    for step in range(n_steps):
        scheduler.on_step(optimizer, step)
        scheduler.on_epoch_end(optimizer, step)
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("end", [0.0, 0.3])
def test_rate_falls_as_torch_lets_it_fall(end):
    ours = [rate for (rate,) in rates(CosineScheduler(lr=0.1, n_steps=41, warmup=0.0, end=end), 41)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs, schedule = [], torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.1 * end)
    for _ in range(41):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert ours == pytest.approx(theirs, abs=1e-12)


@given(n_steps=st.integers(2, 300), warmup=st.floats(0, 1), head=st.integers(0, 50), scale=st.floats(0.01, 1))
def test_ladder_of_rates(n_steps, warmup, head, scale):
    groups = ({"lr_scale": 1.0, "after_head": False}, {"lr_scale": scale, "after_head": True})
    found = rates(CosineScheduler(lr=0.1, n_steps=head + n_steps, warmup=warmup, head_steps=head), head + n_steps, groups)
    assert all(0 <= rate <= 0.1 for pair in found for rate in pair)
    # the head learns alone at first; then the encoder is as far below it as it is said to be
    assert all(of_head > 0 and of_encoder == 0 for of_head, of_encoder in found[:head])
    assert all(math.isclose(of_encoder, of_head * scale, abs_tol=1e-12) for of_head, of_encoder in found[head:])
    rise = max(1, round(warmup * n_steps))
    assert found[-1][0] < 0.1 or rise >= n_steps
    falling = [of_head for of_head, _ in found[head + rise :]]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("encoder", [EfficientNetEncoder("lite0"), EfficientNetEncoder("b0"), MobileNetV3Encoder(0.1)])
def test_each_parameter_is_in_one_group(encoder):
    modules = {"compute_features": torch.nn.Identity(), "embedding_model": encoder, "classifier": AttentionPooling(8, 3)}
    groups = parameter_groups(modules, layer_decay=0.5)
    grouped = [p for group in groups for p in group["params"]]
    every = [p for name in ("classifier", "embedding_model") for p in modules[name].parameters()]
    assert len(grouped) == len(every)
    assert set(map(id, grouped)) == set(map(id, every))
    head, *layers = groups
    assert (head["lr_scale"], head["after_head"]) == (1.0, False)
    scales = [group["lr_scale"] for group in layers]
    assert scales == sorted(scales)
    assert (scales[0], scales[-1]) == (0.5, 1.0)
    assert all(group["after_head"] for group in layers)
    # the first layer has the smallest rate, not the one that is named first
    assert layers[0]["params"][0] is next(encoder.parameters())


def test_loss_of_a_head_for_one_label():
    logits, classes = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    targets = F.one_hot(classes, 4).float()
    assert cross_entropy(logits.softmax(1), targets, "softmax").item() == pytest.approx(F.cross_entropy(logits, classes).item())
    # of mixup: two labels, which are not sure to sum to 1
    mixed = 0.3 * targets + 0.7 * targets.roll(1, 0)
    expected = F.cross_entropy(logits, mixed).item()
    assert cross_entropy(logits.softmax(1), mixed, "softmax").item() == pytest.approx(expected)
    assert cross_entropy(logits.softmax(1), 2 * mixed, "softmax").item() == pytest.approx(expected)
    probabilities = logits.sigmoid()
    assert cross_entropy(probabilities, targets) == binary_cross_entropy(probabilities, targets)
    # a clip without a label has nothing to say, and does not make the loss something that is no number
    assert torch.isfinite(cross_entropy(logits.softmax(1), torch.zeros(5, 4), "softmax"))


def test_optimizer_keeps_its_form_and_settings():
    modules = {
        **{"compute_features": KaldiFbank(n_mels=32), "mean_var_norm": GlobalNorm()},
        **{"embedding_model": EfficientNetEncoder("lite0"), "classifier": AttentionPooling(1280, 3)},
    }
    made = functools.partial(torch.optim.Adam, lr=0.1, betas=(0.95, 0.99), fused=True)
    brain = FineTuningBrain(modules, made, {"modules": modules, "layer_decay": 0.5, "seed": 1}, run_opts={"device": "cpu"})
    brain.init_optimizers()
    groups = brain.optimizer.param_groups
    assert len(groups) == len(parameter_groups(modules, 0.5))
    # fused optimizers leave a step out on a GPU without waiting for it
    assert all(group["fused"] and group["betas"] == (0.95, 0.99) for group in groups)
    assert [group["lr_scale"] for group in groups[:2]] == [1.0, 0.5]
