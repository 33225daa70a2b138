"""TensorRT without TensorRT: what we call against its real Python API, our graphs against its list of operators."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import pytest
import trt_double
from trt_api import Uses, read_api, signatures

TESTS = Path(__file__).parent
ROOT = TESTS.parent
OURS = [ROOT / "export" / "builder.py", ROOT / "mgp5" / "engines" / "trt.py"]
BINDINGS = {"10": "tensorrt-cu12-bindings==10.13.3.9", "11": "tensorrt-cu13-bindings==11.4.0.106"}
TYPES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16"}
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")


@pytest.fixture(scope="session", params=BINDINGS)
def api(request, tmp_path_factory):
    """The real API of a release: its bindings, imported with stand-ins for the libraries, which hold no code."""
    if not (gcc := shutil.which("gcc")):
        pytest.skip("needs gcc")
    cache = Path(request.config.cache.mkdir("tensorrt")) / f"{request.param}-{sys.implementation.cache_tag}"
    if not list(cache.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=0"]
        done = subprocess.run([*command, "-d", cache, BINDINGS[request.param]], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot download {BINDINGS[request.param]}: {done.stderr.strip().splitlines()[-1]}")
    folder = tmp_path_factory.mktemp("tensorrt")
    for wheel in cache.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    for name in LIBRARIES:
        library = folder / f"lib{name}.so.{request.param}"
        subprocess.run([gcc, "-shared", "-fPIC", "-w", "-o", library, TESTS / "trt_stubs" / f"{name}.c"], check=True)
    return read_api(folder, folder)


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.stem)
def test_all_that_we_use_of_tensorrt_is_in_its_api(api, file):
    uses = Uses(file.read_text(), api)
    assert uses.problems == []
    assert not {f"BuilderFlag.{name}" for name in ("FP16", "BF16", "INT8", "FP8")} & uses.found
    # Nothing was overlooked: each attribute in the source that TensorRT has a name for was followed to its class.
    names = {name for members in api["classes"].values() for name in members}
    written = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    overlooked = written & names - {use.rpartition(".")[2] for use in uses.found}
    # Names that values of PyTorch, of Python and of our own have too.
    others = "append dtype engine log logger name nbytes pop shape stream type update"
    assert overlooked <= {*others.split()}


@pytest.mark.parametrize(
    ("file", "right", "wrong", "problem"),
    [
        (0, "parse_from_file(str(onnx))", "parse_from_file(onnx_file=str(onnx))", "does not take"),
        (0, "create_network(1 <<", "create_network('strong', 1 <<", "does not take"),
        (0, "trt.BuilderFlag.REFIT", "trt.BuilderFlag.FP32", "no FP32"),
        (0, "get_error(0)", "get_error('first')", "does not take"),
        (0, "set_timing_cache(cache, False)", "set_timing_cache(cache)", "does not take"),
        (0, "phase_name: str, step: int", "phase_name: str", "is given"),
        (0, "config.builder_optimization_level =", "config.num_optimization_profiles =", "cannot be set"),
        (1, "execute_async_v3(stream.cuda_stream)", "execute_async_v2(stream.cuda_stream)", "no execute_async_v2"),
        (1, "device_memory_size_v2", "device_memory_size_v3", "no device_memory_size_v3"),
        (1, "trt.Runtime(self.logger)", "trt.Runtime()", "does not take"),
        (1, "engine.streamable_weights_size", "engine.streamable_size", "no streamable_size"),
        (1, "set_device_memory(self.memory.data_ptr(), self.memory.nbytes)", "set_device_memory(0)", "does not take"),
    ],
)
def test_a_wrong_use_would_be_found(api, file, right, wrong, problem):
    source = OURS[file].read_text()
    assert right in source
    assert any(problem in found for found in Uses(source.replace(right, wrong, 1), api).problems)


def test_the_double_has_names_and_arguments_of_the_real_api(api):
    for name, kind in inspect.getmembers(trt_double, inspect.isclass):
        real = api["classes"].get(name, {})
        for member in vars(kind) if real else ():
            if (member.startswith("_") and member != "__init__") or isinstance(vars(kind)[member], type):
                continue
            assert member in real, f"{name}.{member}"
            overloads = [
                [a.arg for a in one.args.args] for one in signatures(member, real[member].get("signatures", ""))
            ]
            if inspect.isfunction(vars(kind)[member]) and overloads and hasattr(kind, "log") == (name == "ILogger"):
                assert list(inspect.signature(vars(kind)[member]).parameters) in overloads, f"{name}.{member}"


def unsupported(path: Path) -> list[str]:
    """What of an ONNX file is not on TensorRT's published list: operators, opset, types, and its restrictions."""
    listed = json.loads((TESTS / "trt_operators.json").read_text())
    types = {name: kinds.split() for kinds, names in listed["operators"].items() for name in names}
    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    opset = next(one.version for one in model.opset_import if not one.domain)
    found = [] if listed["opsets"][0] <= opset <= listed["opsets"][1] else [f"opset {opset}"]
    graph = model.graph
    known = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}
    kinds = {name: value.elem_type for name, value in known.items()} | {t.name: t.data_type for t in graph.initializer}
    for node in graph.node:
        names = [name for name in (*node.input[:1], *node.output) if name]
        used = {onnx.TensorProto.DataType.Name(kinds[name]) for name in names}
        attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        ranks = [len(known[name].shape.dim) for name in node.input[:3] if name in known]
        bad = {
            "operator": node.op_type not in types or node.domain != "",
            "types": not {TYPES.get(one, one) for one in used} <= {*types.get(node.op_type, ())},
            "rank": node.op_type == "Attention" and ranks != [4, 4, 4],
            "inputs": node.op_type == "Attention" and (any(node.input[4:]) or len(node.output) > 1),
            "softcap": bool(attributes.get("softcap")),
            "outputs": node.op_type == "LayerNormalization" and len(node.output) > 1,
            "mode": node.op_type == "Resize" and attributes.get("mode") not in (b"nearest", b"linear"),
            "antialias": bool(attributes.get("antialias")),
            "reduction": node.op_type == "ScatterND" and attributes.get("reduction", b"none") != b"none",
        }
        found += [f"{node.op_type} {node.name}: {what} {sorted(used)}" for what, wrong in bad.items() if wrong]
    return found


