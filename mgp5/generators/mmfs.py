"""MMFS, deformable attention to feature pyramids of all earlier images (MM-Interleaved, arXiv 2401.10208, section 3.2).

A query, a token of the LLM or a pixel of a UNet, reads a few points of every level of every image that it may see.

Letters: B batch, T queries of width D, N images, L levels, S pixels of all levels of an image, C width of their
features, H heads, E width of a head, K points, h and w of a map. `shapes` are (h, w) of each level, in the order in
which they lie behind one another in S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.registry import select_kernel

Shapes = Sequence[tuple[int, int]]


def deformable(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:  # (B, T, H E)
    """Sum samples of value (B, N, S, H, E) at locations (B, T, N, H, L, K, 2) with weights (B, T, N, H, L, K), by the
    kernel where it can run; see `kernels.deformable`."""
    chosen = select_kernel("deformable", value.device, value.dtype, value.shape[-1])
    return chosen.function(value, locations, weights, [side for shape in shapes for side in shape])


def image_ranks(visible: Tensor) -> Tensor:  # (B, T, N) bool -> int64
    """Return the position of each image before a query: 1 for the nearest that it may see, then 2, 3; 0 for masked."""
    return visible.flip(-1).cumsum(-1).flip(-1) * visible


def null_softmax(logits: Tensor, visible: Tensor) -> Tensor:  # (B, T, N, H, L, K), (B, T, N) bool
    """Return the softmax over images, levels and points together with one more logit of 0, which attends to nothing.

    So weights sum to less than 1, and to 0 where nothing is visible. The release has such a logit of -log(N L) for
    each image and level: their sum is the same.
    """
    logits = logits.masked_fill(~visible[..., None, None, None], -math.inf)
    rows = logits.transpose(2, 3).flatten(3)  # (B, T, H, N L K)
    weights = nn.functional.pad(rows, (0, 1)).softmax(-1)[..., :-1]
    return weights.unflatten(3, (logits.shape[2], *logits.shape[4:])).transpose(2, 3)


def pixel_centers(height: int, width: int, device: torch.device | None = None) -> Tensor:  # (h w, 2)
    """Return x and y of the centres of the pixels of a map, in (0, 1), in reading order."""
    y, x = ((torch.arange(size, device=device) + 0.5) / size for size in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1)


def sincos(positions: Tensor, width: int) -> Tensor:  # (...) -> (..., width)
    """Return sines and cosines of positions at wavelengths from 2 pi to 20000 pi (Vaswani et al., arXiv 1706.03762);
    `width` is even."""
    rates = 10000.0 ** -(torch.arange(width // 2, device=positions.device) / (width // 2))
    angles = positions[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(width: int, height_width: tuple[int, int], device: torch.device | None = None) -> Tensor:  # (h w, width)
    """Return position embeddings of the pixels of a map: half for the column, half for the row; `width` is a multiple
    of 4."""
    rows, columns = (torch.arange(size, device=device) for size in height_width)
    grid = torch.meshgrid(columns, rows, indexing="xy")
    return torch.cat([sincos(axis.flatten(), width // 2) for axis in grid], dim=-1)


class MMFS(nn.Module):
    """Multi-image multi-scale feature synchronizer (eq. 4).

    Each image gets its own points and logits, from the query and from how near it is. Offsets are in pixels of a map
    with `base` pixels a side, whatever the level: the points of all levels lie at the same places of the image.
    """

    def __init__(
        self,
        width: int,
        feature_width: int,
        *,
        levels: int,
        base: float,  # of the offsets: sides of a map
        inner: int | None = None,  # H E, None for `feature_width`
        heads: int = 16,
        points: int = 8,
        spread: float = 3.0,  # of the first offsets, in pixels
        images: int = 50,  # most images that are told apart; those farther away have the last embedding
    ) -> None:
        super().__init__()
        self.base, self.shape, inner = base, (heads, levels, points), inner or feature_width
        self.query = nn.Linear(width, width)
        self.ranks = nn.Embedding(images + 1, width)
        self.offsets = nn.Linear(width, heads * points * 2)
        self.logits = nn.Linear(width, heads * levels * points)
        self.value, self.output = nn.Linear(feature_width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.offsets.weight)
        nn.init.uniform_(self.offsets.bias, -spread, spread)
        for weight in (self.logits.weight, self.ranks.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.logits.bias)

    def values(self, features: Tensor) -> Tensor:  # (..., S, C) -> (..., S, H, E)
        """Project features of images; they do not depend on the query, so an image is projected once."""
        return self.value(features).unflatten(-1, (self.shape[0], -1))

    def forward(
        self,
        query: Tensor,  # (B, T, D)
        value: Tensor,  # (B, N, S, H, E), from `values`
        visible: Tensor,  # (B, T or 1, N) bool, the images that a query may see; the nearest is the last
        shapes: Shapes,
        reference: Tensor | None = None,  # (T, 2) in [0, 1], the places of the queries; None: the centre
    ) -> Tensor:  # (B, T, D)
        """Return what the queries read; where nothing is visible, the bias of `output`."""
        heads, levels, points = self.shape
        query, ranks = self.query(query), image_ranks(visible).clamp(max=self.ranks.num_embeddings - 1)
        offsets = self._by_image(self.offsets, query, ranks).unflatten(-1, (heads, 1, points, 2))
        logits = self._by_image(self.logits, query, ranks).unflatten(-1, (heads, levels, points))
        center = 0.5 if reference is None else reference[:, None, None, None, None]
        locations = (center + offsets / self.base).expand(-1, -1, -1, -1, levels, -1, -1)
        return self.output(deformable(value, locations, null_softmax(logits, visible), shapes))

    def _by_image(self, layer: nn.Linear, query: Tensor, ranks: Tensor) -> Tensor:  # (B, T, N, out)
        """Return `layer` of query + embedding of the rank; the sum itself would be N times the query's size."""
        out = layer(query)[:, :, None] + nn.functional.linear(self.ranks.weight, layer.weight)[ranks]
        return out.to(torch.promote_types(out.dtype, torch.float32))  # half precision is too coarse for places


