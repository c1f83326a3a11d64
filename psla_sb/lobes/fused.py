"""What an inverted residual is made of, in few passes over a GPU's memory; on a CPU see `on_cpu`, elsewhere as PyTorch does it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from speechbrain.utils.logger import get_logger
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from psla_sb.lobes import on_cpu

try:
    from psla_sb.lobes import kernels
except ImportError:  # macOS, and Linux on ARM, have no Triton
    kernels = None  # type: ignore[assignment]

logger = get_logger(__name__)

WARPS = 8
# as the kernels call them
ACTIVATIONS: dict[Any, int] = {type(None): 0, nn.SiLU: 1, nn.ReLU6: 2}
# of what is added up: programs' sums at a time, channels of a program
JOINED = {"BLOCK_P": 128, "BLOCK_C": 16}


def _is_for_kernels(x: Tensor) -> bool:
    is_plain = x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0
    return is_plain and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and have_kernels(x.device)


def have_kernels(device: torch.device) -> bool:
    """Says whether the kernels can be used: on the current GPU, where they work, and not by what compiles or traces a network."""
    if kernels is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return device.index == torch.cuda.current_device() and _work_here(device)


@functools.cache
def _work_here(device: torch.device) -> bool:
    """Tries the kernels once: they are compiled here, which can fail, and what is faster but other must not go unseen."""
    reason = "they give other numbers than PyTorch"
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            if all(torch.allclose(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item()) for one, other in _trials(device)):
                return True
    except Exception as error:  # of Triton, of the driver, or that there is no C compiler
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
    logger.warning("The toolkit's own kernels are not used on %s, which makes it slower: %s", device, reason)
    return False


def _trials(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Computes what PyTorch gives, and what the kernels give: a block and its gradients, and frames."""
    generator = torch.Generator().manual_seed(0)
    clips = (2 + torch.randn(5, 64, 9, 33, generator=generator)).to(memory_format=torch.channels_last)
    parameters = [torch.randn(shape, generator=generator) for shape in ((64,), (64,), (64, 1, 3, 3))]
    given = [one.to(device).requires_grad_() for one in (clips, *parameters)]
    x, weight, bias, kernel = given
    y = F.silu(F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3))
    expected = F.conv2d(y * torch.sigmoid(y.mean((2, 3), keepdim=True)), kernel, padding=1, groups=64)
    y, gates = _NormAct.apply(x, weight, bias, 1e-3, ACTIVATIONS[nn.SiLU])[0], list[Tensor]()
    mean, same = _Squeeze.apply(y, gates)
    found = _Depthwise.apply(_Excite.apply(same, torch.sigmoid(mean), gates), kernel, (1, 1))
    gradients = [torch.autograd.grad(one.sin().sum(), given) for one in (expected, found)]
    wavs, window = clips.flatten(1)[:, :1040].to(device), torch.hann_window(400, periodic=False, device=device)
    frames = wavs.unfold(1, 400, 160)
    frames = frames - frames.mean(2, keepdim=True)
    filtered = torch.cat([frames[..., :1], frames[..., 1:] - 0.97 * frames[..., :-1]], dim=2) * window
    pairs = [(expected, found), *zip(*gradients, strict=True)]
    return [*pairs, (F.pad(filtered, (0, 112)), windowed_frames(wavs, window, 5, 160, 0.97, 512))]


