"""Load the model that a request names, on its device, with its engine and its plan for memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import Mgp5Error

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..engines import BackendChoice
    from ..memory.offload import Plan
    from ..model import InterleavedModel
    from ..options import Backend, ImageOptions, Memory, ModelRequest, Quantize
    from ..prompts import Context

Tell = Callable[[str], None]  # takes a line for the user


def silent(line: str) -> None:
    """Drop a line that is meant for the user."""


def load(
    name: str | Path = "demo",  # or a folder that `mgp5 train` has written
    *,
    dtype: torch.dtype | None = None,  # of frozen parts, None is float32; what was trained stays in float32
    device: str = "cpu",  # cpu, cuda or cuda:N
    quantize: Quantize = "none",  # see `backbones.quantization`
    backend: Backend | None = "auto",  # the engine that draws, see `mgp5.engines`; None leaves it to diffusers alone
    memory: Memory | Plan = "auto",  # on a GPU, "low" saves all it can, "auto" what it must; or a plan of its own
) -> InterleavedModel:
    """Load a trained model, ready to generate; the libraries' progress bars and FutureWarnings are turned off.

    Raises Mgp5Error if there is no such model, its parts do not fit together, or something cannot run here.
    """
    import torch

    from ..device import quiet_libraries

    quiet_libraries()
    from ..backbones.quantization import TORCHAO, quantize_weights
    from ..hub import resolve
    from ..loading import load_checkpoint
    from ..memory.generation import select_memory_plan
    from ..memory.offload import Plan, place

    target, dtype, parts = torch.device(device), dtype or torch.float32, resolve(str(name))
    if parts.trained is None:
        raise Mgp5Error(f"{name} has no trained head", f"train one: mgp5 train --stage pretrain --model {name}")
    if not isinstance(memory, Plan):
        memory = select_memory_plan(memory, parts, target, dtype, quantize)
    backend = memory.engine(backend)
    by_torchao = memory.quantize in TORCHAO  # of merged weights
    model = load_checkpoint(parts, dtype=dtype, quantize="none" if by_torchao else memory.quantize)
    model.merge()
    if by_torchao:
        quantize_weights([model.backbone.language.layers, *denoisers(model)], memory.quantize)
    place(model.eval(), memory, target)
    if backend:
        set_backend(model, backend)
    return model


def denoisers(model: InterleavedModel) -> list[Any]:
    """Return the module that the head draws with, if it is a denoiser."""
    generator = getattr(model.head, "generator", None)
    return [generator.denoiser] if hasattr(generator, "denoiser") else []


def set_backend(model: InterleavedModel, backend: Backend, exported: Path | None = None) -> BackendChoice:
    """Let images be drawn by an engine, see `export.cache.apply`.

    With compile, tokens are decoded by compiled code too; else, but for eager, by fused kernels where they can be.
    """
    from .. import engines
    from ..engines import decode
    from ..export.cache import apply

    generator, decoder = getattr(model.head, "generator", None), getattr(model.head, "decoder", None)
    if hasattr(generator, "denoiser"):
        choice = apply(generator, backend, exported)
    elif hasattr(decoder, "decode_scale"):
        from ..engines import scales

        choice = scales.apply(decoder, generator, backend, exported)
    elif backend in ("auto", "eager", "compile"):
        choice = engines.BackendChoice("compile" if backend == "compile" else "eager")
    else:
        case = f"--backend {backend} runs a denoiser, and the head {model.head.spec.name} has none"
        raise Mgp5Error(case, "take --backend auto, eager or compile", usage=True)
    model.backbone.compiled = choice.compiles  # it takes longer than most replies: only for who asked for it
    if model.backbone.compiled:
        engines.keep_compiled()
    fused = backend not in ("eager", "compile")
    model.backbone.engine = None  # an earlier one holds weights that were joined
    model.backbone.engine = decode.fused_decode(model.backbone) if fused else None
    if fused and exported is None:
        decode.map_in_half(model.head, model.backbone)
    return choice


def open_model(request: ModelRequest, tell: Tell = silent, images: int = 1) -> InterleavedModel:
    """Load the trained model of a request, ready to generate, with libraries silenced and threads limited.

    The memory plan has room to draw as many `images` at once.

    `tell` is given a line for each choice that was made for the user: the memory mode, and the engine. Raises
    Mgp5Error as `load` does, and for too little memory; a backend that cannot run here is found before weights are
    read.
    """
    from ..device import limit_threads_for_small_models, pick_device, quiet_libraries

    quiet_libraries()  # before transformers and diffusers are imported: they warn while they are
    from .. import engines
    from ..hub import resolve
    from ..memory.generation import select_memory_plan

    device, dtype = pick_device(request.device)
    engines.select_backend(request.backend, device, dtype)
    plan = select_memory_plan(request.memory, resolve(request.model), device, dtype, request.quantize, images)
    backend = plan.engine(request.backend)
    if plan.why:
        tell(plan.why)
    model = load(request.model, dtype=dtype, device=str(device), backend=None, memory=plan)
    limit_threads_for_small_models(model)
    choice = set_backend(model, backend, request.exported)
    if request.exported:
        from ..engines.exported import attach_condition

        attach_condition(model.head, request.exported, backend)
    if choice.why:
        tell(f"backend {choice.name or 'diffusers'}: {choice.why}")
    return model


def image_options(request: ModelRequest) -> type[ImageOptions]:
    """Return the class of the options that the model's head draws with. Raises Mgp5Error for an unknown head."""
    from ..options import IMAGE_OPTIONS

    head = _configuration(request).get("head", "minigpt5")
    if head not in IMAGE_OPTIONS:
        known = ", ".join(IMAGE_OPTIONS)
        raise Mgp5Error(f"{request.model} has the head {head!r}, expected one of {known}", "update mgp5")
    return IMAGE_OPTIONS[head]


def narrate_from(request: ModelRequest) -> Context:
    """Return how much of a story's history a prompt for a text shows."""
    return _configuration(request).get("narrate_from", "full")


def system_text(request: ModelRequest) -> str:
    """Return the system text of conversations that have none of their own."""
    from ..prompts import CHAT_SYSTEM

    return _configuration(request).get("system", CHAT_SYSTEM)


def world(request: ModelRequest) -> str:
    """Return the name of the one world that the model knows, "" where it knows no bounds."""
    return _configuration(request).get("world", "")


def _configuration(request: ModelRequest) -> dict[str, Any]:
    """Return what config.json says of a model; nothing of one that is not trained."""
    from ..hub import read_config, resolve

    trained = resolve(request.model).trained
    return {} if trained is None else read_config(trained / "config.json")
