"""What an inverted residual is made of, for training on a CPU: as PyTorch computes it but for rounding, with faster gradients."""

from collections.abc import Callable
from typing import Any

import torch
from efficientnet_pytorch.utils import Conv2dStaticSamePadding
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PLAIN = (nn.Conv2d, Conv2dStaticSamePadding, nn.BatchNorm2d)
# oneDNN takes ten times as long for the gradient of wider depthwise kernels in channels-last memory
FAST_COLUMNS = 3
# of less it takes longer to call more operations than they save: values of wide channels, pixels of narrow ones
LEAST_VALUES, LEAST_PIXELS = 2**17, 2**13


def untouched(*modules: nn.Module) -> bool:
    """Says whether modules are convolutions and normalisations as PyTorch has them, which nobody has replaced, or hooked on to."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return all(type(module) in PLAIN and not any(getattr(module, name) for name in hooks) for module in modules)


def trains(x: Tensor, *modules: nn.Module) -> bool:
    """Says whether a CPU trains modules on x in float32 and channels-last memory, and nobody sees, or traces, what they do."""
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and not torch.is_autocast_enabled("cpu")
    is_wanted = torch.is_grad_enabled() and x.requires_grad and all(module.training for module in modules)
    is_seen = torch.compiler.is_compiling() or torch.jit.is_tracing() or not untouched(*modules)
    return is_wanted and not is_seen and is_plain and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolves each channel by itself."""
    before, after = _padding(conv)
    is_slow = before < after or (before == after and conv.kernel_size[1] > FAST_COLUMNS)
    if conv.bias is not None or not is_slow or before > FAST_COLUMNS or x.numel() < LEAST_VALUES:
        return conv(x)
    return _Depthwise.apply(x, conv.weight, conv.stride[0], before, after)


def _padding(conv: Any) -> tuple[int, int]:
    """Pixels before and after, of height and width alike: within the convolution, or in front of it."""
    static = getattr(conv, "static_padding", None)
    return static.padding[:2] if isinstance(static, nn.ZeroPad2d) else (conv.padding[0], conv.padding[0])


class _Depthwise(torch.autograd.Function):
    """Convolves with square kernels; the gradient of a kernel is computed a few of its columns at a time.

    Where fewer pixels are before than after, zeros in front of the kernel make up for it, which saves a padded copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, before: int, after: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, before, after
        return F.conv2d(x, _with_zeros(weight, after - before), None, stride, after, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, before, after = ctx.geometry
        gradient = gradient.contiguous(memory_format=torch.channels_last)

        def gradients(x: Tensor, weight: Tensor, padding: int, wanted: list[bool]) -> Any:
            sizes = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight)
            return torch.ops.aten.convolution_backward(gradient, x, weight, None, *sizes, wanted)

        of_x, _, _ = gradients(x, _with_zeros(weight, after - before), after, [True, False, False])
        # rows and columns that the kernel, or a part of it, sees from its first place to its last
        height, width = (stride * (n - 1) for n in gradient.shape[2:])
        below, parts = height + weight.shape[2] - before - x.shape[2], []
        for first, columns in zip(range(0, weight.shape[3], FAST_COLUMNS), weight.split(FAST_COLUMNS, dim=3), strict=True):
            seen, left = x[..., max(0, first - before) :], max(0, before - first)
            right = width + columns.shape[3] - left - seen.shape[3]
            parts.append(gradients(F.pad(seen, (left, right, before, below)), columns, 0, [False, True, False])[1])
        return of_x, torch.cat(parts, dim=3), None, None, None


def _with_zeros(weight: Tensor, n: int) -> Tensor:
    return F.pad(weight, (n, 0, n, 0)) if n else weight


def expand(conv: nn.Conv2d, norm: Any, x: Tensor) -> Tensor:
    """Convolves with a 1x1 kernel, which has no bias, and normalises by the batch's own statistics.

    What a linear map W makes of x has the mean W m and the variances diag(W C W^T), with the mean m and the covariances C of x,
    which has fewer channels. So the normalisation goes into the kernel, and no pass over what comes out is made, there and back.
    """
    weight, mean = conv.weight.flatten(1), x.mean((0, 2, 3))
    centred = x - mean[:, None, None]
    pixels = centred.permute(0, 2, 3, 1).flatten(0, 2)
    var = ((weight @ (pixels.T @ pixels)) * weight).sum(1).clamp(min=0.0) / len(pixels)
    with torch.no_grad():
        norm.running_mean.lerp_(weight @ mean, norm.momentum)
        norm.running_var.lerp_(var * (len(pixels) / (len(pixels) - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return F.conv2d(centred, (weight * scale[:, None])[:, :, None, None], norm.bias)


def project(conv: nn.Conv2d, x: Tensor, gate_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Convolves with a 1x1 kernel, which has no bias, x scaled by a gate `[batch, channels, 1, 1]` that is made of its means."""
    mean, same = _Mean.apply(x)
    return _GatedProduct.apply(same, gate_of(mean).flatten(1), conv.weight)


class _Mean(torch.autograd.Function):
    """Gives the means, and x itself for a `_GatedProduct`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3), keepdim=True), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, gradient: Tensor) -> Tensor:
        # in place: it was made by `_GatedProduct`, and nobody else has it
        return gradient.add_(of_mean / (gradient.shape[2] * gradient.shape[3]))


class _GatedProduct(torch.autograd.Function):
    """Multiplies channels with a gate `[batch, channels]` and convolves them with a 1x1 kernel.

    The gate is multiplied with the kernel, for each clip by itself, so that no gated copy of the channels is made; and gate and
    kernel have their gradients from the same small matrix, that of the products of channels before and after.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, kernel: Tensor) -> Tensor:
        weight = kernel.flatten(1)
        gated = gate[:, None] * weight
        ctx.save_for_backward(x, gate, weight, gated)
        return _image(_pixels(x) @ gated.transpose(1, 2), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gate, weight, gated = ctx.saved_tensors
        gradient = _pixels(gradient.contiguous(memory_format=torch.channels_last))
        # [batch, channels after, channels before]
        products = gradient.transpose(1, 2) @ _pixels(x)
        of_gate, of_weight = (products * weight).sum(1), (products * gate[:, None]).sum(0)
        return _image(gradient @ gated, x), of_gate, of_weight[:, :, None, None]


def _pixels(x: Tensor) -> Tensor:
    """`[batch, channels, height, width]` in channels-last memory -> `[batch, pixels, channels]`."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    return pixels.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
