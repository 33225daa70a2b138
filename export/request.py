"""What to export, as plain values (no torch here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from ..errors import Mgp5Error

COMPONENTS = ("mapper", "detokenizer", "unet", "transformer", "scale", "vae_decoder", "condition", "denoiser")
SPLIT = ("condition", "denoiser")  # components of a denoiser in two parts
PRECISIONS = ("fp32", "fp16", "bf16")
OPSETS = (23, 20, 18)
NEEDED = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How TensorRT engines are built; their precision is that of the ONNX files.

    Each component becomes one engine for all shapes between the smallest and the greatest of these; it is fastest at
    the first of them. Raises Mgp5Error, which names all values that are out of range.
    """

    batches: tuple[int, ...] = (2, 1)  # rows of the denoiser: 2 for one image with guidance, 1 without
    sizes: tuple[tuple[int, int], ...] = ()  # (height, width) of the latents; empty takes the model's native size
    level: int = 3  # of optimization, 0 to 5: higher searches longer for faster kernels

    def __post_init__(self) -> None:
        numbers = [*self.batches, *(side for size in self.sizes for side in size)]
        problems = []
        if not self.batches or not all(isinstance(number, int) and number > 0 for number in numbers):
            problems.append(f"batches {self.batches} and sizes {self.sizes}, expected positive whole numbers")
        if self.level not in range(6):
            problems.append(f"level {self.level}, expected 0 to 5")
        if problems:
            raise Mgp5Error("; ".join(problems), "correct the options of --trt", usage=True)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export and where to. Raises Mgp5Error, which names all that is wrong with it."""

    model: str = "demo"  # a name, a hub id or a folder
    onnx: bool = False  # write ONNX files to `out` and compare them with PyTorch
    trt: bool = False  # build TensorRT engines, of the folder `source`, or of `out` after its ONNX files were written
    out: Path | None = None  # new folder for the ONNX files
    source: Path | None = None  # folder that was exported before
    components: tuple[str, ...] = ()  # of COMPONENTS; empty takes all that the model has
    precision: str = "fp32"  # dtype of weights and arithmetic
    opset: int = 23  # version of ONNX's operators
    split: bool = False  # also `condition`, all that is constant over the steps, and `denoiser`, which takes it
    size: tuple[int, int] | None = None  # (height, width) in pixels of the compared image; None: native, at most 256
    image: bool = True  # whether an image is compared
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        problems = []
        if not (self.onnx or self.trt):
            problems.append("nothing to do: give --onnx, or --trt, which writes the ONNX files first")
        if (self.source is None) == (self.out is None) or (self.source and self.onnx):
            problems.append("expected either --out DIR for new ONNX files or, with --trt alone, --from DIR")
        if unknown := [name for name in self.components if name not in COMPONENTS]:
            problems.append(f"no component {', '.join(unknown)}, expected {', '.join(COMPONENTS)}")
        if self.out and not self.split and (lacking := [name for name in self.components if name in SPLIT]):
            problems.append(f"component {', '.join(lacking)} needs --split")
        if self.precision not in PRECISIONS:
            problems.append(f"precision is {self.precision!r}, expected {', '.join(PRECISIONS)}")
        if self.opset not in OPSETS:
            problems.append(f"opset is {self.opset}, expected {', '.join(map(str, OPSETS))}")
        if self.size and min(self.size) < 1:
            problems.append(f"size is {self.size}, expected positive numbers of pixels")
        if problems:
            raise Mgp5Error("; ".join(problems), usage=True)


def missing() -> str:
    """Return what has to be installed before anything can be exported, or ""."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    return f"{', '.join(lacking)} not installed: pip install 'mgp5[export]'" if lacking else ""
