"""Engines: ways to run the denoising loop, chosen by one call, put onto a diffusion model and taken off again.

Every engine takes constant work out of the loop: keys and values of cross-attention, time embeddings, modulations. On
top of that `compile` compiles the rest, and `triton` puts fused kernels in; on a GPU both make a step one CUDA graph.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..device import SMALL, user_cache
from ..errors import Mgp5Error
from ..generators.denoising import Contexts, DenoisingState, advance
from ..kernels import registry as kernels
from .autotune import try_out

if TYPE_CHECKING:  # what imports diffusers takes seconds, and `select_backend` needs none of it
    from ..generators.latent_diffusion import LatentDiffusion
    from .exported import ExportedEngine
    from .layers import Ops
    from .precomputed import PrecomputedDenoiser

Backend = Literal["auto", "eager", "compile", "triton", "onnx", "trt"]
DENOISERS = ("denoiser", "unet", "transformer")  # names of exported components, the fastest first
TINY = 1_000_000  # parameters


@dataclass(frozen=True)
class Choice:
    """An engine's name, None for no engine, and why it was chosen or what to know of it."""

    name: Backend | None
    why: str = ""


def select_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> Choice:
    """Which engine runs where; `auto` takes the fastest, with the time to get started counted.

    Raises:
        Mgp5Error: the backend is unknown, or cannot run here.
    """
    if backend not in get_args(Backend):
        raise Mgp5Error(f"no backend {backend!r}, expected {', '.join(get_args(Backend))}", "choose one", usage=True)
    missing = {
        "triton": _triton_refusal(device, dtype),
        "compile": _compile_refusal(device),
        "onnx": _onnx_refusal(device),
        "trt": _trt_refusal(device) if backend == "trt" else "",  # it imports TensorRT
    }
    if reason := missing.get(backend):
        raise Mgp5Error(f"--backend {backend} cannot run here: {reason}", "take --backend auto", usage=True)
    if backend == "compile":
        return Choice("compile", f"the first image waits for the compiler, whose results are kept in {_cache()}")
    if backend != "auto":
        return Choice(backend)
    if device.type == "cpu":
        return Choice("eager", "the fastest on a CPU that starts at once")
    if missing["triton"]:
        return Choice("eager", missing["triton"])
    return Choice("auto", "a trial of eager and triton on this GPU decides, once for each model")


def apply(diffusion: LatentDiffusion, backend: Backend = "auto", exported: Path | None = None) -> Choice:
    """Let `diffusion.draw` run by an engine, instead of the one it had. Do it when weights are in their place.

    Returns what was chosen; `auto` chooses none for a denoiser that engines do not know.

    Args:
        exported: a folder that `mgp5 export` wrote of this model, for `onnx` and `trt`; None takes the user's own
            store, which is for `onnx` on a CPU.

    Raises:
        Mgp5Error: the backend is unknown or cannot run here, or it was asked for and does not know the denoiser.
    """
    denoiser = diffusion.denoiser
    if exported and backend not in ("onnx", "trt"):
        raise Mgp5Error(f"--backend {backend} takes no exported folder", "take --backend onnx or trt", usage=True)
    if backend == "trt" and not exported:
        hint = "mgp5 export --trt --split --precision fp16 --out DIR makes one: give it as --exported DIR"
        raise Mgp5Error("--backend trt needs an exported folder", hint, usage=True)
    choice, tried = select_backend(backend, denoiser.device, denoiser.dtype), ""
    remove(diffusion)
    if backend == "auto" and _export_pays(denoiser):
        try:
            diffusion.engine = _onnx(diffusion, None)
            diffusion.engine.stand_in(partial(Engine, "eager", denoiser))
            return Choice("onnx", "by ONNX Runtime, the fastest on a CPU")
        except Mgp5Error as error:
            tried = f" (not onnx: {error})"
    try:
        if choice.name == "auto":
            choice = Choice(*try_out(diffusion, ("eager", "triton")))
        if choice.name in ("onnx", "trt"):
            diffusion.engine = (_trt if choice.name == "trt" else _onnx)(diffusion, exported)
        else:
            diffusion.engine = Engine(choice.name, denoiser)
    except Mgp5Error as error:
        if backend != "auto":
            raise
        return Choice(None, error.message + tried)
    return Choice(choice.name, choice.why + tried)


def remove(diffusion: LatentDiffusion) -> None:
    """Take the engine off; the model is then, bit for bit, what it was."""
    if diffusion.engine is not None:
        diffusion.engine.model.restore()
        diffusion.engine = None


