"""The image encoder of MM-Interleaved (arXiv 2401.10208, section 3.2): a ViT-Adapter around a frozen CLIP.

The adapter (Chen et al., arXiv 2205.08534, section 3) gives a plain ViT what dense tasks need: a small convolutional
network makes maps of finer and coarser resolution, which exchange features with groups of the ViT's layers. The result
is a pyramid of four levels.

Letters: N images, H and W pixels, h and w of a map, T patches of the ViT, U the other tokens before them (its class
token), M pixels of the three coarser levels, S of all four, C width of the ViT.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.deformable import deformable_attention
from .positions import pixel_centers, sincos_2d

Shapes = Sequence[tuple[int, int]]
STRIDE = 16  # pixels of a patch for the convolutions, to which an image is resized
LEVELS = 4  # of the pyramid, at 4, 2, 1 and 1/2 times the sides of the ViT's map


class ImageFeatures(NamedTuple):
    """What the encoder sees in N images."""

    pyramid: Tensor  # (N, S, C), levels behind one another, the finest first
    states: Tensor  # (N, U + T, C), the ViT's last states, before its final norm


class Grid(NamedTuple):
    """The places of the tokens of N images, for all interactions."""

    patches: tuple[int, int]  # h and w of the ViT's map
    shapes: Shapes  # of the three coarser levels
    patch_places: Tensor  # (T, 2)
    level_places: Tensor  # (M, 2)


class VitAdapter(nn.Module):
    """Make a feature pyramid from pixels and the layers of a frozen CLIP-like vision tower, which is given at each call
    and stays unchanged."""

    def __init__(
        self,
        width: int,  # C
        layers: int,  # of the vision tower
        *,
        interactions: int = 4,  # at most `layers`
        heads: int = 16,
        points: int = 4,
        ratio: float = 0.5,  # of the deformable attention's width to C
        ffn_ratio: float = 0.25,
        stem: int = 64,  # channels of the first convolutions, a multiple of 8
        resized: bool = True,  # False: the paper's sizes, a fourth of the image's sides and so on
        channel_norm: bool = False,  # as released: of the channels of each pixel, instead of groups of them
    ) -> None:
        super().__init__()
        self.resized, self.checkpointing = resized, False
        count = min(interactions, layers)
        each, more = divmod(layers, count)  # the first groups have one layer more
        ends = [each * number + min(number, more) for number in range(count + 1)]
        self.groups = [slice(*pair) for pair in pairwise(ends)]
        self.prior = SpatialPrior(width, stem, channel_norm)
        self.level_embedding = nn.Parameter(0.02 * torch.randn(LEVELS - 1, width))
        options = {"heads": heads, "points": points, "ratio": ratio}
        last = len(self.groups) - 1  # the last one has two extractors more
        self.interactions = nn.ModuleList(
            Interaction(width, 3 if index == last else 1, ffn_ratio, options) for index in range(last + 1)
        )
        self.up = nn.ConvTranspose2d(width, width, 2, 2)

    def shapes(self, height: int, width: int, patch: int) -> list[tuple[int, int]]:
        """Return (h, w) of each level for images of H x W pixels and a tower with patches of so many pixels."""
        size = self._size(height, width, patch)
        halved = [[-(-side // 2**times) for times in range(2, 2 + LEVELS)] for side in size]
        return list(zip(*halved, strict=True))

    def _size(self, height: int, width: int, patch: int) -> tuple[int, int]:
        """Return the sides of the image that the convolutions take."""
        return (height // patch * STRIDE, width // patch * STRIDE) if self.resized else (height, width)

    def forward(self, tower: nn.Module, pixels: Tensor) -> ImageFeatures:  # (N, 3, H, W)
        """Encode N preprocessed images by a vision tower of transformers (CLIPVisionModel, or one built alike)."""
        tower, patch, dtype = getattr(tower, "vision_model", tower), tower.config.patch_size, self.up.weight.dtype
        size, shapes = self._size(*pixels.shape[2:], patch), self.shapes(*pixels.shape[2:], patch)
        hidden = tower.embeddings(pixels, interpolate_pos_encoding=True)
        hidden = getattr(tower, "pre_layrnorm", nn.Identity())(hidden)  # as transformers spells it; (N, U + T, C)
        image = pixels.to(dtype)
        if tuple(image.shape[2:]) != size:
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        finest, *coarser = self.prior(image)
        tokens = [_rows(level) + embedding for level, embedding in zip(coarser, self.level_embedding, strict=True)]
        patches = pixels.shape[2] // patch, pixels.shape[3] // patch
        places = torch.cat([pixel_centers(*shape, pixels.device) for shape in shapes[1:]])
        grid = Grid(patches, shapes[1:], pixel_centers(*patches, pixels.device), places)
        levels, maps, count = torch.cat(tokens, dim=1), [], patches[0] * patches[1]
        for group, interaction in zip(self.groups, self.interactions, strict=True):
            inputs = tower.encoder.layers[group], hidden, levels, grid
            if self.checkpointing and torch.is_grad_enabled():
                hidden, levels = checkpoint(interaction, *inputs, use_reentrant=False)
            else:
                hidden, levels = interaction(*inputs)
            maps.append(hidden[:, -count:])
        return ImageFeatures(self._pyramid(finest, levels, maps, grid, shapes), hidden)

    def _pyramid(self, finest: Tensor, levels: Tensor, maps: list[Tensor], grid: Grid, shapes: Shapes) -> Tensor:
        """Return the pyramid (N, S, C): all levels with the ViT's states (N, T, C) of an early to the last interaction
        and positions added."""
        parts = levels.split([h * w for h, w in grid.shapes], dim=1)
        coarser = [_map(part, shape) for part, shape in zip(parts, grid.shapes, strict=True)]
        height, width = shapes[0]
        found = [finest + self.up(coarser[0])[..., :height, :width], *coarser]
        for level, shape in enumerate(shapes):
            states = _map(maps[-(-(level + 1) * len(maps) // LEVELS) - 1], grid.patches)
            states = F.interpolate(states.to(finest.dtype), size=shape, mode="bilinear", align_corners=False)
            places = sincos_2d(finest.shape[1], shape, finest.device, grid.patches)
            found[level] = _rows(found[level] + states) + places.to(finest)
        return torch.cat(found, dim=1)


def _rows(x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, h w, C)
    return x.flatten(2).transpose(1, 2)


def _map(x: Tensor, shape: Sequence[int]) -> Tensor:  # (N, h w, C) -> (N, C, h, w)
    return x.transpose(1, 2).unflatten(2, tuple(shape))


class SpatialPrior(nn.Module):
    """Convolutions that make four maps of C channels, a fourth to a 32nd of the image's sides."""

    def __init__(self, width: int, stem: int, channel_norm: bool) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            norm = ChannelNorm(outputs, 1e-6) if channel_norm else nn.GroupNorm(8, outputs)
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm, nn.ReLU())

        first = [layer(3, stem, 2), layer(stem, stem, 1), layer(stem, stem, 1), nn.MaxPool2d(3, 2, 1)]
        widths = stem, 2 * stem, 4 * stem, 4 * stem
        deeper = [layer(a, b, 2) for a, b in pairwise(widths)]
        self.stages = nn.ModuleList([nn.Sequential(*first), *deeper])
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)

    def forward(self, x: Tensor) -> list[Tensor]:  # (N, 3, H, W) -> four of (N, C, h, w)
        found = []
        for stage, project in zip(self.stages, self.project, strict=True):
            x = stage(x)
            found.append(project(x))
        return found


