"""What every encoder can do: folded and compiled it computes the same, ONNX Runtime too, and it embeds by HEAR's interface."""

import copy

import numpy as np
import pytest
import torch

from psla_sb import hear
from psla_sb.checkpoints.tagger_folder import label_encoder
from psla_sb.inference.hear import HearModel
from psla_sb.inference.onnx_export import export_onnx
from psla_sb.inference.tagger import AudioTagger
from psla_sb.labels.vocabulary import Vocabulary
from psla_sb.lobes.compiled import Compiled
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.features import CentredFbank, GlobalNorm, KaldiFbank
from psla_sb.lobes.mobilenet import MobileNetV3Encoder
from psla_sb.lobes.pooling import AttentionPooling, ConvPooling, MeanPooling, MLPPooling
from runs import REPOSITORY

N_CLASSES = 7


def timm_encoder(name):
    pytest.importorskip("timm")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "examples" / "plugin"))
        from tiny_tagger.timm_encoder import TimmEncoder
    return TimmEncoder(name)


def kaldi():
    return 16000, KaldiFbank(n_mels=64, n_frames=198), GlobalNorm()


def centred():
    """EfficientAT's front end, which takes clips whole."""
    return 32000, CentredFbank(n_mels=64), GlobalNorm(0.0, 1.0)


ENCODERS = {
    "b0": (lambda: EfficientNetEncoder("b0", width=0.3, depth=0.4), kaldi, AttentionPooling),
    "b2, as published": (lambda: EfficientNetEncoder("b2", width=0.3, padding="symmetric"), kaldi, MeanPooling),
    "lite0": (lambda: EfficientNetEncoder("lite0", width=0.5), kaldi, AttentionPooling),
    "lite2": (lambda: EfficientNetEncoder("lite2", width=0.3, depth=0.5), kaldi, MLPPooling),
    "mn04": (lambda: MobileNetV3Encoder(0.4), centred, MLPPooling),
    "mn, its strides": (lambda: MobileNetV3Encoder(0.2, strides=(2, 2, 2, 1)), centred, ConvPooling),
    "mn, other parts": (lambda: MobileNetV3Encoder(0.2), kaldi, AttentionPooling),
    "timm's resnet": (lambda: timm_encoder("test_resnet"), kaldi, AttentionPooling),
    "timm's mobilenetv4": (lambda: timm_encoder("mobilenetv4_conv_small_035"), kaldi, MeanPooling),
    "timm's convnext": (lambda: timm_encoder("test_convnext"), kaldi, MLPPooling),
}


def noise(n_sounds, n_samples, seed=0):
    """Sounds of which some are loud, and some hardly to be heard."""
    noise = torch.randn(n_sounds, n_samples, generator=torch.Generator().manual_seed(seed))
    return (noise * torch.logspace(-3, -0.7, n_sounds)[:, None]).clamp(-1, 1)


