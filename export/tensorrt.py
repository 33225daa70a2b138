"""Build the TensorRT engine of an ONNX file; imported only where TensorRT is installed.

Networks are strongly typed: every tensor has the dtype that the ONNX file gives it. This is the only way in TensorRT
11, and the same calls do it in 10.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorrt as trt
import torch

from ..engines.exported import DENOISERS
from ..engines.tensorrt import INFO, PLAN, built_with, mismatch
from ..errors import Mgp5Error
from ..files import sha256, write_bytes, write_json
from .request import EngineOptions

STEPS = (1, 50, 1000)  # timesteps of one image
Span = tuple[int, int, int]  # least, usual and greatest size of a dimension


class Log(trt.ILogger):
    """Keeps errors, which TensorRT also reports from its own threads."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(" ".join(msg.split()))

    @property
    def first(self) -> str:  # the others follow from it
        return self.errors[0] if self.errors else "TensorRT does not say why"


class Interruptible(trt.IProgressMonitor):
    """Ends a build at the next step after Ctrl-C, which must not pass through TensorRT's C++ as an exception."""

    def __init__(self) -> None:
        trt.IProgressMonitor.__init__(self)
        self.stopped = False

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

    def phase_finish(self, phase_name: str) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool:  # whether the build goes on
        try:
            time.sleep(0)  # Python handles the signal here
        except KeyboardInterrupt:
            self.stopped = True
        return not self.stopped


def build_engine(
    folder: Path,
    name: str,
    manifest: Mapping[str, Any],
    options: EngineOptions,
    tell: Callable[[str], None],
    device: torch.device,
) -> Path:
    """Build the engine of a component and return its file, `<component>/model.plan`; one that still fits is kept.

    Beside it a JSON file says what it depends on: see `engines.tensorrt.mismatch`. Raises Mgp5Error if the ONNX file
    cannot be parsed, or no engine can be built of it; KeyboardInterrupt after Ctrl-C.
    """
    entry, plan, shapes = manifest["components"][name], folder / name / PLAN, _spans(name, manifest, options)
    built_for = {"shapes": {key: list(span) for key, span in shapes.items()}, "level": options.level}
    reason = mismatch(folder / name, entry, device, **built_for)
    if not reason:
        return plan
    tell(f"{name}: building {PLAN}, which takes minutes (it {reason})")
    began = time.monotonic()
    with torch.cuda.device(device):
        write_bytes(plan, _serialized(folder / name / "model.onnx", entry, shapes, options.level))
    seconds = {"seconds": round(time.monotonic() - began, 1)}
    write_json(plan.with_name(INFO), built_with(entry, device) | built_for | {"sha256": sha256(plan)} | seconds)
    return plan


def _spans(name: str, manifest: Mapping[str, Any], options: EngineOptions) -> dict[str, Span]:
    """Return the sizes of a component's dynamic dimensions, by their names in ONNX."""
    inputs = manifest["components"][name]["inputs"].values()
    names = dict.fromkeys(size for value in inputs for size in value["shape"] if isinstance(size, str))
    heights, widths = zip(*(options.sizes or [manifest["native"]]), strict=True)
    sizes = {"batch": options.batches if name in DENOISERS else (1,), "length": (manifest["length"],)}
    sizes |= {"height": heights, "width": widths}
    spans = {key: (min(values), values[0], max(values)) for key, values in sizes.items()} | {"steps": STEPS}
    if unknown := names.keys() - spans.keys():
        raise Mgp5Error(f"{name} has dynamic dimensions {unknown}, expected {', '.join(spans)}", "export it again")
    return {dimension: spans[dimension] for dimension in names}


def _serialized(onnx: Path, entry: Mapping[str, Any], spans: Mapping[str, Span], level: int) -> trt.IHostMemory:
    log, monitor = Log(), Interruptible()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        hint = "opset 23 needs TensorRT 10.14 or newer: update it, or export with --opset 20"
        raise Mgp5Error(f"TensorRT {trt.__version__} cannot parse {onnx} ({log.first})", hint)
    config = builder.create_builder_config()
    config.builder_optimization_level = level
    config.progress_monitor = monitor
    if entry["precision"] == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # which rounds factors to 10 bits
    profile = builder.create_optimization_profile()
    for name, value in entry["inputs"].items():
        sizes = [spans[size] if isinstance(size, str) else (size,) * 3 for size in value["shape"]]
        profile.set_shape(name, *zip(*sizes, strict=True))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if monitor.stopped:
        raise KeyboardInterrupt
    if plan is None:
        hint = "try a lower --set level, smaller shapes, or another version of TensorRT"
        raise Mgp5Error(f"TensorRT {trt.__version__} cannot build {onnx} ({log.first})", hint)
    return plan
