"""Triton kernels for networks in channels-last memory on a GPU: what is bound by memory, in as few passes over it as there can be.

An activation `[batch, channels, height, width]` in channels-last memory is a matrix of rows (pixels) and channels:

    row 0    c0 c1 c2 ... c(C-1)        a program handles a tile of BLOCK_R rows and BLOCK_C channels; sums over rows are
    row 1    c0 c1 c2 ... c(C-1)        first taken by hundreds of programs, each of its own rows, then added up
    ...

Passes over memory of a batch normalisation with its activation in training, there and back: PyTorch 15, here 8. In float32 within.
"""

import triton
import triton.language as tl

# Tiles: 16 to 64 channels are 32 to 128 bytes of bfloat16, in one piece of memory.
TILE = 4096  # of 8 warps: 16 values a thread
# More programs that sum up rows do not read faster, but make more to add up.
MOST_PARTS = 1024
PROGRAMS = 2112
# ways of ACTIVATE
NONE, SILU, RELU6 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def tile(n_channels: int) -> dict[str, int]:
    """Chooses the sizes of a tile."""
    block = min(64, max(16, triton.next_power_of_2(n_channels)))
    return {"BLOCK_R": TILE // block, "BLOCK_C": block}


def blocks(n: int, size: int) -> int:
    """Says how many blocks of a size there are in n."""
    return -(-n // size)


def parts_of_clip(n_pixels: int, n_others: int, block: int) -> tuple[int, int]:
    """Chooses how many programs sum up the pixels of a clip, where there are `n_others` sums, and how many pixels each has."""
    wanted = min(64, max(1, PROGRAMS // n_others))
    pixels = blocks(blocks(n_pixels, wanted), block) * block
    return blocks(n_pixels, pixels), pixels


def parts(n_rows: int, n_channels: int) -> tuple[int, int]:
    """Chooses how many programs sum up rows of a channel, and how many rows each has."""
    sizes = tile(n_channels)
    wanted = min(MOST_PARTS, max(1, PROGRAMS // blocks(n_channels, sizes["BLOCK_C"])))
    rows = blocks(blocks(n_rows, wanted), sizes["BLOCK_R"]) * sizes["BLOCK_R"]
    return blocks(n_rows, rows), rows


@triton.jit
def statistics(x, part_mean, part_m2, n_rows, C, rows_each, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Takes mean and sum of squared deviations over each program's rows."""
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = c < C
    first = part.to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, n_rows)
    # sums of what is close to zero: of large ones, the squares' differences would be lost
    near = tl.load(x + first * C + c, mask=is_channel, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows_each, BLOCK_R):
        rows = first + start + tl.arange(0, BLOCK_R)
        mask = (rows < last)[:, None] & is_channel[None, :]
        value = tl.load(x + rows[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - near[None, :], 0.0)
        total += value
        squares += value * value
    n = (last - first).to(tl.float32)
    mean = tl.sum(total, 0) / n
    tl.store(part_mean + part * C + c, near + mean, mask=is_channel)
    tl.store(part_m2 + part * C + c, tl.sum(squares, 0) - n * mean * mean, mask=is_channel)


@triton.jit
def joined_statistics(
    part_mean, part_m2, weight, bias, out, n_parts, n_rows, C, rows_each, eps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Joins the programs' statistics (Chan, Golub, LeVeque 1979): mean, 1 / deviation, scale, shift, variance: `[5, C]`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = c < C
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, n_parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < n_parts)[:, None] & is_channel[None, :]
        n = tl.minimum(n_rows - p * rows_each, rows_each).to(tl.float32)
        total += n[:, None] * tl.load(part_mean + p[:, None] * C + c[None, :], mask=mask, other=0.0)
    mean = tl.sum(total, 0) / n_rows
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, n_parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < n_parts)[:, None] & is_channel[None, :]
        n = tl.minimum(n_rows - p * rows_each, rows_each).to(tl.float32)
        away = tl.load(part_mean + p[:, None] * C + c[None, :], mask=mask, other=0.0) - mean[None, :]
        within = tl.load(part_m2 + p[:, None] * C + c[None, :], mask=mask, other=0.0)
        squares += tl.where(mask, within + n[:, None] * away * away, 0.0)
    m2 = tl.sum(squares, 0)
    # the compiler takes Python's numbers for float64
    inverse = 1.0 / tl.sqrt_rn((m2 / n_rows + eps).to(tl.float32))
    scale = tl.load(weight + c, mask=is_channel, other=0.0) * inverse
    shift = tl.load(bias + c, mask=is_channel, other=0.0) - mean * scale
    tl.store(out + c, mean, mask=is_channel)
    tl.store(out + C + c, inverse, mask=is_channel)
    tl.store(out + 2 * C + c, scale, mask=is_channel)
    tl.store(out + 3 * C + c, shift, mask=is_channel)
    tl.store(out + 4 * C + c, m2 / tl.maximum(n_rows - 1, 1), mask=is_channel)


@triton.jit
def normalized(
    x,
    out,
    scale,
    shift,
    mean,
    var,
    eps,
    n_rows,
    C,
    ACTIVATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalises if asked, scales and shifts each channel, then activates."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = c < C
    mask = (rows < n_rows)[:, None] & is_channel[None, :]
    at = rows[:, None] * C + c[None, :]
    factor = tl.load(scale + c, mask=is_channel, other=0.0).to(tl.float32)
    term = tl.load(shift + c, mask=is_channel, other=0.0).to(tl.float32)
    if NORMALIZE:
        factor = factor / tl.sqrt_rn((tl.load(var + c, mask=is_channel, other=1.0) + eps).to(tl.float32))
        term = term - tl.load(mean + c, mask=is_channel, other=0.0) * factor
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor[None, :] + term[None, :]
    if ACTIVATE == SILU:
        y = y / (1.0 + tl.exp(-y))
    if ACTIVATE == RELU6:
        y = tl.minimum(tl.maximum(y, 0.0), 6.0)
    tl.store(out + at, y, mask=mask)


@triton.jit
def _gradient_before_activation(value, gradient, scale, shift, ACTIVATE: tl.constexpr):
    y = value * scale + shift
    if ACTIVATE == RELU6:
        gradient = tl.where((y > 0.0) & (y < 6.0), gradient, 0.0)
    if ACTIVATE == SILU:
        gate = 1.0 / (1.0 + tl.exp(-y))
        gradient = gradient * gate * (1.0 + y * (1.0 - gate))
    return gradient


@triton.jit
def gradient_sums(
    x, gradient, of_norm, sums, n_rows, C, rows_each, ACTIVATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums up, over each program's rows, the gradient before the activation, and its product with the normalised values."""
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = c < C
    first = part.to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, n_rows)
    mean = tl.load(of_norm + c, mask=is_channel, other=0.0)[None, :]
    inverse = tl.load(of_norm + C + c, mask=is_channel, other=0.0)[None, :]
    scale = tl.load(of_norm + 2 * C + c, mask=is_channel, other=0.0)[None, :]
    shift = tl.load(of_norm + 3 * C + c, mask=is_channel, other=0.0)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows_each, BLOCK_R):
        rows = first + start + tl.arange(0, BLOCK_R)
        mask = (rows < last)[:, None] & is_channel[None, :]
        at = rows[:, None] * C + c[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
        g = _gradient_before_activation(value, g, scale, shift, ACTIVATE)
        total += g
        products += g * (value - mean) * inverse
    tl.store(sums + part * 2 * C + c, tl.sum(total, 0), mask=is_channel)
    tl.store(sums + part * 2 * C + C + c, tl.sum(products, 0), mask=is_channel)


@triton.jit
def joined_sums(sums, out, n_parts, n, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds up the programs' sums: `[parts, n]` to `[n]`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, n_parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        total += tl.load(sums + p[:, None] * n + c[None, :], mask=(p < n_parts)[:, None] & (c < n)[None, :], other=0.0)
    tl.store(out + c, tl.sum(total, 0), mask=c < n)


@triton.jit
def gradient_of_norm(
    x, gradient, of_norm, sums, out, n_rows, C, ACTIVATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Takes the gradient of a normalisation's input (Ioffe, Szegedy 2015), of the sums over all rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = c < C
    mask = (rows < n_rows)[:, None] & is_channel[None, :]
    at = rows[:, None] * C + c[None, :]
    mean = tl.load(of_norm + c, mask=is_channel, other=0.0)[None, :]
    inverse = tl.load(of_norm + C + c, mask=is_channel, other=0.0)[None, :]
    scale = tl.load(of_norm + 2 * C + c, mask=is_channel, other=0.0)[None, :]
    shift = tl.load(of_norm + 3 * C + c, mask=is_channel, other=0.0)[None, :]
    mean_gradient = tl.load(sums + c, mask=is_channel, other=0.0)[None, :] / n_rows
    mean_product = tl.load(sums + C + c, mask=is_channel, other=0.0)[None, :] / n_rows
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    g = _gradient_before_activation(value, g, scale, shift, ACTIVATE)
    tl.store(out + at, scale * (g - mean_gradient - (value - mean) * inverse * mean_product), mask=mask)


@triton.jit
def sums_of_products(a, b, out, n_pixels, C, pixels_each, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums up the product of two activations over each program's pixels of a clip: `[parts, clips, C]`."""
    part, clip = tl.program_id(0), tl.program_id(2).to(tl.int64)
    last = tl.minimum((part + 1) * pixels_each, n_pixels)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, pixels_each, BLOCK_R):
        pixel = part * pixels_each + start + tl.arange(0, BLOCK_R)
        mask = (pixel < last)[:, None] & (c < C)[None, :]
        at = (clip * n_pixels + pixel[:, None]) * C + c[None, :]
        total += tl.load(a + at, mask=mask, other=0.0).to(tl.float32) * tl.load(b + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (part * tl.num_programs(2) + clip) * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def scaled_and_shifted(x, scale, shift, out, n_pixels, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Multiplies with a factor, and adds a term, for each clip and channel: `[clips, C]`."""
    clip = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (pixel < n_pixels)[:, None] & (c < C)[None, :]
    at = (clip * n_pixels + pixel[:, None]) * C + c[None, :]
    factor = tl.load(scale + clip * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    term = tl.load(shift + clip * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor + term, mask=mask)


@triton.jit
def windowed_frames(wavs, window, out, n_samples, n_frames, length, shift, preemphasis, N_FFT: tl.constexpr):
    """Cuts a frame, subtracts its mean, filters (each sample less the one before), windows, and fills it up with zeros."""
    frame, clip = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, N_FFT)
    inside = i < length
    first = wavs + clip * n_samples + frame * shift
    sample = tl.load(first + i, mask=inside, other=0.0)
    before = tl.load(first + i - 1, mask=inside & (i > 0), other=0.0)
    mean = tl.sum(sample, 0) / length
    # the first sample, which has none before it, is multiplied with the window's zero
    value = (sample - mean - preemphasis * (before - mean)) * tl.load(window + i, mask=inside, other=0.0)
    tl.store(out + (clip * n_frames + frame) * N_FFT + i, value)
