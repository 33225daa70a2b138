"""TensorRT engines of an exported folder, from its ONNX files and manifest.json alone; each is built once and kept.

This file can be imported where there is no TensorRT and no GPU, and says what is missing there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch

from ..engines import DENOISERS
from ..errors import Mgp5Error
from . import plans
from .manifest import check, read_manifest
from .plans import Key, Span

STEPS = (1, 50, 1000)  # timesteps of one image


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to build; the precision is the ONNX files' own.

    Args:
        components: names in the manifest; when empty, those that `--backend trt` runs: of the denoisers the fastest.
        batches: rows of the denoiser: 2 for an image with guidance, 1 for one without.
        sizes: (height, width) of the latents; when empty, 64 x 64 and 96 x 96, or what a smaller model is made for.
        dynamic: one engine for all these shapes and those between them, instead of one for each; it is slower.
        level: of optimisation, 0 to 5: higher searches longer for faster kernels.
        refit: keep weights changeable: for a file that differs in its weights only, seconds take the place of a build.
        weight_streaming: leave weights in the host's memory where the GPU's does not hold them all.
    """

    components: tuple[str, ...] = ()
    batches: tuple[int, ...] = (2, 1)
    sizes: tuple[tuple[int, int], ...] = ()
    dynamic: bool = False
    level: int = 3
    refit: bool = False
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        numbers = [*self.batches, *(side for size in self.sizes for side in size)]
        if not self.batches or not all(isinstance(number, int) and number > 0 for number in numbers):
            raise Mgp5Error(f"batches {self.batches}, sizes {self.sizes}", "give positive whole numbers", usage=True)
        if self.level not in range(6):
            raise Mgp5Error(f"level {self.level}, expected 0 to 5", "3 is TensorRT's own", usage=True)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An ONNX file, as its manifest tells.

    Args:
        file: its path; external data lies beside it.
        digest: SHA-256 of it, and of its external data.
        precision: fp32, fp16 or bf16.
        inputs: name -> shape, of numbers and of names where it may change.
    """

    name: str
    file: Path
    digest: str
    precision: str
    inputs: dict[str, list[int | str]]

    def sizes(self, given: dict[str, Sequence[int]]) -> dict[str, int]:
        """What the names stand for in the shapes of given inputs."""
        pairs = [pair for name, shape in self.inputs.items() for pair in zip(shape, given[name], strict=True)]
        return {name: int(size) for name, size in pairs if isinstance(name, str)}


def build(folder: Path, options: BuildOptions, device: str = "cuda") -> list[Path]:
    """Build all engines of a folder that `mgp5 export` wrote; those that are there and fit are kept.

    Returns their files, `<component>/model-<shapes>-<hash>.plan`, each with a JSON file of its origin beside it.

    Raises:
        Mgp5Error: TensorRT or a GPU is missing, the folder is none of ours, or a file is damaged or cannot be built.
    """
    manifest = read_manifest(folder)
    if unknown := set(options.components) - manifest["components"].keys():
        raise Mgp5Error(
            f"{folder} has no {', '.join(sorted(unknown))}, it has {', '.join(manifest['components'])}",
            "name one of these",
            usage=True,
        )
    if missing := refusal():
        raise Mgp5Error(
            f"no TensorRT engine was built: {missing}",
            f"the ONNX files in {folder} are all that is needed: take the folder to a machine with an NVIDIA GPU, "
            f"pip install 'mgp5[export-gpu]' there, and run mgp5 export --trt --from {folder.resolve().name}",
        )
    used = {"mapper", "vae_decoder", *[name for name in DENOISERS if name in manifest["components"]][:1]}
    names = [name for name in manifest["components"] if name in (options.components or used)]
    check(folder, manifest, names)
    sources = [source(folder, manifest, name) for name in names]
    return [engine(one, shapes, options, device) for one in sources for shapes in _shapes(one, options, manifest)]


def source(folder: Path, manifest: dict[str, Any], name: str) -> Source:
    """A component of a folder."""
    entry = manifest["components"][name]
    return Source(
        name=name,
        file=folder / name / "model.onnx",
        digest=" ".join(facts["sha256"] for facts in entry["files"].values()),
        precision=entry["precision"],
        inputs={tensor: facts["shape"] for tensor, facts in entry["inputs"].items()},
    )


def engine(source: Source, shapes: dict[str, Span], options: BuildOptions, device: str) -> Path:
    """The plan for these shapes: the one that is there, if it fits all of `plans.Key`, or a new one.

    Raises Mgp5Error when it cannot be built.
    """
    from . import builder

    key = Key(
        onnx=source.digest,
        graph=plans.graph_hash(source.file) if options.refit else "",
        precision=source.precision,
        shapes=shapes,
        options={"level": options.level, "refit": options.refit, "weight_streaming": options.weight_streaming},
        machine=plans.this_machine(builder.VERSION, torch.device(device)),
    )
    place, why = key.place(source.file), ""
    if place.exists() and not (why := plans.fault(place, key)):
        return place
    told = f" again: {why}" if why else ", which takes minutes"
    click.echo(f"{source.name}: building {place.name}{told}", err=True)
    began = time.monotonic()
    with torch.cuda.device(device):
        old = plans.same_but_weights(place.parent, key) if options.refit else None
        plan = builder.refit_plan(old.read_bytes(), source.file) if old else None
        way = "build" if plan is None else "refit"
        if plan is None:
            timings = place.with_name("timings.cache")
            plan = builder.build_plan(source.file, shapes, options, source.precision, timings)
    plans.keep(place, key, plan, way=way, seconds=round(time.monotonic() - began, 1))
    return place


def engine_for(source: Source, sizes: dict[str, int], device: str) -> Path:
    """A plan that takes these sizes, however it was built; one for them alone, if there is none yet."""
    from . import builder

    machine = plans.this_machine(builder.VERSION, torch.device(device))
    found = plans.usable(source.file.parent, source.digest, machine, sizes)
    return found or engine(source, {name: (size,) * 3 for name, size in sizes.items()}, BuildOptions(), device)


def refusal() -> str:
    """What is missing to build or run engines here, or ""."""
    reasons = []
    if find_spec("tensorrt") is None:
        reasons.append("TensorRT is not installed (pip install 'mgp5[export-gpu]')")
    else:
        try:
            import tensorrt

            if int(tensorrt.__version__.partition(".")[0]) < 10:
                reasons.append(f"TensorRT is {tensorrt.__version__}, expected 10 or newer")
        except (ImportError, OSError) as error:
            reasons.append(f"TensorRT is installed but cannot be loaded ({error})")
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else f" (this is {torch.__version__}, built without CUDA)"
        reasons.append(f"PyTorch finds no NVIDIA GPU{built}")
    return " and ".join(reasons)


def _shapes(source: Source, options: BuildOptions, manifest: dict[str, Any]) -> Iterator[dict[str, Span]]:
    """Sizes of the dynamic dimensions, for each engine to be built."""
    names = dict.fromkeys(size for shape in source.inputs.values() for size in shape if isinstance(size, str))
    native = tuple(manifest["native"])
    sizes = options.sizes or (((64, 64), (96, 96)) if max(native) >= 64 else (native,))
    if "height" not in names:
        sizes = sizes[:1]
    batches = options.batches if source.name in DENOISERS else (1,)
    cases = [{"batch": rows, "height": height, "width": width} for rows in batches for height, width in sizes]
    for group in [cases] if options.dynamic else [[case] for case in cases]:
        spans = {name: (min(c[name] for c in group), group[0][name], max(c[name] for c in group)) for name in cases[0]}
        spans |= {"length": (manifest["length"],) * 3, "steps": STEPS}
        yield {name: spans[name] for name in names}