def node_file(folder: Path, opset: int, kind: int, rank: int, name: str, **attributes) -> Path:
    """A file with one node of three inputs."""
    value = onnx.helper.make_tensor_value_info
    given = [value(letter, kind, [2] * rank) for letter in "qkv"]
    node = onnx.helper.make_node(name, list("qkv"), ["y"], **attributes)
    graph = onnx.helper.make_graph([node], "one", given, [value("y", kind, [2] * rank)])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)]), folder / "one.onnx")
    return folder / "one.onnx"


FLOAT, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE


@pytest.mark.parametrize(
    ("node", "attributes", "found"),
    [
        ((23, FLOAT, 4, "Attention"), {}, []),
        ((23, FLOAT, 3, "Attention"), {"q_num_heads": 1, "kv_num_heads": 1}, ["Attention : rank ['FLOAT']"]),
        ((23, FLOAT, 4, "Attention"), {"softcap": 1.0}, ["Attention : softcap ['FLOAT']"]),
        ((23, DOUBLE, 4, "Attention"), {}, ["Attention : types ['DOUBLE']"]),
        ((23, FLOAT, 4, "Unique"), {}, ["Unique : operator ['FLOAT']", "Unique : types ['FLOAT']"]),
        ((25, FLOAT, 4, "Attention"), {}, ["opset 25"]),
    ],
)
def test_what_tensorrt_does_not_list_is_found(tmp_path, node, attributes, found):
    assert unsupported(node_file(tmp_path, *node, **attributes)) == found


@pytest.mark.parametrize("name", ["mapper", "unet", "vae_decoder", "condition", "denoiser"])
def test_tensorrt_lists_every_operator_of_an_export(small_export, name):
    assert unsupported(small_export / name / "model.onnx") == []
