"""Denoisers whose constant work is done before the first step: UNets of Stable Diffusion 1.x and 2.x, and SD 3's
transformer.

Letters: n steps, R guidance rows (2B), Z latent channels, h and w latents, L condition length, C condition width, S
width of a step's time embedding: those of all layers, projected and concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
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
from ..generators.denoising import Denoiser
from .fused import FusedResnet, FusedTransformer, fuse_layers
from .layers import (
    Conv,
    Linear,
    Ops,
    Passthrough,
    Resnet,
    Transformer,
    keys_and_values,
    lay_out,
    require,
    share_weights,
)
from .sd3_blocks import JointBlock, ModulatedNorm

ADAPTIVE = (AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX)


class PrecomputedDenoiser(Denoiser, Protocol):
    """A denoiser made of modules that share the weights of the original, which stays usable."""

    model: nn.Module  # runs a step
    dtype: torch.dtype  # of its weights
    layout: torch.memory_format  # of its feature maps


class PrecomputedUNet:
    """A UNet; see `PrecomputedDenoiser`. Time embeddings are (n, 1, S), the inputs of cross-attention are its keys and
    values, (R, H, L, E) for H heads of width E."""

    per_image = False

    def __init__(self, unet: UNet2DConditionModel, ops: Ops, packed: bool, layout: torch.memory_format) -> None:
        unusual = ["class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"]
        unusual += "time_cond_proj_dim", "time_embedding_act_fn"
        require(*((getattr(unet.config, name) is None, name) for name in unusual))
        self.source, self.dtype, self.layout = unet, unet.dtype, layout
        self.resnets = [m for m in unet.modules() if isinstance(m, ResnetBlock2D)]
        self.blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
        model = share_weights(unet)
        # The time embedding is passed as the timestep, and reaches the ResNet blocks unchanged.
        model.get_time_embed = lambda sample, timestep: timestep
        model.time_embedding = Passthrough()
        self._replace_layers(model, ops, packed)
        self.deep = unet.up_blocks[-1].resnets[-1].in_channels - unet.conv_in.out_channels
        self.model = DeepCacheUNet(model)
        if not packed:
            lay_out(unet, layout)

    def _replace_layers(self, model: nn.Module, ops: Ops, packed: bool) -> None:
        columns, first = iter(_slices([block.conv1.out_channels for block in self.resnets])), 0
        resnet, transformer = (FusedResnet, FusedTransformer) if ops.fused else (Resnet, Transformer)
        for name, module in list(model.named_modules()):
            if isinstance(module, ResnetBlock2D):
                model.set_submodule(name, resnet(module, next(columns), ops))
            elif isinstance(module, Transformer2DModel):
                model.set_submodule(name, transformer(module, first, ops))
                first += len(module.transformer_blocks)
        if ops.fused:
            fuse_layers(model, ops)
            return
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) or name.endswith(("proj_in", "proj_out")):
                model.set_submodule(name, Linear(module, packed))
            elif isinstance(module, nn.Conv2d):
                model.set_submodule(name, Conv(module, packed))

    @torch.no_grad()
    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:  # (n,), (R, L, C)
        """Return the biases of the ResNet blocks at each step (n, 1, S), and keys and values of cross-attention."""
        unet, condition = self.source, condition.to(self.dtype)
        embedding = unet.time_embedding(unet.time_proj(timesteps).to(self.dtype))  # (n, 4C)
        embeddings = torch.cat([Resnet.bias(block, embedding) for block in self.resnets], dim=1)
        return embeddings[:, None], [part for block in self.blocks for part in keys_and_values(block.attn2, condition)]

    def __call__(
        self, latents: Tensor, time_embedding: Tensor, cross_attention: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step: prediction (R, Z, h, w) and deep feature (R, `deep`, h, w)."""
        latents = latents.to(self.dtype).contiguous(memory_format=self.layout)
        return self.model(latents, time_embedding, cross_attention, deep)


