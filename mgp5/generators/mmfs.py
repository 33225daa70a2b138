"""MMFS, deformable attention to feature pyramids of all earlier images (MM-Interleaved, arXiv 2401.10208, section 3.2).

A query, a token of the LLM or a pixel of a UNet, reads a few points of every level of every image that it may see.
In the UNet, as released, it reads for the maps of the skip connections and of the mid block, and what it reads is added
to them before the up path; the paper's text puts it behind the up blocks.

Letters: B batch, R rows of a UNet's call, T queries of width D, N images, L levels, S pixels of all levels of an image,
C width of their features, H heads, E width of a head, K points, h and w of a map. `shapes` are (h, w) of each level, in
the order in which they lie behind one another in S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones.positions import pixel_centers, sincos_2d
from ..errors import Mgp5Error
from ..kernels.deformable import deformable_attention

Shapes = Sequence[tuple[int, int]]


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
        return self.output(deformable_attention(value, locations, null_softmax(logits, visible), shapes))

    def _by_image(self, layer: nn.Linear, query: Tensor, ranks: Tensor) -> Tensor:  # (B, T, N, out)
        """Return `layer` of query + embedding of the rank; the sum itself would be N times the query's size."""
        used = self.ranks.weight[: ranks.shape[-1] + 1]  # a rank is at most N
        out = layer(query)[:, :, None] + nn.functional.linear(used, layer.weight)[ranks]
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

    def read(self, hidden: Tensor, value: Tensor | None, visible: Tensor | None, shapes: Shapes) -> Tensor:
        """Return what states (B, T, D) read, gated; without images (None) as where none is visible."""
        if value is None:
            read = self.mmfs.output.bias
        else:
            read = self.mmfs(self.norm(hidden.to(self.norm.weight.dtype)), value, visible, shapes)
        return (self.gate.tanh() * read).to(hidden.dtype)

    def forward(self, hidden: Tensor, *inputs: Any) -> Tensor:  # (B, T, D)
        """Return states with what they read added; arguments as of `read`."""
        return hidden + self.read(hidden, *inputs)


class MMFSBlock(nn.Module):
    """MMFS of a UNet's feature map: every pixel reads around its own place; a convolution of zeros, as ControlNet's,
    leaves the UNet as it was."""

    def __init__(self, width: int, feature_width: int, *, side: int | None = None, **options: float) -> None:
        super().__init__()
        self.base = side and (side, side)  # of the map that has the positions; those of other sizes are interpolated
        self.norm, self.feature_norm = nn.LayerNorm(width, 1e-6), nn.LayerNorm(feature_width, 1e-6)
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
        query = query + sincos_2d(query.shape[-1], size, x.device, self.base).to(dtype)
        read = self.mmfs(query, value, visible[:, None], shapes, pixel_centers(*size, x.device))
        return self.conv(read.transpose(1, 2).unflatten(2, size)).to(x.dtype)


def skip_maps(config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield channels and level of each skip connection of a UNet2DConditionModel, and last those of its mid block.

    Level i has the latents' sides divided by 2**i. Stable Diffusion 1 and 2: 4 maps of 320 channels, 3 of 640, 5 of
    1280, and 1280 of the mid block.
    """
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    yield widths[0], 0
    for level, width in enumerate(widths):
        for _ in range(layers if isinstance(layers, int) else layers[level]):
            yield width, level
        if level < len(widths) - 1:
            yield width, level + 1  # of the downsampler
    yield widths[-1], len(widths) - 1


class UNetMMFS(nn.Module):
    """The MMFS blocks of a UNet, one for each skip connection and one for the mid block, which is the last."""

    def __init__(
        self,
        config: Mapping[str, Any],  # of the UNet
        feature_width: int,
        shapes: Shapes,  # (h, w) of the levels of an earlier image's pyramid
        **options: float,  # of MMFS
    ) -> None:
        super().__init__()
        size = config["sample_size"]
        size, self.shapes = size if isinstance(size, int) else max(size), shapes
        self.blocks = nn.ModuleList(
            MMFSBlock(width, feature_width, side=size, levels=len(shapes), base=size / 2**level, **options)
            for width, level in skip_maps(config)
        )
        self._residuals: list[Tensor] | None = None  # of the current call of the UNet

    def forward(self, features: Tensor, visible: Tensor) -> list[Tensor]:
        """Return the `residuals` of a call of the UNet: what does not depend on its maps, computed once for an image.

        Features (B, N, S, C), of N >= 0 earlier images, and visible (B, N) bool, the nearest last. Returns visible and
        for each block the projected features (B, N, S, H, E).
        """
        features = features.to(self.blocks[0].feature_norm.weight.dtype)
        return [visible, *(block.values(features) for block in self.blocks)]

    def attach(self, unet: nn.Module) -> None:
        """Let a UNet2DConditionModel take `residuals` as an argument. Raises Mgp5Error for another denoiser."""
        if sum(len(block.resnets) for block in getattr(unet, "up_blocks", ())) != len(self.blocks) - 1:
            case = f"a {type(unet).__name__} without {len(self.blocks) - 1} skip connections"
            raise Mgp5Error(f"MMFS residuals of {case}", "take a Stable Diffusion 1 or 2")

        # Functions, not methods: a copy of the UNet, as engines make, copies methods with all their weights.
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            self._residuals = kwargs.pop("residuals", None)
            return args, kwargs

        def end(*_: Any) -> None:
            self._residuals = None

        unet.register_forward_pre_hook(begin, with_kwargs=True)
        unet.register_forward_hook(end, always_call=True)
        first = len(self.blocks) - 1
        for layer in unet.up_blocks:
            first -= len(layer.resnets)
            layer.register_forward_pre_hook(self._skips_hook(first), with_kwargs=True)
        if unet.mid_block is not None:
            unet.mid_block.register_forward_hook(lambda layer, _, output: self._add(-1, output, layer))

    def _skips_hook(self, first: int) -> Callable[..., Any]:
        """Return a hook that adds residuals to the maps that an up block takes; the first has the index `first`."""

        def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            maps = kwargs["res_hidden_states_tuple"]
            kwargs["res_hidden_states_tuple"] = tuple(self._add(first + i, x, layer) for i, x in enumerate(maps))
            return args, kwargs

        return add

    def _add(self, index: int, x: Tensor, layer: nn.Module) -> Tensor:  # (R, channels, h, w)
        if self._residuals is None:
            return x
        visible, *values = self._residuals
        inputs = x, values[index], visible, self.shapes
        if layer.gradient_checkpointing and torch.is_grad_enabled():
            return x + checkpoint(self.blocks[index], *inputs, use_reentrant=False)
        return x + self.blocks[index](*inputs)
