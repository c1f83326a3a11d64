"""The HEAR 2021 API, checked as its validator checks it (that package needs TensorFlow, so its checks are restated here)."""

import numpy as np
import pytest
import torch

from psla_sb import hear
from psla_sb.errors import InputError


@pytest.fixture(scope="module")
def model(tiny_run):
    return hear.load_model(str(tiny_run[0] / "tagger"))


def noise(n_sounds, seconds, seed=0):
    return torch.rand(n_sounds, int(seconds * 16000), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_model_has_its_attributes(model):
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate in (16000, 22050, 44100, 48000)
    assert isinstance(model.scene_embedding_size, int)
    assert isinstance(model.timestamp_embedding_size, int)


@pytest.mark.parametrize("seconds", [1.07, 1.98, 4.0, 0.31, 23.45])
def test_timestamp_embeddings(model, seconds):
    embeddings, timestamps = hear.get_timestamp_embeddings(noise(2, seconds), model)
    assert embeddings.dtype == timestamps.dtype == torch.float32
    assert embeddings.shape == (2, timestamps.shape[1], model.timestamp_embedding_size)
    assert timestamps.shape == embeddings.shape[:2]
    times = timestamps.numpy()
    assert (times[0] == times[1]).all()
    assert times.min() >= 0
    assert times.max() <= 1000 * seconds
    if times.shape[1] > 1:
        steps = np.diff(times)
        assert (steps > 0).all()
        np.testing.assert_allclose(steps, steps.mean(), atol=1)
        assert times.min() <= steps.mean()
        assert times.max() >= 1000 * seconds - steps.mean()


def test_scene_embeddings(model):
    embeddings = hear.get_scene_embeddings(noise(4, 2.74), model)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (4, model.scene_embedding_size)
    assert torch.isfinite(embeddings).all()
    assert embeddings.std(0).max() > 0


def test_a_sounds_embeddings_do_not_depend_on_its_batch(model):
    sounds = noise(3, 2.0)
    together, alone = hear.get_scene_embeddings(sounds, model), [hear.get_scene_embeddings(sound[None], model) for sound in sounds]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    together = hear.get_timestamp_embeddings(sounds, model)[0]
    alone = [hear.get_timestamp_embeddings(sound[None], model)[0] for sound in sounds]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_a_short_sounds_scene_is_the_mean_of_its_true_steps(model):
    tagger = model.tagger
    # 0.4 s within the model's 0.5 s
    sound = noise(1, 0.4)
    feature_map = tagger.encode_batch(sound)
    expected = feature_map.mean(2)[..., : tagger.n_steps_of(6400)].mean(2)
    torch.testing.assert_close(hear.get_scene_embeddings(sound, model), expected)
    padded = torch.nn.functional.pad(sound, (0, 1600), value=0.7).repeat(2, 1)
    torch.testing.assert_close(tagger.scene_embeddings(padded, torch.tensor([0.8, 0.8])), expected.repeat(2, 1))


def test_the_model_follows_the_validator_to_its_device(model):
    model.to("cpu")
    assert model.tagger.device == "cpu"
    assert model.tagger.score_batch(noise(1, 0.5)).shape == (1, 39)


def test_what_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"hyperparams\.yaml"):
        hear.load_model(str(tmp_path))