class DeepCacheUNet(nn.Module):
    """A UNet whose inner blocks, all but the outermost skip connection and the last layers, can be left out of a step.

    Their output, the deep feature, changes slowly: a step may take that of an earlier one and run the outermost layers
    alone (DeepCache, Ma et al., arXiv 2312.00858, section 3, with the shortest branch). The outermost layers of `unet`
    are moved here.
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
        self, latents: Tensor, time_embedding: Tensor, cross_attention: list[Tensor], deep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the prediction (R, Z, h, w) and the deep feature (R, `deep`, h, w), computed where none is given."""
        outer = self.conv_in(latents)
        if deep is None:
            deep = self.inner(outer, time_embedding, cross_attention, return_dict=False)[0]
        x = self.resnet(torch.cat([deep, outer], dim=1), time_embedding)
        if self.attention is not None:
            (x,) = self.attention(x, encoder_hidden_states=cross_attention)
        return self.conv_out(self.act(self.norm(x))), deep


class PrecomputedTransformer:
    """SD 3's transformer; see `PrecomputedDenoiser`. The time embeddings (n, R, S) are all modulations, which a third
    of the weights compute. The input of cross-attention is the embedded condition: each block changes it, so its
    keys and values are not constant."""

    layout = torch.contiguous_format
    deep = 0
    per_image = True  # the pooled text is in the modulations

    def __init__(self, transformer: SD3Transformer2DModel, ops: Ops) -> None:
        self.source, self.dtype = transformer, transformer.dtype
        self.norms = [m for m in transformer.modules() if isinstance(m, ADAPTIVE)]
        self.columns = _slices([norm.linear.out_features for norm in self.norms])
        self.model = share_weights(transformer)
        self.model.time_text_embed, self.model.context_embedder = Passthrough(), Passthrough()
        columns = dict(zip(self.norms, self.columns, strict=True))
        for index, block in enumerate(transformer.transformer_blocks):
            pair = columns[block.norm1], columns[block.norm1_context]
            self.model.transformer_blocks[index] = JointBlock(self.model.transformer_blocks[index], pair, ops)
        self.model.norm_out = ModulatedNorm(transformer.norm_out.norm, columns[transformer.norm_out], ops)

    @torch.no_grad()
    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:  # (n,), (R, L, C)
        """Return the modulations at each step (n, R, S) and the embedded condition; its last row is the pooled vector,
        as in `StableDiffusion3`."""
        source, condition = self.source, condition.to(self.dtype)
        embed = source.time_text_embed
        times = embed.timestep_embedder(embed.time_proj(timesteps).to(self.dtype))  # (n, D)
        texts = embed.text_embedder(condition[:, -1, : source.config.pooled_projection_dim])  # (R, D)
        active = nn.functional.silu(times[:, None] + texts)  # (n, R, D)
        embeddings = active.new_empty(*active.shape[:2], self.columns[-1].stop)
        for norm, columns in zip(self.norms, self.columns, strict=True):
            embeddings[..., columns] = norm.linear(active)
        return embeddings, [source.context_embedder(condition[:, :-1])]

    def __call__(
        self, latents: Tensor, time_embedding: Tensor, cross_attention: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Run one step with a time embedding (R, S): prediction (R, Z, h, w), and no deep feature."""
        latents, (condition,) = latents.to(self.dtype), cross_attention
        return self.model(latents, condition, timestep=time_embedding, return_dict=False)[0], None


def precompute(denoiser: nn.Module, ops: Ops, *, packed: bool, layout: torch.memory_format) -> PrecomputedDenoiser:
    """Return a denoiser with its constant work taken out of the steps.

    Of a UNet, `packed` copies weights into the layouts in which a CPU multiplies fastest; `layout` is that of its
    feature maps, and unless packed of the weights of convolutions. Raises Mgp5Error if engines do not know it.
    """
    if isinstance(denoiser, UNet2DConditionModel):
        return PrecomputedUNet(denoiser, ops, packed, layout)
    if isinstance(denoiser, SD3Transformer2DModel):
        return PrecomputedTransformer(denoiser, ops)
    raise Mgp5Error(f"engines do not know a denoiser that is a {type(denoiser).__name__}", "take --backend auto")


def _slices(widths: Sequence[int]) -> list[slice]:  # side by side
    return [slice(*pair) for pair in pairwise(accumulate(widths, initial=0))]
