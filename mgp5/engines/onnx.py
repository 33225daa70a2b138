"""ONNX Runtime: an exported component as a call on PyTorch's tensors."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from ..errors import Mgp5Error

# What ONNX Runtime calls a type -> PyTorch's, and its number in ONNX.
TYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(float16)": (torch.float16, 10),
    "tensor(bfloat16)": (torch.bfloat16, 16),
    "tensor(int64)": (torch.int64, 7),
}


class Session:
    """One ONNX file. Called with tensors by the names of its inputs, it gives its outputs by theirs.

    Tensors are bound where they lie, on the CPU or a GPU: nothing is copied but what has another type or layout. On a
    GPU work is put on PyTorch's current stream, and nothing waits for it.

    Raises:
        Mgp5Error: the file cannot be read, or this ONNX Runtime cannot run on the device.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what it cannot do is raised
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=providers(device))
        except Exception as error:  # its exceptions share no other base
            reason = str(error).strip().splitlines()[0]
            raise Mgp5Error(f"ONNX Runtime cannot load {path} ({reason})", "export it again") from error
        self.path, self.device = path, device
        self.types = {arg.name: TYPES[arg.type] for arg in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [arg.name for arg in self.session.get_inputs()]
        self.outputs = [arg.name for arg in self.session.get_outputs()]
        self.run_options = onnxruntime.RunOptions()
        if device.type == "cuda":
            self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.shapes: dict[tuple, list[tuple[int, ...]]] = {}  # of the inputs -> of the outputs

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run it; inputs may have any type and device."""
        given = {name: tensors[name].to(self.device, self.types[name][0]).contiguous() for name in self.inputs}
        key = tuple(value.shape for value in given.values())
        if key not in self.shapes:
            self.shapes[key] = self._run(given, {})
        shapes = zip(self.outputs, self.shapes[key], strict=True)
        made = {name: torch.empty(shape, dtype=self.types[name][0], device=self.device) for name, shape in shapes}
        self._run(given, made)
        return made

    def _run(self, given: dict[str, Tensor], made: dict[str, Tensor]) -> list[tuple[int, ...]]:
        """Run on bound tensors; outputs that are not given are made and thrown away. Returns the outputs' shapes."""
        binding, place = self.session.io_binding(), (self.device.type, self.device.index or 0)
        for name, value in given.items():
            binding.bind_input(name, *place, self.types[name][1], tuple(value.shape), value.data_ptr())
        for name in self.outputs:
            if name in made:
                value = made[name]
                binding.bind_output(name, *place, self.types[name][1], tuple(value.shape), value.data_ptr())
            else:
                binding.bind_output(name, *place)
        try:
            self.session.run_with_iobinding(binding, self.run_options)
        except Exception as error:
            sizes = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in given.items())
            hint = "image sizes have to be multiples of what the denoiser halves them to"
            raise Mgp5Error(f"ONNX Runtime cannot run {self.path} with {sizes}", hint) from error
        return [tuple(value.shape()) for value in binding.get_outputs()]


def providers(device: torch.device) -> list[str | tuple[str, dict[str, str]]]:
    """What ONNX Runtime runs on. Raises Mgp5Error where it has no such thing."""
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        found = f"this onnxruntime {onnxruntime.__version__} does not run on a {device.type} device"
        raise Mgp5Error(found, "pip uninstall onnxruntime, then pip install 'mgp5[export-gpu]'")
    stream = {"device_id": str(device.index or 0), "user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
    return [("CUDAExecutionProvider", stream), "CPUExecutionProvider"]
