"""Export a model: write ONNX files into a temporary folder, compare them with PyTorch, rename it; build engines."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device import DTYPES, limit_threads_for_small_models
from ..engines import trt_refusal
from ..engines.exported import (
    DENOISERS,
    FORMAT,
    MANIFEST,
    ExportedMapper,
    Session,
    check_files,
    engine_of,
    read_manifest,
    weights_hash,
)
from ..errors import Mgp5Error
from ..files import Claim, GiB, replacing, write_json
from ..generators import PIPELINES
from ..generators.pipeline import load_part
from ..hub import from_hub
from .components import Exportable, components, latent_unit, load_exportable
from .request import NEEDED, ExportRequest, missing

GREATEST_SIDE = 256  # pixels of the compared image: 20 steps of a larger one take long
LIBRARIES = ("mgp5", "torch", "diffusers", *NEEDED)
PIPELINE_PARTS = ("unet", "transformer", "vae_decoder")  # that optimum's ONNX Runtime pipelines read
Tell = Callable[[str], None]  # takes a line for the user
Condition = tuple[Tensor, Tensor]  # (1, L, C) twice: a condition and the unconditional one


def export(request: ExportRequest, tell: Tell = lambda line: None) -> Path:
    """Export what a request says and return the folder with manifest.json.

    Raises Mgp5Error if there is no such model or component, packages are not installed, the folder is not free, the
    disk is full, files compute something else than PyTorch, or there is no TensorRT or GPU to build engines with.
    """
    folder = request.out or request.source
    with Claim(folder, beside=bool(request.out)):
        _export(request, folder, tell)
    return folder


def _export(request: ExportRequest, folder: Path, tell: Tell) -> None:
    if request.out:
        if reason := missing():
            raise Mgp5Error("nothing was exported", reason)
        require_free(request.out)  # before anything is loaded
        model = load_exportable(request.model, request.components)
        limit_threads_for_small_models(model.generator)
        write_export(model, request, request.out, tell)
        tell(f"The ONNX files are in {request.out}")
    if request.trt:
        for plan in _build_engines(folder, request, tell):
            tell(f"The TensorRT engine is in {plan}")


def _build_engines(folder: Path, request: ExportRequest, tell: Tell) -> list[Path]:
    """Build the engines of the named components, or if none is named of those that `--backend trt` runs."""
    manifest, device = read_manifest(folder), torch.device("cuda")
    entries = manifest["components"]
    if unknown := [name for name in request.components if name not in entries]:
        message = f"{folder} has no {', '.join(unknown)}, it has {', '.join(entries)}"
        raise Mgp5Error(message, "name one of these", usage=True)
    if "scale" in entries:
        hint = "run its ONNX files by --backend onnx, or take --backend triton"
        raise Mgp5Error("no TensorRT engine of a decoder of scales", hint, usage=True)
    if reason := trt_refusal(device):
        raise Mgp5Error(
            f"no TensorRT engine was built: {reason}",
            f"the ONNX files in {folder} are all that is needed: take the folder to a machine with an NVIDIA GPU, "
            f"pip install 'mgp5[export-gpu]' there, and run mgp5 export --trt --from {folder.resolve().name}",
        )
    from .tensorrt import build_engine

    denoiser = next((name for name in DENOISERS if name in entries), "")
    names = request.components or tuple(name for name in entries if name in ("mapper", "vae_decoder", denoiser))
    check_files(folder, manifest, names)
    return [build_engine(folder, name, manifest, request.engine, tell, device) for name in names]


def require_free(out: Path) -> None:
    """Raise Mgp5Error unless `out` does not exist or is an empty folder."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        manifest = read_manifest(out)
        content = f"an export of {manifest.get('model')} in {manifest.get('precision')}"
    except Mgp5Error:
        content = "other files"
    raise Mgp5Error(f"--out {out} holds {content} already", "choose another --out, or remove it", usage=True)


