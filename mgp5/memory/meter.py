"""Measure the memory that a computation takes, on any device and on the meta device too, where it takes none."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BLOCK = 512  # bytes; the size of CUDA's smallest block


class MemoryMeter(TorchDispatchMode):
    """Add up the bytes of all tensors that operations make, for as long as they live.

    `live` are the bytes now, `peak` at most so far; `flops` the operations of matrix products and convolutions. With
    `convolutions_copy`, copies of what convolutions take and give count: cuDNN and oneDNN lay tensors out anew.

    PyTorch's own tools do not serve here: torch.distributed._tools.mem_tracker.MemTracker registers gradient hooks on
    all parameters, and fails on frozen ones; FlopCounterMode tracks modules by hooks that keep tensors alive, which
    checkpointing would have freed.
    """

    def __init__(self, convolutions_copy: bool = False) -> None:
        super().__init__()
        self.convolutions_copy = convolutions_copy
        self.live = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}  # of storages, by their id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in inputs:
                self._add(tensor.untyped_storage())
        if self.convolutions_copy and func.overloadpacket is torch.ops.aten.convolution:
            self.peak = max(self.peak, self.live + sum(tensor.nbytes for tensor in (*args[:2], output)))
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let attention run by the memory-efficient kernel; the meta device would keep its weights (T, T). The function is
    replaced, as a TorchFunctionMode is off during a backward pass, where checkpointed layers are computed again."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _efficient_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _efficient_attention(
    query: Tensor,  # (B, heads, T, d)
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None:  # the kernel adds it: a mask of numbers is made in each layer
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    operation = torch.ops.aten._scaled_dot_product_efficient_attention
    return operation(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@torch.no_grad()
def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the bytes of all tensors that `run` makes for inference, at most at once."""
    with fused_attention(), MemoryMeter(convolutions_copy=True) as meter:
        run()
    return meter.peak
