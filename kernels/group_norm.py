"""GroupNorm in channels-last, fused with what comes before it in a ResNet block (a sum with a residual and a bias or
time embedding, a concatenation) and with the SiLU after it.

Letters: B batch, C channels, G groups, P pixels (h w), S splits of the pixels.

A tile has some pixels (rows) and some whole groups (columns). A group has C / G channels, which is a power of two in no
UNet; the number of groups in a tile is therefore chosen so that they fill a power of two well (12 groups of 10 channels
fill 120 of 128 columns) and start at a multiple of 8 channels, where loads of 16 bytes are possible. A matrix of ones
and zeros turns sums over columns into sums over groups. A small feature map is one tile high: one kernel reads it once.
A larger one is divided into S splits: a program sums each element of its tiles in registers, reduces once at its end,
and writes mean and squared deviations of its groups; a second kernel merges these (Chan et al., 1983) and normalizes a
tile in each program, while the feature map is still in the L2 cache. The first kernel also writes the sum that it
normalizes, where one is asked for; the norm is that of the written, rounded values. Sizes were measured on an H100.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .language import ceil_div, jit, launcher, operator, power_of_2, tl
from .sum_map import map_rows, row_stride, sum_map_reference

ONE_TILE = 16384  # elements of the largest tile that one program holds
TILE = 4096  # elements of a tile where there are several
PROGRAMS, MAX_SPLITS = 396, 128  # programs for the statistics, three for each core of an H100; the splits of an image


def group_norm_reference(
    x: Tensor,  # (B, C, *)
    weight: Tensor,  # (C)
    bias: Tensor,  # (C)
    groups: int,
    eps: float,
    silu: bool,
    time: Tensor | None = None,  # (1 or B, C)
) -> Tensor:  # (B, C, *)
    """Return GroupNorm (Wu and He, arXiv 1803.08494) of x + time, followed by SiLU if `silu`."""
    if time is not None:
        x = x + time.view(*time.shape, *[1] * (x.ndim - 2))
    normed = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    return torch.nn.functional.silu(normed) if silu else normed


def sum_group_norm_reference(
    x: Tensor,  # (B, C1, *)
    residual: Tensor | None,  # (B, C1, *)
    offset: Tensor | None,  # (1 or B, C1)
    beside: Tensor | None,  # (B, C2, *)
    weight: Tensor,  # (C1 + C2)
    bias: Tensor,  # (C1 + C2)
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:  # (B, C1 + C2, *) twice
    """Return [x + residual + offset, beside], concatenated in the channels, and its `group_norm_reference`."""
    total = sum_map_reference(x, residual, offset)
    total = total if beside is None else torch.cat([total, beside], dim=1)
    return total, group_norm_reference(total, weight, bias, groups, eps, silu)


def group_tile(channels: int, groups: int, columns: int) -> tuple[int, int]:
    """Return the number of groups of a tile, aligned if possible and leaving few columns empty, and of its columns."""
    width = channels // groups
    columns = max(columns, power_of_2(width))

    def merit(count: int) -> tuple[bool, float]:
        return count * width % 8 == 0 or count == groups, channels / (ceil_div(groups, count) * columns)

    return max(range(1, min(groups, columns // width) + 1), key=merit), columns


@jit
def _columns(SPAN: tl.constexpr, COLUMNS: tl.constexpr, C):
    """Return the channels of a tile's columns (1, COLUMNS), and which of them there are."""
    column = tl.arange(0, COLUMNS)[None, :]
    channel = tl.program_id(1) * SPAN + column
    return channel, (column < SPAN) & (channel < C)


@jit
def _offsets(offset, image, channel, inside, C1, offset_b):
    """Return what is added to each column (1, COLUMNS)."""
    extra = tl.zeros(channel.shape, tl.float32)
    if offset is not None:
        place = offset + image * offset_b + channel
        extra = tl.load(place, mask=inside & (channel < C1), other=0.0).to(tl.float32)
    return extra


@jit
def _load(x, residual, beside, extra, image, pixel, end, channel, inside, P, C, C1):
    """Return a tile of [x + residual + extra, beside] in float32, 0 outside its mask; and the mask."""
    mask = (pixel < end) & inside
    own = mask
    if beside is not None:
        own = mask & (channel < C1)
    value = tl.load(x + image * P * C1 + pixel * C1 + channel, mask=own, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + image * P * C1 + pixel * C1 + channel, mask=own, other=0.0).to(tl.float32)
    value += extra
    if beside is not None:
        place = beside + image * P * (C - C1) + pixel * (C - C1) + (channel - C1)
        value += tl.load(place, mask=mask & (channel >= C1), other=0.0).to(tl.float32)
    return tl.where(mask, value, 0.0), mask


@jit
def _write(total, value, image, pixel, channel, mask, P, C):
    """Write a tile of the sum where it is wanted; return it as it was rounded."""
    if total is not None:
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + image * P * C + pixel * C + channel, rounded, mask=mask)
        value = rounded.to(tl.float32)
    return value


