"""Averages of weights, and the scores of many models in one pass: the numbers, what is computed how often, and kills in between."""

import itertools
import json
import math
import os
import random
import signal
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from speechbrain import Stage
from torch import nn

from psla_sb.aggregation import scoring as aggregation
from psla_sb.aggregation.averaging import average_weights, update_batch_norm
from psla_sb.aggregation.scoring import score
from psla_sb.checkpoints import psla as interop
from psla_sb.checkpoints import sources
from psla_sb.checkpoints.run_folder import snapshot_path
from psla_sb.checkpoints.weights import load_weights, save_weights
from psla_sb.dataio import dataset
from psla_sb.dataio.dataset import TaggingDataset, clip_loader
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.experiment.brain import TaggingBrain
from psla_sb.files import UNFINISHED
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.label_sets import LabelSets
from psla_sb.labels.teacher_scores import open_scores, stamp
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.augment import WaveformMixup
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.ensemble import EnsembleEncoder, EnsemblePooling
from psla_sb.lobes.features import KaldiFbank, n_samples_for
from psla_sb.lobes.pooling import AttentionPooling, MeanPooling
from runs import SERVER, score_slowly


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clips(lively_runs, mini_data):
    """(evaluation clips, classes) of the embedded set."""
    vocabulary = Vocabulary.from_csv(mini_data / "class_labels_indices.csv")
    return Manifest.from_csv(lively_runs / "a" / "eval.csv", mini_data), vocabulary


@pytest.fixture
def members(lively_runs):
    return {f"{run}{epoch}": snapshot_path(lively_runs / run, epoch) for run in "ab" for epoch in (1, 2)}


def write(path, **tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    save_weights({"classifier": module}, path)
    return path


# Averages


def test_average_is_exact_where_float32_sums_are_not(tmp_path):
    values = [1e8, 1.0, 1.0, 1.0, -1e8]
    paths = [write(tmp_path / f"{i}.safetensors", x=torch.full((2,), value)) for i, value in enumerate(values)]
    assert average_weights(paths)["classifier.x"].tolist() == [np.float32(0.6)] * 2


def test_average_keeps_dtypes_and_rounds_counters(tmp_path):
    values = [(10, 1.0, 0.1), (14, 2.0, 0.2), (11, 6.0, 0.3)]
    paths = []
    for i, (n, h, d) in enumerate(values):
        tensors = {"n": torch.tensor(n), "h": torch.tensor(h, dtype=torch.bfloat16), "d": torch.tensor(d, dtype=torch.float64)}
        paths.append(write(tmp_path / f"{i}.safetensors", **tensors))
    average = average_weights(paths)
    assert [average[f"classifier.{key}"].dtype for key in "nhd"] == [torch.int64, torch.bfloat16, torch.float64]
    assert [average[f"classifier.{key}"].item() for key in "nhd"] == [12, 3, (0.1 + 0.2 + 0.3) / 3]


def test_average_holds_one_file_at_a_time(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{i}.safetensors", x=torch.ones(3)) for i in range(4)]
    earlier = []

    def load(path):
        assert all(tensor() is None for tensor in earlier)
        state = load_weights(path)
        earlier.extend(map(weakref.ref, state.values()))
        return state

    monkeypatch.setattr(sources, "load_weights", load)
    average_weights(paths)
    assert len(earlier) == 4


def test_average_of_checkpoint_folder_and_snapshot_is_the_snapshot(tiny_run):
    (checkpoint,) = [path for path in (tiny_run[0] / "save").iterdir() if "epoch: 2" in (path / "CKPT.yaml").read_text()]
    snapshot = load_weights(snapshot_path(tiny_run[0], 2))
    average = average_weights([checkpoint, snapshot_path(tiny_run[0], 2)])
    assert average.keys() == snapshot.keys()
    assert all(torch.equal(average[key], snapshot[key]) for key in snapshot)


def test_average_of_official_checkpoints_is_that_of_their_tensors(tmp_path):
    models = [(EfficientNetEncoder("b0"), MeanPooling(1280, 2)) for _ in range(2)]
    for i, model in enumerate(models):
        interop.save_psla_checkpoint(tmp_path / f"{i}.pth", *model)
    average = average_weights([tmp_path / "0.pth", tmp_path / "1.pth"])
    states = [model[0].state_dict() for model in models]
    assert {key.partition(".")[0] for key in average} == {"embedding_model", "classifier"}
    for key in states[0]:
        mean = ((states[0][key].double() + states[1][key]) / 2).to(states[0][key].dtype)
        assert torch.equal(average[f"embedding_model.{key}"], mean), key


def test_average_of_different_models_names_file_and_key(tmp_path):
    one, two = write(tmp_path / "1.safetensors", x=torch.ones(3)), write(tmp_path / "2.safetensors", x=torch.ones(2))
    three = write(tmp_path / "3.safetensors", x=torch.ones(3), y=torch.ones(1))
    with pytest.raises(InputError, match=r"2\.safetensors and .*1\.safetensors.*the shapes of 'classifier\.x' are \[2\] and \[3\]"):
        average_weights([one, two])
    for pair in ([one, three], [three, one]):
        with pytest.raises(InputError, match=r"'classifier\.y' is in .*3\.safetensors, not in .*1\.safetensors"):
            average_weights(pair)
    two.write_bytes(two.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"2\.safetensors: not a whole safetensors file"):
        average_weights([one, two])
    with pytest.raises(InputError, match="no snapshots"):
        average_weights([])


def test_a_checkpoint_folder_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "CKPT.yaml").write_text("epoch: 1")
    torch.save({"x": Evil()}, tmp_path / "embedding_model.ckpt")
    with pytest.raises(InputError, match=r"embedding_model\.ckpt: .*without running code"):
        average_weights([tmp_path])
    assert not (tmp_path / "ran").exists()


# Batch-norm statistics


def test_batch_norm_statistics_are_those_of_the_clips(lively_runs, mini_data):
    manifest = Manifest.from_csv(lively_runs / "a" / "train.csv", mini_data)
    batches = [range(0, 16), range(16, 32)]
    tagger = AudioTagger.from_snapshot(snapshot_path(lively_runs / "a", 1), run_opts={"device": "cpu"})
    stem, seen = tagger.mods.embedding_model._bn0, []
    momentum = stem.momentum
    hook = stem.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].double()))
    states = []
    for seed in (1, 2):  # drop-connect, were it on, would change what later layers see
        torch.manual_seed(seed)
        update_batch_norm(tagger.mods, clip_loader(manifest, 16000, None, batches))
        states.append({key: value.clone() for key, value in tagger.mods.embedding_model.state_dict().items()})
    hook.remove()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    mean = sum(x.mean((0, 2, 3)) for x in seen[:2]) / 2
    variance = sum(x.var((0, 2, 3)) for x in seen[:2]) / 2
    torch.testing.assert_close(stem.running_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stem.running_var.double(), variance, rtol=1e-4, atol=1e-6)
    assert stem.momentum == momentum
    assert not any(module.training for module in tagger.mods.modules())