def write_export(
    model: Exportable, request: ExportRequest, out: Path, tell: Tell = lambda line: None
) -> dict[str, Any]:
    """Write components to `out`, which appears whole or not at all, compare them with PyTorch, return the manifest.

    The model's weights are rounded to the requested precision in place. Raises Mgp5Error if the model lacks a
    component, the folder is not free, the disk is full, or the files compute something else.
    """
    require_free(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as folder:
            manifest = _fill(model, request, folder, tell)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "make room there or choose another --out"
        raise Mgp5Error(f"--out {out} cannot be written ({reason})", hint) from error
    return manifest


def _fill(model: Exportable, request: ExportRequest, folder: Path, tell: Tell) -> dict[str, Any]:
    parts = model.parts
    hashes = {name: weights_hash(part) for name, part in parts.items()}
    makers = components(model, request.split, request.opset)
    names = request.components or tuple(makers)
    if unknown := [name for name in names if name not in makers]:
        raise Mgp5Error(f"no component {', '.join(unknown)}", f"this model has {', '.join(makers)}", usage=True)
    for part in parts.values():
        part.to(DTYPES[request.precision])
    entries = {name: _write(makers[name], folder, request, tell) for name in names}
    for part in parts.values():
        part.float()  # PyTorch now has the rounded weights, and computes in float32
    image = _compare(model, makers, folder, request, entries, tell)
    manifest = {
        "format": FORMAT,
        "mgp5": version("mgp5"),
        "model": model.name,
        "kind": type(model.generator).__name__,
        "weights": hashes,
        "precision": request.precision,
        "opset": request.opset,
        **model.sizes,
        "components": entries,
        "image": image,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GiB, 2),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    if model.source:
        _write_pipeline(model, names, folder)
    write_json(folder / MANIFEST, manifest)
    return manifest


def _write(make: Callable[[], Any], folder: Path, request: ExportRequest, tell: Tell) -> dict[str, Any]:
    from .onnx import describe, write

    started, component = time.monotonic(), make()
    tell(f"{component.name}: exporting")
    write(component, folder / component.name, request.opset)
    if component.config:
        write_json(folder / component.name / "config.json", component.config)
    entry = describe(folder, component.name, request.precision)
    return entry | {"seconds": round(time.monotonic() - started, 1)}


def _compare(
    model: Exportable,
    makers: dict[str, Callable[[], Any]],
    folder: Path,
    request: ExportRequest,
    entries: dict[str, Any],
    tell: Tell,
) -> dict[str, Any]:
    """Add its differences to the entry of each component; return those of the image ({} without what draws one)."""
    from . import parity

    limit, unit = parity.LIMITS[request.precision], latent_unit(model.generator)
    usable = (*DENOISERS, *(["scale"] if "vae_decoder" in entries else []))
    painters = next(({name} for name in usable if name in entries), set()) if request.image else set()
    painters |= {"mapper", "detokenizer", "vae_decoder"} if painters else set()
    sessions: dict[str, Session] = {}  # that the image needs: each may hold gigabytes
    for name, entry in entries.items():
        session = None  # frees the one before
        session = parity.load_session(folder / name / "model.onnx", request.precision)
        entry["parity"] = parity.compare(makers[name](), session, limit, unit)
        if name in painters:
            sessions[name] = session
        size = sum(file["bytes"] for file in entry["files"].values()) / 1e6
        worst = max(row["relative"] for row in entry["parity"])
        nodes = sum(entry["nodes"].values())
        tell(f"{name}: {nodes} nodes, {size:.1f} MB, {worst:.1g} of its range from PyTorch ({entry['seconds']} s)")
    if not painters:
        return {}
    tell("drawing an image by PyTorch and by the files")
    if model.decoder is not None:
        image = parity.compare_scales(model.decoder, model.generator, sessions, limit)
    else:
        engine = engine_of(model.generator, folder, entries, sessions.__getitem__)
        side = min(model.generator.native_size, GREATEST_SIDE)
        ways = zip((None, engine), _conditions(model, sessions), strict=True)
        image = parity.compare_image(model.generator, dict(ways), limit, request.size or (side, side))
    tell(f"the image is {image['psnr']} dB from PyTorch's")
    return image


@torch.no_grad()
def _conditions(model: Exportable, files: Mapping[str, Session]) -> tuple[Condition, Condition]:
    """Return a condition and an unconditional one by PyTorch, and by the files where these make them: of random states
    by the mapper, of random codes by the de-tokenizer; or random ones."""
    generator = torch.Generator().manual_seed(1)
    if model.coder is not None:
        shape = model.coder.config.tokenizer
        codes = torch.randint(shape.codes, (2, shape.queries), generator=generator)
        made = model.coder.condition(codes)
        again = files["detokenizer"](codes=codes)["condition"] if "detokenizer" in files else made
    elif model.mapper is None or model.unconditional is None:
        made = again = torch.randn(2, *model.generator.condition_shape, generator=generator)
    else:
        states = torch.randn(1, model.num_vokens, model.mapper.config.llm_width, generator=generator)
        made = again = torch.cat([model.mapper(states), model.unconditional])
        if "mapper" in files:
            exported = ExportedMapper(files["mapper"], model.mapper)
            again = torch.cat([exported(states), exported.unconditional(model.num_vokens)])
    return (made[:1], made[1:]), (again[:1], again[1:])


def _write_pipeline(model: Exportable, names: tuple[str, ...], folder: Path) -> None:
    """Write what else optimum's pipelines need to read the folder: model_index.json and the scheduler's config."""
    from diffusers import DDIMScheduler

    config = from_hub(model.source, lambda name, at: load_part(DDIMScheduler.load_config, name, "scheduler", at))
    classes = {name: kind for kind, (_, name) in PIPELINES.items()}
    index: dict[str, Any] = {"_class_name": classes[type(model.generator).__name__]}
    index |= {"scheduler": ["diffusers", config["_class_name"]]}
    index |= {name: ["diffusers", "OnnxRuntimeModel"] for name in names if name in PIPELINE_PARTS}
    index |= {key: [None, None] for key in ("feature_extractor", "safety_checker", "text_encoder", "tokenizer")}
    write_json(folder / "model_index.json", index)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", dict(config))
