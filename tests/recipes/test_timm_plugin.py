"""A network of timm goes the whole way, from weights for pictures to tags, as an installed plug-in."""

import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from psla_sb.checkpoints.run_folder import snapshot_path
from psla_sb.checkpoints.weights import load_weights
from psla_sb.cli.export import export
from psla_sb.cli.tag import tag
from psla_sb.dataio.audio import read_clip
from psla_sb.dataio.manifest import Manifest
from psla_sb.inference.hear import get_scene_embeddings, get_timestamp_embeddings, load_model
from psla_sb.inference.tagger import AudioTagger
from runs import REPOSITORY, TRAIN, command, differences, finish, rows_by_file, run

timm = pytest.importorskip("timm")

NETWORK = "test_resnet"
BLOCK = """embedding_model: !new:tiny_tagger.timm_encoder.TimmEncoder
    name: {name}
    pretrained: {pretrained}
    norm_momentum: 0.05
    drop_path: 0.2
"""


@pytest.fixture(scope="module")
def installed(plugin):
    """The plug-in, where this process, and those that it starts, find it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(plugin[1]), os.environ.get("PYTHONPATH")])))
        patch.syspath_prepend(str(plugin[1]))
        yield plugin[0]


@pytest.fixture(scope="module")
def hparams(installed, tmp_path_factory):
    """mini.yaml with a network of timm that starts from weights for pictures, and these."""
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(4)
    state = timm.create_model(NETWORK, num_classes=10).state_dict()
    save_file(state, folder / "model.safetensors")
    text = (TRAIN.parent / "hparams" / "mini.yaml").read_text(encoding="utf-8")
    block = BLOCK.format(name=NETWORK, pretrained=folder / "model.safetensors")
    text, found = re.subn(r"(?m)^embedding_model:.*\n(?:[ #].*\n)*", lambda match: block, text)
    assert found == 1
    (folder / "timm.yaml").write_text(text, encoding="utf-8")
    return folder / "timm.yaml", state


@pytest.fixture(scope="module")
def trained(hparams, mini_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(command(TRAIN, str(hparams[0]), data_folder=mini_data, output_folder=folder))
    # a tagger has its weights in it, and asks for no others
    hparams[0].with_name("model.safetensors").unlink()
    yield folder
    save_file(hparams[1], hparams[0].with_name("model.safetensors"))


def clips_of(folder, mini_data, n=4):
    manifest = Manifest.from_csv(folder / "eval.csv", data_root=mini_data)
    return [manifest[i]["wav"] for i in range(n)]


def test_toolkit_does_not_import_timm():
    for file in (REPOSITORY / "psla_sb").rglob("*.py"):
        assert not re.search(r"(?m)^\s*(import|from) timm\b", file.read_text(encoding="utf-8")), file


def test_training_starts_from_the_weights(hparams, mini_data, tmp_path):
    """With a learning rate of 0 what the run ends with is what it began with."""
    path, state = hparams
    settings = {"data_folder": mini_data, "output_folder": tmp_path / "run", "number_of_epochs": 1, "lr": 1e-30}
    run(command(TRAIN, str(path), **settings))
    ended = load_weights(snapshot_path(tmp_path / "run", 1))
    for name, theirs in (("layer4.0.conv1.weight", None), ("conv1.0.weight", state["conv1.0.weight"].sum(1, keepdim=True))):
        assert torch.equal(ended[f"embedding_model.network.{name}"], state[name] if theirs is None else theirs), name


def test_killed_and_resumed_it_ends_as_if_left_alone(hparams, mini_data, tmp_path):
    for folder in ("whole", "killed"):
        argv = command(TRAIN, str(hparams[0]), data_folder=mini_data, output_folder=tmp_path / folder)
        if folder == "killed":
            event = (signal.SIGKILL, "psla_sb.experiment.brain:TaggingBrain.on_fit_batch_start", 7)
            assert finish(argv, tmp_path / "log", at=event) != 0
        assert finish(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


def test_folder_tags_embeds_and_is_onnx_without_more_trust(trained, mini_data, tmp_path, capsys):
    clips = clips_of(trained, mini_data)
    expected = np.load(trained / "predictions" / "valid_weight_average.npy")[: len(clips)]
    assert "model.safetensors" not in (trained / "tagger" / "hyperparams.yaml").read_text()
    with pytest.raises(SystemExit) as caught:
        tag(["--model", str(trained / "tagger"), "--top-k", "39", "--format", "json", *clips])
    assert caught.value.code == 0
    answers, tagger = rows_by_file(capsys.readouterr().out), AudioTagger.from_folder(trained / "tagger")
    rows = [{row["mid"]: row["score"] for row in answers[clip]} for clip in clips]
    np.testing.assert_allclose([[row[mid] for mid in tagger.hparams.mids] for row in rows], expected, atol=1e-5)
    # a step every 32 frames of 10 ms
    times = tagger.tag_timeline(clips[0]).times
    np.testing.assert_allclose(np.diff(times), 0.32, atol=1e-6)
    wavs = torch.stack([read_clip(clip) for clip in clips])
    model = load_model(str(trained / "tagger"))
    assert get_scene_embeddings(wavs, model).shape == (len(clips), model.scene_embedding_size)
    assert get_timestamp_embeddings(wavs, model)[0].shape[2] == model.timestamp_embedding_size
    onnxruntime = pytest.importorskip("onnxruntime")
    export([str(trained), "--out", str(tmp_path / "out"), "--onnx"])
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"waveform": wavs.numpy()})
    np.testing.assert_allclose(scores, expected, atol=1e-4)


@pytest.mark.slow
def test_its_own_tests_pass(installed):
    """Those of the package, as its README says to run them."""
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", "tests", "tiny_tagger"]
    done = run(pytest_here, cwd=installed)
    passed = re.search(r"(?m)^(\d+) passed in ", done.stdout)
    assert passed, done.stdout
    # none was skipped for want of timm, and the examples were run
    assert int(passed[1]) > 30
