"""Parts of a block for training on a CPU give the numbers and the gradients that PyTorch's own operations give in float64."""

import copy

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import Conv2dStaticSamePadding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from psla_sb.lobes import on_cpu
from psla_sb.lobes.efficientnet import EfficientNetEncoder
from psla_sb.lobes.mobilenet import MobileNetV3Encoder


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    """Sizes at which PyTorch's own way is faster."""
    monkeypatch.setattr(on_cpu, "LEAST_VALUES", 0)
    monkeypatch.setattr(on_cpu, "LEAST_PIXELS", 2)


ENCODERS = pytest.mark.parametrize(
    "make", [lambda: EfficientNetEncoder("b0", depth=0.3), lambda: MobileNetV3Encoder(0.2)], ids=["b0", "mn02"]
)


def image(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last).requires_grad_()


def gradients(output, *inputs):
    """Of something that depends on every value in its own way."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output.sin() * weights).sum(), inputs)


def assert_close(found, expected):
    torch.testing.assert_close(found.double(), expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=1e-4)


def padded(channels, kernel, stride, before, after):
    """A depthwise convolution as efficientnet_pytorch has it, padded in front of it or within it."""
    conv = Conv2dStaticSamePadding(channels, channels, kernel, stride, image_size=1, groups=channels, bias=False)
    conv.static_padding = nn.ZeroPad2d((before, after, before, after)) if before != after else nn.Identity()
    conv.padding = (0, 0) if before != after else (before, before)
    return conv


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.data())
def test_depthwise(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kernel, stride, before, n_clips, channels = draw(1, 7), draw(1, 3), draw(0, 3), draw(1, 3), draw(1, 20)
    after = before + draw(0, 2)
    height, width = (draw(max(1, kernel - before - after), 14) for _ in range(2))
    conv, x = padded(channels, kernel, stride, before, after), image(n_clips, channels, height, width, seed=kernel)
    assert on_cpu.trains(x, conv)
    found = on_cpu.depthwise(conv, x)
    exact, y = copy.deepcopy(conv).double(), x.detach().double().requires_grad_()
    expected = exact(y)
    assert_close(found, expected)
    for one, other in zip(gradients(found, x, conv.weight), gradients(expected, y, exact.weight), strict=True):
        assert_close(one, other)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 24),
    out=st.integers(1, 40),
    size=st.sampled_from([(1, 1, 2), (2, 1, 1), (2, 3, 5), (4, 9, 7)]),
    level=st.sampled_from([0.0, 1.0, 100.0]),
    momentum=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_expand(channels, out, size, level, momentum):
    """Also where the mean is much larger than what varies."""
    torch.manual_seed(channels)
    conv, norm = nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out, eps=1e-3, momentum=momentum)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    n_clips, *image_size = size
    x = (image(n_clips, channels, *image_size) + level).detach().requires_grad_()

    def plain(dtype):
        parts = [copy.deepcopy(part).to(dtype) for part in (conv, norm)]
        y = x.detach().to(dtype).requires_grad_()
        answer = parts[1](parts[0](y))
        return [answer, *gradients(answer, y, parts[0].weight, *parts[1].parameters()), *parts[1].buffers()]

    expected, rounded = plain(torch.float64), plain(torch.float32)
    found = on_cpu.expand(conv, norm, x)
    found = [found, *gradients(found, x, conv.weight, *norm.parameters()), *norm.buffers()]
    assert found[-1] == 1
    for one, exact, usual in zip(found, expected, rounded, strict=True):
        # as good as what PyTorch makes of it in float32
        error, usual_error = ((value.double() - exact).abs().max() for value in (one, usual))
        assert error <= 10 * usual_error + 2e-5 * exact.abs().max().clamp(min=1.0)


def test_one_value_alone_has_no_variance():
    encoder = EfficientNetEncoder("b0", depth=0.3).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        encoder(torch.randn(1, 32, 32))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    n_clips=st.integers(1, 4),
    channels=st.integers(1, 40),
    out=st.integers(1, 20),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_project(n_clips, channels, out, height, width):
    conv, small = nn.Conv2d(channels, out, 1, bias=False), nn.Conv2d(channels, channels, 1)
    x = image(n_clips, channels, height, width)
    found = on_cpu.project(conv, x, lambda mean: torch.sigmoid(small(mean)))
    y, weight = x.detach().double().requires_grad_(), conv.weight.detach().double().requires_grad_()
    (kernel, bias) = (p.detach().double().requires_grad_() for p in small.parameters())
    expected = F.conv2d(y * torch.sigmoid(F.conv2d(y.mean((2, 3), keepdim=True), kernel, bias)), weight)
    assert_close(found, expected)
    inputs, others = (x, conv.weight, *small.parameters()), (y, weight, kernel, bias)
    for one, other in zip(gradients(found, *inputs), gradients(expected, *others), strict=True):
        assert_close(one, other)
    assert found.is_contiguous(memory_format=torch.channels_last)


@ENCODERS
def test_gradients_can_be_asked_for_twice(make):
    torch.manual_seed(0)
    encoder = make().train()
    loss = encoder(torch.randn(2, 64, 64)).square().mean()
    once = torch.autograd.grad(loss, encoder.parameters(), retain_graph=True)
    twice = torch.autograd.grad(loss, encoder.parameters())
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


@pytest.mark.parametrize("padding", ["tensorflow", "symmetric"])
def test_the_packages_gradients(padding, monkeypatch):
    """Of a whole network, in float64, where only rounding would differ; here what float32 makes of it is as near as PyTorch's."""
    torch.manual_seed(3)
    encoder, feats = EfficientNetEncoder("b0", drop_connect=0, padding=padding).train(), torch.randn(3, 200, 64)

    def gradient(encoder, feats):
        output = encoder(feats)
        return torch.cat([one.flatten().double() for one in gradients(output, *encoder.parameters())])

    found = gradient(encoder, feats)
    with monkeypatch.context() as patch:
        patch.setattr(on_cpu, "trains", lambda x, *modules: False)
        plain = gradient(encoder, feats)
    exact = gradient(copy.deepcopy(encoder).double(), feats.double())
    largest = exact.abs().max()
    assert not torch.equal(found, plain), "the faster way was not taken"
    assert (found - exact).abs().max() < max(2 * (plain - exact).abs().max(), 1e-5 * largest)
    if padding == "tensorflow":
        package = EfficientNet.from_name("efficientnet-b0", in_channels=1, include_top=False, drop_connect_rate=0).double()
        package.load_state_dict(encoder.state_dict())
        output = package.train().extract_features(feats.double().transpose(1, 2)[:, None])
        theirs = torch.cat([one.flatten() for one in gradients(output, *package.parameters())])
        torch.testing.assert_close(exact, theirs, atol=1e-9 * largest.item(), rtol=1e-6)


