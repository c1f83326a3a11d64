"""The GPU's kernels, in Triton's interpreter on the CPU, against PyTorch's functions; `test_gpu.py` has them on a GPU."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from psla_sb.lobes import fused
from psla_sb.lobes.efficientnet import EfficientNetEncoder

pytest.importorskip("triton")

# The interpreter is chosen before a kernel is defined; its loops stumble over new versions of NumPy.
INTERPRETED = """
import os, inspect
os.environ["TRITON_INTERPRET"] = "1"
import triton.runtime.interpreter as interpreter
source = inspect.getsource(interpreter).replace("int(self.handle.data)", "int(self.handle.data.item())")
exec(compile(source, interpreter.__file__, "exec"), interpreter.__dict__)
import torch
from torch import nn
from torch.nn import functional as F
from psla_sb.lobes import fused
torch.manual_seed(0)

def last(*shape, mean=0.0):
    return (mean + torch.randn(shape)).to(memory_format=torch.channels_last).requires_grad_()

def check(found, expected, wanted, exactness=1e-5):
    gradient = torch.randn_like(expected)
    pairs = [(found, expected), *zip(*(torch.autograd.grad(one, wanted, gradient) for one in (found, expected)))]
    for one, other in pairs:
        assert (one - other).abs().max() <= exactness * max(1.0, other.abs().max().item())
"""


def interpreted(program):
    text = INTERPRETED + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("activation", ["Identity", "SiLU", "ReLU6"])
def test_normalisation(activation):
    interpreted(f"""
        act = nn.{activation}()
        activate = fused.ACTIVATIONS.get(type(act), 0)
        for shape in ((3, 16, 9, 13), (2, 144, 5, 7), (1, 24, 3, 1), (4, 88, 11, 5)):
            x, C = last(*shape, mean=3.0), shape[1]
            weight, bias = (torch.randn(C, requires_grad=True) for _ in range(2))
            mean, var = torch.zeros(C), torch.ones(C)
            expected = F.batch_norm(x, mean, var, weight, bias, True, 1.0, 1e-3)
            found, of_norm = fused._NormAct.apply(x, weight, bias, 1e-3, activate)
            check(found, act(expected), (x, weight, bias))
            assert torch.allclose(of_norm[0], mean, atol=1e-5) and torch.allclose(of_norm[4], var, rtol=1e-4)
            norm = nn.BatchNorm2d(C, eps=1e-3).eval()
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
            found = fused._normalized(x, activate, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
            assert torch.allclose(found, act(norm(x)), atol=1e-5)
    """)


def test_variance_far_from_zero():
    """Of sums of squares of numbers around 1000 nothing would be left."""
    interpreted("""
        x = last(2, 16, 32, 32, mean=1000.0).detach()
        variance = fused.batch_statistics(x, torch.ones(16), torch.zeros(16), 1e-3)[4]
        assert torch.allclose(variance.double(), x.double().var((0, 2, 3)), rtol=1e-4)
    """)


def test_squeeze_and_excitation():
    interpreted("""
        for shape in ((2, 16, 64, 33), (3, 144, 5, 7)):
            x, C = last(*shape), shape[1]
            network = nn.Sequential(nn.Conv2d(C, 4, 1), nn.SiLU(), nn.Conv2d(4, C, 1), nn.Sigmoid())
            gates = []
            mean, same = fused._Squeeze.apply(x, gates)
            found = fused._Excite.apply(same, network(mean), gates)
            check(found, network(F.adaptive_avg_pool2d(x, 1)) * x, (x, *network.parameters()))
    """)


def test_what_is_tried_before_they_are_used():
    interpreted("""
        for expected, found in fused._trials(torch.device("cpu")):
            assert torch.allclose(expected, found, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        assert fused._work_here(torch.device("cpu"))
    """)


def test_frames():
    interpreted("""
        from psla_sb.lobes.features import KaldiFbank, PREEMPHASIS
        for rate in (16000, 32000):
            front_end = KaldiFbank(sample_rate=rate, n_frames=20)
            wavs = torch.randn(2, 19 * front_end.frame_shift + front_end.frame_length)
            expected = front_end._windowed_frames(wavs, 20)
            found = fused.windowed_frames(wavs, front_end.window, 20, front_end.frame_shift, PREEMPHASIS, front_end.n_fft)
            assert torch.allclose(found[..., : front_end.frame_length], expected, atol=1e-6)
            assert not found[..., front_end.frame_length :].any()
    """)


@pytest.mark.parametrize(("size", "padding"), [(3, 1), (5, 2)])
def test_the_gradient_of_a_depthwise_convolution_is_one_with_the_kernel_reversed(size, padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, size, padding=padding, groups=8, bias=False)
    x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
    expected, found = conv(x), fused._Depthwise.apply(x, conv.weight, (padding, padding))
    gradient = torch.randn_like(expected)
    assert torch.equal(expected, found)
    for one, other in zip(*(torch.autograd.grad(y, (x, conv.weight), gradient) for y in (expected, found)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding", ["tensorflow", "symmetric"])
def test_the_first_convolution_is_a_matrix_product(padding):
    torch.manual_seed(0)
    stem, x = EfficientNetEncoder("b0", padding=padding)._conv_stem, torch.randn(2, 1, 128, 203)
    product = stem.as_product(stem.static_padding(x))
    torch.testing.assert_close(product, stem(x), atol=1e-5, rtol=0)
    assert product.is_contiguous(memory_format=torch.channels_last)


def test_kernels_that_fail_are_left_out_with_a_warning(monkeypatch, caplog):
    """What compiles them may be missing; on a CPU they cannot run at all."""
    fused._work_here.cache_clear()
    assert not fused._work_here(torch.device("cpu"))
    assert "kernels are not used on cpu" in caplog.text
    monkeypatch.setattr(fused, "_trials", lambda device: [(torch.ones(3), 1.01 * torch.ones(3))])
    fused._work_here.cache_clear()
    assert not fused._work_here(torch.device("cpu"))
    assert "other numbers than PyTorch" in caplog.text
    fused._work_here.cache_clear()
