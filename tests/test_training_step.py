"""One training step: what reaches the weights, what does not, and where its randomness comes from."""

import math
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from speechbrain import Stage
from torch import nn

from psla_sb.errors import InputError
from psla_sb.experiment.brain import TaggingBrain
from psla_sb.experiment.schedules import WarmupDecayScheduler
from psla_sb.lobes import chain, on_cpu
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


def test_steps_that_are_looked_at_later_are_the_same(make_brain):
    """As on a GPU, where the program is a step ahead."""
    at_once, later = make_brain(), make_brain()
    later.most_behind = 1
    for brain in (at_once, later):
        brain.avg_train_loss = 0.0
        step(brain, *[batch(seed=i) for i in range(4)])
    assert later.avg_train_loss != at_once.avg_train_loss
    later.look_at_steps()
    assert later.avg_train_loss == at_once.avg_train_loss > 0
    assert all(torch.equal(value, state(later)[key]) for key, value in state(at_once).items())


def test_a_loss_that_is_looked_at_later_is_that_of_its_batch(make_brain, tmp_path):
    brain = make_brain(nonfinite_patience=2)
    brain.most_behind = 1
    poison = batch()
    poison.sig[0][:] = math.nan
    before = state(brain)
    step(brain, poison, poison, poison)
    assert all(torch.equal(before[key], value) for key, value in state(brain).items() if "num_batches" not in key)
    with pytest.raises(InputError, match=r"nonfinite_batches\.csv"):
        step(brain, batch())
    lines = (tmp_path / "nonfinite_batches.csv").read_text().splitlines()
    assert [line.rpartition(",")[0] for line in lines[::4]] == ["0,1", "1,2", "2,3"]


def test_the_end_of_an_epoch_looks_at_all_steps(make_brain):
    brain = make_brain()
    brain.most_behind, brain.avg_train_loss = 1, 0.0
    brain.pace = SimpleNamespace(end=lambda step: None, clips=0, first_step=0)
    brain.heartbeat = lambda: None
    step(brain, batch(), batch(seed=1))
    brain.on_stage_end(Stage.TRAIN, brain.avg_train_loss, 1)
    assert not brain._steps
    assert brain.train_figures["train_loss"] == brain.avg_train_loss > 0


def test_a_batch_too_large_for_the_memory_is_told_which_fits(make_brain, monkeypatch):
    brain = make_brain()
    brain.hparams.batch_size, before = 100, state(brain)
    probabilities = chain.probabilities

    def small_memory(modules, wavs, *args, **kwargs):
        if len(wavs) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return probabilities(modules, wavs, *args, **kwargs)

    monkeypatch.setattr(chain, "probabilities", small_memory)
    large = batch(n_clips=100)
    large.partner, large.target = [0] * 100, SimpleNamespace(data=torch.zeros(100, 3))
    # three quarters of 100, again and again, are 75, 56, 42, 31, 23, 17; a tenth is left
    with pytest.raises(InputError, match=r"cpu has too little memory for batch_size=100: --batch_size=15 fits.*out of memory\)"):
        step(brain, large)
    assert all(torch.equal(before[key], value) for key, value in state(brain).items() if "_bn" not in key)
    brain.hparams.valid_batch_size = 100
    brain.modules.eval()
    with pytest.raises(InputError, match=r"valid_batch_size=100: --valid_batch_size=15 fits \("):
        brain.evaluate_batch(large, Stage.VALID)
    monkeypatch.setattr(chain, "probabilities", lambda *args, **kwargs: small_memory(None, range(99)))
    with pytest.raises(InputError, match="not even a clip of 160000 samples fits"):
        step(brain, large)


def test_flags_of_several_processes_are_known_later(make_brain, monkeypatch):
    brain = make_brain()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flags, op: flags[1:].fill_(1.0))
    assert brain.anywhere(True, False) == [True, False]
    brain.distributed_launch = True
    assert brain.anywhere(False, False) == [False, True]
    brain.most_behind = 1
    assert brain.anywhere(True, False) == [False, False]
    assert brain.anywhere(False, False) == [True, True]
    # at the end of an epoch it has to be known
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flags, op: None)
    assert brain._any_rank(True) is True
    assert brain._any_rank(False) is False


def test_only_batches_of_the_usual_size_are_compiled(make_brain, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    # what is compiled is rounded as PyTorch's own operations are
    monkeypatch.setattr(on_cpu, "trains", lambda x, *modules: False)
    brain, eager = make_brain(), make_brain()
    brain.hparams.compile_model, brain.hparams.batch_size = "yes", 2
    with pytest.raises(InputError, match="compile_model must be True, False or auto, not 'yes'"):
        brain._compile()
    brain.hparams.compile_model = True
    brain._compile()
    for one in (eager, brain):
        step(one, batch(), batch(seed=1))
    n = len(compiled)
    assert n >= 1
    short = batch(n_clips=5, seed=2)
    short.partner = [0, 0, 0, 1, 1]
    for one in (eager, brain):
        step(one, short, batch(seed=3))
        one.scores(batch().sig[0], batch().sig[1])
    assert len(compiled) == n
    one, other = (each.hparams.modules["embedding_model"].state_dict() for each in (eager, brain))
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_encoder_that_cannot_be_compiled(make_brain, monkeypatch, caplog):
    def backend(graph, inputs):
        raise RuntimeError("no C compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    brain = make_brain()
    brain.hparams.compile_model, brain.hparams.batch_size = True, 2
    brain._compile()
    with pytest.raises(InputError, match=r"(?s)EfficientNetEncoder cannot be compiled: .*no C compiler here.* Set compile"):
        step(brain, batch())
    brain = make_brain()
    brain.hparams.compile_model, brain.hparams.batch_size = "auto", 2
    brain._compiling_pays = lambda: True
    brain._compile()
    step(brain, batch())
    assert "no C compiler here" in caplog.text
    assert "Training goes on without" in caplog.text


def test_short_runs_and_cpus_are_not_compiled(make_brain):
    brain = make_brain()
    brain.hparams.epoch_counter = SimpleNamespace(limit=30)
    brain.n_steps, brain.hparams.n_frames = 20_000, 98
    assert brain.total_steps == 600_000
    assert not brain._compiling_pays()
    brain.device_type = "cuda"
    assert not brain._compiling_pays(), "clips of all lengths"
    brain.hparams.modules["compute_features"].n_frames = 98
    assert brain._compiling_pays()
    brain.n_steps = 60
    assert not brain._compiling_pays()


@pytest.mark.parametrize("saved", [{"fused": None, "foreach": None}, {"fused": True}])
def test_an_optimizers_state_is_no_matter_of_the_device(make_brain, saved):
    """A checkpoint of a GPU has the fused form, which a CPU's does not."""
    brain = make_brain()
    brain.opt_class = partial(torch.optim.Adam, lr=0.01)
    brain.init_optimizers()
    step(brain, batch())
    checkpoint = brain.optimizer.state_dict()
    checkpoint["param_groups"][0].update(saved)
    brain.optimizer.load_state_dict(checkpoint)
    assert brain.optimizer.param_groups[0]["fused"] is None
    step(brain, batch())
