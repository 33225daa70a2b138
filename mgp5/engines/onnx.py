"""Run an exported component by ONNX Runtime on PyTorch's tensors."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from ..errors import Mgp5Error

# ONNX Runtime's name of a dtype -> PyTorch's, and its number in ONNX.
TYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(float16)": (torch.float16, 10),
    "tensor(bfloat16)": (torch.bfloat16, 16),
    "tensor(int64)": (torch.int64, 7),
}


class OnnxSession:
    """Runs one ONNX file: tensors by the names of its inputs -> tensors by the names of its outputs.

    Tensors are bound at their addresses on the CPU or a GPU; only those of another dtype or layout are copied. On a GPU
    the work is queued on PyTorch's current stream, and the host does not wait for it.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        """Load a file, with its external data beside it. Raises Mgp5Error if it cannot be read."""
        options, self.run_options = onnxruntime.SessionOptions(), onnxruntime.RunOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised anyway
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list = ["CPUExecutionProvider"]
        if device.type == "cuda":
            stream = str(torch.cuda.current_stream().cuda_stream)
            places = {"device_id": str(device.index or 0), "user_compute_stream": stream}
            providers.insert(0, ("CUDAExecutionProvider", places))
            self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no other base
            reason = str(error).strip().splitlines()[0]
            raise Mgp5Error(f"ONNX Runtime cannot load {path} ({reason})", "export it again") from error
        self.path, self.device = path, device
        self.types = {arg.name: TYPES[arg.type] for arg in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [arg.name for arg in self.session.get_inputs()]
        self.outputs = [arg.name for arg in self.session.get_outputs()]
        self.shapes: dict[tuple, list[tuple[int, ...]]] = {}  # shapes of the inputs -> shapes of the outputs

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run on inputs of any dtype and device. Raises Mgp5Error if the graph cannot run with these shapes."""
        inputs = {name: tensors[name].to(self.device, self.types[name][0]).contiguous() for name in self.inputs}
        key = tuple(value.shape for value in inputs.values())
        if key not in self.shapes:
            self.shapes[key] = self._run(inputs, {})
        shapes = zip(self.outputs, self.shapes[key], strict=True)
        outputs = {name: torch.empty(shape, dtype=self.types[name][0], device=self.device) for name, shape in shapes}
        self._run(inputs, outputs)
        return outputs

    def _run(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> list[tuple[int, ...]]:
        """Run on bound tensors, outputs without a tensor being dropped; return the shapes of all outputs."""
        binding, device = self.session.io_binding(), (self.device.type, self.device.index or 0)
        for name, value in inputs.items():
            binding.bind_input(name, *device, self.types[name][1], tuple(value.shape), value.data_ptr())
        for name in self.outputs:
            if (value := outputs.get(name)) is not None:
                binding.bind_output(name, *device, self.types[name][1], tuple(value.shape), value.data_ptr())
            else:
                binding.bind_output(name, *device)
        try:
            self.session.run_with_iobinding(binding, self.run_options)
        except Exception as error:  # onnxruntime's exceptions share no other base
            sizes = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in inputs.items())
            hint = "image sizes have to be multiples of what the denoiser halves them to"
            raise Mgp5Error(f"ONNX Runtime cannot run {self.path} with {sizes}", hint) from error
        return [tuple(value.shape()) for value in binding.get_outputs()]
