"""Deformable attention: bilinear samples of the feature maps of several images, summed with weights.

Letters: B batch, T tokens, N images, S pixels of all levels of an image, H heads, E width of a head, L levels, K
points. `shapes` holds height and width of each level, alternately; the levels of an image lie behind one another in S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .hub_deformable import deformable_hub
from .language import ceil_div, jit, launcher, operator, power_of_2, tl, triton
from .registry import select_kernel

TILE = 512  # elements of a tile of rows (tokens and heads) and channels: 4 a thread, as 8 spill registers


def deformable_reference(
    value: Tensor,  # (B, N, S, H, E)
    locations: Tensor,  # (B, T, N, H, L, K, 2), x and y; 0 and 1 are the edges of an image
    weights: Tensor,  # (B, T, N, H, L, K)
    shapes: list[int],
) -> Tensor:  # (B, T, H E)
    """Return the weighted sum of samples of all images, levels and points (Deformable DETR, Zhu et al., arXiv
    2010.04159, eq. 3); beyond its edges an image is zero. Samples are taken and summed in float32 at least."""
    precise, out = torch.promote_types(value.dtype, torch.float32), 0.0
    for level, (height, width, part) in enumerate(_levels(value, shapes)):
        maps = part.permute(0, 1, 3, 4, 2).flatten(0, 2).unflatten(-1, (height, width))  # (B N H, E, h, w)
        grid = locations[..., level, :, :].permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # (B N H, T, K, 2)
        found = F.grid_sample(maps.to(precise), 2 * grid.to(precise) - 1, align_corners=False)  # (B N H, E, T, K)
        gains = weights[..., level, :].permute(0, 2, 3, 1, 4).flatten(0, 2)[:, None].to(precise)
        out = out + (found * gains).sum(-1).unflatten(0, (len(value), *value.shape[1:4:2])).sum(1)  # (B, H, E, T)
    return out.permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def _levels(value: Tensor, shapes: list[int]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield height, width and pixels (B, N, h w, H, E) of each level."""
    sizes = list(zip(shapes[::2], shapes[1::2], strict=True))
    parts = value.split([height * width for height, width in sizes], dim=2)
    yield from ((*size, part) for size, part in zip(sizes, parts, strict=True))


@jit
def _pixel(source, x, y, width, height, stride, mask):
    """Return pointers (ROWS, COLUMNS) to a pixel for each row, and where it lies inside the map."""
    inside = mask & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return source + (y * width + x).to(tl.int64) * stride, inside


@jit
def _corner(source, x, y, width, height, stride, mask):
    place, inside = _pixel(source, x, y, width, height, stride, mask)
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@jit
def _scatter(source, x, y, width, height, stride, mask, value):
    place, inside = _pixel(source, x, y, width, height, stride, mask)
    tl.atomic_add(place, value, mask=inside)


