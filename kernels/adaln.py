"""The adaptive LayerNorm of SD 3, and its fusion with the gated residual sum before it in the second half of a block.

Letters: B batch, T tokens, D width. Scale, shift and gate are (B, D), one row an image, often slices of one projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import ceil_div, jit, launcher, operator, tl
from .layer_norm import normalize_rows, row_tile


def adaln_reference(hidden: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:  # (B, T, D)
    """Return LayerNorm(hidden) (1 + scale) + shift; the norm has no weights (Peebles and Xie, arXiv 2212.09748)."""
    normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


def gated_adaln_reference(
    hidden: Tensor,  # (B, T, D)
    update: Tensor,  # (B, T, D)
    gate: Tensor,  # (B, D)
    scale: Tensor,  # (B, D)
    shift: Tensor,  # (B, D)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Add the gated output of an attention or feed-forward layer; return hidden + gate update, and its
    `adaln_reference`."""
    hidden = hidden + gate[:, None] * update
    return hidden, adaln_reference(hidden, scale, shift, eps)


@jit
def _adaln(
    hidden, update, gate, scale, shift, total, out, T, D,
    hidden_b, hidden_t, update_b, update_t, gate_b, scale_b, shift_b, eps,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)  # a tile lies in one image, so it has one scale, shift and gate
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < D
    mask = (token < T) & inside
    value = tl.load(hidden + image * hidden_b + token * hidden_t + column, mask=mask, other=0.0).to(tl.float32)
    place = (image * T + token) * D + column
    if GATED:
        factor = tl.load(gate + image * gate_b + column, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(update + image * update_b + token * update_t + column, mask=mask, other=0.0)
        value += factor * change.to(tl.float32)
        tl.store(total + place, value.to(total.dtype.element_ty), mask=mask)
    gain = tl.load(scale + image * scale_b + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + image * shift_b + column, mask=inside, other=0.0).to(tl.float32)
    value = normalize_rows(value, mask, D, eps) * (1.0 + gain) + offset
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


def _packed(x: Tensor) -> Tensor:
    """Return x with stride 1 in its last axis; a copy only where that is not so already."""
    return x if x.stride(-1) == 1 else x.contiguous()


@operator("adaln")
def adaln(hidden: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:  # (B, T, D)
    """Run `adaln_reference` as one Triton kernel, in float32 from load to store."""
    hidden, scale, shift = _packed(hidden), _packed(scale), _packed(shift)
    batch, tokens, width = hidden.shape
    out, tile = hidden.new_empty(hidden.shape), row_tile(width)
    strides = hidden.stride(0), hidden.stride(1), 0, 0, 0, scale.stride(0), shift.stride(0)
    launcher(_adaln)[(ceil_div(tokens, tile["ROWS"]), batch)](
        hidden, None, None, scale, shift, None, out, tokens, width, *strides, eps, GATED=False, **tile
    )
    return out


@operator("gated_adaln")
def gated_adaln(
    hidden: Tensor,  # (B, T, D)
    update: Tensor,  # (B, T, D)
    gate: Tensor,  # (B, D)
    scale: Tensor,  # (B, D)
    shift: Tensor,  # (B, D)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Run `gated_adaln_reference` as one Triton kernel; it normalizes the sum in float32, before it is rounded."""
    hidden, update, gate = _packed(hidden), _packed(update), _packed(gate)
    scale, shift = _packed(scale), _packed(shift)
    batch, tokens, width = hidden.shape
    total, out, tile = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape), row_tile(width)
    strides = *hidden.stride()[:2], *update.stride()[:2], gate.stride(0), scale.stride(0), shift.stride(0)
    launcher(_adaln)[(ceil_div(tokens, tile["ROWS"]), batch)](
        hidden, update, gate, scale, shift, total, out, tokens, width, *strides, eps, GATED=True, **tile
    )
    return total, out
