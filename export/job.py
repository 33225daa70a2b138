"""`mgp5 export`: load what is asked for, write it into a temporary folder, prove it, put the folder in its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..device import DTYPES
from ..errors import Mgp5Error
from ..files import replacing, write_json

if TYPE_CHECKING:
    from .subject import Subject

PROOF_SIDE = 256  # pixels; of the image that proves, where the model's own is larger: 20 steps of that take long
READABLE = ("unet", "transformer", "vae_decoder")
NEEDED = ("onnx", "onnxruntime", "onnxscript", "optimum")
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """How.

    Args:
        components: names; none means all that the model has.
        split: also `condition` and `denoiser`.
        size: (height, width) in pixels of the image that proves; None takes the model's own, at most `PROOF_SIDE`.
        image: whether to draw it.
    """

    components: tuple[str, ...] = ()
    precision: str = "fp32"
    opset: int = 23
    split: bool = False
    size: tuple[int, int] | None = None
    image: bool = True


def run(flags: dict[str, Any], tell: Tell) -> None:
    """The command; `flags` are its options.

    Raises:
        Mgp5Error: as `load` and `export`, flags that do not go together, or packages that are not installed.
    """
    from ..device import limit_threads_for_small_models
    from ..options import override, parse_settings
    from .subject import load
    from .trt import BuildOptions, build

    source, out = flags["source"], flags["out"]
    if not (flags["onnx"] or flags["trt"]):
        raise Mgp5Error("nothing to do", "give --onnx, or --trt, which writes the ONNX files first", usage=True)
    if (source is None) == (out is None) or (source and flags["onnx"]):
        hint = "--out DIR writes ONNX files, --trt --from DIR builds engines of such a folder"
        raise Mgp5Error("expected either --out or, with --trt, --from", hint, usage=True)
    options = override(BuildOptions(components=flags["components"]), parse_settings(flags["settings"]))
    sides = flags["height"], flags["width"]
    if any(sides) and not all(sides):
        raise Mgp5Error("--height and --width go together", "give both or none", usage=True)
    if out:
        if reason := missing():
            raise Mgp5Error("nothing was exported", reason)
        _free(out)  # told before anything is loaded
        subject = load(flags["model"], flags["components"])
        limit_threads_for_small_models(subject.diffusion)
        request = Request(
            components=flags["components"],
            precision=flags["precision"],
            opset=int(flags["opset"]),
            split=flags["split"],
            size=sides if all(sides) else None,
        )
        export(subject, request, out, tell)
        tell(f"The ONNX files are in {out}")
    if flags["trt"]:
        for plan in build(source or out, options):
            tell(f"The TensorRT engine is in {plan}")


def missing() -> str:
    """What has to be installed before anything can be exported, or ""."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    return f"{', '.join(lacking)} not installed: pip install 'mgp5[export]'" if lacking else ""


