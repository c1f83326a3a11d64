"""The encoder against efficientnet_pytorch's own network with the same weights."""

from urllib.error import URLError

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from torch import nn

from psla_sb.errors import InputError
from psla_sb.lobes.efficientnet import VARIANTS, EfficientNetEncoder, fold_norms
from psla_sb.lobes.pooling import AttentionPooling


def package_network(variant, seed=0):
    """The package's network of one channel with seeded weights and statistics."""
    torch.manual_seed(seed)
    network = EfficientNet.from_name(f"efficientnet-{variant}", in_channels=1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.0)
    return network.eval()


def without_classifier(state):
    return {key: value for key, value in state.items() if not key.startswith("_fc.")}


def pad_symmetrically(network):
    """Turn the package's 0.7.1 padding into that of 0.7.0, as its source has it."""
    for conv in network.modules():
        if isinstance(getattr(conv, "static_padding", None), nn.ZeroPad2d):
            left, right, top, bottom = conv.static_padding.padding
            width, height = left + right, top + bottom
            width, height = width - width // 2, height - height // 2
            conv.static_padding = nn.ZeroPad2d((width, width, height, height))


@pytest.mark.parametrize("padding", ["tensorflow", "symmetric"])
@pytest.mark.parametrize(("variant", "frames", "mels"), [("b0", 200, 128), ("b0", 77, 61), ("b2", 131, 128)])
@torch.no_grad()
def test_feature_map_is_the_packages(variant, frames, mels, padding):
    network = package_network(variant)
    encoder = EfficientNetEncoder(variant, padding=padding).eval()
    encoder.load_state_dict(without_classifier(network.state_dict()))
    if padding == "symmetric":
        pad_symmetrically(network)
    feats = torch.randn(2, frames, mels)
    expected = network.extract_features(feats.transpose(1, 2)[:, None])
    torch.testing.assert_close(encoder(feats, torch.ones(2)), expected, atol=1e-5, rtol=0)


