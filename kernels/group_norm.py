"""GroupNorm in channels-last, fused with the time embedding before it and the SiLU after it, as in a ResNet block.

Letters: B batch, C channels, G groups, P pixels (h w), S splits of the pixels.

A tile has some pixels (rows) and some whole groups (columns). A group has C / G channels, which is a power of two in no
UNet; the number of groups in a tile is therefore chosen so that they fill a power of two well (12 groups of 10 channels
fill 120 of 128 columns) and start at a multiple of 8 channels, where loads of 16 bytes are possible. A matrix of ones
and zeros turns sums over columns into sums over groups. A small feature map is one tile high: one kernel reads it once.
A larger one is divided into S splits: a program sums each element of its tiles in registers, reduces once at its end,
and writes mean and squared deviations of its groups; a second kernel merges these (Chan et al., 1983) and normalizes a
tile in each program, while the feature map is still in the L2 cache. The sizes were measured on an H100.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import ceil_div, jit, launcher, operator, power_of_2, tl

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
    time: Tensor | None = None,  # (B, C)
) -> Tensor:  # (B, C, *)
    """Return GroupNorm (Wu and He, arXiv 1803.08494) of x + time, followed by SiLU if `silu`."""
    if time is not None:
        x = x + time.view(*time.shape, *[1] * (x.ndim - 2))
    normed = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    return torch.nn.functional.silu(normed) if silu else normed


def group_tile(channels: int, groups: int, columns: int) -> tuple[int, int]:
    """Return the number of groups of a tile, aligned if possible and leaving few columns empty, and of its columns."""
    width = channels // groups
    columns = max(columns, power_of_2(width))

    def merit(count: int) -> tuple[bool, float]:
        return count * width % 8 == 0 or count == groups, channels / (ceil_div(groups, count) * columns)

    return max(range(1, min(groups, columns // width) + 1), key=merit), columns


@jit
def _load(x, time, pixel, P, channel, inside, x_p, x_c, TIMED: tl.constexpr):
    """Return a tile in float32 with its time embedding added, 0 outside its mask; and the mask."""
    mask = (pixel < P) & inside
    value = tl.load(x + pixel * x_p + channel * x_c, mask=mask, other=0.0).to(tl.float32)
    if TIMED:
        value = tl.where(mask, value + tl.load(time + channel, mask=inside, other=0.0).to(tl.float32), 0.0)
    return value, mask


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
def _store(out, value, weight, bias, pixel, channel, C, inside, mask, SILU: tl.constexpr):
    """Apply weight, bias and SiLU to normalized values, and store them."""
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    value = value * gain + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(out + pixel * C + channel, value.to(out.dtype.element_ty), mask=mask)


@jit
def _norm_one_tile(
    x, time, weight, bias, out, P, C, G, x_b, x_p, x_c, time_b, eps, TIMED: tl.constexpr, SILU: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    channel = tl.program_id(1) * SPAN + column
    inside = (column < SPAN) & (channel < C)
    pixel = tl.arange(0, ROWS)[:, None]
    value, mask = _load(
        x + image * x_b, time + image * time_b if TIMED else None, pixel, P, channel, inside, x_p, x_c, TIMED
    )
    mean = _by_group(tl.sum(value, axis=0), WIDTH, COUNT, COLUMNS) / (P * WIDTH)
    value = tl.where(mask, value - _by_column(mean, WIDTH, COUNT, COLUMNS), 0.0)
    variance = _by_group(tl.sum(value * value, axis=0), WIDTH, COUNT, COLUMNS) / (P * WIDTH)
    value *= _by_column(tl.rsqrt(variance + eps), WIDTH, COUNT, COLUMNS)
    _store(out + image * P * C, value, weight, bias, pixel, channel, C, inside, mask, SILU)


@jit
def _statistics(
    x, time, partial, P, C, G, x_b, x_p, x_c, time_b, split_rows, TIMED: tl.constexpr,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    channel = tl.program_id(1) * SPAN + column
    inside = (column < SPAN) & (channel < C)
    start = split * split_rows
    end = tl.minimum(start + split_rows, P)
    x += image * x_b
    if TIMED:
        time += image * time_b
    # Sums of differences from the first pixel, so that a large mean costs no digits.
    first_pixel = tl.zeros((1, 1), tl.int32) + start
    shift, _ = _load(x, time, first_pixel, end, channel, inside, x_p, x_c, TIMED)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(start, end, ROWS):
        pixel = row + tl.arange(0, ROWS)[:, None]
        value, mask = _load(x, time, pixel, end, channel, inside, x_p, x_c, TIMED)
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
    x, time, partial, weight, bias, out, P, C, G, x_b, x_p, x_c, time_b, splits, split_rows, eps,
    TIMED: tl.constexpr, SILU: tl.constexpr, SPLITS: tl.constexpr,
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

    column = tl.arange(0, COLUMNS)[None, :]
    channel = tl.program_id(1) * SPAN + column
    inside = (column < SPAN) & (channel < C)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    value, mask = _load(
        x + image * x_b, time + image * time_b if TIMED else None, pixel, P, channel, inside, x_p, x_c, TIMED
    )
    _store(out + image * P * C, (value - mean) * scale, weight, bias, pixel, channel, C, inside, mask, SILU)


@operator("group_norm")
def group_norm(
    x: Tensor,  # (B, C, *)
    weight: Tensor,  # (C)
    bias: Tensor,  # (C)
    groups: int,
    eps: float,
    silu: bool,
    time: Tensor | None = None,  # (B, C)
) -> Tensor:  # (B, C, *)
    """Run `group_norm_reference` as one or two Triton kernels, in float32 from load to store.

    The result is channels-last. Any strides of x are correct; channels-last is fast. Rows of `time` may be slices.
    Raises ValueError if the channels of `time` do not have stride 1.
    """
    if time is not None and time.stride(1) != 1:
        raise ValueError(f"a time embedding of strides {time.stride()}, expected its channels side by side")
    flat = x.flatten(2)  # (B, C, P); a view if the pixels are evenly spaced
    batch, channels, pixels = flat.shape
    out = x.new_empty(batch, *x.shape[2:], channels).movedim(-1, 1)
    sizes = (
        pixels,
        channels,
        groups,
        flat.stride(0),
        flat.stride(2),
        flat.stride(1),
        0 if time is None else time.stride(0),
    )
    count, columns = group_tile(channels, groups, 64)
    if (rows := power_of_2(pixels)) * columns <= ONE_TILE:
        tile = _tile(channels // groups, count, rows, columns)
        launcher(_norm_one_tile)[(batch, ceil_div(groups, count))](
            flat, time, weight, bias, out, *sizes, eps, TIMED=time is not None, SILU=silu, **tile
        )
    else:
        _norm_large(flat, time, weight, bias, out, sizes, eps, silu)
    return out


def _norm_large(
    x: Tensor,  # (B, C, P)
    time: Tensor | None,  # (B, C)
    weight: Tensor,  # (C)
    bias: Tensor,  # (C)
    out: Tensor,  # (B, C, *)
    sizes: tuple[int, ...],
    eps: float,
    silu: bool,
) -> None:
    """Launch the kernel of the statistics of all splits, then that of the normalization."""
    batch, channels, pixels = x.shape
    groups = sizes[2]
    count, columns = _large_tile(channels, groups)
    tile = _tile(channels // groups, count, max(1, TILE // columns), columns) | {"TIMED": time is not None}
    tiles, parts = ceil_div(pixels, tile["ROWS"]), ceil_div(groups, count)
    splits = max(1, min(tiles, MAX_SPLITS, PROGRAMS // (batch * parts)))
    split_rows = ceil_div(tiles, splits) * tile["ROWS"]
    splits = ceil_div(pixels, split_rows)
    partial = torch.empty(batch, splits, 2, groups, device=x.device, dtype=torch.float32)  # mean, squared deviations
    launcher(_statistics)[(splits, parts, batch)](x, time, partial, *sizes, split_rows, **tile)
    launcher(_normalize)[(tiles, parts, batch)](
        x,
        time,
        partial,
        weight,
        bias,
        out,
        *sizes,
        splits,
        split_rows,
        eps,
        SILU=silu,
        SPLITS=power_of_2(splits),
        **tile,
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
