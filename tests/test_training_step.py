"""One training step: what reaches the weights, what does not, and where its randomness comes from."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch
from speechbrain import Stage
from torch import nn

from psla_sb.errors import InputError
from psla_sb.experiment.brain import TaggingBrain
from psla_sb.experiment.schedules import WarmupDecayScheduler
from psla_sb.lobes.augment import SpecAugment, WaveformMixup
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.pooling import MeanPooling


class Batch(SimpleNamespace):
    def to(self, device):
        return self


def batch(scale=1.0, n_clips=4, seed=0):
    wavs = scale * torch.randn(n_clips, 8000, generator=torch.Generator().manual_seed(seed))
    targets = torch.eye(n_clips)[:, :3]
    return Batch(
        id=[str(i) for i in range(n_clips)],
        index=list(range(n_clips)),
        error=[None] * n_clips,
        sig=(wavs, torch.ones(n_clips)),
        target=SimpleNamespace(data=targets),
        partner=[0, 0, 1, 1],
    )


@pytest.fixture
def make_brain(tmp_path):
    def make(max_grad_norm=math.inf, **options):
        torch.manual_seed(0)
        modules = {
            "compute_features": KaldiFbank(n_mels=32),
            "mean_var_norm": GlobalNorm(),
            "embedding_model": EfficientNetEncoder("b0", width=0.5, depth=0.3, norm_momentum=0.1),
            "classifier": MeanPooling(640, 3),
        }
        hparams = {
            "modules": modules,
            "seed": 1,
            "output_folder": tmp_path,
            "n_classes": 3,
            "mixup": WaveformMixup(),
            "spec_augment": SpecAugment(8, 8),
            "schedule": WarmupDecayScheduler(0.01, decay_start=10, warmup_steps=0),
            "max_grad_norm": max_grad_norm,
        }
        brain = TaggingBrain(modules, lambda p: torch.optim.SGD(p, lr=0.01), hparams, {"device": "cpu", **options})
        brain.init_optimizers()
        brain.modules.train()
        brain.nonfinite_count = 0
        return brain

    return make


def step(brain, *batches):
    for each in batches:
        brain.step += 1
        brain.fit_batch(each)


def state(brain):
    return {key: value.clone() for key, value in brain.modules.state_dict().items()}


@pytest.mark.parametrize("max_grad_norm", [math.inf, 1e-3])
def test_gradients_are_not_clipped_unless_asked(make_brain, max_grad_norm):
    brain = make_brain(max_grad_norm)
    before, seen = [p.detach().clone() for p in brain.modules.parameters()], []
    clip = torch.nn.utils.clip_grad_norm_

    def record(parameters, norm):
        parameters = list(parameters)
        seen.extend(p.grad.clone() for p in parameters)
        return clip(parameters, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", record)
        step(brain, batch())
    applied = [(b - p.detach()) / 0.01 for b, p in zip(before, brain.modules.parameters(), strict=True)]
    norm = torch.cat([g.flatten() for g in applied]).norm()
    if max_grad_norm == math.inf:
        torch.testing.assert_close(
            torch.cat([g.flatten() for g in applied]), torch.cat([g.flatten() for g in seen]), atol=2e-4, rtol=1e-3
        )
        assert norm > 0.1
    else:
        assert norm == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(make_brain, factor):
    brain = make_brain(grad_accumulation_factor=factor)
    step(brain, *[batch(seed=i) for i in range(factor)])
    before = state(brain)
    poison = batch()
    poison.sig[0][0, 100] = math.nan
    step(brain, poison, *[batch(seed=i) for i in range(factor - 1)])
    after = state(brain)
    for key in before:
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(before[key], after[key]), key
    step(brain, *[batch(seed=i) for i in range(factor)])
    assert all(torch.isfinite(value).all() for value in state(brain).values())
    assert not torch.equal(state(brain)["classifier.cla.weight"], after["classifier.cla.weight"])


def test_training_stops_when_too_many_losses_are_not_finite(make_brain, tmp_path):
    brain = make_brain(nonfinite_patience=2)
    poison = batch()
    poison.sig[0][:] = math.nan
    step(brain, poison, poison)
    with pytest.raises(InputError, match=r"nonfinite_batches\.csv"):
        step(brain, poison)
    lines = (tmp_path / "nonfinite_batches.csv").read_text().splitlines()
    assert lines[:5] == ["0,1,0", "0,1,1", "0,1,2", "0,1,3", "1,2,0"]
    assert len(lines) == 3 * 4


def test_a_second_interrupt_stops_at_once(make_brain):
    brain = make_brain()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        brain.request_stop(signum, None)
        assert brain.stop_requested
    with pytest.raises(KeyboardInterrupt):
        brain.request_stop(signal.SIGINT, None)


def test_randomness_comes_from_seed_and_step_alone(make_brain):
    brain, other = make_brain(), make_brain()
    torch.manual_seed(3)
    step(brain, batch())
    torch.manual_seed(4)
    torch.rand(17)
    step(other, batch())
    for key, value in state(brain).items():
        assert torch.equal(value, state(other)[key]), key


def test_micro_batches_of_one_accumulation_get_other_draws(make_brain):
    brain = make_brain(grad_accumulation_factor=3)
    draws = []
    brain.hparams.mixup = nn.Module()
    brain.hparams.mixup.forward = lambda wavs, lens, targets, n: draws.append(torch.rand(1).item()) or (wavs, lens, targets)
    step(brain, batch(), batch())
    assert brain.optimizer_step == 0
    assert draws[0] != draws[1]


def test_evaluation_is_not_random(make_brain):
    brain = make_brain()
    brain.modules.eval()
    first, _ = brain.compute_forward(batch(), Stage.VALID)
    torch.rand(5)
    second, _ = brain.compute_forward(batch(), Stage.VALID)
    assert torch.equal(first, second)
