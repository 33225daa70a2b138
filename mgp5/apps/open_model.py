"""Load the model that a request names, on its device, with its engine and its plan for memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model import InterleavedModel
    from ..options import ModelRequest
    from ..prompts import Context

Tell = Callable[[str], None]  # takes a line for the user


def silent(line: str) -> None:
    """Drop a line that is meant for the user."""


def open_model(request: ModelRequest, tell: Tell = silent) -> InterleavedModel:
    """Load a trained model, ready to generate.

    Progress bars and advice of transformers, diffusers and the hub are turned off, and a small model on a CPU is
    limited to one thread.

    Args:
        request: which model, and how to hold and run it.
        tell: is given a line for each choice that was made for the user: the memory mode, and the engine.

    Raises:
        Mgp5Error: no such model or device, nothing trained in it, parts that do not fit together, a backend that
            cannot run here (found before any weights are read), or too little memory.
    """
    from ..device import limit_threads_for_small_models, pick_device, quiet_libraries

    quiet_libraries()  # before transformers and diffusers are imported: they warn while they are
    from .. import engines
    from ..hub import resolve
    from ..memory import offload
    from ..model import load, set_backend

    device, dtype = pick_device(request.device)
    engines.select_backend(request.backend, device, dtype)
    plan = offload.select_memory_plan(request.memory, resolve(request.model), device, dtype, request.quantize)
    backend = plan.engine(request.backend)
    if plan.why:
        tell(plan.why)
    model = load(request.model, dtype=dtype, device=str(device), backend=None, memory=plan)
    limit_threads_for_small_models(model)
    choice = set_backend(model, backend, request.exported)
    if request.exported:
        from ..engines.exported import put_mapper_on

        put_mapper_on(model.head, request.exported, device, backend)
    if choice.why:
        tell(f"backend {choice.name or 'diffusers'}: {choice.why}")
    return model


def narrate_from(request: ModelRequest) -> Context:
    """Return how much of a story's history a prompt for a text shows, of the model's configuration alone.

    Raises:
        Mgp5Error: no such model, or a configuration that cannot be read.
    """
    from ..hub import read_config, resolve

    trained = resolve(request.model).trained
    return "full" if trained is None else read_config(trained / "config.json").get("narrate_from", "full")