# One pass


def test_scores_are_those_of_each_model_alone(members, lively_runs, clips, tmp_path):
    manifest, vocabulary = clips
    members["c1"] = snapshot_path(lively_runs / "c", 1)
    scores = score(members, manifest, vocabulary, tmp_path, batch_size=6)
    assert list(scores) == list(members)
    for name, source in members.items():
        tagger = AudioTagger.from_any(source, run_opts={"device": "cpu"})
        batches = [range(start, min(start + 6, 20)) for start in range(0, 20, 6)]
        alone = torch.cat([tagger.score_batch(*batch.sig) for batch in clip_loader(manifest, 16000, n_samples_for(48), batches)])
        np.testing.assert_allclose(scores[name], alone, atol=1e-6)
        assert np.ptp(scores[name], axis=0).max() > 0.1
        assert scores[name].dtype == np.float32
    assert len({one.tobytes() for one in scores.values()}) == 5


def test_one_decode_and_one_feature_computation_however_many_members(members, lively_runs, clips, tmp_path, monkeypatch):
    decoded, computed, read_samples, forward = [], [], dataset.read_samples, KaldiFbank.forward
    monkeypatch.setattr(dataset, "read_samples", lambda path, *args: decoded.append(path) or read_samples(path, *args))
    monkeypatch.setattr(KaldiFbank, "forward", lambda self, wavs, lens: computed.append(self.n_mels) or forward(self, wavs, lens))
    score(members, *clips, tmp_path / "one front end", batch_size=4)
    assert sorted(decoded) == sorted(clips[0][i]["wav"] for i in range(20))
    assert computed == [32] * 5
    decoded.clear(), computed.clear()
    score({**members, "c1": snapshot_path(lively_runs / "c", 1)}, *clips, tmp_path / "two", batch_size=4)
    assert len(decoded) == 20
    assert sorted(computed) == [24] * 5 + [32] * 5


