"""Averages of weights: their numbers against timm's and against means, and what a run reports, writes and goes on with."""

import copy
import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import ruamel.yaml
import torch
from speechbrain.processing.features import InputNormalization
from torch import nn

from psla_sb.aggregation.averaging import update_batch_norm
from psla_sb.checkpoints.run_folder import average_path, ema_path, snapshot_path, swa_path
from psla_sb.checkpoints.weights import copy_statistics, load_weights
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.experiment.averages import Ema, averaged_epochs
from psla_sb.experiment.brain import TaggingBrain
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.augment import FreqMixStyle, Gain, Roll
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import GlobalNorm, KaldiFbank
from psla_sb.lobes.pooling import ConvPooling
from psla_sb.metrics import summarize
from runs import TRAIN, command, differences, finish, run, two_ranks

PLUS = "hparams/mini_plus.yaml"
SETTINGS = {"n_frames": 50, "device": "cpu", "ema_decay": 0.8, "batch_norm_clips": 30, "freq_mixstyle": 0.4}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.BatchNorm1d(3, momentum=0.3), nn.Flatten(), nn.Linear(30, 2))


def train_a_little(net, ema, steps):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        net(torch.randn(4, 2, 10, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema()


@pytest.mark.parametrize("decay", [0.9999, 0.7])
def test_the_moving_average_is_timms(decay):
    timm_utils = pytest.importorskip("timm.utils")
    net = network()
    theirs = timm_utils.ModelEmaV3(net, decay=decay, use_warmup=True, warmup_gamma=1.0, warmup_power=2 / 3)
    step = iter(range(100))
    # timm leaves the first step out of its warm-up: its step 1 is our step 0
    train_a_little(net, lambda: theirs.update(net, step=next(step) + 1), 40)
    net = network()
    ours = Ema({"net": net}, decay)
    train_a_little(net, ours.update, 40)
    assert int(ours.n_averaged) == 40
    # by hand: the decays that both have used
    decays = [min(1 - (1 + n) ** (-2 / 3), decay) for n in range(40)]
    assert [theirs.get_decay(n + 1) for n in range(40)] == pytest.approx(decays)
    for key, value in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.modules_of["net"].state_dict()[key], value, msg=key)
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours.averages.training


def test_the_moving_average_goes_on_from_its_state():
    net = network()
    whole = Ema({"net": net}, 0.9)
    train_a_little(net, whole.update, 5)
    resumed = Ema({"net": net}, 0.9)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    before = copy.deepcopy(whole.state_dict())
    train_a_little(net, lambda: (whole.update(), resumed.update()), 3)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
        # a bias before a batch norm has no gradient
        assert key == "averages.net.0.bias" or not torch.equal(value, before[key]), key
    assert int(resumed.n_averaged) == 8


def test_weights_that_layers_share_are_averaged_once():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    ema = Ema({"net": nn.Sequential(first, second)}, 0.9)
    before = first.weight.detach().clone()
    ema.update()
    with torch.no_grad():
        first.weight += 1
    ema.update()
    shared = ema.modules_of["net"][0].weight
    assert shared is ema.modules_of["net"][1].weight
    torch.testing.assert_close(shared, torch.lerp(before, before + 1, 2 ** (-2 / 3)))


def test_averaged_epochs():
    assert averaged_epochs(range(1, 201), 200, 50, 5) == list(range(50, 201, 5))
    assert averaged_epochs(range(1, 41), 40, 33, 1) == list(range(33, 41))
    assert averaged_epochs([1, 2, 3], 3, 33, 1) == [3]
    assert averaged_epochs(range(1, 41), 40, -12, 1) == list(range(29, 41))
    # of fewer epochs than are asked for, all
    assert averaged_epochs(range(1, 6), 5, -12, 1) == [1, 2, 3, 4, 5]
    for every in (0, 1.5, "2"):
        with pytest.raises(InputError, match="average_every"):
            averaged_epochs([1], 1, 1, every)


@pytest.mark.parametrize("decay", [1, -0.1, 2])
def test_wrong_decays(decay):
    with pytest.raises(InputError, match="ema_decay must be"):
        Ema({"net": network()}, decay)


@pytest.fixture(scope="module")
def settings(mini_data):
    return {**SETTINGS, "data_folder": mini_data, "number_of_epochs": 4, "average_start": 2, "average_every": 2}


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plus")
    done = run(command(TRAIN, PLUS, **settings, output_folder=folder))
    return folder, json.loads((folder / "results.json").read_text()), done.stdout + done.stderr


def test_both_averages_are_validated_written_and_reported(whole, tmp_path):
    folder, results, said = whole
    epochs, rows = results["epochs"], results["evaluation"]
    assert [("ema_mAP" in epoch, "swa_mAP" in epoch) for epoch in epochs] == [
        (True, False),
        (True, True),
        (True, True),
        (True, True),
    ]
    # epoch 3 is not averaged
    assert epochs[2]["swa_mAP"] == epochs[1]["swa_mAP"]
    assert rows["swa"]["epochs"] == [2, 4]
    assert rows["ema"]["epochs"] == [1, 2, 3, 4]
    # the last epoch's figures are those of the evaluation, which reads the files
    assert rows["ema"]["mAP"] == pytest.approx(epochs[-1]["ema_mAP"], abs=1e-6)
    assert rows["swa"]["mAP"] == pytest.approx(epochs[-1]["swa_mAP"], abs=1e-6)
    better = "ema" if rows["ema"]["mAP"] > rows["swa"]["mAP"] else "swa"
    assert results["tagger"] == better
    assert rows["weight_average"] == rows[better]
    chosen = {"ema": ema_path, "swa": swa_path}[better](folder)
    assert load_weights(average_path(folder)).keys() == load_weights(chosen).keys()
    for key, value in load_weights(chosen).items():
        assert torch.equal(load_weights(average_path(folder))[key], value)
    for name in ("swa", "ema"):
        scored = np.load(folder / "predictions" / f"valid_{name}.npy")
        targets = Manifest.from_csv(folder / "eval.csv").targets(Vocabulary.from_csv(folder / "class_labels_indices.csv"))
        assert summarize(scored, targets)["mAP"] == rows[name]["mAP"]
    assert "exponential moving average of weights" in said
    assert "valid ema_mAP" in said
    assert set(results["meaning"]) >= {"ema", "swa", "ema_mAP", "swa_mAP", "tagger"}
    tagger = np.load(folder / "predictions" / "valid_weight_average.npy")
    assert np.array_equal(tagger, np.load(folder / "predictions" / f"valid_{better}.npy"))


def test_the_mean_of_epochs_is_one_and_its_statistics_are_estimated(whole):
    folder, _, _ = whole
    each = [load_weights(snapshot_path(folder, number)) for number in (2, 4)]
    mean = load_weights(swa_path(folder))
    for key, value in mean.items():
        expected = (each[0][key].double() + each[1][key].double()) / 2
        if "running" in key:
            assert not torch.allclose(value.double(), expected, rtol=1e-2), key
        elif value.is_floating_point():
            torch.testing.assert_close(value, expected.float())


def test_without_estimation_statistics_are_averaged(settings, tmp_path):
    run(command(TRAIN, PLUS, **{**settings, "batch_norm_clips": "null", "ema_decay": "null"}, output_folder=tmp_path / "run"))
    each = [load_weights(snapshot_path(tmp_path / "run", number)) for number in (2, 4)]
    mean = load_weights(average_path(tmp_path / "run"))
    for key, value in mean.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, ((each[0][key].double() + each[1][key].double()) / 2).float())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "ema" not in results["evaluation"]
    assert not ema_path(tmp_path / "run").exists()


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_resumed_is_bit_exact(whole, settings, tmp_path, accumulation):
    """With all that psla_plus has: gain, roll, mixup, mel edges, Freq-MixStyle, averages with statistics of their own."""
    settings = {
        **settings,
        "batch_size": 4,
        "ckpt_interval_steps": 2,
        "grad_accumulation_factor": accumulation,
        "number_of_epochs": 2,
        # which must not disturb the statistics that another process estimates
        "drop_connect": 0.2,
    }
    folder, log = tmp_path / "whole", tmp_path / "log"
    assert finish(command(TRAIN, PLUS, **settings, output_folder=folder), log) == 0, log.read_text()
    argv = command(TRAIN, PLUS, **settings, output_folder=tmp_path / "killed")
    for target, count in [
        ("psla_sb.experiment.brain:TaggingBrain.fit_batch", 5),
        ("psla_sb.experiment.averages:update_batch_norm", 1),
        ("psla_sb.experiment.brain:TaggingBrain.evaluate_batch", 2),
        ("psla_sb.experiment.brain:TaggingBrain.fit_batch", 7),
        ("psla_sb.experiment.evaluation:summarize", 1),
    ]:
        assert finish(argv, log, at=(signal.SIGKILL, target, count)) == -signal.SIGKILL, f"{target}\n{log.read_text()}"
    assert finish(argv, log) == 0, log.read_text()
    assert differences(folder, tmp_path / "killed") == []


