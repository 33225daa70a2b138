"""ONNX to TensorRT by its own Python API, the same calls for 10.x and 11.x; imported only where TensorRT is installed.

The networks are strongly typed: every tensor has the type that the ONNX file gives it, and no flag says otherwise.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import tensorrt as trt
from rich.console import Console
from rich.progress import Progress, TaskID

from ..errors import Mgp5Error
from ..files import write_bytes
from .plans import Span
from .trt import BuildOptions

VERSION = trt.__version__
FAULTS = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)


class Log(trt.ILogger):
    """Keeps what went wrong, and says nothing of the rest."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.faults: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT, also from threads of its own."""
        if severity in FAULTS:
            self.faults.append(" ".join(msg.split()))

    @property
    def why(self) -> str:
        """The first fault: others follow from it."""
        return self.faults[0] if self.faults else "TensorRT does not say why"


class Monitor(trt.IProgressMonitor):
    """Shows the phases of a build as bars; Ctrl-C ends the build after the step it is at. Called by TensorRT."""

    def __init__(self, bars: Progress) -> None:
        trt.IProgressMonitor.__init__(self)
        self.bars, self.stopped = bars, False
        self.phases: dict[str, TaskID] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self.phases[phase_name] = self.bars.add_task(phase_name, total=num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        try:
            self.bars.update(self.phases[phase_name], completed=step + 1)
        except KeyboardInterrupt:  # must not pass through TensorRT, which is C++
            self.stopped = True
        return not self.stopped

    def phase_finish(self, phase_name: str) -> None:
        self.bars.remove_task(self.phases.pop(phase_name))


def build_plan(
    onnx: Path, shapes: dict[str, Span], options: BuildOptions, precision: str, timings: Path
) -> trt.IHostMemory:
    """Build an engine for one range of shapes, which takes minutes.

    Args:
        shapes: name of each dynamic dimension -> its least, usual and greatest size.
        precision: of the ONNX file.
        timings: file of kernels that were timed before on this machine; made or added to.

    Raises:
        Mgp5Error: the file cannot be parsed, or nothing can be built of it.
        KeyboardInterrupt: after Ctrl-C.
    """
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        hint = "opset 23 needs TensorRT 10.14 or newer: update it, or export with --opset 20"
        raise Mgp5Error(f"TensorRT {VERSION} cannot parse {onnx} ({_parse_fault(parser)})", hint)
    config = builder.create_builder_config()
    _set(config, options, precision)
    config.add_optimization_profile(_profile(builder, network, shapes))
    cache = _timing_cache(config, timings)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        monitor = Monitor(bars)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor.stopped:
        raise KeyboardInterrupt
    if plan is None:
        hint = "try a lower --level, smaller shapes, or another version of TensorRT"
        raise Mgp5Error(f"TensorRT {VERSION} cannot build {onnx} ({log.why})", hint)
    write_bytes(timings, cache.serialize())
    return plan


def refit_plan(plan: bytes, onnx: Path) -> trt.IHostMemory | None:
    """The same engine with the weights of a file of the same graph, in seconds; None where TensorRT refuses."""
    log = Log()
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None or not engine.refittable:
        return None
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    done = parser.refit_from_file(str(onnx)) and refitter.refit_cuda_engine()
    return engine.serialize() if done else None


def _set(config: trt.IBuilderConfig, options: BuildOptions, precision: str) -> None:
    config.builder_optimization_level = options.level
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # else products would be rounded to 10 bits


def _profile(
    builder: trt.Builder, network: trt.INetworkDefinition, shapes: dict[str, Span]
) -> trt.IOptimizationProfile:
    """Least, usual and greatest shape of each input that has dynamic dimensions, which go by their names in ONNX."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        if strange := {name for name, size in zip(names, tensor.shape, strict=True) if size < 0} - shapes.keys():
            known = ", ".join(shapes)
            raise Mgp5Error(f"input {tensor.name} has dynamic dimensions {strange}, expected {known}", "export again")
        spans = [shapes[n] if size < 0 else (size,) * 3 for n, size in zip(names, tensor.shape, strict=True)]
        if spans:
            profile.set_shape(tensor.name, *zip(*spans, strict=True))
    return profile


def _timing_cache(config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """Earlier timings, or a new cache where there are none of this machine."""
    cache = None
    with suppress(OSError):
        cache = config.create_timing_cache(path.read_bytes())
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _parse_fault(parser: trt.OnnxParser) -> str:
    """The first error of the parser, with its node."""
    if not parser.num_errors:
        return "it does not say why"
    error = parser.get_error(0)
    return f"{error.node_operator()} {error.node_name()}: {' '.join(error.desc().split())}"
