"""Layers of a UNet that take constants as inputs, over the weights of diffusers' layers.

Letters: R rows of the guidance batch (2B), C channels, h and w of a map, T tokens (h w), D width, H heads, E width of a
head, L length of the condition, S width of a step's time embedding.
"""

from __future__ import annotations

import copy
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import Mgp5Error

# The operations with fused kernels, by their names in `kernels.registry.OPERATIONS`; and `fused`, whether they pay
# where PyTorch would take several: see `fused`.
Ops = SimpleNamespace


def require(*conditions: tuple[bool, str]) -> None:
    """Raise an Mgp5Error that names what does not hold of (holds, name): with it the layers here would be wrong."""
    if unknown := [name for holds, name in conditions if not holds]:
        raise Mgp5Error(f"engines do not know a denoiser with {', '.join(unknown)}", "take --backend auto")


def share_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module with the same parameters and buffers."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())})


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Lay the weights of convolutions out so: all that engines change of a model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)


class Passthrough(nn.Module):
    """A layer that returns its first input: the result of the layer it replaces was computed before."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class Linear(nn.Module):
    """A linear layer, or a 1x1 convolution as one, over the weight of `source`; `packed` for a CPU, which multiplies
    few rows by a transposed copy of the weight a fifth faster."""

    def __init__(self, source: nn.Linear | nn.Conv2d, packed: bool) -> None:
        super().__init__()
        self.source = source
        packed = packed and not hasattr(source.weight, "qdata")  # torchao's weights are unpacked at each call
        self.packed = source.weight.flatten(1).t().contiguous() if packed else None

    def forward(self, x: Tensor) -> Tensor:  # (..., C)
        weight, bias = self.source.weight, self.source.bias
        if self.packed is None:
            return F.linear(x, weight if weight.dim() == 2 else weight.flatten(1), bias)
        rows = x.flatten(0, -2)
        out = rows @ self.packed if bias is None else torch.addmm(bias, rows, self.packed)
        return out.view(*x.shape[:-1], -1)


class Conv(nn.Module):
    """A convolution over the weight of `source`, with its bias or another one; `packed` for a CPU, where oneDNN would
    pack the weights again at every call."""

    def __init__(self, source: nn.Conv2d, packed: bool) -> None:
        super().__init__()
        self.source, self.pack, self.packed = source, packed, None
        self.pixel = Linear(source, packed) if source.kernel_size == (1, 1) else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # (R, C, h, w)
        """Convolve; a 1x1 convolution of a channels-last map is a matrix product."""
        if self.pixel is not None and x.is_contiguous(memory_format=torch.channels_last):
            return self.pixel(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.convolve(x, self.source.bias if bias is None else bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:  # (R, C, h, w)
        """Convolve with this bias; weights are packed for the first shape, and right for any."""
        source = self.source
        if not self.pack:
            return F.conv2d(x, source.weight, bias, source.stride, source.padding)
        reach = source.padding, source.stride, source.dilation, source.groups
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(source.weight, *reach, list(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, bias, *reach, "none", [], "")


def require_resnet(block: ResnetBlock2D, timed: bool) -> None:
    """Raise an Mgp5Error for a ResNet block that is not known; `timed` with a time embedding."""
    kind = block.time_embedding_norm  # that of a VAE's decoder is named "group"; without time all but one are the same
    plain = (kind == "default" if timed else kind != "scale_shift") and (block.time_emb_proj is not None) == timed
    require(
        (plain, "unusual time embeddings"),
        (block.upsample is None and block.downsample is None, "ResNet blocks that change the size"),
        (isinstance(block.nonlinearity, nn.SiLU), "another activation than SiLU"),
        (block.output_scale_factor == 1.0, "scaled ResNet blocks"),
    )


class Resnet(nn.Module):
    """A ResNet block that takes its projected time embedding as the bias of its first convolution."""

    def __init__(self, block: ResnetBlock2D, columns: slice, ops: Ops) -> None:
        super().__init__()
        require_resnet(block, timed=True)
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.conv_shortcut, self.columns, self.ops = block.conv_shortcut, columns, ops

    @staticmethod
    def bias(block: ResnetBlock2D, embedding: Tensor) -> Tensor:  # (n, 4C) -> (n, C)
        active = embedding if block.skip_time_act else block.nonlinearity(embedding)
        return block.time_emb_proj(active) + block.conv1.bias

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:  # (R, C, h, w), (1 or R, S)
        hidden, bias = _normed(self.ops, self.norm1, x), time_embedding[:, self.columns]
        if time_embedding.shape[0] == 1:
            hidden = self.conv1(hidden, bias[0])
        else:  # images at different steps; in an exported file too, where ONNX Runtime fuses constant biases only
            hidden = self.conv1.convolve(hidden, None) + bias[:, :, None, None]
        hidden = self.conv2(_normed(self.ops, self.norm2, hidden))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class Block(nn.Module):
    """A transformer block: self-attention, cross-attention to given keys and values, feed-forward."""

    def __init__(self, block: BasicTransformerBlock, ops: Ops) -> None:
        super().__init__()
        attentions = block.attn1, block.attn2
        require(
            (block.norm_type == "layer_norm" and block.pos_embed is None, "unusual transformer blocks"),
            (not block.attn1.is_cross_attention, "two cross-attentions in a block"),
            (block.attn2 is not None and block.attn2.is_cross_attention, "blocks without cross-attention"),
            (all(a.norm_q is None and a.added_kv_proj_dim is None for a in attentions if a), "unusual attention"),
            (type(block.ff.net[0]).__name__ == "GEGLU", "feed-forward layers without GEGLU"),
        )
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        (self.attn1, self.attn2), self.ff, self.ops = attentions, block.ff, ops

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (R, T, D), (R, H, L, E) twice
        x = self.norm1(hidden)
        hidden, x = self._add_norm(attend(self.attn1, x, *keys_and_values(self.attn1, x)), hidden, self.norm2)
        hidden, x = self._add_norm(attend(self.attn2, x, key, value), hidden, self.norm3)
        return self.ff.net[2](self.ops.geglu(self.ff.net[0].proj(x))) + hidden

    def _add_norm(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm, *later: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, *later)


class Transformer(nn.Module):
    """The transformer of one resolution; its first block has the index `first` among all blocks of the UNet."""

    block = Block

    def __init__(self, model: Transformer2DModel, first: int, ops: Ops) -> None:
        super().__init__()
        require((model.is_input_continuous, "transformers of patches"))
        self.norm, self.proj_in, self.proj_out = model.norm, model.proj_in, model.proj_out
        self.blocks = nn.ModuleList(self.block(block, ops) for block in model.transformer_blocks)
        self.first, self.ops = first, ops

    def forward(self, x: Tensor, encoder_hidden_states: list[Tensor], **_: Any) -> tuple[Tensor]:  # (R, C, h, w)
        return (x + self.change(_normed(self.ops, self.norm, x, silu=False), encoder_hidden_states),)

    def change(self, normed: Tensor, encoder_hidden_states: list[Tensor]) -> Tensor:  # (R, C, h, w)
        """Return what the blocks add to a map, from the normed map and the keys and values of cross-attention of all
        blocks of the UNet, alternately."""
        hidden = normed.permute(0, 2, 3, 1)  # (R, h, w, C)
        _, height, width, _ = hidden.shape
        hidden = self.proj_in(hidden.flatten(1, 2))  # (R, T, D)
        for index, block in enumerate(self.blocks, start=self.first):
            hidden = block(hidden, *encoder_hidden_states[2 * index : 2 * index + 2])
        return self.proj_out(hidden).unflatten(1, (height, width)).permute(0, 3, 1, 2)


def keys_and_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # (R, L, D) -> (R, H, L, E) twice
    return _heads(attention, attention.to_k(x)), _heads(attention, attention.to_v(x))


def _heads(attention: Any, x: Tensor) -> Tensor:  # (R, T, H E) -> (R, H, T, E)
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def attend(attention: Any, x: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (R, T, D)
    out = F.scaled_dot_product_attention(_heads(attention, attention.to_q(x)), key, value)
    return attention.to_out[0](out.transpose(1, 2).flatten(2))


def _normed(ops: Ops, norm: nn.GroupNorm, x: Tensor, silu: bool = True) -> Tensor:  # (R, C, h, w)
    return ops.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
