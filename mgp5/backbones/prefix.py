"""Prefix tuning (Li & Liang, arXiv 2101.00190): learned keys and values before all tokens, in every layer.

Letters: B batch; other dimensions are named as in transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

States = list[tuple[Tensor, Tensor]]  # (keys, values) of each layer, both (B, num_heads, num_tokens, head_dim)


def prefix_encoder(text: Any, num_tokens: int, hidden: int) -> nn.Module:
    """Build the trainable part: embeddings of virtual tokens, and an MLP to all keys and values (section 4.3).

    Args:
        text: configuration of the language model.
        num_tokens: virtual tokens.
        hidden: hidden width of the MLP.
    """
    from peft import PrefixEncoder, PrefixTuningConfig

    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    config = PrefixTuningConfig(
        num_virtual_tokens=num_tokens,
        num_layers=text.num_hidden_layers,
        num_attention_heads=text.num_key_value_heads,
        token_dim=text.num_key_value_heads * width,
        encoder_hidden_size=hidden,
        prefix_projection=True,
    )
    encoder = PrefixEncoder(config)
    encoder.shape = (num_tokens, 2 * config.num_layers, config.num_attention_heads, width)
    return encoder


def prefix_states(encoder: nn.Module, batch: int, dtype: torch.dtype = torch.float32) -> States:
    """Return the keys and values of the prefix in each layer, for a batch of B rows."""
    tokens = torch.arange(encoder.shape[0], device=encoder.embedding.weight.device)
    states = (
        encoder(tokens).to(dtype).view(encoder.shape).permute(1, 2, 0, 3)
    )  # (2 num_layers, num_heads, num_tokens, head_dim)
    pairs = states.expand(batch, *states.shape).transpose(0, 1).split(2)
    return [(keys, values) for keys, values in pairs]


def fixed_cache(states: States) -> Cache:
    """Return a cache for training, which gives the prefix to every layer and stores no tokens."""
    return Cache(layers=[_FixedLayer(*pair) for pair in states])


class _FixedLayer(DynamicLayer):
    """A cache layer that does not grow: with gradient checkpointing a layer runs twice on the same keys and values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        super().update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        states = (self.keys, key_states), (self.values, value_states)
        keys, values = (torch.cat([prefix.to(new.dtype), new], dim=-2) for prefix, new in states)
        return keys, values
