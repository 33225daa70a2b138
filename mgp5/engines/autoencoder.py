"""A VAE by fused kernels: in channels-last, over its own weights; a decoding that comes again is one CUDA graph.

Letters: B batch, C channels, h and w latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..device import record
from ..files import GiB
from .cuda_graph import GRAPHS
from .fused import fuse_layers
from .layers import Ops, lay_out, require, share_weights

LARGEST = 2**14  # latents (B h w) of a graph, one image of 1024 pixels a side: launches cost little above, memory much
ROOM = 4 * GiB  # free memory with which a graph may keep that of a decoding, up to 2 GiB


class FusedAutoencoder:
    """Encoder and decoder of fused layers; called, it returns the VAE with these in place of its own.

    Tiles, slices and posteriors are thus diffusers' own, by the settings that the VAE has at that moment.
    """

    def __init__(self, vae: AutoencoderKL, ops: Ops, graphed: bool) -> None:
        """Raises Mgp5Error for a VAE that is not known. Weights may be elsewhere until they are used."""
        require((isinstance(vae, AutoencoderKL), f"a {type(vae).__name__}"))
        encoder, decoder = share_weights(vae.encoder), share_weights(vae.decoder)
        fuse_layers(encoder, ops)
        fuse_layers(decoder, ops)
        self.vae = vae
        self.parts = {"encoder": ChannelsLast(encoder), "decoder": (Replayed if graphed else ChannelsLast)(decoder)}
        lay_out(vae, torch.channels_last)

    def __call__(self) -> AutoencoderKL:
        twin = copy.copy(self.vae)
        twin.__dict__["_modules"] = {**self.vae._modules, **self.parts}
        return twin


class ChannelsLast(nn.Module):
    """A model of maps in channels-last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *_: Any) -> Tensor:  # (B, C, h, w)
        return self.model(x.contiguous(memory_format=torch.channels_last))


class Replayed(ChannelsLast):
    """The same, recorded as a CUDA graph when a size comes the second time with the weights where they were."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.graphs: dict[tuple, Callable[[Tensor], Tensor]] = {}  # at most GRAPHS, the last used last
        self.pool = torch.cuda.graph_pool_handle()

    def forward(self, x: Tensor, *_: Any) -> Tensor:  # (B, C, h, w)
        if len(x) * x.shape[2:].numel() > LARGEST:
            return super().forward(x)
        places = (p.data_ptr() for p in self.model.parameters())  # a graph reads these; `memory.offload` moves them
        key = x.shape, x.dtype, *places
        if key not in self.graphs:
            run = super().forward
        elif (run := self.graphs.pop(key)) == super().forward and _has_room(x.device):
            run = self._record(x)
        self.graphs[key] = run
        if len(self.graphs) > GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return run(x)

    def _record(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        if all(run == super(Replayed, self).forward for run in self.graphs.values()):
            self.pool = torch.cuda.graph_pool_handle()  # a pool whose graphs are all gone takes no others
        with torch.inference_mode(False):  # else it could be written to in inference mode only
            given = torch.zeros_like(x)
        replay, made = record(lambda: super(Replayed, self).forward(given), self.pool)

        def decode(x: Tensor) -> Tensor:
            given.copy_(x)
            replay()
            return made.clone()

        return decode


def _has_room(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > ROOM
