"""Compare exported files with PyTorch: each component at other batches and sizes than its example, and an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from ..engines.engine import Engine
from ..engines.exported import Session
from ..engines.onnx import OnnxSession
from ..engines.scales import ExportedScales
from ..errors import Mgp5Error
from ..generators.latent_diffusion import LatentDiffusion
from ..generators.var import VARDecoder
from ..generators.vqvae import VQVAE
from .components import Component

CPU = torch.device("cpu")
STEPS, GUIDANCE = 20, 7.5
# The example has batch 2 and 2x3 units of latents. Height and width are in units of latents, length in tokens.
CASES = (
    {"batch": 1, "height": 2, "width": 2, "steps": 1},
    {"batch": 3, "height": 3, "width": 2, "length": 5, "steps": 4},
    {"batch": 4, "height": 2, "width": 4, "steps": 20},
)
HINT = "nothing was written: try --precision fp32 or another --opset"


class Limit(NamedTuple):
    """How far files may be from PyTorch in float32 with the same (rounded) weights."""

    relative: float  # greatest difference, in units of the greatest value
    cosine: float  # least cosine between the outputs as vectors
    psnr: float  # least PSNR of the image, in dB


# ONNX Runtime has no bf16 on a CPU: such a file is compared with its weights as they are and arithmetic in float32.
LIMITS = {
    "fp32": Limit(relative=1e-3, cosine=0.99999, psnr=40.0),
    "fp16": Limit(relative=3e-2, cosine=0.9995, psnr=30.0),
    "bf16": Limit(relative=1e-3, cosine=0.99999, psnr=40.0),
}


def compare(component: Component, session: Session, limit: Limit, unit: int) -> list[dict[str, Any]]:
    """Run a component in float32 by PyTorch and by its file at all sizes of CASES; return the differences of each.

    `unit` is the least height and width of latents. Raises Mgp5Error if a difference exceeds the limit.
    """
    rows = []
    for case in _cases(component, unit):
        generator = torch.Generator().manual_seed(len(rows))
        inputs = {name: _input(component, name, case, generator) for name in component.inputs}
        with torch.no_grad():
            expected = component.module(*inputs.values())
        outputs = session(**inputs)
        pairs = zip(component.outputs, expected, strict=True)
        differences = [difference(value, outputs[name]) for name, value in pairs]
        columns = {key: torch.tensor([one[key] for one in differences]) for key in differences[0]}  # extremes keep NaN
        worst = {k: float(v.min() if k == "cosine" else v.max()) for k, v in columns.items()}
        rows.append(case | worst)
        # Not the other way round: a NaN must not pass.
        if not (worst["relative"] <= limit.relative and worst["cosine"] >= limit.cosine):
            found = f"{component.name} differs from PyTorch by {worst['relative']:.2g} of its range at {case}"
            expected = f"expected at most {limit.relative:g} and a cosine of {limit.cosine:g} (it is"
            raise Mgp5Error(f"{found}, {expected} {worst['cosine']:.6f})", HINT)
    return rows


def compare_image(
    generator: LatentDiffusion,
    conditions: Mapping[Engine | None, tuple[Tensor, Tensor]],  # (1, L, C) twice: the second one for guidance
    limit: Limit,
    size: tuple[int, int],  # (height, width) in pixels
) -> dict[str, Any]:
    """Draw a guided image of STEPS steps from the same noise by PyTorch (None) and by the engine of the exported files,
    each from its own conditions; return the differences. Raises Mgp5Error if they exceed the limit."""
    results = []
    for attached, (condition, unconditional) in conditions.items():
        generator.engine = attached
        options = {"steps": STEPS, "guidance": GUIDANCE, "height": size[0], "width": size[1]}
        rng = torch.Generator().manual_seed(0)
        *_, latents = generator.draw(condition, unconditional, generators=[rng], **options)
        results.append((latents, generator.decode(latents) / 2 + 0.5))
    generator.engine = None
    (latents, image), (exported_latents, exported_image) = results
    decibels = psnr(image, exported_image)
    row = {"steps": STEPS, "guidance": GUIDANCE, "size": list(size), "psnr": round(decibels, 1)}
    row |= {f"image_{name}": value for name, value in difference(image, exported_image).items()}
    row |= {f"latents_{name}": value for name, value in difference(latents, exported_latents).items()}
    _check_image(decibels, limit)
    return row


@torch.no_grad()
def compare_scales(decoder: VARDecoder, vqvae: VQVAE, files: Mapping[str, Session], limit: Limit) -> dict[str, Any]:
    """Decode all scales of an image from the same random inputs by PyTorch and by the files, each with its own cache,
    and the image of PyTorch's likeliest codes; return the differences, and the share of codes that both find likeliest.

    Raises Mgp5Error if they exceed the limit.
    """
    by_file, generator = ExportedScales(files["scale"], decoder), torch.Generator().manual_seed(0)
    classes, caches, f_hat = torch.tensor([decoder.dropped_class]), [None, None], vqvae.quantizer.start(1)
    worst, same = [], 0
    for scale, size in enumerate(decoder.config.sizes):
        inputs = torch.randn(1, size, decoder.config.width, generator=generator)
        logits = []
        for way, run in enumerate((decoder.run_scale, by_file)):
            values, caches[way] = run(inputs, classes, caches[way])
            logits.append(values)
        codes, others = (values.argmax(-1) for values in logits)
        worst.append(difference(*logits)["relative"])
        same += int((codes == others).sum())
        f_hat = vqvae.quantizer.add(f_hat, scale, codes)
    painted = vqvae.paint(f_hat), files["vae_decoder"](f_hat=f_hat)["sample"].float()
    decibels = psnr(*((pixels.clamp(-1, 1) + 1) / 2 for pixels in painted))
    if not max(worst) <= limit.relative:
        raise Mgp5Error(f"logits of scales differ by {max(worst):.2g} of their range", HINT)
    _check_image(decibels, limit)
    share = same / sum(decoder.config.sizes)
    return {"scales": len(worst), "psnr": round(decibels, 1), "logits_relative": max(worst), "codes_equal": share}


def _check_image(decibels: float, limit: Limit) -> None:
    if not decibels >= limit.psnr:
        raise Mgp5Error(f"an image is {decibels:.1f} dB from PyTorch's, expected at least {limit.psnr:g}", HINT)


def difference(expected: Tensor, found: Tensor) -> dict[str, float]:
    """Return the greatest difference, the same in units of the greatest value, and the cosine as vectors."""
    one, other = expected.double().flatten(), found.double().flatten()
    largest = float((one - other).abs().max())
    cosine = float(torch.dot(one, other) / (one.norm() * other.norm()).clamp_min(1e-300))
    return {"max_abs": largest, "relative": largest / (float(one.abs().max()) or 1.0), "cosine": cosine}


def psnr(expected: Tensor, found: Tensor) -> float:
    """Return the PSNR of pixels in [0, 1], in dB; 200 where they are equal."""
    error = float((expected.double() - found.double()).square().mean())
    return -10 * math.log10(max(error, 1e-20)) if math.isfinite(error) else math.nan


def load_session(path: Path, precision: str) -> Session:
    """Return a session of an ONNX file on the CPU; of a bf16 file with arithmetic in float32."""
    if precision != "bf16":
        return OnnxSession(path, CPU)
    with TemporaryDirectory(dir=path.parent) as folder:
        wide = Path(folder) / "model.onnx"
        onnx.save(_widened(onnx.load(path)), wide, save_as_external_data=True)
        return OnnxSession(wide, CPU)


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace bf16 by float32 in a graph; the values of the weights stay."""
    half, full = TensorProto.BFLOAT16, TensorProto.FLOAT
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    constants = [attribute.t for attribute in attributes if attribute.type == onnx.AttributeProto.TENSOR]
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_type == half:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
    for attribute in attributes:
        if attribute.name == "to" and attribute.i == half:
            attribute.i = full
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = full
    return model


def _cases(component: Component, unit: int) -> list[dict[str, int]]:  # sizes of the dimensions that it has
    if component.cases:
        return [*component.cases]
    names, units = {name for axes in component.axes.values() for name in axes.values()}, {"height": unit, "width": unit}
    cases = [{name: size * units.get(name, 1) for name, size in case.items() if name in names} for case in CASES]
    return [case for i, case in enumerate(cases) if case not in cases[:i]]


def _input(component: Component, name: str, case: dict[str, int], generator: torch.Generator) -> Tensor:
    """Return a random tensor of a case's shape; timesteps are in [0, 1000), integers at most those of the example."""
    shape = list(component.inputs[name].shape)
    for axis, dimension in component.axes[name].items():
        shape[axis] = case.get(dimension, shape[axis])
    if not (example := component.inputs[name]).is_floating_point():
        return torch.randint(int(example.max()) + 1, shape, generator=generator)
    if name.startswith("timestep"):
        return torch.rand(shape, generator=generator) * 999
    return torch.randn(shape, generator=generator)
