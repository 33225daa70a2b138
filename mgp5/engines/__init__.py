"""Engines: ways to run the denoising steps of a latent-diffusion model, attached to it and removed again.

Every engine computes once per image what does not change from step to step: keys and values of cross-attention, time
embeddings, modulations. Beyond that `compile` compiles the denoiser, `triton` runs it and the VAE by fused kernels (on
a GPU both record a step as one CUDA graph), and `onnx` and `trt` run exported files.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from ..device import user_cache
from ..errors import Mgp5Error
from ..kernels import registry as kernels
from ..options import Backend

if TYPE_CHECKING:  # importing diffusers takes seconds, and `select_backend` needs none of it
    from diffusers import ModelMixin

    from ..generators.latent_diffusion import LatentDiffusion

__all__ = ["Backend", "BackendChoice", "apply", "fuse_unet", "fuse_vae", "keep_compiled", "remove", "select_backend"]
__all__ += ["trt_refusal"]


@dataclass(frozen=True)
class BackendChoice:
    """The backend that was selected (None where the denoiser runs by diffusers alone), and why, for the user."""

    name: Backend | None
    why: str = ""

    @property
    def compiles(self) -> bool:
        """Whether a reply waits for torch.compile: only where `--backend compile` asked for it."""
        return self.name == "compile"


def select_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> BackendChoice:
    """Return the backend for a device and a dtype; it is never "auto".

    `auto` takes what starts at once, without torch.compile and without a trial: `triton` where its kernels run, else
    `eager`.

    Raises Mgp5Error if the backend is unknown, or cannot run here.
    """
    if backend not in get_args(Backend):
        raise Mgp5Error(f"no backend {backend!r}, expected {', '.join(get_args(Backend))}", "choose one", usage=True)
    refusals = {
        "triton": _triton_refusal(device, dtype),
        "compile": _compile_refusal(device),
        "onnx": _onnx_refusal(device),
        "trt": trt_refusal(device) if backend == "trt" else "",  # it imports TensorRT
    }
    if reason := refusals.get(backend):
        raise Mgp5Error(f"--backend {backend} cannot run here: {reason}", "take --backend auto", usage=True)
    if backend == "compile":
        why = f"the first image waits for the compiler, whose results are kept in {_compile_cache()}"
        return BackendChoice("compile", why)
    if backend != "auto":
        return BackendChoice(backend)
    if device.type == "cpu":
        return BackendChoice("eager", "the fastest on a CPU that starts at once")
    if refusals["triton"]:
        return BackendChoice("eager", refusals["triton"])
    return BackendChoice("triton", "the fastest on a GPU that starts at once")


def apply(generator: LatentDiffusion, backend: Backend = "auto", exported: Path | None = None) -> BackendChoice:
    """Attach an engine to a generator, in place of the one it has, and return what runs now.

    The weights must be on their device already. `auto` leaves a denoiser that engines do not know to diffusers; `onnx`
    and `trt` need a folder that `mgp5 export` wrote of this model. Raises Mgp5Error if the backend is unknown, cannot
    run here or does not know the denoiser, or if the folder is missing, not wanted, damaged or of another model.
    """
    check_exported(backend, exported, "--onnx --split" if backend == "onnx" else "--trt --split --precision fp16")
    from .engine import Engine
    from .exported import load_engine

    denoiser = generator.denoiser
    choice = select_backend(backend, denoiser.device, denoiser.dtype)
    remove(generator)
    try:
        if choice.compiles:
            keep_compiled()
        generator.engine = load_engine(generator, exported, choice.name) if exported else Engine(choice.name, denoiser)
    except Mgp5Error as error:
        if backend != "auto":
            raise
        return BackendChoice(None, error.message)
    if choice.name == "triton":
        fuse_vae(generator, graphed=denoiser.device.type == "cuda")
    return choice


def check_exported(backend: Backend, exported: Path | None, way: str) -> None:
    """Raise Mgp5Error if a backend takes no exported folder, or needs one: `way` is how `mgp5 export` makes it."""
    if exported and backend not in ("onnx", "trt"):
        raise Mgp5Error(f"--backend {backend} takes no exported folder", "take --backend onnx or trt", usage=True)
    if backend in ("onnx", "trt") and not exported:
        hint = f"mgp5 export {way} --out DIR makes one: give it as --exported DIR"
        raise Mgp5Error(f"--backend {backend} needs an exported folder", hint, usage=True)


def fuse_vae(generator: LatentDiffusion, graphed: bool = False) -> bool:
    """Let a generator's VAE run by fused kernels, where they run and know it; return whether they do.

    With `graphed`, for a GPU, a decoding that comes again is one CUDA graph.
    """
    from .autoencoder import FusedAutoencoder
    from .engine import operations

    device, dtype = generator.denoiser.device, generator.vae.dtype
    if _triton_refusal(device, dtype):
        return False
    with suppress(Mgp5Error):  # another VAE, or ResNet blocks that are not known
        generator.coder = FusedAutoencoder(generator.vae, operations("triton", device, dtype), graphed)
    return generator.coder is not None


def fuse_unet(unet: ModelMixin) -> bool:
    """Let a frozen UNet train in channels-last, its norms by kernels, where these run and know it; return whether."""
    from .frozen import fuse_frozen

    if _triton_refusal(unet.device, unet.dtype) or any(p.requires_grad for p in unet.parameters()):
        return False
    with suppress(Mgp5Error):  # layers that are not known
        fuse_frozen(unet)
        return True
    return False


def remove(generator: LatentDiffusion) -> None:
    """Remove a generator's engine; the model is then, bit for bit, what it was before."""
    if generator.engine is not None or generator.coder is not None:
        from .layers import lay_out

        generator.engine = generator.coder = None
        for part in (generator.denoiser, generator.vae):
            lay_out(part, torch.contiguous_format)


