"""A frozen UNet in training: channels-last, with our GroupNorm and its backward.

PyTorch's GroupNorm on a GPU knows one memory layout and copies the other; so its models train in the layout for which
cuDNN has to copy every map. Here layers of diffusers keep weights and names, and get another forward.

Letters: B batch, C channels, h and w of a map, L length and D width of a condition, S width of a time embedding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.group_norm_backward import frozen_norm
from .layers import lay_out, require, require_resnet


def fuse_frozen(unet: nn.Module) -> None:
    """Change a frozen UNet in place. Raises Mgp5Error for layers that are not known."""
    forwards = [(module, frozen_norm) for module in unet.modules() if isinstance(module, nn.GroupNorm)]
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            require_resnet(module, timed=True)
            forwards.append((module, _resnet))
        elif isinstance(module, Transformer2DModel):
            require((module.is_input_continuous, "transformers of patches"))
            forwards.append((module, _transformer))
    for module, forward in forwards:
        module.forward = partial(forward, module)
    lay_out(unet, torch.channels_last)


def _resnet(block: ResnetBlock2D, x: Tensor, temb: Tensor) -> Tensor:  # (B, C, h, w), (B, S)
    time = block.time_emb_proj(temb if block.skip_time_act else F.silu(temb))
    hidden = block.conv1(frozen_norm(block.norm1, x, silu=True))
    hidden = block.conv2(frozen_norm(block.norm2, hidden, silu=True, time=time))
    return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + hidden


def _transformer(model: Transformer2DModel, x: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
    """Return a map (B, C, h, w) by a condition (B, L, D)."""
    hidden = frozen_norm(model.norm, x).permute(0, 2, 3, 1)  # (B, h, w, C)
    sides = hidden.shape[1:3]
    hidden = _linear(model.proj_in, hidden.flatten(1, 2))
    for block in model.transformer_blocks:
        if model.gradient_checkpointing and torch.is_grad_enabled():
            hidden = model._gradient_checkpointing_func(block, hidden, None, encoder_hidden_states)
        else:
            hidden = block(hidden, encoder_hidden_states=encoder_hidden_states)
    return (_linear(model.proj_out, hidden).unflatten(1, sides).permute(0, 3, 1, 2) + x,)


def _linear(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:  # a 1x1 convolution as a product
    return F.linear(x, layer.weight.flatten(1), layer.bias)
