"""Perceiver resamplers of MM-Interleaved (arXiv 2401.10208, section 3.2): a few learned queries read a sequence.

Letters: N images, T tokens of a sequence, K queries, U tokens of a ViT before its patches, C width of the ViT.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from .positions import sincos_2d


class HeadNorm(nn.LayerNorm):
    """LayerNorm of each head of states (..., heads times width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, *self.normalized_shape))).flatten(-2)


class Resampler(nn.Module):
    """Read K learned queries out of a sequence by a Q-Former (BLIP-2, Li et al., arXiv 2301.12597).

    With `qk_norm`, as released for images, queries and keys of every head have a LayerNorm.
    """

    def __init__(
        self,
        inputs: int,
        *,
        queries: int,
        width: int,
        layers: int,
        heads: int,
        inner: int = 0,  # width of the feed-forward layers; 0: four times `width`
        every: int = 1,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner or 4 * width,
            encoder_hidden_size=inputs,
            cross_attention_frequency=every,  # one layer in so many reads the sequence
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.queries, self.qformer = nn.Parameter(0.02 * torch.randn(1, queries, width)), Blip2QFormerModel(config)
        for name, module in list(self.qformer.named_modules()):
            if qk_norm and name.endswith((".query", ".key")):
                self.qformer.set_submodule(name, nn.Sequential(module, HeadNorm(width // heads, config.layer_norm_eps)))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:  # (N, T, inputs), (N, T) of 1 and 0
        """Return K states (N, K, width)."""
        queries = self.queries.expand(len(states), -1, -1)
        return self.qformer(queries, encoder_hidden_states=states, encoder_attention_mask=mask).last_hidden_state


class VisualTokens(nn.Module):
    """Turn the ViT's last states into K embeddings of an image for the LLM, 64 as released, 32 in the paper's
    ablations."""

    def __init__(self, width: int, outputs: int, *, queries: int = 64, inner: int = 768, **options: Any) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.norm, self.placed_norm = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)  # before and with positions
        defaults = {"layers": 12, "heads": 12, "every": 2, "qk_norm": True}
        self.resampler = Resampler(width, queries=queries, width=inner, **defaults | options)
        self.output = nn.Linear(inner, outputs)
        nn.init.normal_(self.output.weight, std=1e-3)
        nn.init.zeros_(self.output.bias)

    def forward(self, states: Tensor, patches: tuple[int, int]) -> Tensor:  # (N, U + T, C)
        """Return (N, K, outputs); `patches` are h and w of the ViT's map, the tokens before them have no position."""
        places = sincos_2d(states.shape[-1], patches, states.device)
        places = F.pad(places, (0, 0, states.shape[1] - len(places), 0))
        states = self.norm(self.project(states.to(self.norm.weight.dtype)))
        return self.output(self.resampler(self.placed_norm(states + places.to(states))))
