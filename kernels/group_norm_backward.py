"""The backward of GroupNorm with frozen weights, fused with SiLU: the gradient of the feature map alone.

With n the normalized map and s the gradient of n, that is (s - mean(s) - n mean(s n)) / deviation, with means over a
group. Nothing is kept of the forward but its inputs: a kernel sums x and its square in each channel, then s and s n,
from which PyTorch makes the few values of groups; another one returns the gradient. Each reads the maps once.

Letters: B batch, C channels, G groups, W channels of a group, P pixels (h w), S splits of the pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .group_norm import PROGRAMS, group_norm, group_norm_reference
from .language import ceil_div, jit, launcher, operator, tl
from .sum_map import map_rows

ROWS, COLUMNS = 32, 64  # pixels and channels of a tile


def group_norm_backward_reference(
    grad: Tensor,  # (B, C, *)
    x: Tensor,  # (B, C, *)
    weight: Tensor,  # (C)
    bias: Tensor,  # (C)
    groups: int,
    eps: float,
    silu: bool,
    time: Tensor | None = None,  # (1 or B, C)
) -> Tensor:  # (B, C, *)
    """Return the gradient of x by the autograd of `group_norm_reference`."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(group_norm_reference(x, weight, bias, groups, eps, silu, time), x, grad)[0]


@jit
def _slopes(
    x, grad, weight, bias, table, image, pixel, end, channel, P, C, SILU: tl.constexpr, SLOPES: tl.constexpr
):  # fmt: skip
    """Return n and, with SLOPES, s of a tile, else n twice; both are 0 outside its mask, which is the third."""
    inside = channel < C
    mask = inside & (pixel < end)
    place = (image * P + pixel) * C + channel
    mean = tl.load(table + image * 2 * C + channel, mask=inside, other=0.0)
    scale = tl.load(table + image * 2 * C + C + channel, mask=inside, other=0.0)
    normed = tl.where(mask, (tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - mean) * scale, 0.0)
    slope = normed
    if SLOPES:
        slope = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            active = normed * gain + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
            gate = tl.sigmoid(active)
            slope *= gate * (1 + active * (1 - gate))
        slope *= gain
    return normed, slope, mask


@jit
def _channel_sums(
    x, grad, weight, bias, table, sums, P, C, split_rows,
    SILU: tl.constexpr, SLOPES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    end = tl.minimum((split + 1) * split_rows, P)
    slopes = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(split * split_rows, end, ROWS):
        pixel = row + tl.arange(0, ROWS)[:, None]
        normed, slope, _ = _slopes(x, grad, weight, bias, table, image, pixel, end, channel, P, C, SILU, SLOPES)
        slopes += slope
        products += slope * normed
    place = sums + (image * tl.num_programs(0) + split) * 2 * C + channel
    tl.store(place, tl.sum(slopes, axis=0)[None, :], mask=channel < C)
    tl.store(place + C, tl.sum(products, axis=0)[None, :], mask=channel < C)


@jit
def _gradient(
    x, grad, weight, bias, table, means, out, P, C, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    normed, slope, mask = _slopes(x, grad, weight, bias, table, image, pixel, P, channel, P, C, SILU, True)
    inside, row = channel < C, image * 2 * C + channel
    slope -= tl.load(means + row, mask=inside, other=0.0)
    slope -= normed * tl.load(means + row + C, mask=inside, other=0.0)
    slope *= tl.load(table + row + C, mask=inside, other=0.0)
    tl.store(out + (image * P + pixel) * C + channel, slope.to(out.dtype.element_ty), mask=mask)


@operator("group_norm_backward")
def group_norm_backward(
    grad: Tensor,  # (B, C, *)
    x: Tensor,  # (B, C, *)
    weight: Tensor,  # (C)
    bias: Tensor,  # (C)
    groups: int,
    eps: float,
    silu: bool,
    time: Tensor | None = None,  # (1 or B, C)
) -> Tensor:  # (B, C, *)
    """Run `group_norm_backward_reference` by Triton, in float32 from load to store; the result is channels-last."""
    x, grad = map_rows(x), map_rows(grad)
    batch, channels = len(x), x.shape[-1]
    pixels = x[0, ..., 0].numel()
    tiles, parts = ceil_div(pixels, ROWS), ceil_div(channels, COLUMNS)
    split_rows = ROWS * ceil_div(tiles, max(1, min(tiles, PROGRAMS // (batch * parts))))
    splits = ceil_div(pixels, split_rows)

    def sums(table: Tensor, slopes: bool) -> Tensor:  # (B, 2, C) -> (B, 2, C), means over pixels
        found = torch.empty(batch, splits, 2, channels, device=x.device, dtype=torch.float32)
        sizes = {"SILU": silu, "SLOPES": slopes, "ROWS": ROWS, "COLUMNS": COLUMNS}
        launcher(_channel_sums)[(splits, parts, batch)](
            x, grad, weight, bias, table, found, pixels, channels, split_rows, **sizes
        )
        return found.sum(1) / pixels

    # Differences from the first pixel, so that a large mean costs no digits; `time` only moves the means of channels.
    shift = x.flatten(1, -2)[:, 0].float()  # (B, C)
    one, two = sums(torch.stack([shift, torch.ones_like(shift)], dim=1), False).unbind(1)
    moved = 0.0 if time is None else time.float()
    mean = (shift + moved + one).unflatten(1, (groups, -1))  # (B, G, W)
    centre = mean.mean(2, keepdim=True)
    variance = (mean - centre).square() + (two - one.square()).unflatten(1, (groups, -1))
    scale = (variance.mean(2, keepdim=True) + eps).rsqrt().expand_as(mean).flatten(1)
    table = torch.stack([centre.expand_as(mean).flatten(1) - moved, scale], dim=1)
    means = sums(table, True).unflatten(2, (groups, -1))  # (B, 2, G, W)
    means = means.mean(3, keepdim=True).expand_as(means).flatten(2).contiguous()
    out = torch.empty_like(x)
    launcher(_gradient)[(tiles, parts, batch)](
        x, grad, weight, bias, table, means, out, pixels, channels, SILU=silu, ROWS=ROWS, COLUMNS=COLUMNS
    )
    return out.movedim(-1, 1)


class _FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, time: Tensor | None, norm: nn.GroupNorm, silu: bool) -> Tensor:
        ctx.save_for_backward(x, time)
        ctx.options = norm.weight, norm.bias, norm.num_groups, norm.eps, silu
        return group_norm(x, *ctx.options, time)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, time = ctx.saved_tensors
        found = group_norm_backward(grad, x, *ctx.options, time)
        return found, found.flatten(2).sum(2).sum_to_size(time.shape) if ctx.needs_input_grad[1] else None, None, None


def frozen_norm(norm: nn.GroupNorm, x: Tensor, silu: bool = False, time: Tensor | None = None) -> Tensor:  # (B, C, *)
    """Return GroupNorm of x + time, followed by SiLU if `silu`, by kernels; x and time (1 or B, C) have gradients."""
    return _FrozenNorm.apply(x, time, norm, silu)
