"""A DOUBLE of what we use of TensorRT's Python API, computed by ONNX Runtime on the CPU.

It shows that our calls come in an order that works and bind the right memory; of TensorRT itself it shows nothing.
"""

import ctypes
import json
from enum import Enum, IntEnum
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

__version__ = "99.0"
CALLS: list[str] = []
MARK = b"plan of a double\n"
NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
BuilderFlag = Enum("BuilderFlag", ["TF32"])
DataType = Enum("DataType", {"FLOAT": 1, "HALF": 10, "BF16": 16, "INT32": 6, "INT64": 7, "BOOL": 9})  # ONNX's numbers
TensorIOMode = Enum("TensorIOMode", ["INPUT", "OUTPUT"])
IProgressMonitor = object
ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"])


class ILogger:
    Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"], start=0)

    def __init__(self, *least): ...


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.logger = network, logger

    def parse_from_file(self, model):
        self.network.model = onnx.load(model)
        if strange := any(node.op_type == "Strange" for node in self.network.model.graph.node):
            self.logger.log(ILogger.Severity.ERROR, "Strange: no such\noperator")
        return not strange


class Profile(dict):
    def set_shape(self, input, min, opt, max):
        assert all(low <= usual <= high for low, usual, high in zip(min, opt, max, strict=True))
        self[input] = min, opt, max


class Builder:  # and its configuration
    def __init__(self, logger):
        self.flags = {BuilderFlag.TF32}

    def create_network(self, flags):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return SimpleNamespace()

    def create_builder_config(self):
        return self

    def create_optimization_profile(self):
        return Profile()

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def add_optimization_profile(self, profile):
        self.profile = profile

    def build_serialized_network(self, network, config):
        assert not config.flags  # the files in the tests are in float32
        CALLS.append(f"build level {config.builder_optimization_level}")
        config.progress_monitor.phase_start("choose kernels", None, 1)
        if not config.progress_monitor.step_complete("choose kernels", 0):
            return None
        config.progress_monitor.phase_finish("choose kernels")
        return MARK + json.dumps(config.profile).encode() + b"\n" + network.model.SerializeToString()


Logger = ILogger


class Runtime:
    def __init__(self, logger): ...

    def deserialize_cuda_engine(self, serialized_engine):
        return Engine(serialized_engine) if serialized_engine.startswith(MARK) else None


class Engine:
    device_memory_size_v2 = 1 << 20

    def __init__(self, plan):
        profile, _, model = plan.removeprefix(MARK).partition(b"\n")
        self.profile = json.loads(profile)
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        graph = onnx.load_from_string(model).graph
        self.inputs = [value.name for value in graph.input]
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
        self.num_io_tensors = len(self.types)

    def get_tensor_name(self, index):
        return [*self.types][index]

    def get_tensor_dtype(self, name):
        return DataType(self.types[name])

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name, profile_index):
        return self.profile[name]

    def create_execution_context(self, strategy):
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}

    def set_device_memory(self, memory, size):
        assert memory and size >= self.engine.device_memory_size_v2

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.profile[name]
        self.shapes[name] = shape
        return all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory

    def get_tensor_shape(self, name):
        zeros = {one: np.zeros(shape, self._type(one)) for one, shape in self.shapes.items()}
        return self.engine.session.run([name], zeros)[0].shape

    def execute_async_v3(self, stream_handle):
        CALLS.append(f"execute on stream {stream_handle}")
        outputs = [name for name in self.engine.types if name not in self.engine.inputs]
        inputs = {name: self._at(name, shape) for name, shape in self.shapes.items()}
        for name, value in zip(outputs, self.engine.session.run(outputs, inputs), strict=True):
            self._at(name, value.shape)[...] = value
        return True

    def _type(self, name):
        return onnx.helper.tensor_dtype_to_np_dtype(self.engine.types[name])

    def _at(self, name, shape):
        kind = np.dtype(self._type(name))
        buffer = (ctypes.c_char * (kind.itemsize * int(np.prod(shape)))).from_address(self.addresses[name])
        return np.frombuffer(buffer, kind).reshape(shape)