def test_what_is_scored_is_not_scored_again(members, clips, tmp_path, monkeypatch):
    passes, together = [], aggregation._score_together
    monkeypatch.setattr(aggregation, "_score_together", lambda *args: passes.append(list(args[0])) or together(*args))
    first = {name: members[name] for name in ("a1", "b1")}
    before = {name: one.tobytes() for name, one in score(first, *clips, tmp_path, batch_size=5).items()}
    score(first, *clips, tmp_path, batch_size=5)
    after = score(members, *clips, tmp_path, batch_size=5)
    assert passes == [["a1", "b1"], ["a2", "b2"]]
    assert {name: after[name].tobytes() for name in first} == before
    # other weights under the same name, and other clips
    score({"a1": members["b2"]}, *clips, tmp_path, batch_size=5)
    table = clips[0].table.slice(0, 10)
    assert len(score({"b1": members["b1"]}, Manifest(table, clips[0].data_root), clips[1], tmp_path)["b1"]) == 10
    assert passes[2:] == [["a1"], ["b1"]]
    assert not list(tmp_path.glob(f"{UNFINISHED}*"))


def test_as_many_members_at_a_time_as_fit_give_the_same_files(members, clips, tmp_path):
    score(members, *clips, tmp_path / "all", batch_size=5)
    score(members, *clips, tmp_path / "some", batch_size=5, at_a_time=3)
    assert outcome(tmp_path / "some") == outcome(tmp_path / "all")


