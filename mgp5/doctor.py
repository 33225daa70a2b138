"""What this machine has for mgp5: engine and kernels that are chosen here, weights on disk, and what fits the GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import torch

from . import engines
from .apps.library import catalogue
from .device import host_memory, machine, pick_device, versions
from .errors import Mgp5Error
from .evaluation.weights import WEIGHTS, locate
from .export.request import missing
from .hub import bases, local_names, resolve
from .kernels import registry as kernels

CARDS = (8, 12, 16, 24, 48, 80)  # sizes of GPUs in GB, of which 1e9 bytes each are counted on


def examine(model: str | None = None, every: bool = False) -> dict[str, Any]:
    """Return all that `mgp5 doctor` tells, with the memory that a model takes, or each named one; no weights are read.

    Raises Mgp5Error where there is no such model, or its configuration cannot be read.
    """
    device, dtype = pick_device()
    on_gpu = device.type == "cuda"
    found: dict[str, Any] = {"machine": machine(), "versions": versions()}
    found["engines"] = [_engine(backend, device, dtype) for backend in get_args(engines.Backend)]
    chosen = kernels.choices(device, dtype)
    found["operations"] = [{"name": c.operation, "chosen": c.implementation, "why": c.why} for c in chosen]
    found |= {"weights": catalogue(), "metrics": _metrics()}
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else None
    weights = dtype if on_gpu else torch.bfloat16
    if model:
        found["memory"] = memory(model, weights) | {"free": free, "host": _on_cpu(model)}
        found["paths"] = paths(model, device, dtype)
    if every:
        found["models"] = [memory(name, weights) | {"free": free} for name in [*local_names(), *bases()]]
    return found | {"next": _next(found)}


def _metrics() -> list[dict[str, Any]]:
    """Return where the weights of the metrics of `mgp5 eval` are, or how to get them."""
    found = []
    for name, weights in WEIGHTS.items():
        try:
            path, get = str(locate(name, {})), ""
        except Mgp5Error:
            path, get = None, weights.get
        found.append({"name": name, "what": weights.what, "megabytes": weights.megabytes, "path": path, "get": get})
    return found


def _next(found: dict[str, Any]) -> list[str]:
    """Return lines that say what to do next."""
    have = [row["name"] for row in found["weights"] if row["whole"]]
    lines = ["Next: mgp5 story --images examples/picnic --scenes 2 --out out/picnic" if "demo" in have else ""]
    if not found["machine"].get("gpu"):
        lines.append("There is no GPU here: the demo runs well, 7B models need one.")
    elif not found["versions"]["triton"]:
        lines.append("Faster: pip install 'mgp5[triton]'")
    elif len(have) < 2:
        lines.append("Larger parts: mgp5 models lists them, mgp5 pull NAME fetches one.")
    return [line for line in lines if line]


def memory(model: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a model takes on a GPU, in bytes: part by part, and in each phase of each memory plan."""
    from .memory.generation import footprint
    from .memory.offload import memory_plans

    needs = footprint(resolve(model), dtype)
    plans = [p for p in memory_plans() if not p.tiling or needs.total(p) < needs.total(replace(p, tiling=False))]
    cards = {size: next((p.name for p in plans if needs.total(p) <= size * 1e9), None) for size in CARDS}
    modes = [{"name": p.name} | needs.phases(p) | {"total": needs.total(p), "host": needs.host(p).most} for p in plans]
    parts = [
        {"name": name, "parameters": count, "bytes": needs.weights[name], "phase": needs.phases_of[name]}
        for name, count in needs.parameters.items()
    ]
    facts = {"model": model, "dtype": str(dtype).removeprefix("torch."), "tokens": needs.tokens, "size": needs.size}
    return facts | {"parts": parts, "quantized": needs.quantized, "cache": needs.cache, "modes": modes, "cards": cards}


def _on_cpu(model: str) -> dict[str, Any]:
    """Return what a model takes of the machine's memory where there is no GPU, what is free, and whether it fits."""
    from .memory.generation import footprint
    from .memory.offload import Plan

    needs, memory = footprint(resolve(model), torch.float32).host(Plan(), on_gpu=False), host_memory()
    return {"needs": needs.most, "free": memory.free, "fits": needs.most <= memory.free, "told": memory.told}


def paths(model: str, device: torch.device, dtype: torch.dtype) -> list[dict[str, str]]:
    """Return what writes the text of a model and what draws its images with `--backend auto`, and why."""
    from .engines import decode
    from .engines.engine import operations
    from .engines.precomputed import precompute
    from .memory.skeletons import generating_skeleton

    built = generating_skeleton(resolve(model), dtype)
    graphed, choice = device.type == "cuda" and built.backbone.capturable, engines.select_backend("auto", device, dtype)
    text, why = "PyTorch, operation by operation", "nothing is compiled unless --backend compile asks for it"
    if graphed:
        refusal = decode.why_not(built.backbone, device, dtype)
        text = "one CUDA graph a token" + ("" if refusal else ", by fused kernels")
        known = f"{type(built.backbone.language).__name__} is known, and its kernels were tried"
        why = f"no fused kernels: {refusal}" if refusal else known
    found = [{"part": "text", "path": text, "why": why}]
    denoiser = getattr(getattr(built.head, "generator", None), "denoiser", None)
    if denoiser is None and not hasattr(getattr(built.head, "decoder", None), "decode_scale"):
        why = f"the head {built.head.spec.name} has neither a denoiser nor a decoder of scales"
        return [*found, {"part": "images", "path": "PyTorch", "why": why}]
    try:
        if denoiser is None:
            return [*found, {"part": "images", "path": str(choice.name), "why": f"scales: {choice.why}"}]
        ops = operations("eager", denoiser.device, dtype)
        precompute(denoiser, ops, packed=False, layout=torch.contiguous_format)
    except Mgp5Error as error:
        return [*found, {"part": "images", "path": "diffusers", "why": error.message}]
    return [*found, {"part": "images", "path": str(choice.name), "why": choice.why}]


def _engine(backend: engines.Backend, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    try:
        choice = engines.select_backend(backend, device, dtype)
    except Mgp5Error as error:
        return {"name": backend, "chosen": None, "why": error.message.partition("cannot run here: ")[2]}
    why = choice.why
    if backend == "auto" and device.type == "cpu" and not missing():  # see `export.cache.apply`
        why += "; onnx where mgp5 export --cache has made it"
    return {"name": backend, "chosen": choice.name, "why": why}
