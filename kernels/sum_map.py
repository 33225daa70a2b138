"""The sum of a feature map, a residual and a bias, enlarged where wanted, in channels-last: each value is read once.

Letters: B batch, C channels, h and w height and width, F factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import ceil_div, jit, launcher, operator, tl

ROWS, COLUMNS = 16, 128


def sum_map_reference(
    x: Tensor,  # (B, C, *)
    residual: Tensor | None,  # (B, C, *)
    offset: Tensor | None,  # (1 or B, C)
    factor: int = 1,
) -> Tensor:  # (B, C, *), or (B, C, F h, F w)
    """Return x + residual + offset, each pixel of a map (h, w) repeated as a square of `factor` pixels a side."""
    x = x if residual is None else x + residual
    x = x if offset is None else x + offset.view(*offset.shape, *[1] * (x.ndim - 2))
    return x if factor == 1 else torch.nn.functional.interpolate(x, scale_factor=factor, mode="nearest")


def map_rows(x: Tensor) -> Tensor:  # (B, C, *) -> (B, *, C)
    """Return a feature map as rows of channels, contiguous; a copy where it is not channels-last."""
    return x.movedim(1, -1).contiguous()


def row_stride(offset: Tensor | None) -> int:
    """Return the stride from an image's row of offsets (1 or B, C) to the next one's, 0 where all have the same.

    Raises ValueError if its channels do not have stride 1.
    """
    if offset is not None and offset.stride(1) != 1:
        raise ValueError(f"offsets of strides {offset.stride()}, expected their channels side by side")
    return 0 if offset is None or len(offset) == 1 else offset.stride(0)


@jit
def _sum_map(
    x, residual, offset, out, N, P, W, C, offset_b, FACTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # of the pixels of all images
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < N) & (column < C)
    place = row.to(tl.int64) * C + column
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    if offset is not None:
        value += tl.load(offset + row // P * offset_b + column, mask=mask, other=0.0).to(tl.float32)
    value = value.to(out.dtype.element_ty)
    corner = (row // W).to(tl.int64) * (FACTOR * FACTOR * W) + row % W * FACTOR
    for y in tl.static_range(FACTOR):
        for z in tl.static_range(FACTOR):
            tl.store(out + (corner + y * FACTOR * W + z) * C + column, value, mask=mask)


@operator("sum_map")
def sum_map(
    x: Tensor,  # (B, C, h, w)
    residual: Tensor | None,  # (B, C, h, w)
    offset: Tensor | None,  # (1 or B, C)
    factor: int = 1,
) -> Tensor:  # (B, C, F h, F w)
    """Run `sum_map_reference` as one Triton kernel, in float32 from load to store. The result is channels-last."""
    rows = map_rows(x)
    batch, height, width, channels = rows.shape
    residual = None if residual is None else map_rows(residual)
    out = rows.new_empty(batch, factor * height, factor * width, channels)
    sizes = batch * height * width, height * width, width, channels, row_stride(offset)
    grid = ceil_div(sizes[0], ROWS), ceil_div(channels, COLUMNS)
    launcher(_sum_map)[grid](rows, residual, offset, out, *sizes, FACTOR=factor, ROWS=ROWS, COLUMNS=COLUMNS)
    return out.movedim(-1, 1)
