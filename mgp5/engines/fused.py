"""Layers of UNets and VAEs whose sums wait for the norm that reads them: one kernel computes both.

Letters: B rows of a batch, C channels, h and w of a map, T tokens (h w), D width, H heads, E width of a head, L length
of the condition, S width of a step's time embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from .layers import Block, Conv, Linear, Ops, Passthrough, Transformer, attend, require_resnet

FAST = 256  # the widest head of fast attention (FlashAttention)
SCORES = 2**28  # most scores of an attention with a wider head that are written out: 0.5 GiB in half precision


class Map:
    """A feature map (B, C, h, w) that may be [x + residual + offset, beside], not computed yet; offset is (1 or B, C1).

    For whoever takes it as a tensor it is one, computed then; but a concatenation in the channels waits as well.
    """

    def __init__(
        self,
        ops: Ops,
        x: Tensor,
        residual: Tensor | None = None,
        offset: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> None:
        self.ops, self.parts = ops, (x, residual, offset, beside)

    @classmethod
    def of(cls, ops: Ops, x: Tensor | Map) -> Map:
        return x if isinstance(x, Map) else cls(ops, x)

    @property
    def shape(self) -> torch.Size:
        x, *_, beside = self.parts
        rows, channels, *sides = x.shape
        return torch.Size((rows, channels + (0 if beside is None else beside.shape[1]), *sides))

    def tensor(self) -> Tensor:
        """Return the map, computed now if it was not before."""
        x, residual, offset, beside = self.parts
        if residual is not None or offset is not None:
            x = self.ops.sum_map(x, residual, offset)
        x = x if beside is None else torch.cat([x, beside], dim=1)
        self.parts = x, None, None, None
        return x

    def normed(self, norm: nn.GroupNorm, silu: bool = True) -> Tensor:
        """Return its group norm, followed by SiLU if `silu`; the map is computed on the way."""
        options = norm.weight, norm.bias, norm.num_groups, norm.eps, silu
        if all(part is None for part in self.parts[1:]):
            return self.ops.group_norm(self.parts[0], *options)
        total, normed = self.ops.sum_group_norm(*self.parts, *options)
        self.parts = total, None, None, None
        return normed

    def __getattr__(self, name: str) -> Any:  # called for what a map does not have itself
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        joined = args[0] if function is torch.cat and args and kwargs == {"dim": 1} else ()
        if len(joined) == 2 and isinstance(joined[0], Map):
            first, second = joined[0], joined[1].tensor() if isinstance(joined[1], Map) else joined[1]
            parts = first.parts[:3] if first.parts[3] is None else (first.tensor(), None, None)
            return cls(first.ops, *parts, second)
        args, kwargs = tree_map_only(Map, Map.tensor, (args, kwargs or {}))
        return function(*args, **kwargs)


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:  # without the bias, which cuDNN would add in a kernel of its own
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


class FusedNorm(nn.Module):
    """A GroupNorm and the SiLU behind it."""

    def __init__(self, norm: nn.GroupNorm, ops: Ops) -> None:
        super().__init__()
        self.norm, self.ops = norm, ops

    def forward(self, x: Tensor | Map) -> Tensor:  # (B, C, h, w)
        return Map.of(self.ops, x).normed(self.norm)


class FusedResnet(nn.Module):
    """A ResNet block; with `columns` it takes its projected time embedding as the bias of its first convolution."""

    def __init__(self, block: ResnetBlock2D, columns: slice | None, ops: Ops) -> None:
        super().__init__()
        require_resnet(block, timed=columns is not None)
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.columns, self.ops = columns, ops
        self.conv_shortcut = None if block.conv_shortcut is None else Conv(block.conv_shortcut, False)

    def forward(self, x: Tensor | Map, temb: Tensor | None = None) -> Map:  # (B, C, h, w), (1 or B, S)
        x, second = Map.of(self.ops, x), self.norm2
        offset = self.conv1.bias[None] if self.columns is None else temb[:, self.columns]
        hidden = _convolve(self.conv1, x.normed(self.norm1))
        options = second.weight, second.bias, second.num_groups, second.eps, True
        hidden = self.ops.group_norm(hidden, *options, offset)
        hidden, kept = _convolve(self.conv2, hidden), x.tensor()
        if self.conv_shortcut is not None:
            kept = self.conv_shortcut(kept)
        return Map(self.ops, kept, hidden, self.conv2.bias[None])


class FusedBlock(Block):
    """A transformer block with one product for queries, keys and values, whose weights become views of the joined one.
    The last bias and residual are what the last product is added to."""

    def __init__(self, block: BasicTransformerBlock, ops: Ops) -> None:
        super().__init__(block, ops)
        layers = _inputs(block.attn1)
        self.joined = torch.cat([layer.weight.data for layer in layers])  # (3D, D)
        for layer, rows in zip(layers, self.joined.chunk(3), strict=True):
            layer.weight.data = rows

    @staticmethod
    def fits(block: BasicTransformerBlock) -> bool:
        """Return whether the weights are plain ones: not those of adapters, nor quantized."""
        *inputs, last = *_inputs(block.attn1), block.ff.net[2]
        plain = all(type(layer) is nn.Linear and type(layer.weight.data) is Tensor for layer in (*inputs, last))
        return plain and last.bias is not None and all(layer.bias is None for layer in inputs)

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (B, T, D), (B, H, L, E) twice
        first, last = self.norm1, self.ff.net[2]
        x = self.ops.layer_norm(hidden, first.weight, first.bias, first.eps)
        own = F.linear(x, self.joined).unflatten(-1, (3, self.attn1.heads, -1)).permute(2, 0, 3, 1, 4)
        own = F.scaled_dot_product_attention(*own).transpose(1, 2).flatten(2)
        hidden, x = self._add_norm(self.attn1.to_out[0](own), hidden, self.norm2)
        hidden, x = self._add_norm(attend(self.attn2, x, key, value), hidden, self.norm3, last.bias)
        x = self.ops.geglu(self.ff.net[0].proj(x))
        hidden.flatten(0, 1).addmm_(x.flatten(0, 1), last.weight.t())  # a tensor of this block's own
        return hidden


def _inputs(attention: Attention) -> list[nn.Linear]:
    return [attention.to_q, attention.to_k, attention.to_v]


class FusedTransformer(Transformer):
    """The transformer of one resolution, whose sum waits for the next norm."""

    def __init__(self, model: Transformer2DModel, first: int, ops: Ops) -> None:
        super().__init__(model, first, ops)
        self.proj_in, self.proj_out = Linear(self.proj_in, False), Linear(self.proj_out, False)

    @staticmethod
    def block(block: BasicTransformerBlock, ops: Ops) -> Block:
        return (FusedBlock if FusedBlock.fits(block) else Block)(block, ops)

    def forward(self, x: Tensor | Map, encoder_hidden_states: list[Tensor], **_: Any) -> tuple[Map]:  # (B, C, h, w)
        x = Map.of(self.ops, x)
        change = self.change(x.normed(self.norm, silu=False), encoder_hidden_states)
        return (Map(self.ops, x.tensor(), change),)


class FusedAttention(nn.Module):
    """The attention of a map, in the middle of a VAE. Its one head is too wide for fast attention: the scores are
    written out."""

    def __init__(self, attention: Attention, ops: Ops) -> None:
        super().__init__()
        self.attention, self.ops = attention, ops

    @staticmethod
    def fits(one: Attention) -> bool:
        normed = one.group_norm is not None and one.spatial_norm is None and one.norm_q is None and one.norm_k is None
        return normed and one.residual_connection and one.rescale_output_factor == 1 and not one.is_cross_attention

    def forward(self, x: Tensor | Map, temb: Tensor | None = None) -> Map:  # (B, C, h, w)
        one, x = self.attention, Map.of(self.ops, x)
        hidden = x.normed(one.group_norm, silu=False).permute(0, 2, 3, 1)
        heads = [layer(hidden.flatten(1, 2)).unflatten(-1, (one.heads, -1)) for layer in _inputs(one)]
        query, key, value = (part.transpose(1, 2) for part in heads)  # (B, H, T, E)
        rows, number, tokens, width = query.shape
        if width > FAST and rows * number * tokens**2 <= SCORES:
            out = (query * width**-0.5 @ key.mT).softmax(dim=-1) @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        out = one.to_out[0](out.transpose(1, 2).flatten(2)).view_as(hidden)
        return Map(self.ops, x.tensor(), out.permute(0, 3, 1, 2))


class FusedUpsample(nn.Module):
    """A nearest upsampling and its convolution, whose bias waits for the next norm."""

    def __init__(self, layer: Upsample2D, ops: Ops) -> None:
        super().__init__()
        self.conv, self.ops = layer.conv, ops

    @staticmethod
    def fits(layer: Upsample2D) -> bool:
        plain = layer.norm is None and layer.use_conv and not layer.use_conv_transpose
        return plain and layer.interpolate and layer.name == "conv" and layer.conv.bias is not None

    def forward(self, x: Tensor | Map, output_size: Sequence[int] | None = None) -> Map:  # (B, C, h, w), (h', w')
        x = Map.of(self.ops, x)
        doubled = tuple(2 * side for side in x.shape[2:])
        if x.parts[-1] is None and tuple(output_size or doubled) == doubled:
            large = self.ops.sum_map(*x.parts[:3], 2)
        else:  # of maps with odd sides
            large = F.interpolate(x.tensor(), size=output_size or doubled, mode="nearest")
        return Map(self.ops, _convolve(self.conv, large), offset=self.conv.bias[None])


class FusedDownsample(nn.Module):
    """A convolution of stride 2, whose bias waits for the next norm."""

    def __init__(self, layer: Downsample2D, ops: Ops) -> None:
        super().__init__()
        self.conv, self.padding, self.ops = layer.conv, layer.padding, ops

    @staticmethod
    def fits(layer: Downsample2D) -> bool:
        return layer.norm is None and layer.use_conv and layer.conv.bias is not None

    def forward(self, x: Tensor | Map) -> Map:  # (B, C, h, w)
        x = Map.of(self.ops, x).tensor()
        x = x if self.padding else F.pad(x, (0, 1, 0, 1))
        return Map(self.ops, _convolve(self.conv, x), offset=self.conv.bias[None])


FUSED = {Upsample2D: FusedUpsample, Downsample2D: FusedDownsample, Attention: FusedAttention}


def fuse_layers(model: nn.Module, ops: Ops) -> None:
    """Replace in a model that shares weights, beside what takes time or condition: ResNet blocks, attention of maps,
    what changes their size, and the norm of the output. Raises Mgp5Error for unknown ResNet blocks; other layers that
    are not known stay, and get tensors."""
    known = {inner for module in model.modules() if isinstance(module, Transformer) for inner in module.modules()}
    for name, module in list(model.named_modules()):
        fused = FUSED.get(type(module))
        if isinstance(module, ResnetBlock2D):
            model.set_submodule(name, FusedResnet(module, None, ops))
        elif fused and module not in known and fused.fits(module):
            model.set_submodule(name, fused(module, ops))
    if isinstance(model.conv_norm_out, nn.GroupNorm) and isinstance(model.conv_act, nn.SiLU):
        model.conv_norm_out, model.conv_act = FusedNorm(model.conv_norm_out, ops), Passthrough()
