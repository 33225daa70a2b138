"""Attention of new tokens over a static key-value cache: rotary embedding with the cache's write, then the attention.

Each new token is a row with a place in the cache of its own, so that rows of different lengths, and several tokens of
one row, are the same work. Letters: R new tokens, B rows of the cache, C slots of a row, W slots that are attended to,
H heads, G heads of keys and values, D width of a head, S parts that the slots are read in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .language import ceil_div, jit, launcher, operator, power_of_2, tl

BLOCK = 64  # slots of a tile
PART, PARTS = 256, 64  # slots that one program reads at least, and the most programs of a head


def rotary_cache_reference(
    qkv: Tensor,  # (R, (H + 2G) D), joined projections
    cos: Tensor,  # (R, D)
    sin: Tensor,  # (R, D)
    keys: Tensor,  # (B, G, C, D), written
    values: Tensor,  # (B, G, C, D), written
    rows: Tensor,  # (R,) row of the cache of each token
    slots: Tensor,  # (R,) its slot
    query_gain: Tensor | None = None,  # (D), of an RMSNorm of each head of queries; None: without it
    key_gain: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:  # (R, H, D)
    """Rotate queries and keys (RoFormer, arXiv 2104.09864), write keys and values to the cache; return the queries.

    The first half of a head is rotated with its second half.
    """
    groups, width = keys.shape[1], keys.shape[3]
    query, key, value = qkv.unflatten(1, (-1, width)).tensor_split([-2 * groups, -groups], dim=1)

    def rotate(x: Tensor, gain: Tensor | None) -> Tensor:
        x = x if gain is None else F.rms_norm(x, gain.shape, gain, eps)
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    keys[rows, :, slots] = rotate(key, key_gain)
    values[rows, :, slots] = value
    return rotate(query, query_gain)


def token_attention_reference(
    query: Tensor,  # (R, H, D)
    keys: Tensor,  # (B, G, C, D)
    values: Tensor,  # (B, G, C, D)
    rows: Tensor,  # (R,)
    slots: Tensor,  # (R,), the last slot that each token attends to, below W
    width: int,  # W
    scale: float,
) -> Tensor:  # (R, H D)
    """Let each token attend to the slots of its row up to its own; H / G heads share keys and values."""
    seen = torch.arange(width, device=slots.device) <= slots[:, None]  # (R, W)
    keys, values = keys[rows, :, :width], values[rows, :, :width]  # (R, G, W, D)
    out = F.scaled_dot_product_attention(
        query[:, :, None], keys, values, attn_mask=seen[:, None, None], scale=scale, enable_gqa=True
    )
    return out.flatten(1)


@jit
def _rotary_cache(
    qkv, cos, sin, keys, values, rows, slots, query_gain, key_gain, out, H, G, C, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, COLUMNS)
    inside = i < HALF
    source = qkv + (token * (H + 2 * G) + head) * 2 * HALF + i
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    cached = (tl.load(rows + token) * G * C + tl.load(slots + token)) * 2 * HALF  # of the first head
    if head >= H + G:
        target = values + cached + (head - H - G) * C * 2 * HALF + i
    else:
        if NORM:
            gain = (query_gain if head < H else key_gain) + i
            scale = tl.rsqrt(tl.sum(first * first + second * second, axis=0) / (2 * HALF) + eps)
            first *= scale * tl.load(gain, mask=inside, other=0.0).to(tl.float32)
            second *= scale * tl.load(gain + HALF, mask=inside, other=0.0).to(tl.float32)
        angle = token * 2 * HALF + i
        turned = first * tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        turned -= second * tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        second *= tl.load(cos + HALF + angle, mask=inside, other=0.0).to(tl.float32)
        second += first * tl.load(sin + HALF + angle, mask=inside, other=0.0).to(tl.float32)
        first = turned
        target = (keys + cached + (head - H) * C * 2 * HALF if head >= H else out + (token * H + head) * 2 * HALF) + i
    tl.store(target, first.to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, second.to(out.dtype.element_ty), mask=inside)


@jit
def _token_attention(
    query, keys, values, rows, slots, out, partial, H, G, C, part, parts, scale,
    ALONE: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head, index = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < D
    target = token * H + head
    q = tl.load(query + target * D + column, mask=inside, other=0.0).to(tl.float32) * scale
    cached = (tl.load(rows + token) * G + head // (H // G)) * C * D
    last = tl.load(slots + token).to(tl.int32)
    highest = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    value = tl.zeros((1, COLUMNS), tl.float32)
    for start in range(index * part, tl.minimum((index + 1) * part, last + 1), BLOCK):
        slot = start + tl.arange(0, BLOCK)[:, None]
        mask = (slot <= last) & inside
        key = tl.load(keys + cached + slot * D + column, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(slot <= last, tl.sum(key * q, axis=1)[:, None], -float("inf"))
        higher = tl.maximum(highest, tl.max(score))
        weight, kept = tl.exp(score - higher), tl.exp(highest - higher)
        v = tl.load(values + cached + slot * D + column, mask=mask, other=0.0).to(tl.float32)
        value = value * kept + tl.sum(v * weight, axis=0)[None, :]
        total = total * kept + tl.sum(weight)
        highest = higher
    if ALONE:
        tl.store(out + target * D + column, (value / total).to(out.dtype.element_ty), mask=inside)
    else:  # (R, H, S, D + 2): a sum of values, the highest score, the sum of weights
        partial += (target * parts + index) * (D + 2)
        tl.store(partial + column, value, mask=inside)
        tl.store(partial + D, highest)
        tl.store(partial + D + 1, total)


@jit
def _merge_parts(partial, out, parts, ROWS: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)
    index, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    partial += (target * parts + index) * (D + 2)
    highest = tl.load(partial + D, mask=index < parts, other=-float("inf"))
    weight = tl.exp(highest - tl.max(highest))  # 0 for a part behind the last slot
    total = tl.sum(weight * tl.load(partial + D + 1, mask=index < parts, other=0.0))
    value = tl.load(partial + column, mask=(index < parts) & (column < D), other=0.0)
    value = tl.sum(value * weight, axis=0)[None, :] / total
    tl.store(out + target * D + column, value.to(out.dtype.element_ty), mask=column < D)


@operator("rotary_cache", mutates=("keys", "values"))
def rotary_cache(
    qkv: Tensor,  # (R, (H + 2G) D)
    cos: Tensor,  # (R, D)
    sin: Tensor,  # (R, D)
    keys: Tensor,  # (B, G, C, D)
    values: Tensor,  # (B, G, C, D)
    rows: Tensor,  # (R,)
    slots: Tensor,  # (R,)
    query_gain: Tensor | None = None,
    key_gain: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:  # (R, H, D)
    """Run `rotary_cache_reference` as one Triton kernel, in float32 from load to store."""
    _check(qkv, cos, sin, keys, values)
    _, groups, capacity, width = keys.shape
    heads = qkv.shape[1] // width - 2 * groups
    out = qkv.new_empty(len(qkv), heads, width)
    launcher(_rotary_cache)[(len(qkv), heads + 2 * groups)](
        qkv, cos, sin, keys, values, rows, slots, query_gain, key_gain, out, heads, groups, capacity, eps,
        NORM=query_gain is not None, HALF=width // 2, COLUMNS=power_of_2(width // 2), num_warps=1,
    )  # fmt: skip
    return out


@operator("token_attention")
def token_attention(
    query: Tensor,  # (R, H, D)
    keys: Tensor,  # (B, G, C, D)
    values: Tensor,  # (B, G, C, D)
    rows: Tensor,  # (R,)
    slots: Tensor,  # (R,)
    width: int,
    scale: float,
) -> Tensor:  # (R, H D)
    """Run `token_attention_reference` by Triton: a program for each head of each token, and where there are many slots
    several, whose results another kernel merges."""
    _check(query, keys, values)
    (count, heads, size), (_, groups, capacity, _) = query.shape, keys.shape
    part = ceil_div(max(PART, ceil_div(width, PARTS)), BLOCK) * BLOCK
    parts = ceil_div(width, part)
    out = query.new_empty(count, heads * size)
    partial = query.new_empty((count, heads, parts, size + 2) if parts > 1 else (0,), dtype=torch.float32)
    shape = {"D": size, "COLUMNS": power_of_2(size), "num_warps": 4}
    launcher(_token_attention)[(count, heads, parts)](
        query, keys, values, rows, slots, out, partial, heads, groups, capacity, part, parts, scale,
        ALONE=parts == 1, BLOCK=BLOCK, **shape,
    )  # fmt: skip
    if parts > 1:
        launcher(_merge_parts)[(count * heads,)](partial, out, parts, ROWS=power_of_2(parts), **shape)
    return out


def _check(*tensors: Tensor) -> None:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"strides {[tensor.stride() for tensor in tensors]}, expected contiguous tensors")
