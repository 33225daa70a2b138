"""Denoisers whose constant work is done before the first step: a UNet of Stable Diffusion 1.x and 2.x, and SD 3's.

Letters: n steps, R rows of the guidance batch (2B), C, h and w of the latents, L and D of the condition, S columns: all
that layers take of a step's time embedding, side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Protocol

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, nn

from ..errors import Mgp5Error
from .layers import (
    Conv,
    Linear,
    Ops,
    PackedConv,
    PackedLinear,
    Passthrough,
    Resnet,
    Transformer,
    keys_and_values,
    require,
)
from .sd3_blocks import JointBlock, Modulated

ADAPTIVE = (AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX)


class PrecomputedDenoiser(Protocol):
    """A denoiser in two parts. Its modules are a second tree over the same weights: the first stays as it is."""

    model: nn.Module
    dtype: torch.dtype
    layout: torch.memory_format
    deep: int  # channels of the feature that a step can take of another; 0 where it cannot, see `DeepCacheUNet`

    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Once per image: a table with a row for each of (n) timesteps, and the context that (R, L, D) turns into."""

    def __call__(
        self, latents: Tensor, row: Tensor, context: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One step: latents (R, C, h, w) of any float type to what the model predicts, in its own, and deep feature.

        Args:
            deep: (R, `deep`, h, w), of an earlier step; then what makes it is not run.
        """

    def restore(self) -> None:
        """Undo what was done to weights."""


class PrecomputedUNet:
    """See `PrecomputedDenoiser`. The context are keys and values of each cross-attention, the table (n, 1, S).

    Args:
        packed: copy weights into the layouts that a CPU multiplies fastest.
        layout: of maps, and else of the weights of convolutions.
    """

    def __init__(self, unet: UNet2DConditionModel, ops: Ops, packed: bool, layout: torch.memory_format) -> None:
        unusual = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")
        unusual += "time_cond_proj_dim", "time_embedding_act_fn"
        require(*((getattr(unet.config, name) is None, name) for name in unusual))
        self.source, self.dtype, self.layout = unet, unet.dtype, layout
        self.resnets = [m for m in unet.modules() if isinstance(m, ResnetBlock2D)]
        self.blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
        self.model = _twin(unet)
        # The row comes as the timestep, and goes through both as it is to the ResNet blocks.
        self.model.get_time_embed = lambda sample, timestep: timestep
        self.model.time_embedding = Passthrough()
        self._replace(ops, *((PackedConv, PackedLinear) if packed else (Conv, Linear)))
        self.deep = unet.up_blocks[-1].resnets[-1].in_channels - unet.conv_in.out_channels
        self.model = DeepCacheUNet(self.model)
        convolutions = [] if packed else [m for m in unet.modules() if isinstance(m, nn.Conv2d)]
        self.laid = [m for m in convolutions if not m.weight.is_contiguous(memory_format=layout)]
        self._lay(layout)

    def _replace(self, ops: Ops, conv: type[Conv], linear: type[Linear]) -> None:
        """Put our layers in the places of diffusers', in the order of `resnets` and `blocks`."""
        columns, first = iter(_columns([block.conv1.out_channels for block in self.resnets])), 0
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ResnetBlock2D):
                self.model.set_submodule(name, Resnet(module, next(columns), ops))
            elif isinstance(module, Transformer2DModel):
                self.model.set_submodule(name, Transformer(module, first, ops))
                first += len(module.transformer_blocks)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear) or name.endswith(("proj_in", "proj_out")):
                self.model.set_submodule(name, linear(module))
            elif isinstance(module, nn.Conv2d):
                self.model.set_submodule(name, conv(module))

    def _lay(self, layout: torch.memory_format) -> None:
        for module in self.laid:
            module.weight.data = module.weight.data.contiguous(memory_format=layout)

    @torch.no_grad()
    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `PrecomputedDenoiser`."""
        unet, condition = self.source, condition.to(self.dtype)
        embedding = unet.time_embedding(unet.time_proj(timesteps).to(self.dtype))  # (n, 4C)
        table = torch.cat([Resnet.bias(block, embedding) for block in self.resnets], dim=1)
        return table[:, None], [part for block in self.blocks for part in keys_and_values(block.attn2, condition)]

    def __call__(
        self, latents: Tensor, row: Tensor, context: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # (R, C, h, w), (R, deep, h, w)
        """See `PrecomputedDenoiser`; row (1, S), or (R, S) of pictures at different steps."""
        return self.model(latents.to(self.dtype).contiguous(memory_format=self.layout), row, context, deep)

    def restore(self) -> None:
        """See `PrecomputedDenoiser`."""
        self._lay(torch.contiguous_format)


class DeepCacheUNet(nn.Module):
    """A UNet as its outermost skip connection, with the last layer of all, around everything else.

    What everything else makes, the deep feature, changes slowly: a step may take that of an earlier one and run the
    outermost layers alone (DeepCache, Ma et al., arXiv 2312.00858, section 3, with the shortest branch).

    Args:
        unet: loses those layers.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        block = unet.up_blocks[-1]
        require((isinstance(block, UpBlock2D | CrossAttnUpBlock2D), f"a {type(block).__name__}"))
        self.conv_in, self.norm, self.act = unet.conv_in, unet.conv_norm_out, unet.conv_act
        self.resnet, self.conv_out = block.resnets[-1], unet.conv_out
        self.attention = block.attentions[-1] if isinstance(block, CrossAttnUpBlock2D) else None
        for layers in (block.resnets, getattr(block, "attentions", [])):
            del layers[-1:]
        unet.conv_in, unet.conv_norm_out, unet.conv_out = Passthrough(), None, Passthrough()
        self.inner = unet

    def forward(
        self, latents: Tensor, row: Tensor, context: list[Tensor], deep: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # (R, C, h, w), (R, deep, h, w)
        """See `PrecomputedDenoiser`."""
        outer = self.conv_in(latents)
        if deep is None:
            deep = self.inner(outer, row, context, return_dict=False)[0]
        x = self.resnet(torch.cat([deep, outer], dim=1), row)
        if self.attention is not None:
            (x,) = self.attention(x, encoder_hidden_states=context)
        return self.conv_out(self.act(self.norm(x))), deep


class PrecomputedTransformer:
    """See `PrecomputedDenoiser`. The table (n, R, S) has all modulations, as a third of the weights serve only these.

    The context is what the blocks begin with: it changes from block to block, so its keys and values are not constant.
    """

    layout = torch.contiguous_format
    deep = 0

    def __init__(self, transformer: SD3Transformer2DModel, ops: Ops) -> None:
        self.source, self.dtype = transformer, transformer.dtype
        self.norms = [m for m in transformer.modules() if isinstance(m, ADAPTIVE)]
        self.columns = _columns([norm.linear.out_features for norm in self.norms])
        self.model = _twin(transformer)
        self.model.time_text_embed, self.model.context_embedder = Passthrough(), Passthrough()
        columns = dict(zip(self.norms, self.columns, strict=True))
        for index, block in enumerate(transformer.transformer_blocks):
            own = columns[block.norm1], columns[block.norm1_context]
            self.model.transformer_blocks[index] = JointBlock(self.model.transformer_blocks[index], own, ops)
        self.model.norm_out = Modulated(transformer.norm_out.norm, columns[transformer.norm_out], ops)

    @torch.no_grad()
    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `PrecomputedDenoiser`; the last row of the condition is the pooled vector, as in `StableDiffusion3`."""
        source, condition = self.source, condition.to(self.dtype)
        embed = source.time_text_embed
        times = embed.timestep_embedder(embed.time_proj(timesteps).to(self.dtype))  # (n, D)
        texts = embed.text_embedder(condition[:, -1, : source.config.pooled_projection_dim])  # (R, D)
        active = nn.functional.silu(times[:, None] + texts)  # (n, R, D)
        table = active.new_empty(*active.shape[:2], self.columns[-1].stop)
        for norm, columns in zip(self.norms, self.columns, strict=True):
            table[..., columns] = norm.linear(active)
        return table, [source.context_embedder(condition[:, :-1])]

    def __call__(
        self, latents: Tensor, row: Tensor, context: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, None]:  # (R, C, h, w)
        """See `PrecomputedDenoiser`; row (R, S)."""
        return self.model(latents.to(self.dtype), context[0], timestep=row, return_dict=False)[0], None

    def restore(self) -> None:
        """See `PrecomputedDenoiser`; nothing was done."""


def precompute(denoiser: nn.Module, ops: Ops, *, packed: bool, layout: torch.memory_format) -> PrecomputedDenoiser:
    """Take the constant work out of a denoiser. Raises Mgp5Error where it is of a kind not known here."""
    if isinstance(denoiser, UNet2DConditionModel):
        return PrecomputedUNet(denoiser, ops, packed, layout)
    if isinstance(denoiser, SD3Transformer2DModel):
        return PrecomputedTransformer(denoiser, ops)
    raise Mgp5Error(f"engines do not know a denoiser that is a {type(denoiser).__name__}", "take --backend auto")


def _twin(module: nn.Module) -> nn.Module:
    """A copy of the modules that shares parameters and buffers."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())})


def _columns(widths: Sequence[int]) -> list[slice]:
    """Columns of these widths, side by side."""
    ends = [0]
    for width in widths:
        ends.append(ends[-1] + width)
    return [slice(*pair) for pair in pairwise(ends)]
