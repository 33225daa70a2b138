"""RMSNorm of queries and keys over each head, as in SD 3.5: both in one launch.

Letters: B batch, T tokens, H heads, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import ceil_div, jit, launcher, operator, power_of_2, tl


def rms_norm_reference(
    query: Tensor,  # (B, T, H, D)
    key: Tensor,  # (B, T, H, D)
    query_weight: Tensor,  # (D)
    key_weight: Tensor,  # (D)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Divide each head by its root mean square (Zhang and Sennrich, arXiv 1910.07467), and multiply it by a weight."""
    norm = torch.nn.functional.rms_norm
    return norm(query, query_weight.shape, query_weight, eps), norm(key, key_weight.shape, key_weight, eps)


@jit
def _rms_norm(
    query, key, query_weight, key_weight, query_out, key_out, N, T, H, D,
    query_b, query_t, query_h, key_b, key_t, key_h, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        x, weight, out, stride_b, stride_t, stride_h = query, query_weight, query_out, query_b, query_t, query_h
    else:
        x, weight, out, stride_b, stride_t, stride_h = key, key_weight, key_out, key_b, key_t, key_h
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # of B T H, the order that a projection leaves
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < D
    mask = (row < N) & inside
    start = (row // (T * H)).to(tl.int64) * stride_b + (row // H % T) * stride_t + (row % H) * stride_h
    value = tl.load(x + start + column, mask=mask, other=0.0).to(tl.float32)
    square = tl.sum(value * value, axis=1) / D
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(square + eps)[:, None] * gain
    tl.store(out + row.to(tl.int64) * D + column, value.to(out.dtype.element_ty), mask=mask)


@operator("rms_norm")
def rms_norm(
    query: Tensor,  # (B, T, H, D)
    key: Tensor,  # (B, T, H, D)
    query_weight: Tensor,  # (D)
    key_weight: Tensor,  # (D)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Run `rms_norm_reference` as one Triton kernel; queries and keys may be slices of one fused projection.
    Raises ValueError if they differ in shape, or the elements of a head do not have stride 1."""
    if query.shape != key.shape or query.stride(-1) != 1 or key.stride(-1) != 1:
        raise ValueError(f"queries {tuple(query.shape)} and keys {tuple(key.shape)}: expected one shape, last stride 1")
    _, tokens, heads, width = query.shape
    outs = query.new_empty(query.shape), key.new_empty(key.shape)
    count, columns = query.numel() // width, power_of_2(width)
    rows = max(1, 4096 // columns)  # 32 elements a thread: two loads of 16 bytes and more in half precision
    launcher(_rms_norm)[(ceil_div(count, rows), 2)](
        query, key, query_weight, key_weight, *outs, count, tokens, heads, width,
        *query.stride()[:3], *key.stride()[:3], eps, ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return outs
