"""Write a component as an ONNX file, by torch.onnx's exporter of torch.export graphs, and describe what was written."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from ..engines.exported import GROUP_NORM, plain_group_norm
from ..errors import Mgp5Error
from ..files import sha256
from .components import Component

LIMIT = 1_900_000_000  # bytes of weights in model.onnx itself; a protobuf file holds 2 GB


class Float32GroupNorm(nn.GroupNorm):
    """GroupNorm for opsets before 21, which have no such operator: the exporter's substitute would have statistics in
    half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return plain_group_norm(x, self.weight, self.bias, self.num_groups, self.eps, False)


class CroppedPatchEmbed(PatchEmbed):
    """Patches of Stable Diffusion 3, whose position embeddings are cropped from a table.

    diffusers' end of a slice, (most - h) // 2 + h, is rearranged by sympy to a division of -h, which torch.onnx (2.13)
    writes as ONNX's division that rounds to zero, not down: for an odd h the slice has one row too many.
    """

    def cropped_pos_embed(self, height: int, width: int) -> Tensor:  # (1, T, D)
        rows, columns, most = height // self.patch_size, width // self.patch_size, self.pos_embed_max_size
        table = self.pos_embed.unflatten(1, (most, most))[:, (most - rows) // 2 :, (most - columns) // 2 :]
        return table[:, :rows, :columns].flatten(1, 2)


@contextmanager
def exportable_classes(module: nn.Module, opset: int) -> Iterator[None]:
    """Give layers, inside the block, classes with methods that the exporter can follow."""
    classes: dict[type, type] = {PatchEmbed: CroppedPatchEmbed}
    if opset < GROUP_NORM:
        classes[nn.GroupNorm] = Float32GroupNorm
    swapped = [(layer, type(layer)) for layer in module.modules() if type(layer) in classes]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the exporter does not know the fast path of nn.Transformer
    for layer, kind in swapped:
        layer.__class__ = classes[kind]
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for layer, kind in swapped:
            layer.__class__ = kind


def write(component: Component, folder: Path, opset: int) -> Path:
    """Write `folder/model.onnx` in the precision of the module's weights, large weights in `model.onnx.data` beside it.
    Raises Mgp5Error if torch.export cannot follow the module, OSError if the file cannot be written."""
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    for library in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.ERROR)  # they warn of optional packages
    size = sum(p.nbytes for p in component.module.parameters())
    try:
        with warnings.catch_warnings(), torch.no_grad(), exportable_classes(component.module, opset):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                component.module.eval(),
                tuple(component.inputs.values()),
                path,
                dynamo=True,
                opset_version=opset,
                input_names=list(component.inputs),
                output_names=list(component.outputs),
                dynamic_shapes=(tuple(component.axes[name] for name in component.inputs),),
                external_data=size > LIMIT,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise Mgp5Error(f"{component.name} cannot be exported ({reason})", "MGP5_DEBUG=1 shows where") from error
    return path


def describe(folder: Path, name: str, precision: str) -> dict[str, Any]:
    """Return a component's entry in the manifest, read from its file: hashes, inputs, outputs and node counts."""
    model = onnx.load(folder / name / "model.onnx", load_external_data=False)
    files = sorted(path for path in (folder / name).iterdir() if path.name.startswith("model.onnx"))
    return {
        "precision": precision,
        "opset": next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")),
        "files": {f"{name}/{path.name}": {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files},
        "inputs": {value.name: _type(value) for value in model.graph.input},
        "outputs": {value.name: _type(value) for value in model.graph.output},
        "nodes": dict(Counter(node.op_type for node in model.graph.node).most_common()),
    }


def _type(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim]
    return {"dtype": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), "shape": shape}