def norm_act(norm: Any, x: Tensor, activation: nn.Module | None) -> Tensor:
    """Normalises, then activates, `[batch, channels, height, width]`."""
    activate = ACTIVATIONS.get(type(activation))
    if not (_is_usual(norm) and activate is not None and _is_for_kernels(x)) or (not norm.training and torch.is_grad_enabled()):
        x = norm(x)
        return x if activation is None else activation(x)
    if not norm.training:
        return _normalized(x, activate, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    answer, of_norm = _NormAct.apply(x, norm.weight, norm.bias, norm.eps, activate)
    with torch.no_grad():
        torch._foreach_lerp_([norm.running_mean, norm.running_var], [of_norm[0], of_norm[4]], norm.momentum)
        norm.num_batches_tracked.add_(1)
    return answer


def _is_usual(norm: nn.Module) -> bool:
    return (
        isinstance(norm, nn.BatchNorm2d)
        and on_cpu.untouched(norm)
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
    )


class _NormAct(torch.autograd.Function):
    """Batch normalisation with the batch's own statistics, then an activation; also gives these statistics, `[5, channels]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, activate: int) -> tuple[Tensor, Tensor]:
        of_norm = batch_statistics(x, weight, bias, eps)
        ctx.save_for_backward(x, of_norm, weight)
        ctx.activate = activate
        ctx.mark_non_differentiable(of_norm)
        return _normalized(x, ctx.activate, of_norm[2], of_norm[3]), of_norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, of_norm, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        n_channels, n_rows = x.shape[1], x.numel() // x.shape[1]
        n_parts, rows_each = kernels.parts(n_rows, n_channels)
        sizes: Any = kernels.tile(n_channels)
        columns = kernels.blocks(n_channels, sizes["BLOCK_C"])
        partial = x.new_empty((n_parts, 2 * n_channels), dtype=torch.float32)
        kernels.gradient_sums[(n_parts, columns)](
            x, gradient, of_norm, partial, n_rows, n_channels, rows_each, ACTIVATE=ctx.activate, **sizes, num_warps=WARPS
        )
        sums, of_x = _joined(partial), torch.empty_like(x)
        kernels.gradient_of_norm[(kernels.blocks(n_rows, sizes["BLOCK_R"]), columns)](
            x, gradient, of_norm, sums, of_x, n_rows, n_channels, ACTIVATE=ctx.activate, **sizes, num_warps=WARPS
        )
        return of_x, sums[n_channels:].to(weight.dtype), sums[:n_channels].to(weight.dtype), None, None


def batch_statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Takes each channel's mean, 1 / deviation, scale, shift and unbiased variance, float32 `[5, channels]`."""
    n_channels, n_rows = x.shape[1], x.numel() // x.shape[1]
    n_parts, rows_each = kernels.parts(n_rows, n_channels)
    sizes: Any = kernels.tile(n_channels)
    partial = x.new_empty((2, n_parts, n_channels), dtype=torch.float32)
    kernels.statistics[(n_parts, kernels.blocks(n_channels, sizes["BLOCK_C"]))](
        x, partial[0], partial[1], n_rows, n_channels, rows_each, **sizes, num_warps=WARPS
    )
    of_norm = x.new_empty((5, n_channels), dtype=torch.float32)
    kernels.joined_statistics[(kernels.blocks(n_channels, JOINED["BLOCK_C"]),)](
        partial[0], partial[1], weight, bias, of_norm, n_parts, n_rows, n_channels, rows_each, eps, **JOINED
    )
    return of_norm


def _normalized(
    x: Tensor, activate: int, scale: Tensor, shift: Tensor, mean: Tensor | None = None, var: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """Scales, shifts and activates; with mean and variance, scale and shift are those after the normalisation."""
    n_channels, n_rows, out = x.shape[1], x.numel() // x.shape[1], torch.empty_like(x)
    sizes: Any = kernels.tile(n_channels)
    grid = kernels.blocks(n_rows, sizes["BLOCK_R"]), kernels.blocks(n_channels, sizes["BLOCK_C"])
    options = {"ACTIVATE": activate, "NORMALIZE": mean is not None, "num_warps": WARPS}
    kernels.normalized[grid](x, out, scale, shift, mean, var, eps, n_rows, n_channels, **options, **sizes)
    return out


def _joined(partial: Tensor) -> Tensor:
    """Adds up `[parts, n]`."""
    out = partial.new_empty(partial.shape[1])
    kernels.joined_sums[(kernels.blocks(len(out), JOINED["BLOCK_C"]),)](partial, out, len(partial), len(out), **JOINED)
    return out


def squeeze_excite(x: Tensor, gate_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiplies channels with the gate `[batch, channels, 1, 1]` that a small network makes of their means."""
    if not (_is_for_kernels(x) and torch.is_grad_enabled() and x.requires_grad):
        return gate_of(F.adaptive_avg_pool2d(x, 1)) * x
    gates: list[Tensor] = []
    mean, same = _Squeeze.apply(x, gates)
    return _Excite.apply(same, gate_of(mean), gates)


# x -+-> mean -> small network -> gate -+        There and back each value is read twice and written once. The gradient of what
#    |                                  |        comes out reaches `_Squeeze` as it is; there it is multiplied with the gate, and
#    +------------- same -------------- x ->     the gradient of the mean is added, in one pass.


class _Squeeze(torch.autograd.Function):
    """Gives the means, and x itself for an `_Excite`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: list[Tensor]) -> tuple[Tensor, Tensor]:
        ctx.gates = gates
        return x.mean((2, 3), keepdim=True), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, gradient: Tensor) -> tuple[Tensor, None]:
        n_clips, n_channels, n_pixels = len(gradient), gradient.shape[1], gradient.shape[2] * gradient.shape[3]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(gradient)
        sizes: Any = kernels.tile(n_channels)
        grid = kernels.blocks(n_pixels, sizes["BLOCK_R"]), kernels.blocks(n_channels, sizes["BLOCK_C"]), n_clips
        term, (gate,) = of_mean.float().flatten() / n_pixels, ctx.gates
        kernels.scaled_and_shifted[grid](gradient, gate.contiguous(), term, out, n_pixels, n_channels, **sizes, num_warps=WARPS)
        return out, None


class _Excite(torch.autograd.Function):
    """Multiplies what came through `_Squeeze` with a gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, gates: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.gates = gates
        return x * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gate = ctx.saved_tensors
        ctx.gates[:] = [gate]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        n_clips, n_channels, n_pixels = len(x), x.shape[1], x.shape[2] * x.shape[3]
        sizes: Any = kernels.tile(n_channels)
        columns = kernels.blocks(n_channels, sizes["BLOCK_C"])
        n_parts, pixels_each = kernels.parts_of_clip(n_pixels, n_clips * columns, sizes["BLOCK_R"])
        partial = x.new_empty((n_parts, n_clips * n_channels), dtype=torch.float32)
        kernels.sums_of_products[(n_parts, columns, n_clips)](
            gradient, x, partial, n_pixels, n_channels, pixels_each, **sizes, num_warps=WARPS
        )
        of_gate = _joined(partial) if n_parts > 1 else partial[0]
        return gradient, of_gate.view_as(gate).to(gate.dtype), None


def depthwise(conv: Any, x: Tensor) -> Tensor:
    """Convolves each channel by itself, where the gradient is the slow part of it."""
    if on_cpu.trains(x, conv):
        return on_cpu.depthwise(conv, x)
    is_plain = tuple(conv.stride) == (1, 1) and conv.bias is None and on_cpu.untouched(conv)
    if not (is_plain and torch.is_grad_enabled() and x.requires_grad and _is_for_kernels(x)):
        return conv(x)
    # what a GPU has for its gradient is slower than the convolution with the kernel reversed
    return _Depthwise.apply(getattr(conv, "static_padding", nn.Identity())(x), conv.weight.to(x.dtype), tuple(conv.padding))


def expand(conv: Any, norm: Any, x: Tensor, activation: nn.Module) -> Tensor:
    """Convolves with a 1x1 kernel, normalises and activates."""
    is_worth_it = x.numel() >= on_cpu.LEAST_PIXELS * x.shape[1]
    if is_worth_it and _is_usual(norm) and on_cpu.trains(x, conv, norm) and conv.bias is None:
        return activation(on_cpu.expand(conv, norm, x))
    return norm_act(norm, conv(x), activation)


def project(conv: Any, x: Tensor, gate_of: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Convolves with a 1x1 kernel what `squeeze_excite` gives, or, without a gate, x."""
    if gate_of is None:
        return conv(x)
    if x.numel() >= on_cpu.LEAST_VALUES and on_cpu.trains(x, conv) and conv.bias is None:
        return on_cpu.project(conv, x, gate_of)
    return conv(squeeze_excite(x, gate_of))


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, None, 1, padding, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        (height, width), groups = weight.shape[2:], len(weight)
        around = height - 1 - ctx.padding[0], width - 1 - ctx.padding[1]
        of_x = F.conv2d(gradient, weight.flip(2, 3), None, 1, around, 1, groups)
        wanted = [False, True, False]
        _, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, [1, 1], list(ctx.padding), [1, 1], False, [0, 0], groups, wanted
        )
        return of_x, of_weight, None


def windowed_frames(wavs: Tensor, window: Tensor, n_frames: int, shift: int, preemphasis: float, n_fft: int) -> Tensor:
    """Cuts waveforms `[batch, samples]` into frames as Kaldi does, each less its mean, filtered and windowed: `[..., n_fft]`."""
    wavs, out = wavs.contiguous(), wavs.new_empty((len(wavs), n_frames, n_fft))
    kernels.windowed_frames[(n_frames, len(wavs))](
        wavs, window, out, wavs.shape[1], n_frames, len(window), shift, preemphasis, N_FFT=n_fft
    )
    return out