def test_other_inputs_go_pytorchs_way():
    """Half precision, other memory, evaluation, no gradient: nothing is said to be trained."""
    x, module = image(2, 8, 6, 6), nn.Conv2d(8, 8, 1)
    assert on_cpu.trains(x, module)
    for other in (x.detach(), x.double(), x.contiguous(), x.to(torch.bfloat16), x[:0], x.to("meta")):
        assert not on_cpu.trains(other, module)
    assert not on_cpu.trains(x, nn.Conv2d(8, 8, 1).eval())
    with torch.no_grad():
        assert not on_cpu.trains(x, module)
    with torch.autocast("cpu", torch.bfloat16):
        assert not on_cpu.trains(x, module)
        # the encoder as a whole too
        encoder = EfficientNetEncoder("b0", depth=0.3)
        encoder(torch.randn(2, 64, 64)).float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@ENCODERS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:ONNX Preprocess")
def test_others_export_it(make, training, tmp_path):
    """As people do: with gradients on."""
    torch.manual_seed(2)
    encoder, feats = make().train(), torch.randn(2, 96, 64)
    encoder(feats)
    encoder.train(training)
    traced = torch.jit.trace(copy.deepcopy(encoder), feats, check_trace=False)
    torch.manual_seed(6)
    found = traced(feats)
    torch.manual_seed(6)
    torch.testing.assert_close(found, encoder(feats), atol=1e-4, rtol=1e-3)
    pytest.importorskip("onnx")
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    torch.onnx.export(encoder, (feats,), tmp_path / "encoder.onnx", dynamo=False, training=mode)
    assert (tmp_path / "encoder.onnx").stat().st_size > 100_000


def test_frozen_weights_get_no_gradient_and_others_theirs():
    """Fine-tuning of the last blocks alone."""
    torch.manual_seed(1)
    encoder = EfficientNetEncoder("b0", drop_connect=0).train()
    feats = torch.randn(2, 100, 64)
    encoder(feats).sin().sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.startswith(("_blocks.15", "_conv_head", "_bn1")))
    encoder(feats).sin().sum().backward()
    tolerance = 1e-5 * max(gradient.abs().max().item() for gradient in wanted.values())
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=tolerance, rtol=1e-3)
        else:
            assert parameter.grad is None


@ENCODERS
def test_what_others_put_in_is_called(make, monkeypatch):
    """A part that was replaced, or hooked on to, does what it does: an adapter adds something to what its weight gives."""
    torch.manual_seed(5)
    feats, encoder = torch.randn(2, 96, 64), make().train()
    called, parts = [], [part for part in encoder.modules() if isinstance(part, (nn.Conv2d, nn.BatchNorm2d))]
    handles = [part.register_forward_hook(lambda part, *_: called.append(part)) for part in parts]
    plain = encoder(feats)
    assert len(called) == len(parts)
    for handle in handles:
        handle.remove()
    for part in parts:
        if isinstance(part, nn.Conv2d):
            kind = type(part)
            forward = lambda self, x, kind=kind: kind.forward(self, x) * 1.5 + x.mean()  # noqa: E731
            part.__class__ = type("Adapted", (kind,), {"forward": forward})
    found = encoder(feats)
    monkeypatch.setattr(on_cpu, "trains", lambda x, *modules: False)
    torch.testing.assert_close(found, encoder(feats))
    assert not torch.allclose(found, plain, atol=1e-2)
