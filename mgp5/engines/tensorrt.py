"""Run an exported component by TensorRT on PyTorch's tensors; imported only where TensorRT is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorrt as trt
import torch
from torch import Tensor

from ..errors import Mgp5Error
from ..files import read_json, sha256

PLAN, INFO = "model.plan", "model.plan.json"  # a serialized engine, and what it depends on
TYPES = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
    trt.DataType.INT32: torch.int32,
    trt.DataType.INT64: torch.int64,
    trt.DataType.BOOL: torch.bool,
}


class Workspace:
    """The runtime, and the device memory for activations, that engines share: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(256, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        self.runtime = trt.Runtime(trt.Logger(trt.ILogger.Severity.ERROR))  # must outlive its engines

    def reserve(self, size: int) -> Tensor:
        """Return at least `size` bytes. Earlier tensors stay valid: a CUDA graph may have recorded their address."""
        if self.memory.nbytes < size:
            self.memory = torch.empty(size, dtype=torch.uint8, device=self.memory.device)
        return self.memory


class TensorRTSession:
    """Runs one engine: tensors by the names of its inputs -> tensors by the names of its outputs.

    Tensors are bound at their addresses and the host does not wait: the work is queued on PyTorch's current stream,
    where a CUDA graph can record it after the first call with the same shapes.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any], workspace: Workspace) -> None:
        """Load the engine in a component's folder; `entry` is that of the component in the manifest. Raises Mgp5Error
        if there is none, or it was built from another ONNX file, by another TensorRT or for another GPU."""
        self.plan, self.workspace = folder / PLAN, workspace
        if reason := mismatch(folder, entry, workspace.memory.device):
            raise Mgp5Error(f"{self.plan} {reason}", f"build it: mgp5 export --trt --from {folder.parent}")
        self.engine = workspace.runtime.deserialize_cuda_engine(self.plan.read_bytes())
        if self.engine is None:
            raise Mgp5Error(f"TensorRT {trt.__version__} cannot load {self.plan}", "remove it and build it again")
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.types = {name: TYPES[self.engine.get_tensor_dtype(name)] for name in names}
        self.inputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        # Input shapes -> context and its memory. A CUDA graph needs a context whose shapes do not change.
        self.contexts: dict[tuple[torch.Size, ...], tuple[trt.IExecutionContext, Tensor]] = {}

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run on inputs of any dtype. Raises Mgp5Error if the engine was not built for these shapes."""
        device = self.workspace.memory.device
        bound = {name: tensors[name].to(device, self.types[name]).contiguous() for name in self.inputs}
        key = tuple(tensor.shape for tensor in bound.values())
        if key not in self.contexts:
            self.contexts[key] = self._context({name: tuple(tensor.shape) for name, tensor in bound.items()})
        context, _ = self.contexts[key]
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            bound[name] = torch.empty(shape, dtype=self.types[name], device=device)
        for name, tensor in bound.items():
            context.set_tensor_address(name, tensor.data_ptr())
        self._enqueue(context, device)
        return {name: bound[name] for name in self.outputs}

    def _context(self, shapes: dict[str, tuple[int, ...]]) -> tuple[trt.IExecutionContext, Tensor]:
        context = self.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        memory = self.workspace.reserve(self.engine.device_memory_size_v2)
        context.set_device_memory(memory.data_ptr(), memory.nbytes)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                low, _, high = (tuple(one) for one in self.engine.get_tensor_profile_shape(name, 0))
                hint = "mgp5 export --trt --from DIR --set batches=[...] --set sizes=[...] builds it for others"
                raise Mgp5Error(f"{name} is {shape}, {self.plan} takes {low} to {high}", hint)
        return context, memory

    def _enqueue(self, context: trt.IExecutionContext, device: torch.device) -> None:
        """Queue the work on the current stream; on the default stream, where TensorRT would synchronize, on another."""
        current = torch.cuda.current_stream(device)
        stream = current if current.cuda_stream else self.workspace.stream
        if stream is not current:
            stream.wait_stream(current)
        if not context.execute_async_v3(stream.cuda_stream):
            raise Mgp5Error(f"TensorRT cannot run {self.plan}", "its reason is above")
        if stream is not current:
            current.wait_stream(stream)


def built_with(entry: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return what an engine is bound to: the SHA-256 of its ONNX files, the version of TensorRT and the GPU."""
    card = torch.cuda.get_device_properties(device)
    hashes = [file["sha256"] for file in entry["files"].values()]
    gpu = f"{card.name}, compute capability {card.major}.{card.minor}"
    return {"onnx": hashes, "tensorrt": trt.__version__, "gpu": gpu}


def mismatch(folder: Path, entry: Mapping[str, Any], device: torch.device, **wanted: Any) -> str:
    """Return why the engine in a component's folder must not be used, or ""; `wanted` are further values that it must
    have been built with."""
    if not (folder / PLAN).is_file():
        return "is missing"
    try:
        info = read_json(folder / INFO)
    except Mgp5Error as error:
        return f"cannot be trusted ({error.message})"
    for name, value in (built_with(entry, device) | wanted).items():
        if info.get(name) != value:
            return f"was built for {name} {str(info.get(name))[:60]}, here it is {str(value)[:60]}"
    return "" if sha256(folder / PLAN) == info.get("sha256") else "is damaged"
