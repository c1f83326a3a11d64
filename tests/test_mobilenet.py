"""MobileNetV3, its heads and its front end: figures of the published code, and restatements of what they compute."""

import copy

import pytest
import torch
from published_networks import DIGESTS, FEATURES, N_FRAMES, digest, layout, seeded, waveform
from torchaudio.compliance.kaldi import get_mel_banks

from psla_sb.errors import InputError
from psla_sb.lobes import features
from psla_sb.lobes.efficientnet import fold_norms
from psla_sb.lobes.features import CentredFbank, GlobalNorm
from psla_sb.lobes.mobilenet import MobileNetV3Encoder, width_of
from psla_sb.lobes.pooling import ConvPooling, MLPPooling


@pytest.mark.parametrize("name", DIGESTS)
def test_names_and_shapes_are_the_published_ones(name):
    shapes = layout(int(name[2:4]) / 10, is_conv=name.endswith("fc"))
    assert digest(shapes) == DIGESTS[name]
    assert width_of({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}) == int(name[2:4]) / 10


def test_mn10_has_the_published_number_of_parameters():
    shapes = [shape for key, shape in layout(1.0).items() if not key.endswith(("_tracked", "_mean", "_var"))]
    assert round(sum(torch.Size(shape).numel() for shape in shapes) / 1e6, 1) == 4.9


# The front end


@pytest.mark.parametrize("i", [0, 1])
def test_features_are_those_of_the_published_code(i):
    feats = GlobalNorm(mean=-4.5, std=5.0)(CentredFbank().eval()(waveform(i)[None]))[0]
    assert feats.shape == (N_FRAMES[i], 128)
    torch.testing.assert_close(feats.T[::25, ::148], torch.tensor(FEATURES[i]), atol=1e-4, rtol=0)


def restated(wav, n_mels, hop_length, win_length, n_fft, highest):
    """The features of one clip by PyTorch's own centred transform, in float64."""
    x = wav.double()
    x = x[1:] - 0.97 * x[:-1]
    window = torch.hann_window(win_length, periodic=False, dtype=torch.float64)
    spectrum = torch.stft(x, n_fft, hop_length, win_length, window, center=True, pad_mode="reflect", return_complex=True)
    banks = get_mel_banks(n_mels, n_fft, 32000.0, 0.0, highest, 100.0, -500.0, 1.0)[0].double()
    return (banks @ spectrum.abs().square()[:-1] + 1e-5).log().T


@pytest.mark.parametrize(
    "options",
    [
        {"n_mels": 40, "hop_length": 160, "win_length": 800, "n_fft": 1024, "highest": 15000.0},
        {"n_mels": 64, "hop_length": 333, "win_length": 601, "n_fft": 1024, "highest": 16000.0},
        {"n_mels": 128, "hop_length": 800, "win_length": 1024, "n_fft": 1024, "highest": 8000.0},
    ],
)
def test_other_front_ends_are_the_formula(options):
    fbank, generator = CentredFbank(**options), torch.Generator().manual_seed(0)
    for n_samples in (514, 1000, 3201, 3202, 20011):
        wav = 0.1 * torch.randn(n_samples, generator=generator)
        feats = fbank(wav[None])[0].double()
        assert len(feats) == fbank.frames_of(n_samples)
        torch.testing.assert_close(feats, restated(wav, **options), atol=2e-4, rtol=0)


def test_a_clip_has_the_features_that_it_has_alone():
    fbank, generator = CentredFbank(), torch.Generator().manual_seed(1)
    lengths = [40000, 39999, 32001, 1000, 514, 402, 401, 400, 300, 2, 1]
    # the padding is loud
    wavs = torch.rand(len(lengths), 40000, generator=generator) - 0.5
    batch = fbank(wavs, torch.tensor(lengths) / 40000)
    for feats, wav, length in zip(batch, wavs, lengths, strict=True):
        alone = fbank(wav[None, :length])[0]
        assert len(alone) == fbank.frames_of(length)
        torch.testing.assert_close(feats[: len(alone)], alone, atol=1e-5, rtol=0)
        assert not feats[len(alone) :].any()
    assert torch.isfinite(batch).all()


@pytest.mark.parametrize("n_frames", [1, 50, 126, 300])
def test_n_frames_cuts_or_fills_up(n_frames):
    wavs, lens = torch.rand(2, 40000, generator=torch.Generator().manual_seed(2)) - 0.5, torch.tensor([1.0, 0.4])
    whole, cut = CentredFbank()(wavs, lens), CentredFbank(n_frames=n_frames)
    expected = torch.nn.functional.pad(whole, (0, 0, 0, 300))[:, :n_frames]
    torch.testing.assert_close(cut(wavs, lens), expected, atol=1e-5, rtol=0)
    # what a dataset leaves of a clip is enough
    torch.testing.assert_close(cut(wavs[:1, : cut.n_samples]), expected[:1], atol=1e-5, rtol=0)