def test_two_ranks_keep_the_same_averages(settings, tmp_path):
    settings = {**settings, "number_of_epochs": 2, "batch_size": 4, "ckpt_interval_steps": 2}
    argv = command(TRAIN, PLUS, **settings, output_folder=tmp_path / "whole")
    assert two_ranks(argv, tmp_path / "whole_log") == [0, 0], (tmp_path / "whole_log.0").read_text()
    argv, log = command(TRAIN, PLUS, **settings, output_folder=tmp_path / "stopped"), tmp_path / "log"
    fit_batch = "psla_sb.experiment.brain:TaggingBrain.fit_batch"
    assert two_ranks(argv, log, at=(signal.SIGKILL, fit_batch, 4)) == [-signal.SIGKILL] * 2
    assert two_ranks(argv, log) == [0, 0], log.with_suffix(".0").read_text()
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["evaluation"]["ema"]["mAP"] == pytest.approx(results["epochs"][-1]["ema_mAP"], abs=1e-6)
    assert results["evaluation"]["swa"]["mAP"] == pytest.approx(results["epochs"][-1]["swa_mAP"], abs=1e-6)


def test_micro_batches_and_ranks_draw_independently(monkeypatch):
    """What the parts draw follows from PyTorch's generator, which has another state in each step of each process, and no other."""
    from psla_sb.experiment import brain as module

    brain = module.TaggingBrain({}, hparams={"seed": 3, "schedule": SimpleNamespace(on_step=lambda *step: None)})
    brain.optimizer, brain.pace, brain.noprogressbar = None, module.Pace(0), False
    brain.has_said_how_long = True
    brain.audio_checks = {module.sb.Stage.TRAIN: lambda batch: None}
    batch = SimpleNamespace(id=[], partner=[])
    parts = [Gain(7), Roll(100), FreqMixStyle(p=1.0)]
    drawn = {}
    for rank in (0, 1):
        monkeypatch.setattr(module, "rank_and_world_size", lambda rank=rank: (rank, 2))
        for brain.optimizer_step, brain.step in ((0, 1), (0, 2), (1, 3)):
            for again in (0, 1):
                brain.on_fit_batch_start(batch, True)
                clips = torch.linspace(0.1, 1, 300).repeat(4, 1)
                said = [part(clips) for part in parts[:2]] + [
                    parts[2](clips.reshape(4, 20, 15) * torch.arange(1, 5)[:, None, None])
                ]
                drawn[rank, brain.step, again] = said
    for (rank, step, again), said in drawn.items():
        assert all(map(torch.equal, said, drawn[rank, step, 1 - again]))
        for other, others in drawn.items():
            if other[:2] != (rank, step):
                assert not any(map(torch.equal, said, others))


