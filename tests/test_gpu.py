"""On a GPU: the same numbers as on a CPU, nothing that waits, and every protection. `make test-gpu` runs these."""

import contextlib
import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from psla_sb.aggregation import scoring
from psla_sb.checkpoints.run_folder import snapshot_path
from psla_sb.checkpoints.weights import load_weights
from psla_sb.dataio.batches import ClipBatch, Reading
from psla_sb.dataio.dataset import TaggingDataset, init_worker
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.experiment.brain import TaggingBrain
from psla_sb.experiment.schedules import WarmupDecayScheduler
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes import fused
from psla_sb.lobes.augment import SpecAugment, WaveformMixup
from psla_sb.lobes.compiled import Compiled, Recorded
from psla_sb.lobes.efficientnet import EfficientNetEncoder, cast_convolutions
from psla_sb.lobes.features import GlobalNorm, KaldiFbank, float32_matmul
from psla_sb.lobes.pooling import AttentionPooling
from runs import REPOSITORY, TRAIN, command, finish, rows_by_file

pytestmark = pytest.mark.cuda

N_CLASSES, N_FRAMES = 5, 98
AGGREGATE = TRAIN.with_name("aggregate.py")


@pytest.fixture
def no_tf32(monkeypatch):
    """SpeechBrain's TF32 of convolutions is off, so that figures compare with the CPU's; that of products stays on."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)


def clip_batch(n_clips=6, n_partners=2, seed=0, poison=False):
    generator = torch.Generator().manual_seed(seed)
    items = []
    for i in range(n_clips):
        samples = (3000 * torch.randn(16000 - 100 * (i % 6), generator=generator)).to(torch.int16)
        target = torch.zeros(N_CLASSES)
        target[i % N_CLASSES] = 1
        if poison and i == 0:
            target[0] = math.nan
        partner = i >= n_clips - n_partners
        items.append(
            {"id": str(i), "index": i, "samples": samples, "mean": 0.0, "target": target, "partner": partner, "error": None}
        )
    return ClipBatch(items).pin_memory()


@pytest.fixture
def make_brain(tmp_path):
    def make(compile_model=False, variant="b0", **options):
        torch.manual_seed(0)
        encoder = EfficientNetEncoder(variant, width=0.5, depth=0.3)
        modules = {
            "compute_features": KaldiFbank(n_mels=64, n_frames=N_FRAMES),
            "mean_var_norm": GlobalNorm(),
            "embedding_model": encoder,
            "classifier": AttentionPooling(encoder.out_channels, N_CLASSES, 2),
        }
        hparams = {
            "modules": modules,
            "seed": 1,
            "output_folder": tmp_path,
            "n_classes": N_CLASSES,
            "n_frames": N_FRAMES,
            "sample_rate": 16000,
            "batch_size": 4,
            "valid_batch_size": 4,
            "mixup": WaveformMixup(),
            "spec_augment": SpecAugment(8, 8),
            "schedule": WarmupDecayScheduler(1e-3, decay_start=10, warmup_steps=0),
            "max_grad_norm": math.inf,
            "compile_model": compile_model,
        }
        optimizer = options.pop("optimizer", lambda p, fused=None: torch.optim.Adam(p, lr=1e-3, fused=fused))
        brain = TaggingBrain(modules, optimizer, hparams, {"device": "cuda:0", "noprogressbar": True, **options})
        brain._compile()
        brain.init_optimizers()
        brain.modules.train()
        brain.nonfinite_count = 0
        brain.avg_train_loss = 0.0
        return brain

    return make


def step(brain, *batches):
    for each in batches:
        brain.step += 1
        brain.fit_batch(each)
    torch.cuda.synchronize()


def state(brain):
    return {key: value.clone() for key, value in brain.hparams.modules["embedding_model"].state_dict().items()}


def test_features_are_the_cpus():
    wavs, lens = torch.randn(3, 160000) / 10, torch.tensor([1.0, 0.5, 0.01])
    front_end = KaldiFbank(n_frames=1056)
    on_gpu = copy.deepcopy(front_end).cuda()(wavs.cuda(), lens.cuda()).cpu()
    # logarithms; where little is left of what was subtracted, the order of operations shows
    torch.testing.assert_close(on_gpu, front_end(wavs, lens), atol=2e-3, rtol=0)


@pytest.mark.parametrize("padding", ["tensorflow", "symmetric"])
def test_the_network_computes_what_it_does_on_the_cpu(padding, no_tf32):
    torch.manual_seed(0)
    encoder = EfficientNetEncoder("b0", padding=padding)
    feats = torch.randn(2, 203, 128)
    with torch.no_grad():
        # statistics of what goes through: with those of no training, numbers die out
        for norm in encoder.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = 1.0
        encoder.train()(feats)
    encoder.eval()
    pooling = AttentionPooling(encoder.out_channels, 20).eval()
    expected = encoder(feats)
    found = copy.deepcopy(encoder).cuda()(feats.cuda())
    torch.testing.assert_close(found.cpu(), expected, atol=2e-4 * expected.abs().max().item(), rtol=0)
    torch.testing.assert_close(copy.deepcopy(pooling).cuda()(expected.cuda()).cpu(), pooling(expected), atol=2e-6, rtol=0)
    # gradients, of the first layer too, which is a matrix product here
    on_gpu = copy.deepcopy(encoder).cuda()
    encoder(feats).square().mean().backward()
    on_gpu(feats.cuda()).square().mean().backward()
    for name, parameter in on_gpu.named_parameters():
        gradient = dict(encoder.named_parameters())[name].grad
        torch.testing.assert_close(parameter.grad.cpu(), gradient, atol=3e-3 * gradient.abs().max().item() + 1e-7, rtol=0, msg=name)


def relative(found, expected):
    return ((found.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("padding", ["tensorflow", "symmetric"])
def test_a_training_step_computes_what_it_does_on_the_cpu(padding, no_tf32):
    """By the kernels: outputs, all gradients, and the statistics of the normalisations."""
    torch.manual_seed(0)
    encoder = EfficientNetEncoder("b0", drop_connect=0.0, padding=padding).train()
    feats, on_gpu = torch.randn(8, 203, 128), copy.deepcopy(encoder).cuda()
    assert fused.have_kernels(torch.device("cuda", 0))
    expected, found = encoder(feats), on_gpu(feats.cuda())
    assert relative(found, expected) < 1e-4
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights.cuda()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, parameter in on_gpu.named_parameters():
        # some are zero but for rounding: what a normalisation takes away again
        error = (parameter.grad.cpu() - gradients[name]).norm()
        assert error < 5e-3 * max(gradients[name].norm(), 1e-3 * largest), name
    for name, buffer in on_gpu.named_buffers():
        # means that are zero but for rounding, and variances of about one
        torch.testing.assert_close(buffer.cpu(), dict(encoder.named_buffers())[name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 16, 9, 33), (2, 144, 8, 66), (5, 88, 4, 7), (2, 1408, 4, 33), (4, 32, 64, 528)])
def test_kernels_are_pytorchs_functions(shape, dtype):
    torch.manual_seed(0)
    coarse = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    x = (1 + 2 * torch.randn(shape, device="cuda")).to(dtype, memory_format=torch.channels_last)
    norm, act = torch.nn.BatchNorm2d(shape[1], eps=1e-3, momentum=0.3).cuda(), torch.nn.SiLU()
    torch.nn.init.normal_(norm.weight)
    exact = copy.deepcopy(norm).double()
    for activation in (act, None):
        one, other = x.clone().requires_grad_(), x.double().requires_grad_()
        found, expected = fused.norm_act(norm, one, activation), exact(other)
        expected = expected if activation is None else activation(expected)
        assert type(found.grad_fn).__name__ == "_NormActBackward"
        gradient = torch.randn_like(found)
        found.backward(gradient)
        expected.backward(gradient.double())
        assert relative(found.detach(), expected.detach().cpu()) < coarse
        assert relative(one.grad, other.grad.cpu()) < coarse
        for name in ("weight", "bias"):
            assert relative(getattr(norm, name).grad, getattr(exact, name).grad.cpu()) < coarse, name
        for name in ("running_mean", "running_var"):
            assert relative(getattr(norm, name), getattr(exact, name).cpu()) < coarse, name
    norm.eval()
    exact.eval()
    with torch.inference_mode():
        assert relative(fused.norm_act(norm, x, act), act(exact(x.double())).cpu()) < coarse
    gate = torch.nn.Conv2d(shape[1], shape[1], 1).cuda()
    one, other = x.clone().requires_grad_(), x.double().requires_grad_()
    found = fused.squeeze_excite(one, lambda mean: torch.sigmoid(gate(mean.float())).to(dtype))
    of_gate = copy.deepcopy(gate).double()
    expected = torch.sigmoid(of_gate(other.mean((2, 3), keepdim=True))) * other
    gradient = torch.randn_like(found)
    found.backward(gradient)
    expected.backward(gradient.double())
    assert relative(found.detach(), expected.detach().cpu()) < coarse
    assert relative(one.grad, other.grad.cpu()) < coarse
    # sums over all pixels of what cancels out
    assert relative(gate.weight.grad, of_gate.weight.grad.cpu()) < 10 * coarse


def test_float32_is_float32_eager_compiled_and_in_threads(no_tf32):
    """Three digits are what TF32 has; SpeechBrain switches it on."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 33, 1408, device="cuda", requires_grad=True), torch.randn(1408, 527, device="cuda")
    exact = a.detach().double() @ b.double()
    assert (a.detach() @ b - exact).abs().max() > 1e-3, "TF32 is off anyway"
    ways = {"eager": float32_matmul, "compiled": torch.compile(float32_matmul)}
    for name, way in ways.items():
        product = way(a, b)
        assert (product - exact).abs().max() < 1e-3, name
        (gradient,) = torch.autograd.grad(product.sum(), a)
        assert (gradient - b.double().sum(1)).abs().max() < 1e-3, name
    pooling, x = AttentionPooling(1408, 527).cuda().eval(), torch.randn(8, 1408, 4, 33, device="cuda")
    torch.testing.assert_close(torch.compile(pooling)(x), pooling(x), atol=1e-6, rtol=0)
    wrong, before = [], torch.backends.cuda.matmul.allow_tf32

    def work():
        for _ in range(200):
            if (float32_matmul(a.detach(), b) - exact).abs().max() >= 1e-3:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize("ema_decay", [None, 0.99])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_nothing(make_brain, precision, ema_decay):
    brain = make_brain(precision=precision)
    brain.hparams.ema_decay = ema_decay
    brain.begin_averages()
    batches = [clip_batch(seed=seed) for seed in range(6)]
    step(brain, *batches[:3])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in batches[3:]:
            brain.step += 1
            brain.fit_batch(each)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    brain.look_at_steps()
    assert math.isfinite(brain.avg_train_loss)