def test_edges_are_drawn_in_training_alone(monkeypatch):
    fbank, wavs = CentredFbank(edge_ranges=(10, 2000)), torch.rand(1, 32000, generator=torch.Generator().manual_seed(3))
    fixed = CentredFbank().eval()(wavs)
    assert torch.equal(fbank.eval()(wavs), fixed)
    assert torch.equal(CentredFbank().train()(wavs), fixed)
    torch.manual_seed(0)
    first, second = (fbank.train()(wavs) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(fbank(wavs), first)
    drawn = []
    monkeypatch.setattr(features, "mel_filters", lambda *given: (drawn.append(given[3:]), fbank.mel_banks)[1])
    for _ in range(3000):
        fbank._filters()
    lowest, highest = map(set, zip(*drawn, strict=True))
    assert lowest == set(range(10))
    assert 14001 <= min(highest) < 14020
    assert 15980 < max(highest) <= 16000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_mels": 3}, "n_mels >= 4"),
        ({"win_length": 2000}, "win_length <= n_fft"),
        ({"n_fft": 1023}, "which is even"),
        ({"n_frames": 0}, "n_frames >= 1"),
        ({"sample_rate": 16000}, "half the sample rate"),
        ({"edge_ranges": (10, 4000)}, "half the sample rate"),
        ({"lowest": 14500.0, "edge_ranges": (0, 2000)}, "the lowest below"),
    ],
)
def test_front_ends_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        CentredFbank(**options)


def test_one_waveform_is_refused():
    with pytest.raises(ValueError, match=r"CentredFbank takes waveforms \[batch, samples\]"):
        CentredFbank()(torch.zeros(32000))


# The heads


