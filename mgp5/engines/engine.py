"""The engine of PyTorch: a denoiser without its constant work, as it is (`eager`), compiled, or with fused kernels."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..device import SMALL, user_cache
from ..generators.denoising import DenoisingState, advance
from ..kernels import registry as kernels

if TYPE_CHECKING:  # they import diffusers, which takes seconds
    from ..generators.latent_diffusion import LatentDiffusion
    from .layers import Ops
    from .precomputed import PrecomputedDenoiser


class Engine:
    """Runs the denoising steps of one model by modules that share its weights.

    Args:
        name: "eager", "compile" or "triton".
        denoiser: a UNet of Stable Diffusion 1.x or 2.x, or the transformer of Stable Diffusion 3.

    Attributes:
        model: the denoiser with constant work taken out.
        graphed: whether images that begin together run whole steps, on a GPU as CUDA graphs.
        decode: function from latents, scaled as the VAE's decoder takes them, to pixels; None leaves it to the VAE.

    Raises:
        Mgp5Error: the denoiser is of a kind that engines do not know.
    """

    decode: Callable[[Tensor], Tensor] | None = None

    def __init__(self, name: str, denoiser: torch.nn.Module) -> None:
        from .cuda_graph import StepGraphs
        from .precomputed import precompute

        self.name, device, dtype = name, denoiser.device, denoiser.dtype
        on_gpu = device.type == "cuda"
        flat = on_gpu and name == "eager"  # PyTorch's own GroupNorm on a GPU copies channels-last maps
        ops = operations(name, device, dtype)
        self.model: PrecomputedDenoiser = precompute(
            denoiser,
            ops,
            packed=name == "eager" and packing_pays(denoiser),
            layout=torch.contiguous_format if flat else torch.channels_last,
        )
        if name == "compile":
            keep_compiled()
            mode = {"mode": "max-autotune-no-cudagraphs"} if on_gpu else {}
            self.model.model.compile(dynamic=False, **mode)
        self.graphs = StepGraphs(self.model, ops.guided_step)
        self.graphed = on_gpu and name != "eager"

    def model_for(self, reuse: int) -> PrecomputedDenoiser:
        """Return the model that runs the steps of an image with this `reuse`."""
        return self.model

    def advance(self, states: Sequence[DenoisingState]) -> None:
        """Advance images by one step each, see `generators.denoising.advance`; where possible, by one CUDA graph."""
        if not (self.graphed and states[0].model is self.model and self.graphs.advance(states)):
            advance(states)


def remove(generator: LatentDiffusion) -> None:
    """Remove a generator's engine; the model is then, bit for bit, what it was before."""
    if generator.engine is not None:
        generator.engine.model.restore()
        generator.engine = None


def operations(name: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """Return PyTorch's operations, or for `triton` the fused kernels that can run on this device with this dtype."""
    from .layers import Ops

    if name == "triton":
        functions = {selected.operation: selected.function for selected in kernels.choices(device, dtype)}
    else:
        functions = {operation: kernels.implementations(operation)[-1].load() for operation in kernels.OPERATIONS}
    return Ops(**{field: functions[field] for field in Ops.__dataclass_fields__})


def packing_pays(denoiser: torch.nn.Module) -> bool:
    """Return whether copies of weights in the CPU's own layouts pay: not for a large model, where they take much
    memory and gain nothing, nor on a GPU."""
    small = sum(p.numel() for p in denoiser.parameters()) < SMALL
    on_cpu = denoiser.device.type == "cpu" and denoiser.dtype == torch.float32
    return on_cpu and small and torch.backends.mkldnn.is_available()


def keep_compiled() -> None:
    """Keep code that is compiled from now on for later processes."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compile_cache()


def compile_cache() -> str:
    """Return the folder of compiled code: TORCHINDUCTOR_CACHE_DIR where the user set it, else the user's cache."""
    configured = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    default = os.path.join(tempfile.gettempdir(), "torchinductor_")  # which PyTorch itself sets when it is imported
    if configured and not configured.startswith(default):
        return configured
    return str(user_cache() / "inductor")