class Engine:
    """Runs the denoising steps of one model by modules that share its weights.

    Attributes:
        model: the denoiser with constant work taken out.
        graphed: whether images that begin together take whole steps, on a GPU as CUDA graphs.
        decode: latents as the VAE's decoder takes them -> pixels; None leaves it to the VAE.
    """

    decode: Callable[[Tensor], Tensor] | None = None

    def __init__(self, name: Backend, denoiser: torch.nn.Module) -> None:
        from .cuda_graph import StepGraphs
        from .precomputed import precompute

        self.name, device, dtype = name, denoiser.device, denoiser.dtype
        on_gpu = device.type == "cuda"
        flat = on_gpu and name == "eager"  # PyTorch's own GroupNorm on a GPU copies channels-last maps
        self.ops = operations(name, device, dtype)
        self.model: PrecomputedDenoiser = precompute(
            denoiser,
            self.ops,
            packed=name == "eager" and _packs(denoiser),
            layout=torch.contiguous_format if flat else torch.channels_last,
        )
        if name == "compile":
            _compile(self.model, on_gpu)
        self.graphs = StepGraphs(self.model, self.ops.guided_step)
        self.graphed = on_gpu and name != "eager"

    def model_for(self, reuse: int) -> PrecomputedDenoiser:
        """Return what runs the steps of an image with this `reuse`."""
        return self.model

    def advance(self, states: Sequence[DenoisingState], contexts: Contexts) -> None:
        """Advance images by one step each, as `generators.denoising.advance` does; where it can, as one CUDA graph."""
        if not (self.graphed and states[0].model is self.model and self.graphs.advance(states)):
            advance(states, contexts)


def operations(name: Backend, device: torch.device, dtype: torch.dtype) -> Ops:
    """PyTorch's operations, or for `triton` kernels where they can run."""
    from .layers import Ops

    if name == "triton":
        found = {choice.operation: choice.function for choice in kernels.choices(device, dtype)}
    else:
        found = {operation: kernels.implementations(operation)[-1].load() for operation in kernels.OPERATIONS}
    return Ops(**{field: found[field] for field in Ops.__dataclass_fields__})


def _onnx(diffusion: LatentDiffusion, exported: Path | None) -> ExportedEngine:
    from .exported import put_on

    return put_on(diffusion, exported)


def _onnx_refusal(device: torch.device) -> str:
    """Why ONNX Runtime cannot run here, or ""."""
    if find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install 'mgp5[export]'"
    if device.type == "cpu":
        return ""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return ""
    return "this onnxruntime has no CUDA: pip uninstall onnxruntime, then pip install 'mgp5[export-gpu]'"


def _trt(diffusion: LatentDiffusion, exported: Path) -> ExportedEngine:
    from .tensorrt import put_on

    return put_on(diffusion, exported)


def _trt_refusal(device: torch.device) -> str:
    """Why TensorRT cannot run here, or ""."""
    from ..export.trt import refusal

    return refusal() or ("" if device.type == "cuda" else f"it needs a GPU, not a {device.type} device")


def _export_pays(denoiser: torch.nn.Module) -> bool:
    """Whether `auto` exports a model to ONNX: a tiny one draws at once anyway, and a large one gains little."""
    from ..export.job import missing

    return _packs(denoiser) and sum(p.numel() for p in denoiser.parameters()) > TINY and not missing()


def _packs(denoiser: torch.nn.Module) -> bool:
    """Whether packed weights pay: for a small model, as of a large one they take much memory and gain nothing."""
    small = sum(p.numel() for p in denoiser.parameters()) < SMALL
    on_cpu = denoiser.device.type == "cpu" and denoiser.dtype == torch.float32
    return on_cpu and small and torch.backends.mkldnn.is_available()


def _compile(model: PrecomputedDenoiser, on_gpu: bool) -> None:
    """Compile for the shapes that come."""
    keep_compiled()
    model.model.compile(dynamic=False, **({"mode": "max-autotune-no-cudagraphs"} if on_gpu else {}))


def keep_compiled() -> None:
    """Have what is compiled from now on kept for the next run."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache()


def _cache() -> str:
    """Where compiled code is kept: the user's cache, unless PyTorch was told a place."""
    told = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if told and not told.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_")):  # PyTorch's own default
        return told
    return str(user_cache() / "inductor")


def _compile_refusal(device: torch.device) -> str:
    """Why nothing can be compiled here, or ""."""
    if device.type == "cuda":
        from ..kernels.language import triton

        return "" if triton else "Triton is not installed: pip install 'mgp5[triton]'"
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    return "" if any(map(shutil.which, compilers)) else "there is no C++ compiler: install g++ or set CXX"


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Why kernels cannot run here, or ""."""
    chosen = kernels.select_kernel("group_norm", device, dtype)
    return "" if chosen.implementation == "triton" else chosen.why.removeprefix("no triton: ")
