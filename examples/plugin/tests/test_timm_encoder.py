"""Networks of five families with random weights: the contract, and weights as timm and people keep them."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from psla_sb.errors import InputError
from psla_sb.lobes import chain

timm = pytest.importorskip("timm")
TimmEncoder = pytest.importorskip("tiny_tagger.timm_encoder").TimmEncoder

# the smallest of each
FAMILIES = ["convnext_atto", "mobilenetv4_conv_small_035", "tf_efficientnetv2_b0", "regnetx_002", "resnet10t"]
STEM = {"convnext_atto": "stem.0", "regnetx_002": "stem.conv", "resnet10t": "conv1.0"}


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request):
    torch.manual_seed(1)
    return TimmEncoder(request.param)


def rgb(name):
    """A network as timm has it, for pictures, with a classifier, and with statistics that are not those of a new one."""
    torch.manual_seed(2)
    network = timm.create_model(name, num_classes=10)
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 64))
    return network.eval()


def test_every_family_keeps_the_contract(encoder):
    feats = torch.randn(2, 160, 64)
    feature_map = encoder.train()(feats, torch.ones(2))
    assert feature_map.shape == (2, encoder.out_channels, 64 // 32, 160 // encoder.frames_per_step)
    assert encoder.frames_per_step == 32
    feature_map.square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    with torch.no_grad():
        encoder.eval()
        # of a clip longer and of one shorter than any that it was tried on
        assert encoder(torch.zeros(1, 3200, 96)).shape == (1, encoder.out_channels, 3, 100)
        assert encoder(torch.zeros(1, 1, 1)).shape == (1, encoder.out_channels, 1, 1)
    # as the toolkit measures it where an encoder does not say it
    frames_per_step = vars(encoder).pop("frames_per_step")
    assert chain.frames_per_step(encoder, 160, 64) == frames_per_step
    encoder.frames_per_step = frames_per_step
    convs = [part.weight for part in encoder.modules() if isinstance(part, nn.Conv2d) and part.weight.shape[2:] != (1, 1)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convs)


@torch.no_grad()
def test_steps_are_where_the_sound_is(encoder):
    """What changes in a clip changes the map there: the last axis is the time."""
    feats = torch.zeros(1, 1600, 64)
    other = feats.clone()
    other[:, 1440:] = 1.0
    change = (encoder.eval()(other) - encoder(feats)).abs().sum((0, 1, 2))
    assert change[-5:].sum() > 10 * change[:25].sum()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_summed_stem_hears_what_the_picture_network_sees(name, tmp_path):
    """Three equal channels through three filters are one channel through their sum."""
    network = rgb(name)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    encoder = TimmEncoder(name, pretrained=tmp_path / "model.safetensors").eval()
    feats = torch.randn(2, 128, 64)
    network.reset_classifier(0, "")
    expected = network(feats.transpose(1, 2)[:, None].expand(-1, 3, -1, -1))
    torch.testing.assert_close(encoder(feats), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_stem_keeps_the_rest(name, tmp_path):
    network = rgb(name)
    wrapped = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": wrapped}, tmp_path / "a.pth")
    encoder = TimmEncoder(name, pretrained=str(tmp_path / "a.pth"), stem="random")
    stem, theirs = f"{STEM.get(name, 'conv_stem')}.weight", network.state_dict()
    for key, value in encoder.network.state_dict().items():
        assert torch.equal(value, theirs[key]) or key == stem, key
    assert encoder.network.state_dict()[stem].shape[1] == 1
    assert not torch.equal(encoder.network.state_dict()[stem], theirs[stem].sum(1, keepdim=True))


@torch.no_grad()
def test_a_map_with_channels_last_is_turned():
    encoder, feats = TimmEncoder("test_mambaout").eval(), torch.randn(2, 320, 64)
    expected = encoder.network(feats.transpose(1, 2)[:, None])
    assert expected.shape == (2, 2, 10, encoder.out_channels)
    assert torch.equal(encoder(feats), expected.permute(0, 3, 1, 2))


def test_momentum_and_drop_path():
    momenta = {
        value: {part.momentum for part in TimmEncoder("test_resnet", norm_momentum=value).modules() if hasattr(part, "momentum")}
        for value in (None, 0.01)
    }
    assert momenta == {None: {0.1}, 0.01: {0.01}}
    encoder, feats = TimmEncoder("test_convnext", drop_path=0.9).train(), torch.randn(1, 64, 64)
    answers = [encoder(feats) for _ in range(8)]
    assert not all(torch.equal(answer, answers[0]) for answer in answers)
    encoder = TimmEncoder("test_convnext").train()
    assert torch.equal(encoder(feats), encoder(feats))


def test_own_weights_go_back_in(tmp_path):
    torch.manual_seed(3)
    encoder = TimmEncoder("test_resnet")
    # as embedding_model.ckpt of an exported folder, and as a snapshot
    for prefix in ("", "embedding_model."):
        save_file({f"{prefix}{key}": value.contiguous() for key, value in encoder.state_dict().items()}, tmp_path / "own.ckpt")
        again = TimmEncoder("test_resnet", pretrained=tmp_path / "own.ckpt").state_dict()
        assert all(torch.equal(value, again[key]) for key, value in encoder.state_dict().items())


def test_downloaded_weights(monkeypatch):
    """What timm would download, in its place, and what it raises where there is no network."""
    network, create = rgb("test_resnet"), timm.create_model

    def with_network(name, pretrained=False, **options):
        return network if pretrained else create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", with_network)
    encoder = TimmEncoder("test_resnet", pretrained="timm")
    assert torch.equal(encoder.network.layer4[0].conv1.weight, network.layer4[0].conv1.weight)

    def without_network(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", without_network)
    with pytest.raises(InputError, match=r"timm's weights of test_resnet cannot be downloaded \(OSError: no network\).*its path"):
        TimmEncoder("test_resnet", pretrained="timm")


class MakesAFolder:
    """A pickle that makes a folder if it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_files_that_are_none(tmp_path):
    state = rgb("test_resnet").state_dict()
    broken = {**state, "bn1.weight": state["bn1.weight"] * torch.nan}
    for content, message in [
        ({**state, "code": MakesAFolder(tmp_path / "code_was_run")}, "without running code"),
        (rgb("test_efficientnet").state_dict(), r"not weights of timm's test_resnet: conv1.0.weight is missing.* \(and \d+ more\)"),
        ({**state, "bn1.weight": torch.ones(3)}, r"bn1.weight is \[3\] and should be \[\d+\]"),
        ({**state, "more": torch.ones(3)}, "more is unknown"),
        (broken, "numbers of 'bn1.weight' are NaN"),
    ]:
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(InputError, match=rf"file\.pth: .*{message}"):
            TimmEncoder("test_resnet", pretrained=tmp_path / "file.pth")
    assert not (tmp_path / "code_was_run").exists()
    with pytest.raises(InputError, match="no such checkpoint file"):
        TimmEncoder("test_resnet", pretrained=tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("resnet81", {}, InputError, "has no network 'resnet81'; did you mean resnet18"),
        ("hf-hub:somebody/something", {}, InputError, "has no network 'hf-hub:somebody/something'"),
        ("test_vit", {}, InputError, r"no feature map over time: it gives \[1, 65, 64\] for 256 frames"),
        ("vit_tiny_patch16_224", {}, InputError, "takes no features of 256 frames and 64 mels: .*224"),
        ("vgg11", {"drop_path": 0.1}, InputError, "cannot be made an encoder: .*drop_path"),
        ("test_resnet", {"drop_path": 1.0}, ValueError, "drop_path"),
        ("test_resnet", {"norm_momentum": -0.1}, ValueError, "norm_momentum"),
        ("test_resnet", {"stem": "mean"}, ValueError, "sum, random"),
    ],
)
def test_networks_and_arguments_that_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        TimmEncoder(name, **options)
