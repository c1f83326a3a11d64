"""A tagger's ONNX file used without PyTorch, and in 8 bits."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.transforms import Resample

from psla_sb.cli.export import export
from psla_sb.dataio.manifest import Manifest
from psla_sb.dataio.resampling import RESAMPLING
from psla_sb.errors import InputError
from psla_sb.inference.onnx_export import export_onnx
from psla_sb.inference.onnx_int8 import quantize_onnx
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.metrics import average_precision
from runs import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "onnx_only.py"
# only these, and what they import, may be needed
ALONE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchaudio", "speechbrain", "psla_sb", "scipy"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def model(lively_runs, tmp_path_factory):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    tagger = AudioTagger.from_experiment(lively_runs / "a")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(tagger, path)
    return tagger, path


@pytest.mark.parametrize(("rate", "channels", "seconds"), [(16000, 1, 0.2), (16000, 1, 3.3), (44100, 2, 2.05), (8000, 1, 1.0)])
def test_sounds_of_any_length_are_tagged_by_the_same_rule(model, tmp_path, rate, channels, seconds):
    tagger, path = model
    rng = np.random.default_rng(0)
    envelope = np.linspace(0, 1, round(rate * seconds))[:, None]
    soundfile.write(
        tmp_path / "a.wav", 0.1 + 0.3 * envelope * rng.standard_normal((len(envelope), channels)), rate, subtype="FLOAT"
    )
    argv = [sys.executable, "-c", ALONE, str(EXAMPLE), str(path), str(tmp_path / "a.wav"), "39"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {mid: float(score) for score, mid in (line.split()[:2] for line in done.stdout.splitlines())}
    expected = {tag.mid: tag.score for tag in tagger.tag_file(tmp_path / "a.wav", top_k=39)}
    assert found == pytest.approx(expected, abs=1e-3)
    assert len(set(found.values())) > 3


def test_its_resampler_is_the_file_readers():
    import runpy

    wave = np.random.default_rng(0).standard_normal(5000)
    resample = runpy.run_path(str(EXAMPLE))["resample"]
    for rates in ((44100, 16000), (8000, 16000), (22050, 16000)):
        expected = Resample(*rates, **RESAMPLING, dtype=torch.float64)(torch.from_numpy(wave))
        np.testing.assert_allclose(resample(wave, *rates), expected, atol=1e-6)


def test_it_has_forty_lines():
    lines = [line for line in EXAMPLE.read_text(encoding="utf-8").split('"""', 2)[2].splitlines() if line.strip()]
    assert len(lines) <= 40


def test_eight_bits_and_what_they_lose(model, lively_runs, mini_data, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    tagger, path = model
    clips, vocabulary = (
        Manifest.from_csv(lively_runs / "a" / "train.csv", mini_data),
        Vocabulary(tagger.hparams.mids, tagger.labels),
    )
    said = quantize_onnx(path, tmp_path / "int8.onnx", clips, vocabulary, 16000, tagger.window)
    assert [file.name for file in tmp_path.iterdir()] == ["int8.onnx"]
    sessions = [
        onnxruntime.InferenceSession(str(one), providers=["CPUExecutionProvider"]) for one in (path, tmp_path / "int8.onnx")
    ]
    about = [session.get_modelmeta().custom_metadata_map for session in sessions]
    assert about[0] == about[1]
    assert json.loads(about[1]["labels"]) == tagger.labels
    # in 8 bits indeed, and what is said of it is so
    others = np.random.default_rng(0).permutation(len(clips))[len(clips) // 2 :]
    waves = [tagger._opened(clips[int(row)]["wav"], None) for row in others]
    from psla_sb.dataio.audio import read_clip

    feeds = [{"waveform": read_clip(wave, 16000, tagger.window)[None].numpy()} for wave in waves]
    scores = [np.concatenate([session.run(None, feed)[0] for feed in feeds]) for session in sessions]
    change = np.abs(scores[0] - scores[1])
    assert change.max() > 1e-4
    assert said["changed"] == pytest.approx({"mean": change.mean(), "most": change.max()}, rel=1e-4)
    for key, each in zip(("mAP", "mAP_int8"), scores, strict=True):
        assert said[key] == pytest.approx(np.nanmean(average_precision(each, clips.targets(vocabulary)[others])))
    assert (tmp_path / "int8.onnx").stat().st_size < path.stat().st_size
    few = Manifest.from_columns(["a"], ["a.wav"], [1.0], [vocabulary.mids[0]])
    with pytest.raises(InputError, match="8 bits need four at least"):
        quantize_onnx(path, tmp_path / "none.onnx", few, vocabulary, 16000, tagger.window)


def test_export_writes_both_and_says_what_is_lost(lively_runs, mini_data, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    run, out = lively_runs / "a", tmp_path / "tagger"
    export([str(run), "--out", str(out), "--int8", str(run / "train.csv"), "--data-folder", str(mini_data)])
    said, card = capsys.readouterr().out, (out / "README.md").read_text(encoding="utf-8")
    assert "On 20 clips that were not used to make it, its mAP is " in card
    assert said.splitlines()[0] in card
    assert {"model.onnx", "model_int8.onnx"} <= {file.name for file in out.iterdir()}
    assert AudioTagger.from_folder(out).labels
