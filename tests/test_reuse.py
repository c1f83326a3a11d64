"""The parts in other people's SpeechBrain code: what README.md shows, run as it stands there."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.lobes.features import Fbank

from psla_sb.inference.tagger import AudioTagger
from runs import REPOSITORY, TRAIN, command, run


@pytest.fixture(scope="module")
def readme():
    """The names that README.md's first two Python examples define."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    torch.manual_seed(0)
    for block in blocks[:2]:
        exec(block, names)
    return names


def test_a_brain_of_ones_own_learns_with_our_encoder_and_pooling(readme):
    brain, losses = readme["brain"], []
    brain.on_stage_end = lambda stage, loss, epoch=None: losses.append(loss)
    brain.fit(range(15), readme["sounds"], train_loader_kwargs={"batch_size": 4})
    assert losses[-1] < 0.8 * losses[0]


def test_the_encoder_stands_in_for_the_esc50_recipes_embedding_model(readme):
    embedding_model = readme["ClipEmbedding"]("b0")
    embeddings = embedding_model(Fbank(n_mels=80)(torch.randn(2, 16000)), torch.ones(2))
    assert embeddings.shape == (2, 1, embedding_model.out_channels)
    classifier = torch.nn.Linear(embedding_model.out_channels, 50)
    classifier(embeddings).squeeze(1).logsumexp(dim=1).sum().backward()
    assert all(p.grad is not None for p in embedding_model.parameters())


def test_an_encoder_of_ones_own_is_trained_and_loaded_as_the_readme_says(mini_data, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if block.startswith("# my_encoder.py")]
    (tmp_path / "my_encoder.py").write_text(code)
    hparams = (TRAIN.parent / "hparams" / "mini.yaml").read_text(encoding="utf-8")
    block = "embedding_model: !new:my_encoder.TinyEncoder\n"
    (tmp_path / "mine.yaml").write_text(re.sub(r"(?m)^embedding_model: !new:.*\n(?: .*\n)*", block, hparams))
    run(command(TRAIN, "mine.yaml", data_folder=mini_data, output_folder=tmp_path / "run"), cwd=tmp_path)
    clip = str(next((mini_data / "audio" / "eval").iterdir()))
    tagged = [Path(sys.executable).with_name("psla-tag"), "--model", "run/tagger", "--trust", "my_encoder", clip]
    assert len(run(tagged, cwd=tmp_path).stdout.splitlines()) == 6


def test_speechbrains_encoder_classifier_loads_our_folder_moved_elsewhere(tiny_run, mini_data, tmp_path):
    moved = tmp_path / "moved here"
    moved.mkdir()
    for file in (tiny_run[0] / "tagger").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    theirs = EncoderClassifier.from_hparams(source=str(moved), savedir=str(tmp_path / "saved"))
    ours = AudioTagger.from_hparams(source=str(moved))
    path = next((mini_data / "audio" / "eval").iterdir())
    probabilities, score, index, label = theirs.classify_file(str(path))
    tags = ours.tag_file(path, top_k=39)
    assert label == [tags[0].label]
    assert score.item() == pytest.approx(tags[0].score, abs=1e-5)
    np.testing.assert_allclose(sorted(probabilities[0].tolist(), reverse=True), [tag.score for tag in tags], atol=1e-5)
    assert index.item() == int(np.argmax(probabilities))