def test_each_part_is_switched_off_by_one_override(settings, tmp_path):
    """What the file says of a key switches its part off, and nothing else: it is built and asked."""
    from psla_sb.experiment.hparams import load_hparams

    path = TRAIN.parent / PLUS
    written = ruamel.yaml.YAML().load(path.read_text())
    off = {
        "gain": (0, lambda built: built["waveform_augment"][0].amount),
        "roll": (0, lambda built: built["waveform_augment"][1].shift),
        "mixup_at_least_half": (False, lambda built: built["mixup"].at_least_half),
        "freq_mixstyle": (0, lambda built: built["feature_augment"][0].p),
        "edge_ranges": ([0, 0], lambda built: sum(built["compute_features"].edge_ranges)),
        "ema_decay": (None, lambda built: built["ema_decay"]),
        "batch_norm_clips": (None, lambda built: built["batch_norm_clips"]),
        "validate_average": (False, lambda built: built["validate_average"]),
        "teacher_scores": (None, lambda built: built["teacher_scores"]),
        "warmup_epochs": (0, lambda built: built["schedule"].warmup_epochs),
    }
    assert set(off) <= set(written)
    given = {"data_folder": str(tmp_path), "output_folder": str(tmp_path / "run")}
    for key, (value, part) in off.items():
        built = load_hparams(path, {**given, key: value})
        assert not part(built), key


