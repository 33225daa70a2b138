"""Blocks of SD 3's transformer that take their modulations as columns of a step's time embedding.

Letters: R rows of the guidance batch (2B), T tokens of the image, L of the condition, D width, H heads, E width of a
head, S width of a time embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Ops, require

# What a block returns: (hidden, update, gate), the sum hidden + gate update that waits for the next norm.
Stream = tuple[Tensor, Tensor, Tensor]


def _modulate(ops: Ops, x: Tensor | Stream, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return a stream (R, T, D), its sum computed, and its adaptive norm."""
    return ops.gated_adaln(*x, scale, shift, eps) if isinstance(x, tuple) else (x, ops.adaln(x, scale, shift, eps))


class ModulatedNorm(nn.Module):
    """An adaptive LayerNorm of scale and shift alone: the model's last one, and the context's in the last block."""

    def __init__(self, norm: nn.LayerNorm, columns: slice, ops: Ops) -> None:
        super().__init__()
        require((isinstance(norm, nn.LayerNorm) and norm.weight is None, "adaptive norms with weights"))
        self.eps, self.columns, self.ops = norm.eps, columns, ops

    def forward(self, x: Tensor | Stream, time_embedding: Tensor) -> Tensor:  # (R, T, D), (R, S)
        scale, shift = time_embedding[:, self.columns].chunk(2, dim=1)
        return _modulate(self.ops, x, scale, shift, self.eps)[1]


class JointBlock(nn.Module):
    """A block of both streams, image and context; `columns` have the modulations of each."""

    def __init__(self, block: JointTransformerBlock, columns: tuple[slice, slice], ops: Ops) -> None:
        super().__init__()
        norms = [getattr(a, name) for a in (block.attn, block.attn2) if a for name in ("norm_q", "norm_k")]
        require(
            (all(norm is None or isinstance(norm, RMSNorm) for norm in norms), "unusual norms of queries"),
            (block.norm2.weight is None and block.norm1.norm.weight is None, "adaptive norms with weights"),
        )
        self.attn, self.attn2, self.ff, self.ff_context = block.attn, block.attn2, block.ff, block.ff_context
        (self.image, self.context), self.eps, self.ops = columns, block.norm2.eps, ops
        self.last = ModulatedNorm(block.norm1_context.norm, self.context, ops) if block.context_pre_only else None

    def forward(
        self, hidden_states: Tensor | Stream, encoder_hidden_states: Tensor | Stream, temb: Tensor, **_: Any
    ) -> tuple[Stream | None, Stream]:
        """Return context (R, L, D), None in the last block, and image (R, T, D), modulated by `temb` (R, S)."""
        context = encoder_hidden_states
        shift, scale, gate, *mlp = temb[:, self.image].chunk(6 if self.attn2 is None else 9, dim=1)
        hidden, x = _modulate(self.ops, hidden_states, scale, shift, self.eps)
        if self.last is None:
            c_shift, c_scale, c_gate, *c_mlp = temb[:, self.context].chunk(6, dim=1)
            context, y = _modulate(self.ops, context, c_scale, c_shift, self.eps)
        else:
            y = self.last(context, temb)
        attended, context_attended = self._attend_jointly(x, y)
        if self.attn2 is not None:  # SD 3.5: once more, from the image to itself
            *mlp, shift, scale, second = mlp
            x = self.ops.adaln(hidden, scale, shift, self.eps)
            own = self.attn2.to_out[0](_attend(*self._heads(x, self.attn2)))
            hidden, gate, attended = hidden + gate[:, None] * attended, second, own
        hidden = self._feed(self.ff, hidden, attended, gate, *mlp)
        return None if self.last else self._feed(self.ff_context, context, context_attended, c_gate, *c_mlp), hidden

    def _feed(
        self, ff: nn.Module, hidden: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, last: Tensor
    ) -> Stream:  # (R, T, D)
        hidden, x = self.ops.gated_adaln(hidden, update, gate, scale, shift, self.eps)
        return hidden, ff(x), last

    def _attend_jointly(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend from both streams to both; return image (R, T, D) and context (R, L, D)."""
        attn = self.attn
        pairs = zip(self._heads(x, attn), self._heads(y, attn, added=True), strict=True)
        out = _attend(*(torch.cat(pair, dim=1) for pair in pairs))  # (R, T + L, D)
        image, context = out.split([x.shape[1], y.shape[1]], dim=1)
        return attn.to_out[0](image), None if self.last else attn.to_add_out(context)

    def _heads(self, x: Tensor, attn: Any, added: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # (R, T, H, E) each
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if added else (attn.to_q, attn.to_k, attn.to_v)
        norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
        query, key, value = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in layers)
        if norms[0] is not None:
            query, key = self.ops.rms_norm(query, key, norms[0].weight, norms[1].weight, norms[0].eps)
        return query, key, value


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (R, T, H, E) each -> (R, T, D)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
