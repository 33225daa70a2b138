"""manifest.json of an exported folder: what is in it, whose it is, and how near to PyTorch it was found to be."""

from __future__ import annotations

import hashlib
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import Mgp5Error
from ..files import read_json, sha256

NAME = "manifest.json"
FORMAT = 2  # of what components take and give; 1 had one timestep for all rows
LIBRARIES = ("mgp5", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "optimum")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `mgp5 export` wrote. Raises Mgp5Error when it is missing, broken or old."""
    try:
        manifest = read_json(folder / NAME)
        if not all(entry["files"] for entry in manifest["components"].values()):
            raise ValueError("it lists no files")
    except (Mgp5Error, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "give a folder that mgp5 export has written"
        raise Mgp5Error(f"no readable {NAME} in {folder} ({str(error) or type(error).__name__})", hint) from None
    if (found := manifest.get("format", 1)) != FORMAT:
        made = f"{folder} was exported by another version of mgp5 (format {found}, expected {FORMAT})"
        raise Mgp5Error(made, "export it again")
    return manifest


def check(folder: Path, manifest: dict[str, Any], names: list[str] | None = None) -> None:
    """See that the files are those that were proved. Raises Mgp5Error when one is missing or damaged."""
    for name in names or manifest["components"]:
        for file, told in manifest["components"][name]["files"].items():
            path = folder / file
            if not path.is_file() or path.stat().st_size != told["bytes"] or sha256(path) != told["sha256"]:
                found = "is damaged" if path.is_file() else "is missing"
                raise Mgp5Error(f"{path} {found}: it is not the file that was proved", "copy or export it again")


def describe(folder: Path, name: str, precision: str) -> dict[str, Any]:
    """Files, inputs, outputs and node counts of a component, read from what was written."""
    import onnx

    model = onnx.load(folder / name / "model.onnx", load_external_data=False)
    files = sorted(path for path in (folder / name).iterdir() if path.name.startswith("model.onnx"))
    return {
        "precision": precision,
        "opset": next(own.version for own in model.opset_import if own.domain in ("", "ai.onnx")),
        "files": {f"{name}/{path.name}": {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files},
        "inputs": {value.name: _kind(value) for value in model.graph.input},
        "outputs": {value.name: _kind(value) for value in model.graph.output},
        "nodes": dict(Counter(node.op_type for node in model.graph.node).most_common()),
    }


def _kind(value: Any) -> dict[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    shape = [dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim]
    return {"dtype": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), "shape": shape}


def versions() -> dict[str, str]:
    """Of what exports and proves."""
    return {name: version(name) for name in LIBRARIES}


def weights_hash(module: nn.Module) -> str:
    """Of all weights and their names, in 32 hexadecimal digits; in bfloat16, so that of most precisions it is one."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().bfloat16().cpu().contiguous().reshape(-1).view(torch.int16).numpy())
    return digest.hexdigest()
