"""Residuals of a UNet from the feature pyramids of all earlier images (MM-Interleaved, arXiv 2401.10208, section 3.2).

As released, MMFS reads for the maps of the skip connections and of the mid block, and what it reads is added to them
before the up path; the paper's text puts it behind the up blocks. The layers are attached to a UNet by hooks, which do
nothing while a call of the UNet has no `residuals`.

Letters: B images to draw, R rows of a call, N earlier images, S pixels of all levels of one, C width of their features,
H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import Mgp5Error
from .mmfs import MMFSBlock, Shapes


def skip_maps(config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield channels and level of each skip connection of a UNet2DConditionModel, and last those of its mid block.

    Level i has the latents' sides divided by 2**i. Stable Diffusion 1 and 2: 4 maps of 320 channels, 3 of 640, 5 of
    1280, and 1280 of the mid block.
    """
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    yield widths[0], 0
    for level, width in enumerate(widths):
        for _ in range(layers if isinstance(layers, int) else layers[level]):
            yield width, level
        if level < len(widths) - 1:
            yield width, level + 1  # of the downsampler
    yield widths[-1], len(widths) - 1


class UNetMMFS(nn.Module):
    """The MMFS blocks of a UNet, one for each skip connection and one for the mid block, which is the last."""

    def __init__(
        self,
        config: Mapping[str, Any],  # of the UNet
        feature_width: int,
        shapes: Shapes,  # (h, w) of the levels of an earlier image's pyramid
        **options: float,  # of MMFS
    ) -> None:
        super().__init__()
        size = config["sample_size"]
        size, self.shapes = size if isinstance(size, int) else max(size), shapes
        self.blocks = nn.ModuleList(
            MMFSBlock(width, feature_width, levels=len(shapes), base=size / 2**level, **options)
            for width, level in skip_maps(config)
        )
        self._residuals: list[Tensor] | None = None  # of the current call of the UNet

    def forward(self, features: Tensor, visible: Tensor) -> list[Tensor]:
        """Return the `residuals` of a call of the UNet: what does not depend on its maps, computed once for an image.

        Features (B, N, S, C), of N >= 0 earlier images, and visible (B, N) bool, the nearest last. Returns visible and
        for each block the projected features (B, N, S, H, E).
        """
        features = features.to(self.blocks[0].feature_norm.weight.dtype)
        return [visible, *(block.values(features) for block in self.blocks)]

    def attach(self, unet: nn.Module) -> None:
        """Let a UNet2DConditionModel take `residuals` as an argument. Raises Mgp5Error for another denoiser."""
        if sum(len(block.resnets) for block in getattr(unet, "up_blocks", ())) != len(self.blocks) - 1:
            case = f"a {type(unet).__name__} without {len(self.blocks) - 1} skip connections"
            raise Mgp5Error(f"MMFS residuals of {case}", "take a Stable Diffusion 1 or 2")

        # Functions, not methods: a copy of the UNet, as engines make, copies methods with all their weights.
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            self._residuals = kwargs.pop("residuals", None)
            return args, kwargs

        def end(*_: Any) -> None:
            self._residuals = None

        unet.register_forward_pre_hook(begin, with_kwargs=True)
        unet.register_forward_hook(end, always_call=True)
        first = len(self.blocks) - 1
        for layer in unet.up_blocks:
            first -= len(layer.resnets)
            layer.register_forward_pre_hook(self._skips_hook(first), with_kwargs=True)
        if unet.mid_block is not None:
            unet.mid_block.register_forward_hook(lambda layer, _, output: self._add(-1, output, layer))

    def _skips_hook(self, first: int) -> Callable[..., Any]:
        """Return a hook that adds residuals to the maps that an up block takes; the first has the index `first`."""

        def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            maps = kwargs["res_hidden_states_tuple"]
            kwargs["res_hidden_states_tuple"] = tuple(self._add(first + i, x, layer) for i, x in enumerate(maps))
            return args, kwargs

        return add

    def _add(self, index: int, x: Tensor, layer: nn.Module) -> Tensor:  # (R, channels, h, w)
        if self._residuals is None:
            return x
        visible, *values = self._residuals
        inputs = x, values[index], visible, self.shapes
        if layer.gradient_checkpointing and torch.is_grad_enabled():
            return x + checkpoint(self.blocks[index], *inputs, use_reentrant=False)
        return x + self.blocks[index](*inputs)