@pytest.mark.parametrize("optimizer", ["fused", "not fused"])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(make_brain, optimizer, tmp_path, caplog):
    options = {} if optimizer == "fused" else {"optimizer": lambda p: torch.optim.RMSprop(p, lr=1e-3)}
    brain = make_brain(nonfinite_patience=2, **options)
    step(brain, clip_batch(), clip_batch(seed=1))
    before, moments = state(brain), copy.deepcopy(brain.optimizer.state_dict()["state"])
    step(brain, clip_batch(poison=True))
    after = state(brain)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for one, other in zip(moments.values(), brain.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    step(brain, clip_batch(seed=2))
    assert not torch.equal(state(brain)["_conv_stem.weight"], after["_conv_stem.weight"])
    assert all(value.isfinite().all() for value in state(brain).values())
    brain.look_at_steps()
    lines = (tmp_path / "nonfinite_batches.csv").read_text().splitlines()
    assert lines[0].startswith("2,3,")
    with pytest.raises(InputError, match=r"nonfinite_batches\.csv"):
        step(brain, *[clip_batch(poison=True)] * 4)


def test_fp16_leaves_out_steps_that_overflow(make_brain):
    brain = make_brain(precision="fp16")
    brain.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
    before, scale = state(brain), 2.0**60
    step(brain, clip_batch())
    assert all(torch.equal(value, state(brain)[key]) for key, value in before.items())
    assert brain.scaler.get_scale() < scale
    for seed in range(60):
        step(brain, clip_batch(seed=seed))
    after = state(brain)
    assert not torch.equal(before["_conv_stem.weight"], after["_conv_stem.weight"])
    assert all(value.isfinite().all() for value in after.values())


def test_compiled_training(make_brain):
    """Weights go the same way, the short last batch is not compiled, and no name tells of the compiler."""
    eager, compiled = make_brain(), make_brain(compile_model=True)
    assert isinstance(compiled.modules["embedding_model"], Compiled)
    for brain in (eager, compiled):
        # without what is random: the compiler draws other numbers
        brain.hparams.modules["embedding_model"]._global_params = eager.hparams.modules["embedding_model"]._global_params._replace(
            drop_connect_rate=0.0
        )
        step(brain, clip_batch(), clip_batch(seed=1), clip_batch(4, 1, seed=2))
        brain.look_at_steps()
    assert eager.avg_train_loss == pytest.approx(compiled.avg_train_loss, rel=2e-3)
    assert list(state(eager)) == list(state(compiled))
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    step(compiled, clip_batch(4, 1, seed=3))
    compiled.modules.eval()
    with torch.no_grad():
        compiled.scores(*clip_batch().to("cuda").sig)
    assert not counted["frames"]["total"], "something was compiled anew"


def test_a_batch_that_is_too_large_is_told_which_fits(make_brain):
    brain = make_brain(variant="b2")
    step(brain, clip_batch())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 150 * 2**20) / total)
    brain.hparams.batch_size = 256
    try:
        brain.step += 1
        with pytest.raises(InputError, match=r"--batch_size=\d+ fits; --grad_accumulation_factor=2") as caught:
            brain.fit_batch(clip_batch(256, 0))
        fits = int(str(caught.value).partition("--batch_size=")[2].split()[0])
        step(brain, clip_batch(fits, 0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= fits < 256


def test_lent_and_pinned_memory_keeps_its_contents_under_load(tmp_path, make_brain):
    """2,000 batches, while the GPU is busy: each clip is checked by its own samples."""
    n = 64
    rng = np.random.default_rng(0)
    sounds = [rng.integers(-30000, 30000, 4000 + 10 * i, dtype=np.int16) for i in range(n)]
    paths = [str(tmp_path / f"{i}.wav") for i in range(n)]
    for path, samples in zip(paths, sounds, strict=True):
        soundfile.write(path, samples, 16000)
    clips = Manifest.from_columns([str(i) for i in range(n)], paths, [0.3] * n, [""] * n)
    dataset = TaggingDataset(clips, LabelSets.from_lists([[0]] * n), 1, compact=True)
    sizes = rng.integers(1, 9, 2000)
    rows = [rng.integers(n, size=size).tolist() for size in sizes]
    loader = DataLoader(
        dataset, batch_sampler=rows, num_workers=4, worker_init_fn=init_worker, collate_fn=ClipBatch, pin_memory=True
    )
    sums = torch.tensor([int(samples.astype(np.int64).sum()) for samples in sounds])
    squares = torch.tensor([int((samples.astype(np.int64) ** 2).sum()) for samples in sounds])
    brain, busy, readings = make_brain(), torch.randn(2048, 2048, device="cuda"), []
    for batch in loader:
        batch = brain.on_device(batch)
        busy = busy @ busy / busy.norm()
        samples = batch.samples.data.long()
        readings.append((batch.index, Reading(samples.sum(1), samples.square().sum(1))))
    assert len(readings) == 2000
    for index, reading in readings:
        found_sums, found_squares = reading.values()
        assert torch.equal(found_sums, sums[index])
        assert torch.equal(found_squares, squares[index])


def train_argv(mini_data, folder, yaml, **overrides):
    settings = {"device": "cuda", "num_workers": 2, "batch_size": 8, **overrides}
    return command(TRAIN, str(yaml), data_folder=mini_data, output_folder=folder, **settings)


DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@pytest.fixture(scope="module")
def deterministic_yaml(tmp_path_factory):
    text = (REPOSITORY / "recipes" / "AudioSet" / "hparams" / "mini.yaml").read_text()
    file = tmp_path_factory.mktemp("yaml") / "mini.yaml"
    file.write_text(f"__deterministic: !apply:torch.use_deterministic_algorithms [True]\n{text}")
    return file


def test_a_run_that_is_killed_goes_on_to_the_same_weights(mini_data, tmp_path, deterministic_yaml):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(train_argv(mini_data, whole, deterministic_yaml), tmp_path / "log", env=DETERMINISTIC) == 0, (
        tmp_path / "log"
    ).read_text()
    argv = train_argv(mini_data, killed, deterministic_yaml, ckpt_interval_steps=2)
    at = (signal.SIGKILL, "psla_sb.experiment.brain:TaggingBrain.fit_batch", 8)
    assert finish(argv, tmp_path / "log", env=DETERMINISTIC, at=at) == -9, (tmp_path / "log").read_text()
    assert finish(argv, tmp_path / "log", env=DETERMINISTIC) == 0, (tmp_path / "log").read_text()
    for epoch in (1, 2):
        one, other = (load_weights(snapshot_path(folder, epoch)) for folder in (whole, killed))
        assert all(torch.equal(one[key], other[key]) for key in one), epoch
    figures = [json.loads((folder / "results.json").read_text())["evaluation"] for folder in (whole, killed)]
    assert figures[0] == figures[1]
    assert "Could not parse" not in (tmp_path / "log").read_text()


def test_a_checkpoint_of_the_cpu_goes_on_on_a_gpu_and_back(mini_data, tmp_path):
    folder = tmp_path / "run"
    for epochs, device in ((1, "cpu"), (2, "cuda"), (3, "cpu")):
        argv = train_argv(mini_data, folder, "hparams/mini.yaml", device=device, number_of_epochs=epochs, num_workers=0)
        assert finish(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert [epoch["epoch"] for epoch in results["epochs"]] == [1, 2, 3]
    assert all(math.isfinite(epoch["train_loss"]) for epoch in results["epochs"])


def test_one_process_of_torchrun(mini_data, tmp_path):
    """NCCL, and what processes ask each other at every step, a step late."""
    argv = train_argv(mini_data, tmp_path / "run", "hparams/mini.yaml", device="cuda:0", ckpt_interval_steps=3)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", *argv[1:]]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = tmp_path / "alone"
    argv = train_argv(mini_data, alone, "hparams/mini.yaml", device="cuda:0")
    assert finish(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    losses = [json.loads((f / "results.json").read_text())["epochs"][-1]["train_loss"] for f in (tmp_path / "run", alone)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_members_are_scored_as_on_the_cpu(lively_runs, mini_data, tmp_path, no_tf32):
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    clips = Manifest.from_csv(lively_runs / "a" / "eval.csv", mini_data)
    members = {f"{name}{epoch}": snapshot_path(lively_runs / name, epoch) for name in "abc" for epoch in (1, 2)}
    found = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        found[device] = scoring.score(members, clips, vocabulary, folder, 4, 2, {"device": device})
    for name, path in members.items():
        # the logarithm of nearly empty mel bands shows the rounding of another order of operations
        np.testing.assert_allclose(found["cuda"][name], found["cpu"][name], atol=5e-3)
        alone = scoring.score({name: path}, clips, vocabulary, tmp_path / "alone", 4, 0, {"device": "cuda"})[name]
        np.testing.assert_allclose(alone, found["cuda"][name], atol=1e-5)


def test_what_is_cached_is_room(lively_runs, monkeypatch):
    tagger = AudioTagger.from_snapshot(snapshot_path(lively_runs / "a", 1), device="cuda")
    torch.cuda.empty_cache()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**30))
    assert not scoring._has_room({"a": tagger})
    cached = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del cached
    assert scoring._has_room({"a": tagger})
    torch.cuda.empty_cache()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_clip_is_a_recording_and_follows_the_weights(lively_runs, precision, no_tf32):
    run_opts = {"device": "cuda", "precision": precision}
    tagger = AudioTagger.from_snapshot(snapshot_path(lively_runs / "a", 1), run_opts=run_opts)
    wavs = torch.randn(6, 8000) / 10
    one_by_one = [tagger.score_batch(wav) for wav in wavs]
    recorded = [made for _, made in tagger._faster.values()]
    assert all(isinstance(module, Recorded) and all(module._recordings.values()) for module in recorded)
    together = tagger.score_batch(wavs)
    torch.testing.assert_close(torch.cat(one_by_one), together, atol=2e-4 if precision == "fp32" else 2e-2, rtol=0)
    # answers are not overwritten by the next one, and weights that change are used
    assert not torch.equal(one_by_one[0], one_by_one[1])
    with torch.no_grad():
        for parameter in tagger.mods.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(tagger.score_batch(wavs[0]), one_by_one[0])


def test_cast_weights_are_autocasts():
    encoder = EfficientNetEncoder("b0").cuda().eval()
    feats = torch.randn(2, 200, 128, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(cast_convolutions(encoder, torch.bfloat16)(feats), encoder(feats))


def test_threads_share_recordings(lively_runs):
    tagger = AudioTagger.from_snapshot(snapshot_path(lively_runs / "a", 1), device="cuda")
    wavs = torch.randn(8, 8000) / 10
    expected = [tagger.score_batch(wav).cpu() for wav in wavs]
    wrong = []

    def work(k):
        for _ in range(20):
            if not torch.allclose(tagger.score_batch(wavs[k]).cpu(), expected[k], atol=1e-5):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(wavs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tagging_with_a_gpu_says_nothing_else(tiny_run, mini_data):
    folder = tiny_run[0]
    files = sorted(map(str, (mini_data / "audio" / "eval").glob("*.flac")))[:5]
    answers = {}
    for device in ("cpu", "cuda"):
        argv = [sys.executable, "-c", "from psla_sb.cli.tag import tag; tag()", "--format", "json", "--top-k", "1000"]
        argv += ["--model", str(folder / "tagger")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run([*argv, "--device", device, *files], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert "Could not parse" not in done.stderr
        answers[device] = rows_by_file(done.stdout)
    for file in files:
        scores = {device: {tag["label"]: tag["score"] for tag in answers[device][file]} for device in answers}
        assert scores["cpu"] == pytest.approx(scores["cuda"], abs=2e-3)


def test_a_default_device_is_a_gpu_without_complaint(tiny_run):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), warnings.catch_warnings():
        tagger = AudioTagger.from_folder(tiny_run[0] / "tagger")
    assert tagger.device == "cuda:0"
    assert "Could not parse" not in said.getvalue()