def outcome(folder):
    """The contents of the files of a finished pass."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_at_three_moments_ends_in_identical_files(members, clips, tmp_path):
    del members["a1"], members["b1"]
    score(members, *clips, tmp_path / "whole", batch_size=1)
    killed, moments = tmp_path / "killed", random.Random()
    args = (members, *clips, killed, 1)
    note = killed / f"{UNFINISHED}pass_0.json"
    done = 0
    for _ in range(3):
        least = done + moments.randint(1, 2)
        process = SERVER.Process(target=score_slowly, args=(0.1, *args))
        process.start()
        while process.is_alive() and (not note.exists() or json.loads(note.read_text())["batches"] < least):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        done = json.loads(note.read_text())["batches"]
        assert least <= done < 20
    decoded, read_samples = [], dataset.read_samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "read_samples", lambda path, *rest: decoded.append(path) or read_samples(path, *rest))
        score(*args)
    assert len(decoded) == 20 - done
    assert outcome(killed) == outcome(tmp_path / "whole")


def test_progress_without_its_files_is_not_believed(members, clips, tmp_path, monkeypatch):
    del members["a1"], members["b1"]
    score(members, *clips, tmp_path / "whole", batch_size=2)
    monkeypatch.setattr(aggregation, "BATCHES_AT_ONCE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(aggregation, "check_audio", interrupt_at(3))
        with pytest.raises(KeyboardInterrupt):
            score(members, *clips, tmp_path / "killed", batch_size=2)
    assert json.loads((tmp_path / "killed" / f"{UNFINISHED}pass_0.json").read_text())["batches"] == 2
    (tmp_path / "killed" / f"{UNFINISHED}a2.npy").unlink()
    score(members, *clips, tmp_path / "killed", batch_size=2)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def interrupt_at(n):
    """Stands for `check_audio`, and stops at the n-th batch."""
    batches = itertools.count(1)

    def check(batch):
        if next(batches) == n:
            raise KeyboardInterrupt

    return check


# Bad input


def test_mixed_vocabularies_and_broken_members_overwrite_nothing(members, lively_runs, clips, tmp_path):
    manifest, vocabulary = clips
    score(members, manifest, vocabulary, tmp_path / "out")
    before = outcome(tmp_path / "out")
    other = Vocabulary(vocabulary.mids[::-1], vocabulary.names[::-1])
    with pytest.raises(InputError, match=r"epoch_01\.safetensors has other classes than the class list"):
        score(members, manifest, other, tmp_path / "out")
    run = tmp_path / "run"
    (run / "snapshots").mkdir(parents=True)
    (run / "hyperparams.yaml").write_bytes((lively_runs / "a" / "hyperparams.yaml").read_bytes())
    snapshot_path(run, 1).write_bytes(members["a1"].read_bytes()[:-100])
    with pytest.raises(InputError, match=r"epoch_01\.safetensors: not a whole safetensors file"):
        score({"b1": members["b1"], "a1": snapshot_path(run, 1)}, manifest, vocabulary, tmp_path / "out")
    with pytest.raises(InputError, match=r"nowhere\.safetensors: no such file"):
        score({"a1": tmp_path / "nowhere.safetensors"}, manifest, vocabulary, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: not the folder of a tagger"):
        score({"a1": tmp_path / "empty"}, manifest, vocabulary, tmp_path / "out")
    assert outcome(tmp_path / "out") == before


def test_another_setting_of_the_run_is_another_model(lively_runs, clips, tmp_path):
    """A run that was evaluated again with other frames: the same snapshot, but not the same scores."""
    run = tmp_path / "run"
    (run / "snapshots").mkdir(parents=True)
    for file in ("hyperparams.yaml", "class_labels_indices.csv", "snapshots/epoch_01.safetensors"):
        (run / file).write_bytes((lively_runs / "a" / file).read_bytes())
    before = score({"a": snapshot_path(run, 1)}, *clips, tmp_path / "out")["a"].tobytes()
    text = (run / "hyperparams.yaml").read_text()
    (run / "hyperparams.yaml").write_text(text.replace("n_frames: 48", "n_frames: 30"))
    assert score({"a": snapshot_path(run, 1)}, *clips, tmp_path / "out")["a"].tobytes() != before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path, manifest, vocabulary: path.unlink(), "teacher.npy: no such file"),
        (lambda path, manifest, vocabulary: path.with_suffix(".json").unlink(), "teacher.json: no such file"),
        (lambda path, manifest, vocabulary: path.write_bytes(path.read_bytes()[:100]), "teacher.npy: cannot be read as scores"),
        (lambda path, manifest, vocabulary: np.save(path, np.zeros((1, 2), np.float32)), r"the shape \[1, 2\], not \[2, 2\]"),
        (lambda path, manifest, vocabulary: manifest.__init__(manifest.table.take([1, 0])), "scores of others than annotation"),
        (lambda path, manifest, vocabulary: vocabulary.mids.reverse(), "scores of others than the class list"),
    ],
)
def test_scores_of_something_else_are_refused(spoil, message, tmp_path):
    manifest = Manifest.from_columns(["a", "b"], ["a.wav", "b.wav"], [1.0, 1.0], ["", ""])
    vocabulary, path = Vocabulary(["/m/1", "/m/2"], ["Bell", "Rain"]), tmp_path / "teacher.npy"
    np.save(path, np.eye(2, dtype=np.float32))
    path.with_suffix(".json").write_text(json.dumps(stamp(manifest, vocabulary)))
    np.testing.assert_array_equal(open_scores(path, manifest, vocabulary), np.eye(2))
    spoil(path, manifest, vocabulary)
    with pytest.raises(InputError, match=message):
        open_scores(path, manifest, vocabulary)


# The ensemble as a module, and its scores as a teacher


def test_ensemble_of_modules_is_the_weighted_mean_of_clamped_probabilities():
    feats, encoders = torch.randn(2, 100, 64), [EfficientNetEncoder("b0", width=0.5, depth=0.5).eval() for _ in range(2)]
    channels = encoders[0].out_channels
    poolings = [MeanPooling(channels, 3), AttentionPooling(channels, 3)]
    with torch.inference_mode():
        poolings[1].head_weight += 1  # probabilities above 1
        one, two = (pooling(encoder(feats)).clamp(0, 1) for pooling, encoder in zip(poolings, encoders, strict=True))
        assert two.max() == 1
        maps = EnsembleEncoder(encoders).eval()(feats)
        torch.testing.assert_close(EnsemblePooling(poolings, [3, 1])(maps), 0.75 * one + 0.25 * two)
        torch.testing.assert_close(EnsemblePooling(poolings)(maps), (one + two) / 2)
        segments = EnsemblePooling(poolings).segment_scores([maps[0], maps[1][..., :1]])
    assert segments.shape == (2, 3, maps[0].shape[3])


@pytest.mark.parametrize(("members", "weights"), [([], None), ([nn.Identity()], [1, 1]), ([nn.Identity()], [0])])
def test_ensemble_pooling_checks_its_arguments(members, weights):
    with pytest.raises(ValueError, match="positive weight"):
        EnsemblePooling(members, weights)


def test_a_teachers_row_goes_with_its_clip(tmp_path):
    np.save(tmp_path / "teacher.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    manifest = Manifest.from_columns(list("abc"), ["x.wav"] * 3, [1.0] * 3, [""] * 3)
    teacher = np.load(tmp_path / "teacher.npy", mmap_mode="r")
    items = TaggingDataset(manifest, LabelSets.from_lists([[], [], []]), 2, teacher=teacher)
    assert items[2]["teacher"].tolist() == [4, 5]
    assert items[0]["teacher"].tolist() == [0, 1]
    assert "teacher" not in TaggingDataset(manifest, LabelSets.from_lists([[], [], []]), 2)[0]


@pytest.mark.parametrize("weight", [None, 1.0, 0.25])
def test_distillation_is_the_weighted_mean_of_the_cross_entropies(weight):
    brain = TaggingBrain({}, hparams={} if weight is None else {"distillation_weight": weight}, run_opts={"device": "cpu"})
    p, target, teacher = np.array([[0.2, 0.9]]), np.array([[0.0, 1.0]]), np.array([[0.3, 0.6]])
    both = torch.tensor(np.hstack([target, teacher]), dtype=torch.float32)
    loss = brain.compute_objectives((torch.tensor(p, dtype=torch.float32), both), None, Stage.TRAIN).item()
    hard = -(math.log(0.8) + math.log(0.9)) / 2
    soft = -(0.3 * math.log(0.2) + 0.7 * math.log(0.8) + 0.6 * math.log(0.9) + 0.4 * math.log(0.1)) / 2
    # as published: 0.1 of the labels, 0.9 of the teacher
    share = {None: 0.9, 1.0: 0.5, 0.25: 0.2}[weight]
    assert loss == pytest.approx((1 - share) * hard + share * soft, rel=1e-6)


def test_the_teachers_scores_are_mixed_as_the_targets_are():
    modules = {name: nn.Identity() for name in ("mean_var_norm", "embedding_model", "classifier")}
    modules["compute_features"] = KaldiFbank(n_frames=10)
    hparams = {"modules": modules, "mixup": WaveformMixup(), "spec_augment": nn.Identity()}
    brain = TaggingBrain(modules, hparams=hparams, run_opts={"device": "cpu"})
    targets, teacher = torch.eye(4)[:, :3], torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    batch = SimpleNamespace(
        sig=(torch.randn(4, 2000), torch.ones(4)),
        target=SimpleNamespace(data=targets),
        teacher=SimpleNamespace(data=teacher),
        partner=[0, 0, 1, 1],
    )
    batch.to = lambda device: batch
    _, mixed = brain.compute_forward(batch, Stage.TRAIN)
    assert mixed.shape == (2, 6)
    for clip in (0, 1):
        share = mixed[clip, clip]  # what is left of the clip's own label
        assert 0.05 < share < 0.95
        torch.testing.assert_close(mixed[clip, 3:], share * teacher[clip] + (1 - share) * teacher[clip + 2])


@pytest.mark.parametrize("temperature", [None, 1.0, 2.5])
def test_a_clip_without_a_teacher_has_its_own_labels_in_mixtures_too(temperature):
    modules = {name: nn.Identity() for name in ("mean_var_norm", "embedding_model", "classifier")}
    modules["compute_features"] = KaldiFbank(n_frames=10)
    hparams = {"modules": modules, "mixup": WaveformMixup(), "spec_augment": None, "distillation_temperature": temperature}
    brain = TaggingBrain(modules, hparams=hparams, run_opts={"device": "cpu"})
    targets, teacher = torch.eye(4)[:, :3], torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    # of the pairs (0, 2) and (1, 3): a partner without scores, and a clip
    teacher[1:3] = math.nan
    batch = SimpleNamespace(
        sig=(torch.randn(4, 2000), torch.ones(4)),
        target=SimpleNamespace(data=targets),
        teacher=SimpleNamespace(data=teacher.half()),
        partner=[0, 0, 1, 1],
    )
    batch.to = lambda device: batch
    _, mixed = brain.compute_forward(batch, Stage.TRAIN)
    logits = torch.logit(teacher.half().float())
    soft = torch.sigmoid(logits / (temperature or 1.0))
    taught = torch.where(teacher.isnan(), targets, soft)
    for clip in (0, 1):
        share = mixed[clip, clip]
        torch.testing.assert_close(mixed[clip, 3:], share * taught[clip] + (1 - share) * taught[clip + 2])
