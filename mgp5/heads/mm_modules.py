"""The trained parts of MM-Interleaved (arXiv 2401.10208, section 3.2) between a vision tower, an LLM and a UNet.

Letters: N images, P target images, S visual tokens of one image, X pixels of all levels of its pyramid, V width of the
vision tower, B batch, T tokens, D LLM width, L condition length, C condition width, H heads and E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..backbones.positions import sincos
from ..backbones.resampler import Resampler, VisualTokens
from ..backbones.vit_adapter import VitAdapter
from ..generators.mmfs import GatedMMFS
from .settings import MMInterleavedConfig

if TYPE_CHECKING:
    from ..backbones import Backbone

LLM_LEVELS = 3  # the LLM attends to the coarser ones of four


class ImageEncoder(nn.Module):
    """Encode images to visual tokens for the sequence and a feature pyramid, by a frozen vision tower."""

    def __init__(self, config: MMInterleavedConfig) -> None:
        super().__init__()
        sizes, (height, width) = config.sizes, config.image_size
        shape = {"interactions": sizes.interactions, "heads": sizes.adapter_heads, "points": sizes.adapter_points}
        shape |= {"stem": sizes.stem, "resized": sizes.resized, "channel_norm": sizes.channel_norm}
        self.adapter = VitAdapter(config.vision_width, config.vision_layers, **shape)
        shape = {"queries": sizes.queries, "inner": sizes.token_width, "layers": sizes.token_layers}
        shape |= {"heads": sizes.token_heads, "every": sizes.token_every}
        self.tokens = VisualTokens(config.vision_width, config.llm_width, **shape)
        self.shapes = self.adapter.shapes(height, width, config.patch)  # of the pyramid
        self.patches = height // config.patch, width // config.patch

    def forward(self, tower: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return visual tokens (N, S, D) and pyramids (N, X, V) of preprocessed images (N, 3, H, W)."""
        features = self.adapter(tower, pixels)
        return self.tokens(features.states, self.patches), features.pyramid


class LayersMMFS(nn.ModuleList):
    """The gated MMFS of every n-th layer of an LLM: it attends to the images so far. And the bias of the token that
    begins an image, which as released is beside the LLM's head."""

    def __init__(self, config: MMInterleavedConfig, shapes: Sequence[tuple[int, int]]) -> None:
        sizes = config.sizes
        self.shapes = shapes[-LLM_LEVELS:]
        self.pixels = sum(h * w for h, w in self.shapes)
        shape = {"levels": LLM_LEVELS, "base": max(self.shapes[1]), "heads": sizes.heads, "points": sizes.points}
        options = {**shape, "images": sizes.images}
        count = len(range(0, config.llm_layers, sizes.every)) if sizes.every else 0
        super().__init__(GatedMMFS(config.llm_width, config.vision_width, **options) for _ in range(count))
        self.bias = nn.Parameter(torch.zeros(()))

    def values(self, pyramid: Tensor) -> Tensor | None:  # (N, X, V) -> (N, layers, levels' pixels, H, E)
        """Project the features of images for all layers; they do not depend on what attends to them."""
        pyramid = pyramid[:, -self.pixels :]
        return torch.stack([mmfs.values(pyramid) for mmfs in self], dim=1) if len(self) else None

    def attach(self, backbone: Backbone, every: int, token: int) -> None:
        """Let every n-th layer attend to `backbone.side`, and add the bias of `token`. Raises Mgp5Error for layers that
        are not LLaMA's."""
        backbone.biases[token] = lambda: self.bias

        def reader(index: int, mmfs: GatedMMFS) -> Callable[[Tensor], Tensor]:
            def read(hidden: Tensor) -> Tensor:
                if backbone.side is None:
                    return mmfs.read(hidden, None, None, self.shapes)
                features, count, first = backbone.side
                images = torch.arange(features.shape[1], device=count.device)
                visible = images < count[..., None]  # (B, T, N)
                visible = visible if first is None else visible & (images >= first[..., None])
                return mmfs.read(hidden, features[:, :, index], visible, self.shapes)

            return read

        for index, mmfs in enumerate(self):
            backbone.add_after_attention(index * every, reader(index, mmfs))


class Conditioner(nn.Module):
    """Turn all states of the LLM before an image to the condition of its generator."""

    def __init__(self, config: MMInterleavedConfig) -> None:
        super().__init__()
        sizes, (length, width) = config.sizes, config.condition
        self.project = nn.Linear(config.llm_width, config.llm_width)
        shape = {"layers": sizes.context_layers, "heads": sizes.context_heads, "inner": sizes.context_inner}
        self.resampler = Resampler(config.llm_width, queries=length, width=width, **shape)
        self.unconditional = nn.Parameter(torch.zeros(1, length, width))  # takes the condition's place for guidance

    def forward(self, states: Tensor, lengths: Sequence[int] | None = None) -> Tensor:  # (P, T, D) -> (P, L, C)
        """Return the condition from states in reversed order: the first is that of the token that begins the image.

        `lengths` are those without padding; None: all are T.
        """
        states, mask = self.project(states.to(self.project.weight.dtype)), None
        places = torch.arange(states.shape[1], device=states.device)
        if lengths is not None and min(lengths) < len(places):
            mask = (places < torch.tensor(lengths, device=states.device)[:, None]).long()
        return self.resampler(states + sincos(places, states.shape[2]).to(states), mask)


def reversed_contexts(
    hidden: Tensor, rows: Sequence[int], starts: Sequence[int], begins: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Return the states (P, T, D) from position `starts` back to `begins` of rows of hidden (B, T, D), padded with
    zeros, and their P lengths."""
    runs = [hidden[r, b : s + 1].flip(0) for r, s, b in zip(rows, starts, begins, strict=True)]
    return pad_sequence(runs, batch_first=True), list(map(len, runs))