def test_mlp_pooling_is_the_formula():
    pooling, feature_map = MLPPooling(24, 7, hidden=16).eval(), torch.randn(3, 24, 4, 9)
    for parameter in pooling.parameters():
        torch.nn.init.normal_(parameter)
    state = {key: value.double() for key, value in pooling.state_dict().items()}

    def of(x):
        hidden = x @ state["hidden.weight"].T + state["hidden.bias"]
        hidden = hidden * (hidden + 3).clamp(0, 6) / 6
        return torch.sigmoid(hidden @ state["output.weight"].T + state["output.bias"])

    x = feature_map.double()
    torch.testing.assert_close(pooling(feature_map).double(), of(x.mean((2, 3))), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooling(feature_map.mean(2)), pooling(feature_map))
    steps = torch.stack([of(x[..., step].mean(2)) for step in range(9)], dim=2)
    torch.testing.assert_close(pooling.segment_scores(feature_map).double(), steps, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    assert not torch.equal(pooling.train()(feature_map), pooling(feature_map))


def test_conv_pooling_is_the_formula():
    pooling, feature_map = ConvPooling(24, 7), torch.randn(3, 24, 4, 9)
    torch.nn.init.normal_(pooling.norm.weight)
    torch.nn.init.normal_(pooling.norm.bias)
    scores = torch.einsum("kc,bcfs->bkfs", pooling.conv.weight[:, :, 0, 0].double(), feature_map.double())

    def of(mean, var):
        wide = [x.double()[None, :, None, None] for x in (mean, var, pooling.norm.weight, pooling.norm.bias)]
        return (scores - wide[0]) / (wide[1] + 1e-5).sqrt() * wide[2] + wide[3]

    trained = pooling(feature_map)
    logits = of(scores.mean((0, 2, 3)), scores.var((0, 2, 3), correction=0))
    torch.testing.assert_close(trained.double(), torch.sigmoid(logits.mean((2, 3))), atol=1e-5, rtol=0)
    pooling.eval()
    logits = of(pooling.norm.running_mean, pooling.norm.running_var)
    torch.testing.assert_close(pooling(feature_map).double(), torch.sigmoid(logits.mean((2, 3))), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooling.segment_scores(feature_map).double(), torch.sigmoid(logits.mean(2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooling(feature_map.mean(2)), pooling(feature_map))
    pooling.train()
    assert pooling(feature_map.mean(2)).shape == (3, 7)


@pytest.mark.parametrize("kind", [MLPPooling, ConvPooling])
def test_heads_stay_in_float32(kind):
    pooling, feature_map = kind(24, 7).eval(), torch.randn(3, 24, 4, 9)
    expected = pooling(feature_map)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pooling(feature_map), expected)
        assert pooling.segment_scores(feature_map).dtype == torch.float32
    with pytest.raises(ValueError, match="n_classes"):
        kind(24, 0)


# The encoder


@pytest.mark.parametrize(("strides", "factor"), [((2, 2, 2, 2), 32), ([2, 2, 2, 1], 16), ((2, 2, 1, 1), 8)])
def test_steps_are_where_the_encoder_says(strides, factor):
    encoder = MobileNetV3Encoder(0.1, strides=strides).eval()
    assert encoder.frames_per_step == factor
    # the gates see the whole clip
    for block in encoder.features:
        for i, part in enumerate(getattr(block, "block", ())):
            if hasattr(part, "conc_se_layers"):
                block.block[i] = torch.nn.Identity()
    feats = torch.randn(1, 3200, 32, requires_grad=True)
    feature_map = encoder(feats)
    assert feature_map.shape == (1, encoder.out_channels, 32 // factor, 3200 // factor)
    k = 1600 // factor
    feature_map[..., k].sum().backward()
    heard = feats.grad.abs().sum((0, 2)).nonzero()
    assert abs((heard.min() + heard.max()).item() / 2 - encoder.step_offset - k * factor) < 1


def test_a_frame_is_enough():
    assert MobileNetV3Encoder(0.1).eval()(torch.zeros(1, 1, 4)).shape == (1, 96, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be above 0"),
        ({"strides": (2, 2, 2)}, "strides must be four numbers"),
        ({"strides": (2, 2, 2, 3)}, "each 1 or 2"),
        ({"norm_momentum": 2}, "norm_momentum must be in"),
    ],
)
def test_encoders_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV3Encoder(**options)


def test_folded_it_computes_the_same():
    encoder = MobileNetV3Encoder(0.4, norm_momentum=0.3)
    feats = torch.randn(2, 200, 128, generator=torch.Generator().manual_seed(0))
    encoder(feats)
    state = copy.deepcopy(encoder.eval().state_dict())
    with torch.no_grad():
        expected, folded = encoder(feats), fold_norms(encoder)
        torch.testing.assert_close(folded(feats), expected, atol=1e-5, rtol=1e-4)
        assert expected.abs().max() > 0.01
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded.modules())
    assert torch.equal(encoder(feats), expected)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def test_every_weight_is_trained():
    encoder = MobileNetV3Encoder(0.1)
    MLPPooling(96, 3)(encoder(torch.randn(2, 64, 64))).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


# Pretrained weights


@pytest.fixture
def imagenet(tmp_path):
    state = seeded(layout(0.4, n_classes=1000), "mn04_im")
    torch.save(state, tmp_path / "mn04_im.pt")
    return tmp_path / "mn04_im.pt", state


def test_pretrained_takes_the_encoder_of_a_published_file(imagenet):
    path, state = imagenet
    own = MobileNetV3Encoder(0.4, pretrained=path).state_dict()
    assert len(own) == 308
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    # of colours, and as old as to have no counters
    stem = torch.randn(8, 3, 3, 3)
    old = {key: value for key, value in state.items() if "num_batches" not in key} | {"features.0.0.weight": stem}
    torch.save(old, path)
    own = MobileNetV3Encoder(0.4, pretrained=str(path)).state_dict()
    torch.testing.assert_close(own.pop("features.0.0.weight"), stem.sum(1, keepdim=True))
    assert all(torch.equal(value, state[key]) for key, value in own.items() if "num_batches" not in key)


def test_pretrained_weights_that_do_not_fit(imagenet, tmp_path):
    path, state = imagenet
    with pytest.raises(InputError, match=r"mn04_im\.pt: not .* width 1\.0: .* should be .*\. They are those of width 0\.4"):
        MobileNetV3Encoder(1.0, pretrained=path)
    del state["features.3.block.0.1.bias"]
    torch.save(state | {"features.x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"features\.3\.block\.0\.1\.bias is missing; features\.x is unknown\. Give"):
        MobileNetV3Encoder(0.4, pretrained=path)
    with pytest.raises(InputError, match="no such checkpoint file"):
        MobileNetV3Encoder(0.4, pretrained=tmp_path / "none.pt")
    path.write_text("<html>")
    with pytest.raises(InputError, match="without running code"):
        MobileNetV3Encoder(0.4, pretrained=path)
    torch.save([1], path)
    with pytest.raises(InputError, match="holds a list"):
        MobileNetV3Encoder(0.4, pretrained=path)
