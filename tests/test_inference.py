"""Loading taggers: what can be loaded, and what is refused."""

import shutil

import numpy as np
import pytest

from psla_sb.dataio.manifest import Manifest
from psla_sb.errors import InputError
from psla_sb.inference import AudioTagger


@pytest.fixture
def tagger_folder(tiny_run, tmp_path):
    return shutil.copytree(tiny_run[0] / "tagger", tmp_path / "tagger")


@pytest.mark.parametrize("file", ["embedding_model.ckpt", "classifier.ckpt", "label_encoder.ckpt", "hyperparams.yaml"])
@pytest.mark.parametrize("content", [None, "", "x: 1\n"])
def test_a_folder_that_is_not_whole_is_refused(file, content, tagger_folder):
    (tagger_folder / file).unlink()
    if content is not None:
        (tagger_folder / file).write_text(content)
    with pytest.raises(InputError, match=r"tagger"):
        AudioTagger.from_folder(tagger_folder)


def test_a_folder_that_constructs_other_things_is_refused_and_not_run(tagger_folder, tmp_path):
    file = tagger_folder / "hyperparams.yaml"
    file.write_text(file.read_text() + f"evil: !apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    with pytest.raises(InputError, match=r"!apply:os\.mkdir"):
        AudioTagger.from_folder(tagger_folder)
    assert not (tmp_path / "ran").exists()
    AudioTagger.from_hparams(source=str(tagger_folder))
    assert (tmp_path / "ran").exists()


def test_run_snapshot_and_folder_are_the_same_tagger(tiny_run, mini_data):
    folder = tiny_run[0]
    clip = Manifest.from_csv(folder / "eval.csv", data_root=mini_data)[3]["wav"]
    expected = AudioTagger.from_folder(folder / "tagger").tag_file(clip, top_k=39)
    for source in (folder, folder / "snapshots" / "average.safetensors"):
        assert AudioTagger.from_any(source).tag_file(clip, top_k=39) == expected
    last = AudioTagger.from_experiment(folder, weights="last").tag_file(clip, top_k=39)
    scores = np.load(folder / "predictions" / "valid_epoch_02.npy")[3]
    np.testing.assert_allclose([tag.score for tag in last], sorted(scores, reverse=True), atol=1e-5)


def test_what_is_no_tagger(tmp_path):
    for source, message in [
        (tmp_path, "no hyperparams.yaml"),
        (tmp_path / "a.safetensors", "no such"),
        (tmp_path / "a.pth", "--labels"),
    ]:
        with pytest.raises(InputError, match=message):
            AudioTagger.from_any(source)
    with pytest.raises(InputError, match="not the output folder"):
        AudioTagger.from_experiment(tmp_path)