class ChannelNorm(nn.LayerNorm):
    """LayerNorm of the channels of each pixel of maps (N, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Interaction(nn.Module):
    """Inject the levels into the ViT's tokens, run a group of its layers, extract features into the levels."""

    def __init__(self, width: int, extractors: int, ffn_ratio: float, options: dict[str, Any]) -> None:
        super().__init__()
        self.query_norm, self.level_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inject = DeformableAttention(width, LEVELS - 1, **options)
        self.gamma = nn.Parameter(torch.zeros(width))  # the ViT begins as it was
        self.extractors = nn.ModuleList(Extractor(width, ffn_ratio, options) for _ in range(extractors))

    def forward(self, layers: nn.ModuleList, hidden: Tensor, levels: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return tokens (N, U + T, C) of the ViT and of the levels (N, M, C)."""
        count, dtype = len(grid.patch_places), levels.dtype
        others, tokens = hidden[:, :-count], hidden[:, -count:]
        query, features = self.query_norm(tokens.to(dtype)), self.level_norm(levels)
        read = self.inject(query, features, grid.patch_places, grid.shapes)
        hidden = torch.cat([others, tokens + (self.gamma * read).to(tokens.dtype)], dim=1)
        for layer in layers:
            hidden = layer(hidden, attention_mask=None)
        for extractor in self.extractors:
            levels = extractor(levels, hidden[:, -count:].to(dtype), grid)
        return hidden, levels


class Extractor(nn.Module):
    """Let the levels read the ViT's tokens; then a feed-forward layer with a depthwise convolution of each level."""

    def __init__(self, width: int, ffn_ratio: float, options: dict[str, Any]) -> None:
        super().__init__()
        self.query_norm, self.token_norm, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention, inner = DeformableAttention(width, 1, **options), int(width * ffn_ratio)
        self.rise, self.fall = nn.Linear(width, inner), nn.Linear(inner, width)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)

    def forward(self, levels: Tensor, tokens: Tensor, grid: Grid) -> Tensor:  # (N, M, C), (N, T, C)
        query, features = self.query_norm(levels), self.token_norm(tokens)
        levels = levels + self.attention(query, features, grid.level_places, [grid.patches])
        parts = self.rise(self.norm(levels)).split([h * w for h, w in grid.shapes], dim=1)
        rows = [_rows(self.conv(_map(part, shape))) for part, shape in zip(parts, grid.shapes, strict=True)]
        return levels + self.fall(F.gelu(torch.cat(rows, dim=1)))


