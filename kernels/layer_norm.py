"""LayerNorm, alone or fused with the residual sum before it, which is used twice and never read back from memory.

Letters: N rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import as_rows, ceil_div, jit, launcher, operator, power_of_2, tl


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # (..., D), (D), (D)
    """Return the LayerNorm (Ba et al., arXiv 1607.06450) of the rows of x."""
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm_reference(
    x: Tensor,  # (..., D)
    residual: Tensor,  # (..., D)
    weight: Tensor,  # (D)
    bias: Tensor,  # (D)
    eps: float,
    later: Tensor | None = None,  # (D)
) -> tuple[Tensor, Tensor]:
    """Return x + residual, and its LayerNorm; `later`, the bias of the next layer's output, is in the first alone."""
    total = x + residual
    normed = layer_norm_reference(total, weight, bias, eps)
    return total if later is None else total + later, normed


def row_tile(width: int) -> dict[str, int]:
    """Return the constants of a tile of whole rows: 16 elements a thread where rows are up to 4096 wide.
    Rows stay in registers between the statistics and their use, which limits the width (`registry.OPERATIONS`)."""
    columns = power_of_2(width)
    return {"ROWS": max(1, 4096 // columns), "COLUMNS": columns, "num_warps": 8 if columns <= 4096 else 16}


@jit
def normalize_rows(value, mask, D, eps):
    """Normalize each row of a tile (0 outside its mask) to mean 0 and variance 1, in two passes over registers."""
    mean = tl.sum(value, axis=1) / D
    centred = tl.where(mask, value - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    return centred * tl.rsqrt(variance + eps)[:, None]


@jit
def _layer_norm(
    x, residual, later, weight, bias, total, normed, N, D, x_stride, residual_stride, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < N) & (column < D)
    row = row.to(tl.int64)
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
        kept = value
        if later is not None:
            kept += tl.load(later + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(total + row * D + column, kept.to(total.dtype.element_ty), mask=mask)
    gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
    value = normalize_rows(value, mask, D, eps) * gain + shift
    tl.store(normed + row * D + column, value.to(normed.dtype.element_ty), mask=mask)


@operator("layer_norm")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # (..., D), (D), (D)
    """Run `layer_norm_reference` as one Triton kernel, in float32 from load to store."""
    rows, normed = as_rows(x), x.new_empty(x.shape)
    _launch(rows, None, None, weight, bias, None, normed, eps)
    return normed


@operator("add_layer_norm")
def add_layer_norm(
    x: Tensor,  # (..., D)
    residual: Tensor,  # (..., D)
    weight: Tensor,  # (D)
    bias: Tensor,  # (D)
    eps: float,
    later: Tensor | None = None,  # (D)
) -> tuple[Tensor, Tensor]:
    """Run `add_layer_norm_reference` as one Triton kernel; it normalizes the sum in float32, before it is rounded."""
    total, normed = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(as_rows(x), as_rows(residual), later, weight, bias, total, normed, eps)
    return total, normed


def _launch(
    rows: Tensor,  # (N, D)
    residual: Tensor | None,  # (N, D)
    later: Tensor | None,  # (D)
    weight: Tensor,  # (D)
    bias: Tensor,  # (D)
    total: Tensor | None,  # (..., D)
    normed: Tensor,  # (..., D)
    eps: float,
) -> None:
    (count, width), tile = rows.shape, row_tile(rows.shape[-1])
    strides = rows.stride(0), 0 if residual is None else residual.stride(0)
    launcher(_layer_norm)[(ceil_div(count, tile["ROWS"]),)](
        rows, residual, later, weight, bias, total, normed, count, width, *strides, eps, **tile
    )
