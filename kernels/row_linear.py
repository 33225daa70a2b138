"""Products of a weight with a few rows, as decoding a token needs them, with what stands around them in one launch.

Such a product is bound by reading the weight. RMSNorm of the rows comes before it; bias, SwiGLU and the residual stream
come after it. Letters: R rows, K width of a row, N width of the result, F width of a gated one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .language import as_rows, before_ampere, ceil_div, dot_in_float32, jit, launcher, operator, power_of_2, tl

DOT_ROWS = 16  # rows of a tile of tensor cores; one row alone is summed without them
# Most weight rows -> weight rows and columns of a tile, for one row of x: the fastest on an H100 for the products of
# LLaMA 7B (4096x4096 and 4096x11008: 2.3 and 2.5 TB/s; 12288x4096, 22016x4096 and 32064x4096: 2.7 to 2.8 TB/s).
TILES = {8192: (8, 1024), 2**31: (4, 2048)}


def row_norm_reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:  # (..., K)
    """Divide rows by their root mean square (Zhang and Sennrich, arXiv 1910.07467), and multiply them by a weight."""
    return F.rms_norm(x, gain.shape, gain, eps)


def row_linear_reference(
    x: Tensor,  # (R, K)
    weight: Tensor,  # (N, K); gated (2F, K), the gate before what it gates
    bias: Tensor | None = None,  # (N) or (2F)
    gain: Tensor | None = None,  # (K), of an RMSNorm of the rows before the product; None: without it
    residual: Tensor | None = None,  # (R, N) or (R, F), added to the result
    eps: float = 0.0,  # of the norm
    gated: bool = False,
) -> Tensor:  # (R, N) or (R, F)
    """Return the product of normalized rows with a weight, its SwiGLU (Shazeer, arXiv 2002.05202), plus a residual."""
    x = F.linear(x if gain is None else row_norm_reference(x, gain, eps), weight, bias)
    if gated:
        gate, x = x.chunk(2, dim=-1)
        x = F.silu(gate) * x
    return x if residual is None else residual + x


@jit
def _row_norm(x, gain, out, K, eps, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * K, tl.arange(0, COLUMNS)
    inside = column < K
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / K + eps)
    value *= tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, value.to(out.dtype.element_ty), mask=inside)


@jit
def _weights(weight, n, k, N, K, EVEN: tl.constexpr):
    """Load a tile of a weight (N, K), which is read once and so need not stay in the cache."""
    mask = (n < N) if EVEN else (n < N) & (k < K)
    return tl.load(weight + n.to(tl.int64) * K + k, mask=mask, other=0.0, eviction_policy="evict_first")


@jit
def _row_linear(
    x, weight, up, bias, up_bias, gain, residual, out, R, N, K, eps, BIAS: tl.constexpr, NORM: tl.constexpr,
    ADD: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)[:, None]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[None, :]
    total = tl.zeros((OUT, ROWS if DOT else COLUMNS), tl.float32)
    second = tl.zeros((OUT, ROWS if DOT else COLUMNS), tl.float32)
    squares = tl.zeros((1, COLUMNS), tl.float32)
    for start in range(0, K, COLUMNS):
        k = start + tl.arange(0, COLUMNS)[None, :]
        w = _weights(weight, n, k, N, K, EVEN)
        u = _weights(up, n, k, N, K, EVEN) if GATED else w
        if DOT:
            column = start + tl.arange(0, COLUMNS)[:, None]
            value = tl.load(x + row * K + column, mask=(row < R) & (column < K), other=0.0)
            if WIDE:
                w, u, value = w.to(tl.float32), u.to(tl.float32), value.to(tl.float32)
            total = tl.dot(w, value, total, input_precision="ieee")
            if GATED:
                second = tl.dot(u, value, second, input_precision="ieee")
        else:
            value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            if NORM:
                squares += value * value
                value *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
            total += w.to(tl.float32) * value
            if GATED:
                second += u.to(tl.float32) * value
    if not DOT:
        total, second = tl.sum(total, axis=1)[:, None], tl.sum(second, axis=1)[:, None]
        if NORM:
            scale = tl.rsqrt(tl.sum(squares) / K + eps)
            total, second = total * scale, second * scale
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if GATED:
        if BIAS:
            second += tl.load(up_bias + n, mask=n < N, other=0.0).to(tl.float32)
        total *= tl.sigmoid(total) * second
    mask = (n < N) & (row < R)
    if ADD:
        total += tl.load(residual + row * N + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=mask)


@operator("row_norm")
def row_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:  # (..., K)
    """Run `row_norm_reference` as one Triton kernel, in float32 from load to store."""
    rows, out = as_rows(x).contiguous(), x.new_empty(x.shape)
    columns = power_of_2(x.shape[-1])
    warps = min(16, max(1, columns // 256))  # 8 elements a thread, 32 at 16384 columns
    launcher(_row_norm)[(len(rows),)](rows, gain, out, rows.shape[1], eps, COLUMNS=columns, num_warps=warps)
    return out


@operator("row_linear")
def row_linear(
    x: Tensor,  # (R, K)
    weight: Tensor,  # (N, K) or (2F, K)
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> Tensor:  # (R, N) or (R, F)
    """Run `row_linear_reference` by Triton: one row in one kernel that sums in float32; more rows by tensor cores, with
    their norm in a kernel of its own, so that what is multiplied has the rows' dtype.

    Raises ValueError if the rows, the weight or the residual do not lie row by row.
    """
    if not all(part.is_contiguous() for part in (x, weight, *([] if residual is None else [residual]))):
        raise ValueError(f"rows {x.stride()} and weight {weight.stride()}, expected both to lie row by row")
    count, width = x.shape
    outputs, dot = len(weight) // (2 if gated else 1), count > 1
    if dot and gain is not None:
        x, gain = row_norm(x, gain, eps), None
    if dot:  # a tile of x is as wide as one of the weight, so that both are loaded ahead
        plain = x.dtype == torch.float32 or before_ampere()  # without tensor cores: few columns, no spills
        rows, columns, at_once, stages = DOT_ROWS, 32 if plain else 256, 16, 3
    else:
        at_once, columns = next(tile for most, tile in TILES.items() if outputs <= most)
        rows, stages = 1, 3
        at_once = at_once // 2 if gated else at_once
        columns = columns * 2 // max(2, weight.element_size())  # the table is of half precision
    columns = min(columns, max(16, power_of_2(width)))
    out = x.new_empty(count, outputs)
    biases = (bias[:outputs], bias[-outputs:]) if bias is not None else (None, None)
    launcher(_row_linear)[(ceil_div(outputs, at_once), ceil_div(count, rows))](
        x, weight, weight[-outputs:], *biases, gain, residual, out, count, outputs, width, eps, BIAS=bias is not None,
        NORM=gain is not None, ADD=residual is not None, GATED=gated, EVEN=width % columns == 0, DOT=dot,
        WIDE=dot_in_float32(x.dtype), ROWS=rows, OUT=at_once, COLUMNS=columns, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out