@jit
def _by_group(columns, WIDTH: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum values of columns over each group: (COLUMNS) -> (COUNT)."""
    member = tl.arange(0, COLUMNS)[:, None] // WIDTH == tl.arange(0, COUNT)[None, :]
    return tl.sum(tl.where(member, columns[:, None], 0.0), axis=0)


@jit
def _by_column(groups, WIDTH: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """Expand values of groups to their columns: (COUNT) -> (1, COLUMNS)."""
    member = tl.arange(0, COLUMNS)[:, None] // WIDTH == tl.arange(0, COUNT)[None, :]
    return tl.sum(tl.where(member, groups[None, :], 0.0), axis=1)[None, :]


@jit
def _store(out, value, weight, bias, image, pixel, channel, inside, mask, P, C, SILU: tl.constexpr):
    """Apply weight, bias and SiLU to normalized values, and store them."""
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    value = value * gain + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(out + image * P * C + pixel * C + channel, value.to(out.dtype.element_ty), mask=mask)


@jit
def _norm_one_tile(
    x, residual, offset, beside, total, weight, bias, out, P, C, C1, G, offset_b, eps, SILU: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image, pixel = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS)[:, None]
    channel, inside = _columns(SPAN, COLUMNS, C)
    extra = _offsets(offset, image, channel, inside, C1, offset_b)
    value, mask = _load(x, residual, beside, extra, image, pixel, P, channel, inside, P, C, C1)
    value = _write(total, value, image, pixel, channel, mask, P, C)
    mean = _by_group(tl.sum(value, axis=0), WIDTH, COUNT, COLUMNS) / (P * WIDTH)
    value = tl.where(mask, value - _by_column(mean, WIDTH, COUNT, COLUMNS), 0.0)
    variance = _by_group(tl.sum(value * value, axis=0), WIDTH, COUNT, COLUMNS) / (P * WIDTH)
    value *= _by_column(tl.rsqrt(variance + eps), WIDTH, COUNT, COLUMNS)
    _store(out, value, weight, bias, image, pixel, channel, inside, mask, P, C, SILU)


@jit
def _statistics(
    x, residual, offset, beside, total, partial, P, C, C1, G, offset_b, split_rows,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel, inside = _columns(SPAN, COLUMNS, C)
    start = split * split_rows
    end = tl.minimum(start + split_rows, P)
    extra = _offsets(offset, image, channel, inside, C1, offset_b)
    # Sums of differences from the first pixel, so that a large mean costs no digits.
    first_pixel = tl.zeros((1, 1), tl.int32) + start
    shift, _ = _load(x, residual, beside, extra, image, first_pixel, end, channel, inside, P, C, C1)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(start, end, ROWS):
        pixel = row + tl.arange(0, ROWS)[:, None]
        value, mask = _load(x, residual, beside, extra, image, pixel, end, channel, inside, P, C, C1)
        value = _write(total, value, image, pixel, channel, mask, P, C)
        value = tl.where(mask, value - shift, 0.0)
        sums += value
        squares += value * value
    number = (end - start).to(tl.float32)
    sums = tl.sum(sums, axis=0)[None, :]
    means = tl.where(inside, shift + sums / number, 0.0)
    mean = _by_group(tl.sum(means, axis=0), WIDTH, COUNT, COLUMNS) / WIDTH
    step = means - _by_column(mean, WIDTH, COUNT, COLUMNS)
    squares = tl.sum(squares, axis=0)[None, :] - sums * sums / number + number * step * step
    squares = _by_group(tl.sum(tl.where(inside, squares, 0.0), axis=0), WIDTH, COUNT, COLUMNS)
    first = tl.program_id(1) * (SPAN // WIDTH)
    group = tl.arange(0, COUNT)
    place = partial + (image * tl.num_programs(0) + split) * 2 * G + first + group
    mask = (group < SPAN // WIDTH) & (first + group < G)
    tl.store(place, mean, mask=mask)
    tl.store(place + G, squares, mask=mask)


@jit
def _normalize(
    x, offset, partial, weight, bias, out, P, C, G, offset_b, splits, split_rows, eps,
    SILU: tl.constexpr, SPLITS: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * (SPAN // WIDTH)
    split = tl.arange(0, SPLITS)[:, None]
    group = tl.arange(0, COUNT)[None, :]
    place = partial + (image * splits + split) * 2 * G + first + group
    known = (split < splits) & (group < SPAN // WIDTH) & (first + group < G)
    size = (tl.maximum(tl.minimum(P - split * split_rows, split_rows), 0) * WIDTH).to(tl.float32)
    means = tl.load(place, mask=known, other=0.0)
    mean = tl.sum(size * means, axis=0) / (P * WIDTH)
    means -= mean[None, :]
    squares = tl.sum(tl.load(place + G, mask=known, other=0.0) + size * means * means, axis=0)
    mean = _by_column(mean, WIDTH, COUNT, COLUMNS)
    scale = _by_column(tl.rsqrt(squares / (P * WIDTH) + eps), WIDTH, COUNT, COLUMNS)

    channel, inside = _columns(SPAN, COLUMNS, C)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    extra = _offsets(offset, image, channel, inside, C, offset_b)
    value, mask = _load(x, None, None, extra, image, pixel, P, channel, inside, P, C, C)
    _store(out, (value - mean) * scale, weight, bias, image, pixel, channel, inside, mask, P, C, SILU)


@operator("group_norm")
def group_norm(
    x: Tensor,  # (B, C, *)
    weight: Tensor,  # (C)
    bias: Tensor,  # (C)
    groups: int,
    eps: float,
    silu: bool,
    time: Tensor | None = None,  # (1 or B, C)
) -> Tensor:  # (B, C, *)
    """Run `group_norm_reference` as one or two Triton kernels, in float32 from load to store.

    The result is channels-last; so should x be, else it is copied. Rows of `time` may be slices. Raises ValueError if
    the channels of `time` do not have stride 1, or an image has 2**31 elements.
    """
    rows = map_rows(x)
    out = torch.empty_like(rows)
    _launch(rows, None, time, None, None, weight, bias, out, (groups, eps, silu))
    return out.movedim(-1, 1)


@operator("sum_group_norm")
def sum_group_norm(
    x: Tensor,  # (B, C1, *)
    residual: Tensor | None,  # (B, C1, *)
    offset: Tensor | None,  # (1 or B, C1)
    beside: Tensor | None,  # (B, C2, *)
    weight: Tensor,  # (C1 + C2)
    bias: Tensor,  # (C1 + C2)
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:  # (B, C1 + C2, *) twice
    """Run `sum_group_norm_reference` as one or two Triton kernels; see `group_norm`."""
    rows, others = map_rows(x), None if beside is None else map_rows(beside)
    total = rows.new_empty(*rows.shape[:-1], len(weight))
    out = torch.empty_like(total)
    residual = None if residual is None else map_rows(residual)
    _launch(rows, residual, offset, others, total, weight, bias, out, (groups, eps, silu))
    return total.movedim(-1, 1), out.movedim(-1, 1)


def _launch(
    x: Tensor,  # (B, *, C1)
    residual: Tensor | None,  # (B, *, C1)
    offset: Tensor | None,  # (1 or B, C1)
    beside: Tensor | None,  # (B, *, C2)
    total: Tensor | None,  # (B, *, C), what is written of the sum
    weight: Tensor,  # (C)
    bias: Tensor,  # (C)
    out: Tensor,  # (B, *, C)
    options: tuple[int, float, bool],
) -> None:
    """Launch one kernel for a small map; else that of the statistics of all splits, then that of the normalization."""
    (groups, eps, silu), (batch, *sides, channels) = options, out.shape
    pixels, width, offset_b = math.prod(sides), channels // groups, row_stride(offset)
    if pixels * channels >= 2**31:
        raise ValueError(f"a map of {pixels} pixels and {channels} channels, expected less than 2**31 elements")
    sizes, inputs = (pixels, channels, x.shape[-1], groups, offset_b), (x, residual, offset, beside, total)
    count, columns = group_tile(channels, groups, 64)
    if (rows := power_of_2(pixels)) * columns <= ONE_TILE:
        launcher(_norm_one_tile)[(batch, ceil_div(groups, count))](
            *inputs, weight, bias, out, *sizes, eps, SILU=silu, **_tile(width, count, rows, columns)
        )
        return
    count, columns = _large_tile(channels, groups)
    tile = _tile(width, count, max(1, TILE // columns), columns)
    tiles, parts = ceil_div(pixels, tile["ROWS"]), ceil_div(groups, count)
    splits = max(1, min(tiles, MAX_SPLITS, PROGRAMS // (batch * parts)))
    split_rows = ceil_div(tiles, splits) * tile["ROWS"]
    splits = ceil_div(pixels, split_rows)
    partial = torch.empty(batch, splits, 2, groups, device=x.device, dtype=torch.float32)  # mean, squared deviations
    launcher(_statistics)[(splits, parts, batch)](*inputs, partial, *sizes, split_rows, **tile)
    x, offset = (x, offset) if total is None else (total, None)
    sizes = pixels, channels, groups, offset_b, splits, split_rows, eps
    launcher(_normalize)[(tiles, parts, batch)](
        x, offset, partial, weight, bias, out, *sizes, SILU=silu, SPLITS=power_of_2(splits), **tile
    )


def _large_tile(channels: int, groups: int) -> tuple[int, int]:
    """Return groups and columns of a tile: 128 columns, or 256 where those leave fewer empty by far."""
    narrow, wide = (group_tile(channels, groups, columns) for columns in (128, 256))
    covered = [ceil_div(groups, count) * columns for count, columns in (narrow, wide)]
    return wide if covered[0] > 1.15 * covered[1] else narrow


def _tile(width: int, count: int, rows: int, columns: int) -> dict[str, int]:
    """Return the compile-time constants of a tile of `count` groups of `width` channels: 32 elements a thread."""
    sizes = {"WIDTH": width, "SPAN": count * width, "COUNT": power_of_2(count), "ROWS": rows, "COLUMNS": columns}
    return sizes | {"num_warps": min(16, max(4, rows * columns // 1024))}
