"""A component as an ONNX file, by torch.onnx's exporter of torch.export graphs."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from ..engines.exported import GROUP_NORM
from ..errors import Mgp5Error
from .specs import Component, Float32GroupNorm

LIMIT = 1_900_000_000  # bytes of weights; a protobuf file holds 2 GB


class StandIn:
    """Classes whose methods the exporter can follow, for as long as this context lasts.

    Args:
        opset: before 21 there is no GroupNorm, and what stands for it would have statistics in half precision.
    """

    def __init__(self, module: nn.Module, opset: int) -> None:
        kinds: dict[type, type] = {PatchEmbed: Crop} | ({nn.GroupNorm: Float32GroupNorm} if opset < GROUP_NORM else {})
        self.swaps = [(own, type(own), kinds[type(own)]) for own in module.modules() if type(own) in kinds]

    def __enter__(self) -> None:
        self.fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the exporter does not know that of nn.Transformer
        for own, _, other in self.swaps:
            own.__class__ = other

    def __exit__(self, *_: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self.fast)
        for own, kind, _ in self.swaps:
            own.__class__ = kind


class Crop(PatchEmbed):
    """Patches of SD 3, whose positions are cropped from a table.

    diffusers' end of a slice, (most - h) // 2 + h, is rearranged by sympy to a division of -h, which torch.onnx (2.13)
    writes as ONNX's division that rounds to zero, not down: for an odd h the slice has one row too many.
    """

    def cropped_pos_embed(self, height: int, width: int) -> Tensor:  # (1, T, D)
        rows, columns, most = height // self.patch_size, width // self.patch_size, self.pos_embed_max_size
        table = self.pos_embed.unflatten(1, (most, most))[:, (most - rows) // 2 :, (most - columns) // 2 :]
        return table[:, :rows, :columns].flatten(1, 2)


def write(component: Component, folder: Path, opset: int) -> Path:
    """Write `folder/model.onnx` in the precision of the module's weights, large weights in `model.onnx.data` beside it.

    Raises:
        Mgp5Error: torch.export cannot follow the module.
        OSError: the disk is full, say.
    """
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    for library in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.ERROR)  # else they tell of all that they can do without
    size = sum(p.nbytes for p in component.module.parameters())
    try:
        with warnings.catch_warnings(), torch.no_grad(), StandIn(component.module, opset):
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