def test_training_step_is_the_packages():
    network = package_network("b0").train()
    network._global_params = network._global_params._replace(drop_connect_rate=0.0)
    encoder = EfficientNetEncoder("b0", drop_connect=0.0)
    encoder.load_state_dict(without_classifier(network.state_dict()))
    feats = torch.randn(3, 100, 64)
    loss = encoder(feats).square().mean()
    loss.backward()
    expected = network.extract_features(feats.transpose(1, 2)[:, None]).square().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name in ("_conv_stem.weight", "_blocks.5._depthwise_conv.weight", "_bn1.bias"):
        torch.testing.assert_close(encoder.get_parameter(name).grad, network.get_parameter(name).grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(encoder._bn1.running_var, network._bn1.running_var)


def test_drop_connect_acts_in_training_only():
    feats, moved = torch.randn(4, 64, 64), []
    for rate in (0.0, 0.5):
        encoder = EfficientNetEncoder("b0", drop_connect=rate)
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        moved.append(not torch.equal(encoder(feats), encoder(feats)))
        encoder.eval()
        assert torch.equal(encoder(feats), encoder(feats))
    assert moved == [False, True]
    assert EfficientNetEncoder("b0")._global_params.drop_connect_rate == 0.2


@pytest.mark.parametrize(
    ("variant", "padding", "frames", "freq_and_steps"),
    [
        ("b2", "tensorflow", 1056, (4, 33)),
        ("b2", "tensorflow", 3000, (4, 94)),
        ("b0", "tensorflow", 3000, (4, 93)),
        ("b0", "symmetric", 3000, (4, 94)),
    ],
)
@torch.no_grad()
def test_published_output_lengths(variant, padding, frames, freq_and_steps):
    encoder = EfficientNetEncoder(variant, padding=padding).eval()
    assert encoder(torch.zeros(1, frames, 128)).shape == (1, encoder.out_channels, *freq_and_steps)


def test_out_channels():
    with torch.device("meta"):
        channels = [EfficientNetEncoder(variant).out_channels for variant in VARIANTS]
    assert channels == [1280, 1280, 1408, 1536, 1792, 2048, 2304, 2560, *[1280] * 5]


@pytest.mark.parametrize(("variant", "padding"), [("b0", "tensorflow"), ("b2", "symmetric"), ("b3", "tensorflow")])
@torch.no_grad()
def test_smallest_inputs(variant, padding):
    with torch.device("meta"):
        encoder = EfficientNetEncoder(variant, padding=padding).eval()
        smallest = encoder._min_size
        assert encoder(torch.zeros(1, 1, 1)).shape == (1, encoder.out_channels, 1, 1)
        # the network itself takes this size and none below
        assert encoder.extract_features(torch.zeros(1, 1, smallest, smallest)).shape[2:] == (1, 1)
        if smallest > 1:
            with pytest.raises(RuntimeError):
                encoder.extract_features(torch.zeros(1, 1, smallest - 1, smallest - 1))


@torch.no_grad()
def test_one_frame_is_filled_with_zeros():
    encoder, frame = EfficientNetEncoder("b0").eval(), torch.randn(1, 1, 128)
    filled = torch.cat([frame, torch.zeros(1, encoder._min_size - 1, 128)], 1)
    assert encoder(frame).shape == (1, 1280, 4, 1)
    assert torch.equal(encoder(frame), encoder(filled))


def test_keys_are_the_packages():
    encoder = EfficientNetEncoder("b0")
    assert list(encoder.state_dict()) == list(without_classifier(package_network("b0").state_dict()))


def test_number_of_parameters():
    with torch.device("meta"):
        encoder = EfficientNetEncoder("b2")
        classifier = AttentionPooling(encoder.out_channels, 527, n_heads=4)
    assert sum(p.numel() for module in (encoder, classifier) for p in module.parameters()) == 13_640_766


@pytest.mark.parametrize("momentum", [0.01, 0.1])
def test_batch_norm(momentum):
    norms = [m for m in EfficientNetEncoder("b0", norm_momentum=momentum).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}
    assert [norm.momentum for norm in norms] == pytest.approx([momentum] * 49)


def test_memory_layout_and_activation():
    encoder = EfficientNetEncoder("b0")
    assert encoder(torch.zeros(2, 64, 64)).is_contiguous(memory_format=torch.channels_last)
    activations = [encoder._swish, *(block._swish for block in encoder._blocks)]
    assert all(isinstance(activation, nn.SiLU) for activation in activations)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "b8"}, "b0, b1, .*b7, lite0, .*lite4, not 'b8'"),
        ({"variant": "b0", "stem": "mean"}, "random, sum"),
        ({"variant": "b0", "padding": "same"}, "tensorflow, symmetric"),
        ({"variant": "b0", "norm_momentum": 1.5}, "norm_momentum"),
        ({"variant": "b0", "drop_connect": 1.0}, "drop_connect"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EfficientNetEncoder(**arguments)


@pytest.fixture(scope="module")
def imagenet_state():
    """A state dict as the package's weight files hold it: three channels, with the classifier."""
    torch.manual_seed(3)
    return EfficientNet.from_name("efficientnet-b0").state_dict()


@pytest.fixture
def save(tmp_path):
    def save_to_file(state):
        torch.save(state, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    return save_to_file


@pytest.mark.parametrize("classifier", [True, False])
def test_pretrained_file(imagenet_state, save, classifier):
    path = save(imagenet_state if classifier else without_classifier(imagenet_state))
    summed = EfficientNetEncoder("b0", pretrained=str(path), stem="sum").state_dict()
    torch.manual_seed(4)
    random = EfficientNetEncoder("b0", pretrained=path, stem="random").state_dict()
    torch.manual_seed(4)
    untrained = EfficientNetEncoder("b0").state_dict()
    stem = "_conv_stem.weight"
    torch.testing.assert_close(summed.pop(stem), imagenet_state[stem].sum(1, keepdim=True))
    assert torch.equal(random.pop(stem), untrained[stem])
    for state in (summed, random):
        assert all(torch.equal(value, imagenet_state[key]) for key, value in state.items())


@torch.no_grad()
def test_summed_stem_sees_grey_images_as_the_package_does(imagenet_state, save):
    network = EfficientNet.from_name("efficientnet-b0").eval()
    network.load_state_dict(imagenet_state)
    encoder = EfficientNetEncoder("b0", pretrained=save(imagenet_state), stem="sum").eval()
    feats = torch.randn(1, 64, 64)
    expected = network.extract_features(feats.transpose(1, 2)[:, None].expand(1, 3, 64, 64))
    torch.testing.assert_close(encoder(feats), expected, atol=1e-5, rtol=0)


def test_files_without_batch_counters(imagenet_state, save):
    path = save({key: value for key, value in imagenet_state.items() if "num_batches" not in key})
    assert torch.equal(EfficientNetEncoder("b0", path)._bn1.weight, imagenet_state["_bn1.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("_bn0.weight"), "_bn0.weight is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda state: state.update({"_bn0.bias": torch.zeros(5)}), r"_bn0.bias is \[5\] and should be \[32\]"),
        (lambda state: state.update({"_bn0.bias": torch.tensor(1.0)}), r"_bn0.bias is \[\] and should be \[32\]"),
        (lambda state: state.update({"_conv_stem.weight": torch.zeros(32, 2, 3, 3)}), r"should be \[32, 3, 3, 3\]"),
    ],
)
def test_changed_files_are_refused(imagenet_state, save, change, message):
    state = dict(imagenet_state)
    change(state)
    with pytest.raises(InputError, match=message) as error:
        EfficientNetEncoder("b0", pretrained=save(state))
    assert "weights.pth: not efficientnet_pytorch's weights of efficientnet-b0" in str(error.value)


def test_a_file_that_holds_more_than_tensors_is_refused(imagenet_state, save):
    with pytest.raises(InputError, match=r"weights\.pth: '_bn0.bias' is not a name with a plain tensor"):
        EfficientNetEncoder("b0", pretrained=save({**imagenet_state, "_bn0.bias": 1.0}))


def test_another_variants_file_is_refused(imagenet_state, save):
    with pytest.raises(InputError, match=r"of efficientnet-b1: .* is missing; .*\(and \d+ more\).*change the variant"):
        EfficientNetEncoder("b1", pretrained=save(imagenet_state))


class RunsCode:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a weights file was run')",)


def test_pickled_code_is_not_run(imagenet_state, save):
    with pytest.raises(InputError, match="without running code"):
        EfficientNetEncoder("b0", pretrained=save({**imagenet_state, "code": RunsCode()}))


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 9, b"PK\x03\x04broken", b"\x80\x02}q\x00."])
def test_broken_files_are_refused(tmp_path, content):
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.pth"):
        EfficientNetEncoder("b0", pretrained=tmp_path / "broken.pth")


