"""What `mgp5 doctor` tells: the machine, versions, the engine and kernels that are chosen here, and what fits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch

from . import engines
from .apps.library import catalogue, here
from .device import machine, pick_device, versions
from .errors import Mgp5Error
from .evaluation.weights import WEIGHTS, locate
from .export.request import missing
from .files import GiB
from .hub import bases, local_names, resolve
from .kernels import registry as kernels
from .views.tables import show, table

if TYPE_CHECKING:
    from rich.table import Table


def report(model: str | None, every: bool, as_json: bool) -> None:
    """Print it: tables, or one JSON object. Raises Mgp5Error for a model that is not there."""
    found = examine(model, every)
    if as_json:
        print(json.dumps(found))
        return
    show(*tables(found))
    for line in found["next"]:
        print(line)


def examine(model: str | None = None, every: bool = False) -> dict[str, Any]:
    """All that `mgp5 doctor` tells.

    Args:
        model: as `hub.resolve` takes it; its configuration is read, no weights.
        every: tell the memory of each named model.
    """
    device, dtype = pick_device()
    on_gpu = device.type == "cuda"
    found: dict[str, Any] = {"machine": machine(), "versions": versions()}
    found["engines"] = [_engine(backend, device, dtype) for backend in get_args(engines.Backend)]
    chosen = kernels.choices(device, dtype)
    found["operations"] = [{"name": c.operation, "chosen": c.implementation, "why": c.why} for c in chosen]
    found |= {"weights": _weights(), "metrics": _metrics()}
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else None
    weights = dtype if on_gpu else torch.bfloat16
    if model:
        found["memory"] = memory(model, weights) | {"free": free}
    if every:
        found["models"] = [memory(name, weights) | {"free": free} for name in [*local_names(), *bases()]]
    return found | {"next": _next(found)}


def _weights() -> list[dict[str, Any]]:
    """Named models, and what of them is on this disk."""
    return [{name: row[name] for name in ("name", "made_of", "size", "bytes", "whole")} for row in catalogue()]


def _metrics() -> list[dict[str, Any]]:
    """Weights of the metrics of `mgp5 eval`: where they are, or how to get them."""
    found = []
    for name, weights in WEIGHTS.items():
        try:
            path, get = str(locate(name, {})), ""
        except Mgp5Error:
            path, get = None, weights.get
        found.append({"name": name, "what": weights.what, "megabytes": weights.megabytes, "path": path, "get": get})
    return found


def _next(found: dict[str, Any]) -> list[str]:
    """What to do next."""
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
    """What a model takes on a GPU, in bytes: part by part, and at most in each mode."""
    from .memory.generation import footprint
    from .memory.offload import memory_plans

    needs = footprint(resolve(model), dtype)
    plans = [p for p in memory_plans() if not p.tiling or needs.total(p) < needs.total(replace(p, tiling=False))]
    modes = [{"name": p.name} | needs.phases(p) | {"total": needs.total(p)} for p in plans]
    parts = [
        {"name": name, "parameters": count, "bytes": needs.weights[name]} for name, count in needs.parameters.items()
    ]
    facts = {"model": model, "dtype": str(dtype).removeprefix("torch."), "tokens": needs.tokens, "size": needs.size}
    return facts | {"parts": parts, "quantized": needs.quantized, "cache": needs.cache, "modes": modes}


def tables(found: dict[str, Any]) -> list[Table]:
    """What `examine` found, for the terminal."""
    facts = [[name.replace("_gib", " (GiB)"), str(value)] for name, value in found["machine"].items()]
    facts += [[name, number or "not installed"] for name, number in found["versions"].items()]
    ways = [[e["name"], e["chosen"] or "cannot run", e["why"]] for e in found["engines"]]
    operations = [[o["name"], o["chosen"], o["why"]] for o in found["operations"]]
    views = [table("machine", ["", ""], facts), table("engines", ["--backend", "chosen", "why"], ways)]
    views.append(table("operations of the engine triton", ["operation", "chosen", "why"], operations))
    weights = [[w["name"], w["made_of"], f"{w['size']:.2f}", here(w)] for w in found["weights"]]
    views.append(table("named models", ["name", "what", "GB", "on this disk"], weights))
    metrics = [[m["name"], m["what"], f"{m['megabytes']:,}", m["path"] or m["get"]] for m in found["metrics"]]
    views.append(table("weights of metrics", ["name", "what", "MB", "where, or how to get them"], metrics))
    views += _memory_tables(found["memory"]) if "memory" in found else []
    if "models" in found:
        rows = [
            [m["model"], *(_gib(modes[place]["total"]) for place in (0, -1))]
            for m in found["models"]
            if (modes := m["modes"])
        ]
        views.append(table("GPU memory (GiB)", ["model", "full", "at least"], rows))
    return views


def _memory_tables(told: dict[str, Any]) -> list[Table]:
    rows = [[p["name"], f"{p['parameters'] / 1e6:,.2f}", _gib(p["bytes"])] for p in told["parts"]]
    rows[-1][0] += ", not on the GPU"
    rows += [[f"LLM in {kind[0]} bits", "", _gib(size)] for kind, size in told["quantized"].items()]
    rows.append([f"cache of {told['tokens']} tokens", "", _gib(told["cache"])])
    names = "see", "read", "draw", "decode", "total"
    modes = [[mode["name"], *(_gib(mode[name]) for name in names)] for mode in told["modes"]]
    columns = ["held as", "seeing", "reading", "drawing", "decoding", "GPU memory (GiB)"]
    if told["free"] is not None:
        columns.append("fits")
        for row, mode in zip(modes, told["modes"], strict=True):
            row.append("yes" if mode["total"] <= told["free"] else "no")
    title = f"{told['model']} in {told['dtype']}"
    size = "x".join(map(str, told["size"]))
    parts = table(title, ["part", "parameters (M)", "GiB"], rows)
    return [parts, table(f"{title}, a picture of {size}", columns, modes)]


def _engine(backend: engines.Backend, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    try:
        choice = engines.select_backend(backend, device, dtype)
    except Mgp5Error as error:
        return {"name": backend, "chosen": None, "why": error.message.partition("cannot run here: ")[2]}
    why = choice.why
    if backend == "auto" and device.type == "cpu" and not missing():  # see `export.cache.apply`
        why += "; onnx for models of 1 to 100 million parameters, such as demo"
    return {"name": backend, "chosen": choice.name, "why": why}


def _gib(size: float) -> str:
    return f"{size / GiB:.2f}"