def keep_compiled() -> None:
    """Keep code that is compiled from now on for later processes."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compile_cache()


def _compile_cache() -> str:
    """Return the folder of compiled code: TORCHINDUCTOR_CACHE_DIR where the user set it, else the user's cache."""
    configured = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    default = os.path.join(tempfile.gettempdir(), "torchinductor_")  # which PyTorch itself sets when it is imported
    return configured if configured and not configured.startswith(default) else str(user_cache() / "inductor")


def trt_refusal(device: torch.device) -> str:
    """Return what is missing to build or run TensorRT engines on a device, or ""."""
    reasons = []
    if find_spec("tensorrt") is None:
        reasons.append("TensorRT is not installed (pip install 'mgp5[export-gpu]')")
    else:
        try:
            version = import_module("tensorrt").__version__
            if int(version.partition(".")[0]) < 10:
                reasons.append(f"TensorRT is {version}, expected 10 or newer")
        except (ImportError, OSError) as error:
            reasons.append(f"TensorRT is installed but cannot be loaded ({error})")
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else f" (this is {torch.__version__}, built without CUDA)"
        reasons.append(f"PyTorch finds no NVIDIA GPU{build}")
    elif device.type != "cuda":
        reasons.append(f"it needs a GPU, not a {device.type} device")
    return " and ".join(reasons)


def _onnx_refusal(device: torch.device) -> str:
    if find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install 'mgp5[export]'"
    if device.type == "cpu" or "CUDAExecutionProvider" in import_module("onnxruntime").get_available_providers():
        return ""
    return "this onnxruntime has no CUDA: pip uninstall onnxruntime, then pip install 'mgp5[export-gpu]'"


def _compile_refusal(device: torch.device) -> str:
    if device.type == "cuda":
        return "" if find_spec("triton") else "Triton is not installed: pip install 'mgp5[triton]'"
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    return "" if any(map(shutil.which, compilers)) else "there is no C++ compiler: install g++ or set CXX"


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str:
    selected = kernels.select_kernel("group_norm", device, dtype)
    return "" if selected.implementation == "triton" else selected.why.removeprefix("no triton: ")