@jit
def _sample(
    value, locations, weights, out, T, N, H, E, K, height, width, value_b, value_n, value_s,
    place_b, place_t, place_n, place_h, gain_b, gain_t, gain_n, gain_h, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the samples of one level to `out`, which is float32."""
    row, batch = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.program_id(1).to(tl.int64)
    token, head = (row // H).to(tl.int64), row % H
    column, known = tl.arange(0, COLUMNS)[None, :], row < T * H
    mask = known & (column < E)
    target = out + (batch * T * H + row) * E + column
    total = tl.load(target, mask=mask, other=0.0)
    for image in range(N):
        source = value + batch * value_b + image * value_n + head * E + column
        place = locations + batch * place_b + token * place_t + image * place_n + head * place_h
        gain = weights + batch * gain_b + token * gain_t + image * gain_n + head * gain_h
        for point in range(K):
            x = tl.load(place + 2 * point, mask=known, other=0.0) * width - 0.5
            y = tl.load(place + 2 * point + 1, mask=known, other=0.0) * height - 0.5
            weight = tl.load(gain + point, mask=known, other=0.0)
            left, top = tl.floor(x), tl.floor(y)
            right, down = x - left, y - top
            i, j = left.to(tl.int32), top.to(tl.int32)
            upper = (1 - right) * _corner(source, i, j, width, height, value_s, mask)
            upper += right * _corner(source, i + 1, j, width, height, value_s, mask)
            lower = (1 - right) * _corner(source, i, j + 1, width, height, value_s, mask)
            lower += right * _corner(source, i + 1, j + 1, width, height, value_s, mask)
            total += weight * ((1 - down) * upper + down * lower)
    tl.store(target, total, mask=mask)


@jit
def _sample_backward(
    grad, value, locations, weights, value_grad, location_grad, weight_grad,
    T, N, H, E, K, height, width, value_b, value_n, value_s, sum_b, sum_n, place_b, place_t, place_n, place_h,
    gain_b, gain_t, gain_n, gain_h, out_t, out_n, out_h, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one level's locations and weights; add to those of its pixels, which are float32."""
    row, batch = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.program_id(1).to(tl.int64)
    token, head = (row // H).to(tl.int64), row % H
    column, known = tl.arange(0, COLUMNS)[None, :], row < T * H
    mask = known & (column < E)
    g = tl.load(grad + (batch * T * H + row) * E + column, mask=mask, other=0.0).to(tl.float32)
    for image in range(N):
        source = value + batch * value_b + image * value_n + head * E + column
        sums = value_grad + batch * sum_b + image * sum_n + head * E + column
        place = locations + batch * place_b + token * place_t + image * place_n + head * place_h
        gain = weights + batch * gain_b + token * gain_t + image * gain_n + head * gain_h
        written = (batch * T + token) * out_t + image * out_n + head * out_h
        for point in range(K):
            x = tl.load(place + 2 * point, mask=known, other=0.0) * width - 0.5
            y = tl.load(place + 2 * point + 1, mask=known, other=0.0) * height - 0.5
            weight = tl.load(gain + point, mask=known, other=0.0)
            left, top = tl.floor(x), tl.floor(y)
            right, down = x - left, y - top
            i, j = left.to(tl.int32), top.to(tl.int32)
            a = tl.sum(g * _corner(source, i, j, width, height, value_s, mask), axis=1)[:, None]
            b = tl.sum(g * _corner(source, i + 1, j, width, height, value_s, mask), axis=1)[:, None]
            c = tl.sum(g * _corner(source, i, j + 1, width, height, value_s, mask), axis=1)[:, None]
            d = tl.sum(g * _corner(source, i + 1, j + 1, width, height, value_s, mask), axis=1)[:, None]
            upper, lower = (1 - right) * a + right * b, (1 - right) * c + right * d
            tl.store(weight_grad + written + point, (1 - down) * upper + down * lower, mask=known)
            x_grad = weight * width * ((1 - down) * (b - a) + down * (d - c))
            tl.store(location_grad + 2 * (written + point), x_grad, mask=known)
            tl.store(location_grad + 2 * (written + point) + 1, weight * height * (lower - upper), mask=known)
            share = weight * g
            _scatter(sums, i, j, width, height, E * H, mask, (1 - right) * (1 - down) * share)
            _scatter(sums, i + 1, j, width, height, E * H, mask, right * (1 - down) * share)
            _scatter(sums, i, j + 1, width, height, E * H, mask, (1 - right) * down * share)
            _scatter(sums, i + 1, j + 1, width, height, E * H, mask, right * down * share)


def _launches(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]
) -> Iterator[tuple[int, Tensor, tuple[Any, ...], tuple[int, ...]]]:
    """Yield for each level its index, its pixels, sizes that both kernels take, and strides of location and weight."""
    _, tokens, images, heads, _, points, _ = locations.shape
    for level, (height, width, part) in enumerate(_levels(value, shapes)):
        sizes = tokens, images, heads, value.shape[-1], points, height, width, *part.stride()[:3]
        yield level, part, sizes, (*locations.stride()[:4], *weights.stride()[:4])


def _tile(width: int) -> dict[str, int]:
    columns = power_of_2(width)
    return {"ROWS": max(1, TILE // columns), "COLUMNS": columns, "num_warps": 4}


def _packed(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs with float32 locations and weights; copies only where channels or points do not lie side by
    side, so that levels may share locations and guidance rows their images (stride 0)."""
    locations, weights = locations.float(), weights.float()
    heads_apart = value.stride()[-2:] != (value.shape[-1], 1)
    value = value.contiguous() if heads_apart else value
    locations = locations if locations.stride()[-2:] == (2, 1) else locations.contiguous()
    return value, locations, weights if weights.stride(-1) == 1 else weights.contiguous()


@operator("deformable")
def deformable(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:  # (B, T, H E)
    """Run `deformable_reference` by Triton, one kernel a level; nothing of N L K times the output's size is stored."""
    value, locations, weights = _packed(value, locations, weights)
    batch, tokens, _, heads, *_ = locations.shape
    out = torch.zeros(batch, tokens, heads * value.shape[-1], device=value.device, dtype=torch.float32)
    tile = _tile(value.shape[-1])
    grid = ceil_div(tokens * heads, tile["ROWS"]), batch
    for level, part, sizes, strides in _launches(value, locations, weights, shapes):
        launcher(_sample)[grid](
            part, locations[..., level, :, :], weights[..., level, :], out, *sizes, *strides, **tile
        )
    return out.to(value.dtype)


@operator("deformable_backward")
def deformable_backward(
    grad: Tensor,  # (B, T, H E)
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights; sums over tokens have no fixed order on a GPU."""
    grad, (value, locations, weights) = grad.contiguous(), _packed(value, locations, weights)
    batch, tokens, _, heads, *_ = locations.shape
    value_grad = torch.zeros(value.shape, device=value.device, dtype=torch.float32)
    location_grad = torch.zeros(locations.shape, device=value.device, dtype=torch.float32)
    weight_grad = torch.zeros(weights.shape, device=value.device, dtype=torch.float32)
    tile, sums = _tile(value.shape[-1]), [part for *_, part in _levels(value_grad, shapes)]
    grid = ceil_div(tokens * heads, tile["ROWS"]), batch
    for level, part, sizes, strides in _launches(value, locations, weights, shapes):
        launcher(_sample_backward)[grid](
            grad, part, locations[..., level, :, :], weights[..., level, :],
            sums[level], location_grad[..., level, :, :], weight_grad[..., level, :],
            *sizes, *sums[level].stride()[:2], *strides, *weight_grad.stride()[1:4], **tile,
        )  # fmt: skip
    return value_grad.to(value.dtype), location_grad, weight_grad


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.shapes = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    grads = deformable_backward(grad, value, locations, weights, ctx.shapes)
    return *(g.to(x.dtype) for g, x in zip(grads, ctx.saved_tensors, strict=True)), None


if triton is not None:
    deformable.register_autograd(_backward, setup_context=_keep)


def deformable_attention(
    value: Tensor,  # (B, N, S, H, E)
    locations: Tensor,  # (B, T, N, H, L, K, 2)
    weights: Tensor,  # (B, T, N, H, L, K)
    shapes: Sequence[tuple[int, int]],  # height and width of each level
) -> Tensor:  # (B, T, H E)
    """Return what `deformable_reference` does, by the kernel where it can run."""
    attend = ATTEND[_implementation(value.device, value.dtype, value.shape[-1])]
    return attend(value, locations, weights, [side for shape in shapes for side in shape])


ATTEND = {"triton": deformable, "hub": deformable_hub, "torch": deformable_reference}


@torch.compiler.assume_constant_result  # torch.compile cannot look into the choice
def _implementation(device: torch.device, dtype: torch.dtype, width: int) -> str:
    return select_kernel("deformable", device, dtype, width).implementation
