"""psla-export: the folder of a run's tagger, its model card, and ONNX that computes what PyTorch computes."""

import json

import numpy as np
import pytest
import torch

from psla_sb.cli.export import export
from psla_sb.dataio.audio import read_clip
from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.inference.onnx_export import export_onnx
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.features import KaldiFbank


def status_of(*arguments):
    with pytest.raises(SystemExit) as caught:
        export([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported") / "tagger"
    export([str(tiny_run[0]), "--out", str(folder), "--onnx"])
    return folder


def test_the_folder_tags_as_the_run_and_says_its_figures(exported, tiny_run, mini_data):
    run, results, _ = tiny_run
    clip = Manifest.from_csv(run / "eval.csv", data_root=mini_data)[2]["wav"]
    assert AudioTagger.from_folder(exported).tag_file(clip, 39) == AudioTagger.from_experiment(run).tag_file(clip, 39)
    assert Vocabulary.from_csv(exported / "class_labels_indices.csv").mids == AudioTagger.from_folder(exported).hparams.mids
    card = (exported / "README.md").read_text(encoding="utf-8")
    for figure in ("mAP", "mAUC", "d_prime"):
        assert f"| {figure} | {results['evaluation']['weight_average'][figure]:.4f} |" in card
    assert "| mixup_rate | 0.5 |" in card
    assert "model.onnx" in card
    assert str(run) not in card
    assert str(mini_data) not in card


def test_onnx_takes_any_length_and_batch(exported, tiny_run, mini_data):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    tagger = AudioTagger.from_folder(exported)
    manifest = Manifest.from_csv(tiny_run[0] / "eval.csv", data_root=mini_data)
    wave = read_clip(manifest[0]["wav"])
    for wavs in (wave[None], wave[None, :1], wave[None, :399], wave[None, :3000], wave.repeat(5, 3), torch.zeros(1, 8000)):
        (scores,) = session.run(None, {"waveform": wavs.numpy()})
        np.testing.assert_allclose(scores, tagger.score_batch(wavs), atol=1e-4)


def sensitive_tagger(folder):
    """A tagger whose scores depend on what it hears more than two epochs of training teach."""
    tagger = AudioTagger.from_folder(folder)
    norms = [module for module in tagger.mods.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    feats = tagger.features(torch.randn(8, 8000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 0, 8)[:, None])
    tagger.mods.embedding_model.train()(feats)
    tagger.eval()
    for conv in tagger.mods.classifier.cla:
        conv.weight.mul_(3)
    return tagger


def test_onnx_is_compared_with_pytorch_before_it_is_written(tiny_run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    tagger = sensitive_tagger(tiny_run[0] / "tagger")
    assert export_onnx(tagger, tmp_path / "right" / "model.onnx") < 1e-4
    monkeypatch.setattr("psla_sb.inference.onnx_export.ENERGY_FLOOR", 1e6)
    with pytest.raises(InputError, match="differ from PyTorch"):
        export_onnx(tagger, tmp_path / "wrong" / "model.onnx")
    assert not list((tmp_path / "wrong").iterdir())


def test_onnx_names_the_parts_of_what_cannot_be_exported(tiny_run, tmp_path):
    pytest.importorskip("onnxruntime")
    tagger = AudioTagger.from_folder(tiny_run[0] / "tagger")
    tagger.mods["compute_features"] = torch.nn.Identity()
    with pytest.raises(InputError, match=r"compute_features Identity.* to ONNX"):
        export_onnx(tagger, tmp_path / "model.onnx")


def test_a_model_that_takes_clips_whole(tiny_run, tmp_path):
    pytest.importorskip("onnxruntime")
    tagger = AudioTagger.from_folder(tiny_run[0] / "tagger")
    tagger.mods["compute_features"] = KaldiFbank(n_mels=32)
    export_onnx(tagger, tmp_path / "model.onnx")


def test_every_kind_of_trained_model_is_exported(tiny_run, mini_data, tmp_path):
    run = tiny_run[0]
    clip = next((mini_data / "audio" / "eval").iterdir())
    expected = AudioTagger.from_experiment(run).tag_file(clip, 39)
    for name, source in {"snapshot": run / "snapshots" / "average.safetensors", "folder": run / "tagger"}.items():
        export([str(source), "--out", str(tmp_path / name)])
        assert AudioTagger.from_folder(tmp_path / name).tag_file(clip, 39) == expected
        assert str(run) not in (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert (
            Vocabulary.from_csv(tmp_path / name / "class_labels_indices.csv").mids
            == AudioTagger.from_folder(run / "tagger").hparams.mids
        )


def test_other_weights(tiny_run, tmp_path):
    export([str(tiny_run[0]), "--out", str(tmp_path / "last"), "--weights", "2"])
    card = (tmp_path / "last" / "README.md").read_text(encoding="utf-8")
    assert f"| mAP | {json.loads((tiny_run[0] / 'results.json').read_text())['epochs'][1]['mAP']:.4f} |" in card
    assert not (tmp_path / "last" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--weights", "worst"], "--weights must be"), (["--weights", "77"], "epoch_77"), (["nonsense"], "unrecognized arguments")],
)
def test_wrong_command_line(options, message, tiny_run, tmp_path, capsys):
    assert status_of(tiny_run[0], "--out", tmp_path / "x", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert status_of(tmp_path, "--out", tmp_path / "x") == 2
    assert "not the output folder of a run" in capsys.readouterr().err


def test_onnx_keeps_the_shares_of_faint_attention(tiny_run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    tagger = sensitive_tagger(tiny_run[0] / "tagger")
    tagger.mods["compute_features"] = KaldiFbank(n_mels=32)
    for conv in tagger.mods.classifier.att:
        conv.weight.mul_(4)
        conv.bias.fill_(-13.0)
    export_onnx(tagger, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    # louder and fainter, so that the steps differ
    loudness = torch.logspace(-4, 0, 48000) * torch.tensor([[0.3], [1.0]])
    wavs = loudness * torch.randn(2, 48000, generator=torch.Generator().manual_seed(0))
    (scores,) = session.run(None, {"waveform": wavs.numpy()})
    np.testing.assert_allclose(scores, tagger.score_batch(wavs), atol=1e-4)