class GatedMMFS(nn.Module):
    """MMFS of a layer of the LLM, between self-attention and MLP; its gate, tanh(0), leaves the LLM as it was."""

    def __init__(self, width: int, feature_width: int, *, eps: float = 1e-6, **options: float) -> None:
        super().__init__()
        self.norm, self.feature_norm = nn.RMSNorm(width, eps), nn.RMSNorm(feature_width, eps)
        self.mmfs, self.gate = MMFS(width, feature_width, **options), nn.Parameter(torch.zeros(()))

    def values(self, features: Tensor) -> Tensor:  # (..., S, C) -> (..., S, H, E)
        """Normalize and project features; see `MMFS.values`."""
        return self.mmfs.values(self.feature_norm(features))

    def forward(self, hidden: Tensor, value: Tensor | None, visible: Tensor | None, shapes: Shapes) -> Tensor:
        """Return states (B, T, D) with what they read added; without images (None) as where none is visible."""
        if value is None:
            read = self.mmfs.output.bias
        else:
            read = self.mmfs(self.norm(hidden.to(self.norm.weight.dtype)), value, visible, shapes)
        return hidden + (self.gate.tanh() * read).to(hidden.dtype)


class MMFSBlock(nn.Module):
    """MMFS of a UNet's feature map: every pixel reads around its own place; a convolution of zeros, as ControlNet's,
    leaves the UNet as it was."""

    def __init__(self, width: int, feature_width: int, **options: float) -> None:
        super().__init__()
        self.norm, self.feature_norm = nn.LayerNorm(width), nn.LayerNorm(feature_width)
        self.mmfs, self.conv = MMFS(width, feature_width, **{"spread": 1.0, **options}), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def values(self, features: Tensor) -> Tensor:  # (..., S, C) -> (..., S, H, E)
        """Normalize and project features; see `MMFS.values`."""
        return self.mmfs.values(self.feature_norm(features))

    def forward(self, x: Tensor, value: Tensor, visible: Tensor, shapes: Shapes) -> Tensor:  # (B, D, h, w)
        """Return the residual of a map (B, D, h, w), in its dtype; value (B, N, S, H, E), visible (B, N) bool."""
        size, dtype = x.shape[2:], self.norm.weight.dtype
        query = self.norm(x.flatten(2).transpose(1, 2).to(dtype))  # (B, T, D)
        query = query + sincos_2d(query.shape[-1], size, x.device).to(dtype)
        read = self.mmfs(query, value, visible[:, None], shapes, pixel_centers(*size, x.device))
        return self.conv(read.transpose(1, 2).unflatten(2, size)).to(x.dtype)
