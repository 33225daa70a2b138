"""A static key-value cache for rows of different lengths; reading or removing tokens copies nothing. And a prefix.

A row holds one conversation, a slot of a row one token. Letters: B rows of the cache, b rows of one forward, T new
tokens of a row; other dimensions are named as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

States = list[tuple[Tensor, Tensor]]  # (keys, values) of each layer, both (B, num_heads, num_tokens, head_dim)
SMALLEST = 256  # initial slots of a row
PIECE = 2048  # tokens of a row that are read at once: a mask of 32k x 32k would take 7 GiB


@dataclass
class CacheIndex:
    """The rows and slots that a forward reads and writes, shared by all layers."""

    num_rows: int  # B
    capacity: int = SMALLEST  # slots of a row
    rows: Tensor | None = None  # (b,), the rows of the next forward
    slots: Tensor | None = None  # (b, T), the slots of their new tokens
    width: int = 0  # how many slots, counted from the first, the next forward attends to
    all_rows: bool = True  # whether `rows` are all rows in order, so that none have to be gathered

    def at(self, rows: Tensor, slots: Tensor, width: int, all_rows: bool) -> None:
        """Set the rows and slots of the next forward."""
        self.rows, self.slots, self.width, self.all_rows = rows, slots, width, all_rows


class KVCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, each (B, num_heads, capacity, head_dim); a prefix (1, num_heads, prefix length,
    head_dim) fills the first slots of every row."""

    is_sliding = False

    def __init__(self, index: CacheIndex, prefix: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.index, self.prefix = index, prefix

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate buffers of zeros: masked slots are multiplied by 0, which NaN would survive."""
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        for buffer, prefix in zip((self.keys, self.values), self.prefix or (), strict=False):
            buffer[:, :, : prefix.shape[2]] = prefix
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values (b, num_heads, T, head_dim); return those to attend to, `width` slots of each row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        index = self.index
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if index.num_rows == 1:  # the same as below, but faster
                buffer.index_copy_(2, index.slots[0], states)
            else:
                buffer[index.rows[:, None], :, index.slots] = states.transpose(1, 2)
        keys, values = self.keys[:, :, : index.width], self.values[:, :, : index.width]
        return (keys, values) if index.all_rows else (keys[index.rows], values[index.rows])

    def grow(self) -> None:
        """Copy keys and values to buffers of `index.capacity` slots."""
        if self.is_initialized:
            for name in ("keys", "values"):
                old = getattr(self, name)
                setattr(self, name, self._empty(old))
                getattr(self, name)[:, :, : old.shape[2]] = old

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return width and offset of a mask for transformers; the decoder passes its own mask."""
        return self.index.width, 0

    def get_seq_length(self) -> int:
        """Return how many slots the forward attends to, as rows have different lengths."""
        return self.index.width

    def get_max_length(self) -> int:
        """Return the number of slots of a row."""
        return self.index.capacity

    def _empty(self, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        with torch.inference_mode(False):  # else the buffers could only be written in inference mode
            return like.new_zeros(self.index.num_rows, heads, self.index.capacity, width)


class KVCache(Cache):
    """A static key-value cache of all layers for B rows, as models of transformers take it; `prefix` fills the first
    slots of every row with keys and values (1, num_heads, prefix length, head_dim) of each layer."""

    def __init__(self, num_layers: int, rows: int, prefix: States | None = None) -> None:
        self.index = CacheIndex(rows)
        self.prefix_length = prefix[0][0].shape[2] if prefix else 0
        super().__init__(layers=[KVCacheLayer(self.index, prefix[i] if prefix else None) for i in range(num_layers)])

    def reserve(self, length: int) -> bool:
        """Make sure that a row has `length` slots and one more, which idle rows write to; return whether it grew.
        The capacity doubles, so that a long conversation is rarely copied."""
        if length < self.index.capacity:
            return False
        self.index.capacity = 1 << length.bit_length()
        for layer in self.layers:
            layer.grow()
        return True


def read(
    backbone: Callable[..., Tensor],  # a Backbone
    cache: KVCache,
    rows: Sequence[int],
    starts: Sequence[int],  # slot of the first new token of each row
    embeds: Tensor,  # (b, T, E)
    positions: Tensor,  # (b, T) or (3, b, T)
    side: Any = None,  # SideInputs
) -> Tensor:  # (b, T, D)
    """Read T tokens behind what rows of the cache hold, PIECE by PIECE; return the state after each."""
    length, device = embeds.shape[1], embeds.device
    index, steps = torch.tensor(rows, device=device), torch.arange(length, device=device)
    slots, hidden = torch.tensor(starts, device=device)[:, None] + steps, []
    for first in range(0, length, PIECE):
        piece = slice(first, first + PIECE)
        width = max(starts) + min(first + PIECE, length)
        cache.index.at(index, slots[:, piece], width, list(rows) == list(range(cache.index.num_rows)))
        mask = causal_mask(slots[:, piece], width, embeds.dtype)
        own = side and side._replace(visible=side.visible[:, piece])
        hidden.append(backbone(embeds[:, piece], positions[..., piece], mask, cache, own))
    return torch.cat(hidden, dim=1)


def causal_mask(slots: Tensor, width: int, dtype: torch.dtype) -> Tensor:  # (b, 1, T, width)
    """Return what is added to attention scores: a token in slot s (b, T) attends to the slots up to s."""
    hidden = torch.arange(width, device=slots.device) > slots[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=slots.device).masked_fill_(hidden, -torch.inf)


def prefix_states(encoder: nn.Module, batch: int, dtype: torch.dtype = torch.float32) -> States:
    """Return the keys and values of a prefix (see `adapters.add_prefix`) in each layer, for `batch` rows."""
    tokens = torch.arange(encoder.shape[0], device=encoder.embedding.weight.device)
    states = encoder(tokens).to(dtype).view(encoder.shape)  # (num_tokens, 2 num_layers, num_heads, head_dim)
    states = states.permute(1, 2, 0, 3)[:, None].expand(-1, batch, -1, -1, -1)
    return [(keys, values) for keys, values in states.split(2)]


class PrefixLayer(DynamicLayer):
    """A cache layer for training: it gives a prefix to one layer of the LLM and does not grow, as with gradient
    checkpointing a layer runs twice on the same keys and values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        super().update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the prefix and the new keys and values (B, num_heads, tokens, head_dim), joined along the tokens."""
        states = (self.keys, key_states), (self.values, value_states)
        keys, values = (torch.cat([prefix.to(new.dtype), new], dim=-2) for prefix, new in states)
        return keys, values