def test_statistics_of_speechbrains_normalisation_are_copied():
    """They are in no state dict, and change from batch to batch."""
    one, other = InputNormalization(), InputNormalization()
    one(torch.randn(4, 10, 3), torch.ones(4), epoch=0)
    copy_statistics(nn.Sequential(one), nn.Sequential(other))
    assert torch.equal(one.glob_mean, other.glob_mean)
    assert one.count == other.count


def test_evaluated_again_by_another_process_it_is_the_same(settings, tmp_path):
    """Also with drop-connect, and though the process has trained nothing."""
    given = {**settings, "drop_connect": 0.5, "number_of_epochs": 2, "output_folder": tmp_path / "run"}
    argv, kept = command(TRAIN, PLUS, **given), tmp_path / "kept"
    run(argv)
    shutil.copytree(tmp_path / "run", kept)
    run([*argv, "--test_only"])
    assert differences(kept, tmp_path / "run") == []


def test_a_brain_of_ones_own_whose_batches_have_no_waveforms():
    brain = TaggingBrain({}, hparams={"n_classes": 2})
    brain.begin_validation(None)
    # without an average nothing is asked of the batch
    brain.score_with_averages(SimpleNamespace())
    assert brain.end_validation() == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ema_decay", 1),
        ("ema_decay", True),
        ("average_every", 0),
        ("average_every", 1.5),
        ("batch_norm_clips", -1),
        ("validate_average", "yes"),
        ("distillation_temperature", 0),
        ("distillation_weight", -1),
    ],
)
def test_wrong_values_are_refused_before_the_training(settings, tmp_path, key, value):
    done = run(command(TRAIN, PLUS, **{**settings, key: value}, output_folder=tmp_path / "run"), check=False)
    assert done.returncode == 2
    assert f"{key} must be" in done.stderr
    assert not (tmp_path / "run").exists()


def test_batch_norms_of_a_classifier_are_estimated_too():
    torch.manual_seed(0)
    modules = {
        "compute_features": KaldiFbank(n_mels=16, n_frames=20),
        "mean_var_norm": GlobalNorm(),
        "embedding_model": EfficientNetEncoder("b0", width=0.1, depth=0.1),
    }
    modules["classifier"] = ConvPooling(modules["embedding_model"].out_channels, 3)
    norms = [part for part in modules["classifier"].modules() if isinstance(part, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    batches = [SimpleNamespace(sig=(torch.randn(4, 3400), torch.ones(4))) for _ in range(2)]
    update_batch_norm(modules, batches, modules["compute_features"].n_samples, check=lambda batch: None)
    assert norms
    assert not any(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))


def test_an_old_folder_without_a_teacher_goes_on(settings, mini_data, tmp_path):
    """Its distillation_weight was 1: a teacher alone makes it matter."""
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "run", number_of_epochs=1)
    run(argv)
    file = tmp_path / "run" / "identity.json"
    identity = json.loads(file.read_text())
    identity["settings"]["distillation_weight"] = 1.0
    del identity["contents"]["teacher_loss"]
    file.write_text(json.dumps(identity))
    run([*argv, "--number_of_epochs=2"])
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["epochs"]) == 2


def test_a_changed_average_is_refused_in_a_used_folder(whole, settings):
    folder, _, _ = whole
    for key, value in {"ema_decay": 0.7, "batch_norm_clips": 7, "gain": 3}.items():
        done = run(command(TRAIN, PLUS, **{**settings, key: value}, output_folder=folder), check=False)
        assert done.returncode == 2
        assert f"{key} was" in done.stderr


def test_a_recipe_whose_file_has_no_such_key_can_be_told_of_it(mini_data, tmp_path):
    argv = command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=tmp_path / "run", number_of_epochs=1)
    run([*argv, "--ema_decay=0.5"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "ema_mAP" in results["epochs"][0]
    done = run(argv, check=False)
    assert done.returncode == 2
    assert "ema_decay was 0.5" in done.stderr