class DeformableAttention(nn.Module):
    """Deformable attention to the levels of one image (Zhu et al., arXiv 2010.04159, section 4.1)."""

    def __init__(self, width: int, levels: int, *, heads: int, points: int, ratio: float) -> None:
        super().__init__()
        self.shape, inner = (heads, levels, points), int(width * ratio)
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.logits = nn.Linear(width, heads * levels * points)
        self.value, self.output = nn.Linear(width, inner), nn.Linear(inner, width)
        for parameter in (self.offsets.weight, self.logits.weight, self.logits.bias):
            nn.init.zeros_(parameter)
        angles = torch.arange(heads) * (2 * torch.pi / heads)  # each head looks to another side, each point farther
        sides = torch.stack([angles.cos(), angles.sin()], dim=-1)
        sides = sides / sides.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None] * sides[:, None, None]
        self.offsets.bias.data = steps.expand(-1, levels, -1, -1).flatten().contiguous()

    def forward(self, query: Tensor, features: Tensor, places: Tensor, shapes: Shapes) -> Tensor:  # (N, T, C)
        """Read features (N, S, C) around the places (T, 2) of the queries (N, T, C)."""
        offsets = self.offsets(query).float().unflatten(-1, (*self.shape, 2))  # in pixels of each level
        sides = offsets.new_tensor([[w, h] for h, w in shapes])[:, None]  # (L, 1, 2)
        locations = places[:, None, None, None] + offsets / sides
        weights = self.logits(query).float().unflatten(-1, self.shape).flatten(-2).softmax(-1)
        weights = weights.unflatten(-1, self.shape[1:])
        value = self.value(features).unflatten(-1, (self.shape[0], -1))
        return self.output(deformable_attention(value[:, None], locations[:, :, None], weights[:, :, None], shapes))
