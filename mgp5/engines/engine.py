"""The engine of PyTorch: a denoiser without its constant work, as it is (`eager`), compiled, or with fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import ModelMixin
from torch import Tensor

from ..device import SMALL
from ..generators.denoising import DenoisingState, advance
from ..kernels import registry as kernels
from .cuda_graph import StepGraphs
from .layers import Ops
from .precomputed import PrecomputedDenoiser, precompute


class Engine:
    """Runs the denoising steps of one model by modules that share its weights."""

    model: PrecomputedDenoiser  # the denoiser with constant work taken out
    graphed: bool  # whether images that begin together run whole steps, on a GPU as CUDA graphs
    decode: Callable[[Tensor], Tensor] | None = None  # scaled latents -> pixels; None: by the VAE

    def __init__(self, name: str, denoiser: ModelMixin) -> None:
        """Prepare "eager", "compile" or "triton". Raises Mgp5Error if engines do not know the denoiser."""
        self.name, on_gpu = name, denoiser.device.type == "cuda"
        flat = on_gpu and name == "eager"  # PyTorch's own GroupNorm on a GPU copies channels-last maps
        layout = torch.contiguous_format if flat else torch.channels_last
        ops = operations(name, denoiser.device, denoiser.dtype)
        packed = name == "eager" and packing_pays(denoiser)
        self.model = precompute(denoiser, ops, packed=packed, layout=layout)
        if name == "compile":
            mode = {"mode": "max-autotune-no-cudagraphs"} if on_gpu else {}
            self.model.model.compile(dynamic=False, **mode)
        self.graphs = StepGraphs(self.model, ops.guided_step)
        self.graphed = on_gpu and name != "eager"

    def model_for(self, reuse: int) -> PrecomputedDenoiser:  # for the steps of an image with this `reuse`
        return self.model

    def advance(self, states: Sequence[DenoisingState]) -> None:
        """Advance images by one step each, see `generators.denoising.advance`; where possible, by one CUDA graph."""
        if not (self.graphed and states[0].model is self.model and self.graphs.advance(states)):
            advance(states)


def operations(name: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """Return PyTorch's operations, or for `triton` the fused kernels that can run on this device with this dtype."""
    if name == "triton":
        used = (operation for operation in kernels.OPERATIONS if operation != "deformable")  # of a head, not of these
        functions = {operation: kernels.select_kernel(operation, device, dtype).function for operation in used}
    else:
        functions = {operation: kernels.implementations(operation)[-1].load() for operation in kernels.OPERATIONS}
    return Ops(**functions, fused=name == "triton")


def packing_pays(denoiser: ModelMixin) -> bool:
    """Return whether copies of weights in the CPU's own layouts pay: not on a GPU, nor for a large model, where they
    take much memory and gain nothing."""
    small = sum(p.numel() for p in denoiser.parameters()) < SMALL
    on_cpu = denoiser.device.type == "cpu" and denoiser.dtype == torch.float32
    return on_cpu and small and torch.backends.mkldnn.is_available()
