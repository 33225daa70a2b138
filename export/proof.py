"""Proof that exported files compute what PyTorch does: each component at other batches and sizes, and a whole image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from ..engines import Engine
from ..engines.exported import Run
from ..engines.onnx import Session
from ..errors import Mgp5Error
from ..generators.latent_diffusion import LatentDiffusion
from .specs import Component

CPU = torch.device("cpu")
STEPS, GUIDANCE = 20, 7.5
# Other sizes than the exported example's, batch 2 and 2x3 units: in units of it, and lengths of a condition.
CASES = (
    {"batch": 1, "height": 2, "width": 2, "steps": 1},
    {"batch": 3, "height": 3, "width": 2, "length": 5, "steps": 4},
    {"batch": 4, "height": 2, "width": 4, "steps": 20},
)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How far files may be from PyTorch in float32 with the same (rounded) weights.

    Args:
        relative: greatest difference, in units of the greatest value.
        cosine: least, between outputs as vectors.
        psnr: least, of the image in dB.
    """

    relative: float
    cosine: float
    psnr: float


# ONNX Runtime has no bf16 on a CPU: such a file is proved with its weights as they are and arithmetic in float32.
LIMITS = {
    "fp32": Limit(relative=1e-3, cosine=0.99999, psnr=40.0),
    "fp16": Limit(relative=3e-2, cosine=0.9995, psnr=30.0),
    "bf16": Limit(relative=1e-3, cosine=0.99999, psnr=40.0),
}


def prove(component: Component, run: Run, limit: Limit, unit: int) -> list[dict[str, Any]]:
    """Run a component by PyTorch and by `run` at all sizes of `CASES`; one row for each.

    Args:
        component: in float32.
        unit: least height and width of latents.

    Raises:
        Mgp5Error: a difference beyond the limit.
    """
    rows = []
    for case in _cases(component, unit):
        generator = torch.Generator().manual_seed(len(rows))
        inputs = {name: _input(component, name, case, generator) for name in component.inputs}
        with torch.no_grad():
            expected = component.module(*inputs.values())
        found = run(**inputs)
        told = [difference(value, found[name]) for name, value in zip(component.outputs, expected, strict=True)]
        columns = {key: torch.tensor([one[key] for one in told]) for key in told[0]}  # whose extremes keep a NaN
        worst = {k: float(v.min() if k == "cosine" else v.max()) for k, v in columns.items()}
        rows.append(case | worst)
        # Not the other way round: a NaN must not pass.
        if not (worst["relative"] <= limit.relative and worst["cosine"] >= limit.cosine):
            found_it = f"{component.name} differs from PyTorch by {worst['relative']:.2g} of its range at {case}"
            expected_it = f"expected at most {limit.relative:g} and a cosine of {limit.cosine:g} (it is"
            raise Mgp5Error(f"{found_it}, {expected_it} {worst['cosine']:.6f})", "nothing was written: " + ADVICE)
    return rows


ADVICE = "try --precision fp32 or another --opset"


def prove_image(
    diffusion: LatentDiffusion,
    condition: Tensor,  # (1, L, D)
    unconditional: Tensor,  # (1, L, D)
    engine: Engine,
    limit: Limit,
    size: tuple[int, int],
) -> dict[str, Any]:
    """A whole guided image of `STEPS` steps from the same noise, by PyTorch and by an engine of the exported files.

    Raises:
        Mgp5Error: the images differ beyond the limit.
    """
    made = []
    for use in (None, engine):
        diffusion.engine = use
        generators = [torch.Generator().manual_seed(0)]
        options = {"steps": STEPS, "guidance": GUIDANCE, "height": size[0], "width": size[1]}
        *_, latents = diffusion.draw(condition, unconditional, generators=generators, **options)
        made.append((latents, diffusion.decode(latents) / 2 + 0.5))
    diffusion.engine = None
    (latents, image), (own_latents, own_image) = made
    decibels = psnr(image, own_image)
    told = {"steps": STEPS, "guidance": GUIDANCE, "size": list(size), "psnr": round(decibels, 1)}
    told |= {f"image_{name}": value for name, value in difference(image, own_image).items()}
    told |= {f"latents_{name}": value for name, value in difference(latents, own_latents).items()}
    if not decibels >= limit.psnr:
        found = f"an image of {STEPS} steps is {decibels:.1f} dB from PyTorch's, expected at least {limit.psnr:g}"
        raise Mgp5Error(found, "nothing was written: " + ADVICE)
    return told


def difference(expected: Tensor, found: Tensor) -> dict[str, float]:
    """Greatest difference, the same in units of the greatest value, and the cosine between both as vectors."""
    one, other = expected.double().flatten(), found.double().flatten()
    largest = float((one - other).abs().max())
    cosine = float(torch.dot(one, other) / (one.norm() * other.norm()).clamp_min(1e-300))
    return {"max_abs": largest, "relative": largest / (float(one.abs().max()) or 1.0), "cosine": cosine}


def psnr(expected: Tensor, found: Tensor) -> float:
    """Of pixels in [0, 1], in dB; 200 where they are equal."""
    error = float((expected.double() - found.double()).square().mean())
    return -10 * math.log10(max(error, 1e-20)) if math.isfinite(error) else math.nan


def runner(path: Path, precision: str) -> Run:
    """An ONNX file as a call on the CPU, to compare it with PyTorch."""
    if precision != "bf16":
        return Session(path, CPU)
    with TemporaryDirectory(dir=path.parent) as folder:
        wide = Path(folder) / "model.onnx"
        onnx.save(_widened(onnx.load(path)), wide, save_as_external_data=True)
        return Session(wide, CPU)


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with bf16 as float32; the weights stay what they are."""
    half, full = TensorProto.BFLOAT16, TensorProto.FLOAT

    def widen(tensor: TensorProto) -> None:
        if tensor.data_type == half:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widen(attribute.t)
            elif attribute.name == "to" and attribute.i == half:
                attribute.i = full
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = full
    return model


def _cases(component: Component, unit: int) -> Iterator[dict[str, int]]:
    """Sizes of the dimensions that this component has, each combination once."""
    own = {name for axes in component.axes.values() for name in axes.values()}
    seen = []
    for case in CASES:
        sizes = {k: v * unit if k in ("height", "width") else v for k, v in case.items() if k in own}
        if sizes not in seen:
            seen.append(sizes)
            yield sizes


def _input(component: Component, name: str, case: dict[str, int], generator: torch.Generator) -> Tensor:
    """A random tensor of a case's shape; timesteps are in [0, 1000)."""
    shape = list(component.inputs[name].shape)
    for axis, dimension in component.axes[name].items():
        shape[axis] = case.get(dimension, shape[axis])
    if name.startswith("timestep"):
        return torch.rand(shape, generator=generator) * 999
    return torch.randn(shape, generator=generator)