def test_not_a_state_dict(save):
    with pytest.raises(InputError, match="holds a list, not a state dict"):
        EfficientNetEncoder("b0", pretrained=save([torch.zeros(1)]))


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.pth: cannot be read. Give imagenet, advprop, or the path"):
        EfficientNetEncoder("b0", pretrained=tmp_path / "nowhere.pth")


@pytest.mark.parametrize(("name", "file"), [("imagenet", "efficientnet-b0-"), ("advprop", "adv-efficientnet-b0-")])
def test_download(monkeypatch, tmp_path, imagenet_state, name, file):
    """Offline the message says what to put where; with the file there nothing is fetched."""

    def offline(url, *args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match=rf"https://\S*/{file}\w+\.pth: cannot be downloaded.*no network") as error:
        EfficientNetEncoder("b0", pretrained=name)
    path = str(error.value).split("put it at ")[1].split(" (")[0]
    assert path.startswith(str(tmp_path / "checkpoints" / file))
    torch.save(imagenet_state, path)
    assert torch.equal(EfficientNetEncoder("b0", name)._bn1.weight, imagenet_state["_bn1.weight"])


def test_width_and_depth_scale_the_network_as_the_package_does():
    theirs = EfficientNet.from_name(
        "efficientnet-b0", in_channels=1, include_top=False, width_coefficient=0.5, depth_coefficient=0.5
    )
    ours = EfficientNetEncoder("b0", width=0.5, depth=0.5).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 1, 64, 70)
    with torch.no_grad():
        torch.testing.assert_close(ours(x[:, 0].transpose(1, 2)), theirs.eval().extract_features(x), atol=1e-5, rtol=1e-5)
    assert ours.out_channels == 640
    with pytest.raises(ValueError, match="width must be above 0"):
        EfficientNetEncoder("b0", width=0)


@pytest.mark.parametrize("padding", ["tensorflow", "symmetric"])
def test_folded_norms_give_the_same_numbers(padding):
    torch.manual_seed(0)
    encoder, feats = EfficientNetEncoder("b0", padding=padding), torch.randn(2, 200, 64)
    assert encoder.frames_per_step == 32
    for norm in (module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = None
    encoder(feats)
    encoder.eval()
    folded = fold_norms(encoder)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules())
    with torch.inference_mode():
        expected = encoder(feats)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(folded(feats), expected, atol=1e-4, rtol=1e-3)
