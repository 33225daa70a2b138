"""TensorRT engines called with PyTorch's tensors; imported only where TensorRT is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tensorrt as trt
import torch
from torch import Tensor

from ..errors import Mgp5Error
from ..export.trt import Source, engine_for, source
from ..generators.latent_diffusion import LatentDiffusion
from . import Engine, operations
from .cuda_graph import StepGraphs
from .exported import ExportedEngine, engine_of, open_folder

TYPES = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
    trt.DataType.INT32: torch.int32,
    trt.DataType.INT64: torch.int64,
    trt.DataType.BOOL: torch.bool,
}


class Workspace:
    """What sessions share that never run at the same time: memory for intermediate results, a stream, and weights."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(256, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        self.logger = trt.Logger(trt.ILogger.Severity.ERROR)
        self.runtime = trt.Runtime(self.logger)  # outlives what it makes
        self.engines: dict[Path, trt.ICudaEngine] = {}

    def load(self, plan: Path) -> trt.ICudaEngine:
        """A plan in the GPU's memory, once. Raises Mgp5Error where TensorRT cannot load it."""
        if plan not in self.engines:
            engine = self.runtime.deserialize_cuda_engine(plan.read_bytes())
            if engine is None:
                raise Mgp5Error(f"TensorRT {trt.__version__} cannot load {plan}", "remove it, and it is built again")
            if engine.streamable_weights_size:  # 0 unless built for it; before there is a context
                engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
            self.engines[plan] = engine
        return self.engines[plan]

    def of(self, size: int) -> Tensor:
        """At least `size` bytes. Who has a smaller piece keeps it: a CUDA graph may read it where it lies."""
        if self.memory.nbytes < size:
            self.memory = torch.empty(size, dtype=torch.uint8, device=self.memory.device)
        return self.memory


class Session:
    """An engine for one shape. Called with tensors by the names of its inputs, it gives its outputs by theirs.

    Tensors are bound where they lie, and nothing waits for the host: work goes onto PyTorch's current stream, where a
    CUDA graph can record it once the same shapes have run before.

    Args:
        engine: of `Workspace.load`.
        name: of its plan.
    """

    def __init__(self, engine: trt.ICudaEngine, name: str, workspace: Workspace) -> None:
        self.engine, self.name, self.workspace = engine, name, workspace
        self.context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.memory = workspace.of(engine.device_memory_size_v2)
        self.context.set_device_memory(self.memory.data_ptr(), self.memory.nbytes)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.types = {name: TYPES[engine.get_tensor_dtype(name)] for name in names}
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self.shapes: dict[str, torch.Size] = {}

    def __call__(self, **given: Tensor) -> dict[str, Tensor]:
        """Run it. Inputs of another type are converted, of another layout copied.

        Raises:
            Mgp5Error: an input has a shape that the engine was not built for.
        """
        device = self.memory.device
        bound = {name: given[name].to(device, self.types[name]).contiguous() for name in self.inputs}
        for name, tensor in bound.items():
            self._shape(name, tensor.shape)
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            bound[name] = torch.empty(shape, dtype=self.types[name], device=device)
        for name, tensor in bound.items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        self._enqueue()
        return {name: bound[name] for name in self.outputs}

    def _shape(self, name: str, shape: torch.Size) -> None:
        """Only what changes is set: TensorRT then prepares its kernels anew."""
        if self.shapes.get(name) == shape:
            return
        if not self.context.set_input_shape(name, tuple(shape)):
            low, _, high = (tuple(one) for one in self.engine.get_tensor_profile_shape(name, 0))
            raise Mgp5Error(f"{name} is {tuple(shape)}, {self.name} takes {low} to {high}", "build for that shape")
        self.shapes[name] = shape

    def _enqueue(self) -> None:
        """On the current stream, or between its work on another: on the default stream TensorRT would synchronise."""
        current = torch.cuda.current_stream(self.memory.device)
        stream = current if current.cuda_stream else self.workspace.stream
        if stream is not current:
            stream.wait_stream(current)
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise Mgp5Error(f"TensorRT cannot run {self.name}", "its reason is above")
        if stream is not current:
            current.wait_stream(stream)


class Sessions:
    """An exported component by TensorRT, see `exported.Run`: a session for each shape that comes.

    Raises Mgp5Error when an engine has to be built and cannot be.
    """

    def __init__(self, source: Source, workspace: Workspace) -> None:
        self.source, self.workspace = source, workspace
        self.loaded: dict[tuple[int, ...], Session] = {}

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run it; the first call with a shape loads an engine, or builds it, which takes minutes."""
        sizes = self.source.sizes({name: tensor.shape for name, tensor in tensors.items()})
        key = tuple(sizes.values())
        if key not in self.loaded:
            plan = engine_for(self.source, sizes, str(self.workspace.memory.device))
            self.loaded[key] = Session(self.workspace.load(plan), plan.name, self.workspace)
        return self.loaded[key](**tensors)


def sessions(folder: Path, manifest: dict[str, Any], device: torch.device) -> Callable[[Path], Sessions]:
    """What loads a file of an exported folder; all that it loads share a workspace."""
    workspace = Workspace(device)
    return lambda path: Sessions(source(folder, manifest, path.parent.name), workspace)


def put_on(diffusion: LatentDiffusion, folder: Path) -> ExportedEngine:
    """The engine of an exported folder, run by TensorRT: each step as a whole, on a GPU one CUDA graph.

    Raises:
        Mgp5Error: another model's export, or a file is missing or damaged.
    """
    manifest = open_folder(folder, {"denoiser": diffusion.denoiser, "vae": diffusion.vae})
    device, dtype = diffusion.denoiser.device, diffusion.denoiser.dtype
    engine = engine_of(diffusion, folder, manifest["components"], sessions(folder, manifest, device))
    engine.stand_in(partial(Engine, "eager", diffusion.denoiser))
    engine.graphed = device.type == "cuda"
    engine.graphs = StepGraphs(engine.model, operations("triton", device, dtype).guided_step)
    return engine