@pytest.fixture(scope="module", params=ENCODERS)
def tagger(request):
    """A tagger that was not trained, but whose scores tell sounds apart."""
    make, front_end, head = ENCODERS[request.param]
    torch.manual_seed(0)
    encoder, (rate, fbank, norm) = make(), front_end()
    parts = fbank, norm, encoder, head(encoder.out_channels, N_CLASSES)
    vocabulary = Vocabulary([f"/m/{k}" for k in range(N_CLASSES)], [f"class {k}" for k in range(N_CLASSES)])
    hparams = {"sample_rate": rate, "mids": vocabulary.mids, "label_encoder": label_encoder(vocabulary)}
    tagger = AudioTagger(dict(zip(AudioTagger.MODULES_NEEDED, parts, strict=True)), hparams, run_opts={"device": "cpu"})
    feats = tagger.features(noise(8, 2 * rate))
    norms = [part for part in tagger.mods.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    usual = [part.momentum for part in norms]
    for part in norms:
        part.momentum = None
    with torch.no_grad():
        tagger.mods.classifier.train()(encoder.train()(feats))
    for part, momentum in zip(norms, usual, strict=True):
        part.momentum = momentum
    tagger.eval()
    assert tagger.score_batch(noise(4, 2 * rate, seed=1)).std(0).max() > 1e-3, "all sounds get the same scores"
    return tagger


def sounds(tagger, n_sounds, seconds, seed):
    return noise(n_sounds, round(seconds * tagger.hparams.sample_rate), seed)


@torch.no_grad()
def test_folded_it_computes_the_same(tagger):
    mods, wavs = tagger.mods, sounds(tagger, 3, 1.9, seed=2)
    feature_map = mods.embedding_model(mods.mean_var_norm(mods.compute_features(wavs)))
    encoded = tagger.encode_batch(wavs)
    torch.testing.assert_close(encoded, feature_map, atol=1e-4 * feature_map.abs().max().item(), rtol=1e-3)
    torch.testing.assert_close(tagger.score_batch(wavs), mods.classifier(feature_map), atol=1e-5, rtol=0)


def test_compiled_it_trains_the_same(tagger):
    """As one graph; to make code of it takes minutes, see `make test-slow`."""
    compare_training(tagger, backend="eager")


@pytest.mark.slow
def test_compiled_to_code_it_trains_the_same(tagger):
    compare_training(tagger)


@pytest.fixture(autouse=True)
def compiler_without_memory():
    """What was compiled of another shape makes the compiler take shapes for unknown, here and in other tests."""
    yield
    torch._dynamo.reset()


def compare_training(tagger, **options):
    """In float64: the least rounding turns the gradient of a ReLU6 about."""
    feats = tagger.features(sounds(tagger, 2, 2, seed=3)).double()
    answers = []
    for compiled in (False, True):
        encoder = copy.deepcopy(tagger.mods.embedding_model).double()
        # what is left out at random, the compiler leaves out by other numbers
        if isinstance(encoder, EfficientNetEncoder):
            encoder._global_params = encoder._global_params._replace(drop_connect_rate=0)
        for part in encoder.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        for parameter in encoder.parameters():
            parameter.requires_grad_()
        module = Compiled(encoder.train(), n_clips=2, fullgraph=True, **options) if compiled else encoder.train()
        feature_map = module(feats)
        feature_map.square().mean().backward()
        assert all(parameter.grad is not None for parameter in encoder.parameters())
        answers.append(
            (feature_map.detach(), [parameter.grad for parameter in encoder.parameters()], dict(encoder.named_buffers()))
        )
    (one, gradients, buffers), (other, others, other_buffers) = answers
    for found, expected in ((other, one), (others, gradients), (other_buffers, buffers)):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)


def test_onnx_runtime_computes_the_same(tagger, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export_onnx(tagger, tmp_path / "model.onnx") < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    # of a recording that is longer than the model's clips the file hears the beginning
    for n_sounds, seconds in ((1, 1), (3, 2), (2, 3.1)):
        wavs = sounds(tagger, n_sounds, seconds, seed=4)
        (scores,) = session.run(None, {"waveform": wavs.numpy()})
        np.testing.assert_allclose(scores, tagger.tag_features(*tagger.features_and_lens(wavs)), atol=1e-4)


def test_hear(tagger):
    model, audio = HearModel(tagger), sounds(tagger, 2, 3, seed=5)
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.shape == (2, times.shape[1], model.timestamp_embedding_size)
    assert (times.diff() > 0).all()
    assert 0 <= times.min() < times.max() <= 3000
    # a step's length, at the beginning as at the end
    assert times[0, 0] <= times[0].diff().mean() + 1
    assert times[0, -1] >= 3000 - times[0].diff().mean() - 1
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.shape == (2, model.scene_embedding_size)
    assert embeddings.isfinite().all()
    assert not torch.allclose(scenes[0], scenes[1])
    torch.testing.assert_close(scenes, embeddings.mean(1), atol=1e-4, rtol=1e-3)
