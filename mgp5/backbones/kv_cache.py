"""A static key-value cache whose rows have lengths of their own: nothing moves when tokens are read or taken back.

R rows, r rows of one forward, H key and value heads, C slots of a row, W slots that attention sees, k new tokens, P
virtual tokens of a prefix, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .prefix import States

SMALLEST = 256  # slots of a row to begin with


@dataclass
class CacheIndex:
    """Index of the slots that forwards read and write, the same for all layers; all but two are set before each.

    Args:
        num_rows: R.
        capacity: C.
        rows: (r,) that take part.
        slots: (r, k) of their new tokens.
        width: W.
        all_rows: whether `rows` are all rows in order, so that none need be gathered.
    """

    num_rows: int
    capacity: int = SMALLEST
    rows: Tensor | None = None
    slots: Tensor | None = None
    width: int = 0
    all_rows: bool = True

    def at(self, rows: Tensor, slots: Tensor, width: int, all_rows: bool) -> None:
        """Set where the next forward writes and what it attends to."""
        self.rows, self.slots, self.width, self.all_rows = rows, slots, width, all_rows


class KVCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, (R, H, C, d); a prefix lies in the first slots of every row."""

    is_sliding = False

    def __init__(self, index: CacheIndex, prefix: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.index, self.prefix = index, prefix

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: attention multiplies slots that it does not see by 0, which NaN would survive."""
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        for buffer, prefix in zip((self.keys, self.values), self.prefix or (), strict=False):
            buffer[:, :, : prefix.shape[2]] = prefix
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values (r, H, k, d) to their slots; return those of the rows, (r, H, W, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        index = self.index
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if index.num_rows == 1:  # the same, faster
                buffer.index_copy_(2, index.slots[0], states)
            else:
                buffer[index.rows[:, None], :, index.slots] = states.transpose(1, 2)
        keys, values = self.keys[:, :, : index.width], self.values[:, :, : index.width]
        return (keys, values) if index.all_rows else (keys[index.rows], values[index.rows])

    def grow(self) -> None:
        """Copy keys and values to buffers of the index's capacity."""
        if self.is_initialized:
            for name in ("keys", "values"):
                old = getattr(self, name)
                setattr(self, name, self._empty(old))
                getattr(self, name)[:, :, : old.shape[2]] = old

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return width and offset of a mask; ours is made by the decoder."""
        return self.index.width, 0

    def get_seq_length(self) -> int:
        """Return the slots that attention sees: rows have lengths of their own."""
        return self.index.width

    def get_max_length(self) -> int:
        """Return C, the slots of a row."""
        return self.index.capacity

    def _empty(self, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        with torch.inference_mode(False):  # else the buffers could be written to in inference mode only
            return torch.zeros(
                self.index.num_rows, heads, self.index.capacity, width, dtype=like.dtype, device=like.device
            )


class KVCache(Cache):
    """Static key-value cache of all layers, as transformers' models take it.

    Args:
        prefix: keys and values of each layer, (1, H, P, d).
    """

    def __init__(self, num_layers: int, rows: int, prefix: States | None = None) -> None:
        self.index = CacheIndex(rows)
        self.prefix_length = prefix[0][0].shape[2] if prefix else 0
        super().__init__(layers=[KVCacheLayer(self.index, prefix[i] if prefix else None) for i in range(num_layers)])

    def reserve(self, length: int) -> bool:
        """Make room for rows of `length` slots and one for pausing rows; return whether they moved.

        The room doubles, so that a long conversation is copied seldom.
        """
        if length < self.index.capacity:
            return False
        self.index.capacity = 1 << length.bit_length()
        for layer in self.layers:
            layer.grow()
        return True
