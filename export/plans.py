"""Built TensorRT engines on disk: a plan, and beside it all that it depends on as JSON; found by a hash of that."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import Mgp5Error
from ..files import read_json, sha256, write_bytes, write_json

Span = tuple[int, int, int]  # least, usual and greatest size of a dimension


@dataclass(frozen=True, kw_only=True)
class Key:
    """All that an engine depends on: it runs well, or at all, only where everything is the same.

    Args:
        onnx: SHA-256 of the ONNX file and its external data.
        graph: see `graph_hash`; "" of an engine whose weights cannot be changed.
        precision: of the weights in it.
        shapes: name of each dynamic dimension -> its sizes.
        options: of the build.
        machine: see `this_machine`.
    """

    onnx: str
    graph: str
    precision: str
    shapes: dict[str, Span]
    options: dict[str, Any]
    machine: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return json.loads(json.dumps(asdict(self)))

    def place(self, onnx: Path) -> Path:
        """Where the plan of this key is, beside its ONNX file: unet/model-2x64x64-0123456789ab.plan, say."""
        least, greatest = ("x".join(str(span[end]) for span in self.shapes.values()) for end in (0, 2))
        label = least if least == greatest else f"{least}-to-{greatest}"
        digest = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()
        return onnx.with_name(f"{onnx.stem}-{label}-{digest[:12]}.plan")


def this_machine(tensorrt: str, device: torch.device) -> dict[str, Any]:
    """What an engine is bound to: TensorRT's version, the GPU and its driver."""
    from torch.utils.collect_env import get_nvidia_driver_version, run

    card = torch.cuda.get_device_properties(device)
    return {
        "tensorrt": tensorrt,
        "gpu": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        # Without nvidia-smi, at least the CUDA version that the driver is for.
        "driver": get_nvidia_driver_version(run) or str(torch._C._cuda_getDriverVersion()),
    }


def graph_hash(onnx: Path) -> str:
    """SHA-256 of all of an ONNX file but the values of its weights; whole numbers are sizes and axes, so they count."""
    import onnx as library

    model = library.load(onnx, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_type not in (library.TensorProto.INT64, library.TensorProto.INT32):
            for field in ("raw_data", "float_data", "int32_data", "external_data", "data_location"):
                tensor.ClearField(field)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def keep(place: Path, key: Key, plan: Any, **notes: Any) -> None:
    """Write a plan, any buffer, and what belongs to it; each appears whole or not at all."""
    write_bytes(place, plan)
    facts = {"key": key.facts(), "sha256": sha256(place), "bytes": place.stat().st_size, **notes}
    write_json(place.with_suffix(".json"), facts)


def note(place: Path) -> dict[str, Any]:
    """What was written beside a plan; {} where it is missing or broken."""
    try:
        found = read_json(place.with_suffix(".json"))
    except Mgp5Error:
        return {}
    names = {field.name for field in fields(Key)}
    return found if {*(found.get("key") or ())} == names else {}


def fault(place: Path, key: Key) -> str:
    """Why the plan at a place must not be loaded where `key` is wanted, or ""."""
    if not (found := note(place)):
        return "no readable JSON file beside it tells where it is from"
    for name, wanted in key.facts().items():
        if found["key"].get(name) != wanted:
            return f"it was built for another {_difference(name, found['key'].get(name), wanted)}"
    return "" if sha256(place) == found.get("sha256") else "it is damaged, its content is not what was written"


def same_but_weights(folder: Path, key: Key) -> Path | None:
    """A plan that differs in nothing but the weights it was built with."""
    for place in folder.glob("*.plan"):
        built = note(place).get("key", {})
        old = replace(key, onnx=str(built.get("onnx")))
        if old.facts() == built and not fault(place, old):
            return place
    return None


def usable(folder: Path, onnx: str, machine: dict[str, Any], sizes: dict[str, int]) -> Path | None:
    """Of the plans of a file on this machine that take these sizes, the one with the least room for others."""
    found = []
    for place in folder.glob("*.plan"):
        built = note(place).get("key", {})
        spans = built.get("shapes", {})
        if spans.keys() == sizes.keys() and all(spans[n][0] <= size <= spans[n][2] for n, size in sizes.items()):
            key = replace(Key(**built), onnx=onnx, machine=machine)
            room = sum(span[2] - span[0] for span in spans.values())
            found += [(room, -built["options"]["level"], place)] if not fault(place, key) else []
    return min(found)[2] if found else None


def _difference(name: str, built: Any, wanted: Any) -> str:
    """The first part that is not the same, in words."""
    if isinstance(built, dict) and isinstance(wanted, dict):
        for part in sorted(built | wanted):
            if built.get(part) != wanted.get(part):
                return _difference(part, built.get(part), wanted.get(part))
    return f"{name} ({str(built)[:40]}, here {str(wanted)[:40]})"
