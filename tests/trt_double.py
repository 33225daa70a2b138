"""A DOUBLE of TensorRT, for control flow only: what we use of its Python API, computed by ONNX Runtime on the CPU.

It shows that our code makes the calls in an order that works, and binds the right memory. It shows nothing of TensorRT
itself: not that it can parse or build our graphs, nor what they cost. That its methods have the names and arguments of
the real ones is tested.
"""

from __future__ import annotations

import ctypes
import json
from enum import Enum, IntEnum

import numpy as np
import onnx
import onnxruntime

__version__ = "99.0"
CALLS: list[tuple] = []
MARK = b"plan of a double\n"


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING = range(3)


NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
BuilderFlag = Enum("BuilderFlag", ["REFIT", "WEIGHT_STREAMING", "TF32"])
DataType = Enum("DataType", {"FLOAT": 1, "HALF": 10, "BF16": 16, "INT32": 6, "INT64": 7, "BOOL": 9})  # ONNX's numbers
TensorIOMode = Enum("TensorIOMode", ["INPUT", "OUTPUT"])
ExecutionContextAllocationStrategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"])


class ILogger:
    Severity = Severity

    def log(self, severity, msg): ...


class Logger(ILogger):
    def __init__(self, min_severity=Severity.WARNING): ...


class IProgressMonitor: ...


class ITensor:
    def __init__(self, value):
        self._axes = value.type.tensor_type.shape.dim
        self.name, self.shape = value.name, tuple(-1 if axis.dim_param else axis.dim_value for axis in self._axes)

    def get_dimension_name(self, index):
        return self._axes[index].dim_param


class INetworkDefinition:
    model: onnx.ModelProto

    num_inputs = property(lambda self: len(self.model.graph.input))

    def get_input(self, index):
        return ITensor(self.model.graph.input[index])


class ParserError:
    def desc(self):
        return "no such\noperator"

    def node_name(self):
        return "node_7"

    def node_operator(self):
        return "Strange"


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self._network = network

    def parse_from_file(self, model):
        CALLS.append(("parse", model))
        self._network.model = onnx.load(model)
        return all(node.op_type != "Strange" for node in self._network.model.graph.node)

    def get_error(self, index):
        return ParserError()


class ITimingCache:
    def __init__(self, serialized_timing_cache):
        self._known = bytes(serialized_timing_cache)

    def serialize(self):
        return self._known or b"timings"


class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        self._shapes[input] = min, opt, max


class IBuilderConfig:
    progress_monitor = builder_optimization_level = None

    def __init__(self):
        self._flags, self._cache = {BuilderFlag.TF32}, None

    def set_flag(self, flag):
        self._flags.add(flag)

    def clear_flag(self, flag):
        self._flags.discard(flag)

    def add_optimization_profile(self, profile):
        self._profile = profile

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        return cache._known in (b"", b"timings")


class Builder:
    def __init__(self, logger): ...

    def create_network(self, flags=0):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        config.progress_monitor.phase_start("choose kernels", None, 2)
        for step in range(2):
            if not config.progress_monitor.step_complete("choose kernels", step):
                return None
        config.progress_monitor.phase_finish("choose kernels")
        flags = sorted(flag.name for flag in config._flags)
        CALLS.append(("build", flags, config.builder_optimization_level))
        return _plan({"flags": flags, "profile": config._profile._shapes}, network.model)


def _plan(facts, model):
    return MARK + json.dumps(facts).encode() + b"\n" + model.SerializeToString()


class Runtime:
    def __init__(self, logger): ...

    def deserialize_cuda_engine(self, serialized_engine):
        CALLS.append(("deserialize",))
        return ICudaEngine(bytes(serialized_engine)) if serialized_engine.startswith(MARK) else None


class ICudaEngine:
    device_memory_size_v2, streamable_weights_size, weight_streaming_budget_v2 = 1 << 20, 0, None

    def __init__(self, plan):
        facts, _, self._model = plan.removeprefix(MARK).partition(b"\n")
        self._facts = json.loads(facts)
        self._session = onnxruntime.InferenceSession(self._model, providers=["CPUExecutionProvider"])
        graph = onnx.load_from_string(self._model).graph
        self._inputs, self._values = len(graph.input), [*graph.input, *graph.output]

    num_io_tensors = property(lambda self: len(self._values))
    refittable = property(lambda self: "REFIT" in self._facts["flags"])

    def _index(self, name):
        return [value.name for value in self._values].index(name)

    def get_tensor_name(self, index):
        return self._values[index].name

    def get_tensor_dtype(self, name):
        return DataType(self._values[self._index(name)].type.tensor_type.elem_type)

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if self._index(name) < self._inputs else TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name, profile_index):
        return self._facts["profile"][name]

    def get_weight_streaming_automatic_budget(self):
        return 1

    def create_execution_context(self, strategy):
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)

    def serialize(self):
        return _plan(self._facts, onnx.load_from_string(self._model))


class IExecutionContext:
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses, self._memory = engine, {}, {}, None

    def set_device_memory(self, memory, size):
        assert memory and size >= self._engine.device_memory_size_v2
        self._memory = memory

    def set_input_shape(self, name, shape):
        low, _, high = self._engine._facts["profile"].get(name, (shape,) * 3)
        self._shapes[name] = shape
        return all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return True

    def get_tensor_shape(self, name):
        zeros = {given: np.zeros(shape, self._type(given)) for given, shape in self._shapes.items()}
        return self._engine._session.run([name], zeros)[0].shape

    def execute_async_v3(self, stream_handle):
        CALLS.append(("execute", stream_handle, dict(self._addresses), self._memory))
        outputs = [value.name for value in self._engine._values[self._engine._inputs :]]
        given = {name: self._at(name, shape) for name, shape in self._shapes.items()}
        for name, value in zip(outputs, self._engine._session.run(outputs, given), strict=True):
            self._at(name, value.shape)[...] = value
        return True

    def _type(self, name):
        return onnx.helper.tensor_dtype_to_np_dtype(self._engine.get_tensor_dtype(name).value)

    def _at(self, name, shape):
        kind = np.dtype(self._type(name))
        held = (ctypes.c_char * (kind.itemsize * int(np.prod(shape)))).from_address(self._addresses[name])
        return np.frombuffer(held, kind).reshape(shape)


class Refitter:
    def __init__(self, engine, logger):
        self._engine = engine

    def refit_cuda_engine(self):
        return True


class OnnxParserRefitter:
    def __init__(self, refitter, logger):
        self._engine = refitter._engine

    def refit_from_file(self, model):
        CALLS.append(("refit", model))
        self._engine._model = onnx.load(model).SerializeToString()
        return True