def export(subject: Subject, request: Request, out: Path, tell: Tell = lambda line: None) -> dict[str, Any]:
    """Write and prove components in `out`, with manifest.json; `out` appears whole or not at all.

    The subject's weights are rounded to the precision asked for.

    Raises:
        Mgp5Error: an unknown component, a folder that is not free, a full disk, or files that compute something else.
    """
    _free(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as part:
            manifest = _fill(subject, request, part, tell)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "make room there or choose another --out"
        raise Mgp5Error(f"--out {out} cannot be written ({reason})", hint) from error
    return manifest


def _free(out: Path) -> None:
    """See that a folder can be made."""
    from .manifest import read_manifest

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        manifest = read_manifest(out)
        held = f"an export of {manifest.get('model')} in {manifest.get('precision')}"
    except Mgp5Error:
        held = "other files"
    raise Mgp5Error(f"--out {out} holds {held} already", "choose another --out, or remove it", usage=True)


def _fill(subject: Subject, request: Request, folder: Path, tell: Tell) -> dict[str, Any]:
    """Write all into `folder`; the manifest comes last."""
    import resource

    from . import manifest as facts
    from . import specs

    diffusion, mapper, dtype = subject.diffusion, subject.mapper, DTYPES[request.precision]
    parts = {"denoiser": diffusion.denoiser, "vae": diffusion.vae, "mapper": mapper}
    identity = {name: facts.weights_hash(part) for name, part in parts.items() if part is not None}
    known = specs.components(diffusion, mapper, subject.unconditional, subject.num_vokens, request.split, request.opset)
    names = request.components or tuple(known)
    if unknown := [name for name in names if name not in known]:
        hint = f"this model has {', '.join(known)}" + ("" if request.split else "; condition and denoiser by --split")
        raise Mgp5Error(f"no component {', '.join(unknown)}", hint, usage=True)
    for part in (diffusion, mapper):
        if part is not None:
            part.to(dtype)
    entries = {name: _write(known[name], folder, request, tell) for name in names}
    for part in (diffusion, mapper):
        if part is not None:
            part.float()  # from here on PyTorch has the rounded weights, and arithmetic in float32
    image = _prove(subject, known, folder, request, entries, tell)
    native = diffusion.native_size
    told = {
        "format": facts.FORMAT,
        "mgp5": facts.version("mgp5"),
        "model": subject.name,
        "kind": type(diffusion).__name__,
        "weights": identity,
        "precision": request.precision,
        "opset": request.opset,
        "native": list(diffusion.latent_shape(native, native)[1:]),
        "length": diffusion.condition_shape[0] - bool(diffusion.pooled_width),
        "components": entries,
        "image": image,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "versions": facts.versions(),
    }
    if subject.source:
        _readable(subject, names, folder)
    write_json(folder / facts.NAME, told)
    return told


def _write(make: Callable[[], Any], folder: Path, request: Request, tell: Tell) -> dict[str, Any]:
    """One component; returns its entry in the manifest, without proof yet."""
    from . import onnx
    from .manifest import describe

    started, component = time.monotonic(), make()
    tell(f"{component.name}: exporting")
    onnx.write(component, folder / component.name, request.opset)
    if component.config:
        write_json(folder / component.name / "config.json", {k: _plain(v) for k, v in component.config.items()})
    entry = describe(folder, component.name, request.precision)
    return entry | {"seconds": round(time.monotonic() - started, 1)}


def _prove(
    subject: Subject, known: dict[str, Any], folder: Path, request: Request, entries: dict[str, Any], tell: Tell
) -> dict[str, Any]:
    """Add the proof of each component to its entry; returns that of the image ({} without a denoiser)."""
    from ..engines import DENOISERS
    from ..engines.exported import engine_of
    from . import proof, specs

    limit, unit = proof.LIMITS[request.precision], specs.latent_unit(subject.diffusion)
    drawing = next((name for name in DENOISERS if name in entries), None) if request.image else None
    runs: dict[Path, Any] = {}  # of what the image needs: each may hold gigabytes
    for name, entry in entries.items():
        path, run = folder / name / "model.onnx", None  # the one before is let go first
        run = proof.runner(path, request.precision)
        entry["proof"] = proof.prove(known[name](), run, limit, unit)
        if drawing and name in (drawing, "vae_decoder"):
            runs[path] = run
        size = sum(file["bytes"] for file in entry["files"].values()) / 1e6
        worst = max(row["relative"] for row in entry["proof"])
        nodes = sum(entry["nodes"].values())
        tell(f"{name}: {nodes} nodes, {size:.1f} MB, {worst:.1g} of its range from PyTorch ({entry['seconds']} s)")
    if drawing is None:
        return {}
    tell(f"drawing an image of {proof.STEPS} steps by PyTorch and by the files")
    engine = engine_of(subject.diffusion, folder, entries, runs.__getitem__)
    side = min(subject.diffusion.native_size, PROOF_SIDE)
    image = proof.prove_image(subject.diffusion, *_conditions(subject), engine, limit, request.size or (side, side))
    tell(f"the image is {image['psnr']} dB from PyTorch's")
    return image


def _conditions(subject: Subject) -> tuple[Tensor, Tensor]:  # (1, L, D) twice
    """What to draw: the mapper's condition of random states, or random ones."""
    generator = torch.Generator().manual_seed(1)
    if subject.mapper is None or subject.unconditional is None:
        made = torch.randn(2, *subject.diffusion.condition_shape, generator=generator)
        return made[:1], made[1:]
    states = torch.randn(1, subject.num_vokens, subject.mapper.config.llm_width, generator=generator)
    with torch.no_grad():
        return subject.mapper(states), subject.unconditional


def _readable(subject: Subject, names: Sequence[str], folder: Path) -> None:
    """What else optimum's pipelines need to read the folder: their index, and the scheduler's configuration."""
    from diffusers import DDIMScheduler

    from ..generators import PIPELINES
    from ..generators.latent_diffusion import load_part
    from ..hub import from_hub

    classes = {name: kind for kind, (_, name) in PIPELINES.items()}
    config = from_hub(subject.source, lambda name, at: load_part(DDIMScheduler.load_config, name, "scheduler", at))
    index: dict[str, Any] = {"_class_name": classes[type(subject.diffusion).__name__]}
    index |= {"scheduler": ["diffusers", config["_class_name"]]}
    index |= {name: ["diffusers", "OnnxRuntimeModel"] for name in names if name in READABLE}
    index |= {key: [None, None] for key in ("feature_extractor", "safety_checker", "text_encoder", "tokenizer")}
    write_json(folder / "model_index.json", index)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", dict(config))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
