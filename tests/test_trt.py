"""Building, keeping, refusing and running TensorRT engines on a DOUBLE of TensorRT, and our graphs against its list of
operators. No engine has been built here, and nothing has run on a GPU."""

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
import trt_double
from click.testing import CliRunner
from mgp5.export.onnx import describe
from mgp5.export.request import EngineOptions, ExportRequest
from mgp5.export.run import export
from tiny_export import draw, without_denoiser

from mgp5 import engines
from mgp5.apps.open_model import load
from mgp5.cli import main
from mgp5.engines import trt_refusal
from mgp5.engines.exported import attach_condition, read_manifest
from mgp5.errors import Mgp5Error

CPU = torch.device("cpu")
NAMES = ("mapper", "vae_decoder", "denoiser")


@pytest.fixture
def folder(small_export, tmp_path):
    return Path(shutil.copytree(small_export, tmp_path / "export"))


@pytest.fixture
def machine(monkeypatch):
    """The double in TensorRT's place, and a GPU that is none; gives the card and the current stream, to be changed."""
    stream = SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None)
    other = SimpleNamespace(cuda_stream=8, wait_stream=lambda other: None)
    card = SimpleNamespace(name="A GPU", major=9, minor=0)
    monkeypatch.setitem(sys.modules, "tensorrt", trt_double)
    monkeypatch.setattr(engines, "find_spec", lambda name: True)
    monkeypatch.setattr(engines, "trt_refusal", lambda device: "")
    monkeypatch.setattr("mgp5.export.run.trt_refusal", lambda device: "")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: other)
    trt_double.CALLS.clear()
    yield SimpleNamespace(card=card, stream=stream)
    for module in ("mgp5.engines.tensorrt", "mgp5.export.tensorrt"):
        sys.modules.pop(module, None)


def built(folder, tell=lambda line: None, names=(), **options) -> int:
    """How many engines a build has made."""
    before = len(trt_double.CALLS)
    export(ExportRequest(trt=True, source=folder, components=names, engine=EngineOptions(**options)), tell)
    return len(trt_double.CALLS) - before


def test_without_tensorrt_or_a_gpu_it_says_what_is_missing_and_how_to_go_on(small_export, tmp_path):
    if not trt_refusal(CPU):
        pytest.skip("TensorRT and a GPU are here")
    done = CliRunner().invoke(main, ["export", "--trt", "--from", str(small_export)])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert "no TensorRT engine was built: " in done.stderr and "pip install 'mgp5[export-gpu]'" in done.stderr
    assert f"mgp5 export --trt --from {small_export.name}" in done.stderr
    with pytest.raises(Mgp5Error, match="has no transformer, it has mapper, unet"):
        export(ExportRequest(trt=True, source=small_export, components=("transformer",)))
    for setting, reason in (("level=6", "level 6"), ("batches=[0]", "batches (0,)"), ("fp16=true", "no setting fp16")):
        done = CliRunner().invoke(main, ["export", "--trt", "--from", str(small_export), "--set", setting])
        assert done.exit_code == 2 and reason in done.stderr
    with pytest.raises(Mgp5Error, match="--backend trt cannot run here: TensorRT is not installed"):
        engines.select_backend("trt", CPU, torch.float32)


def test_an_engine_is_kept_until_what_it_depends_on_changes(folder, machine):
    lines: list[str] = []
    assert built(folder, lines.append) == len(NAMES) and not built(folder)
    assert sorted(path.parent.name for path in folder.glob("*/model.plan")) == sorted(NAMES)
    info = json.loads((folder / "denoiser" / "model.plan.json").read_text())
    assert info["tensorrt"] == "99.0" and info["gpu"] == "A GPU, compute capability 9.0"
    assert info["shapes"] == {"batch": [1, 2, 2], "height": [8] * 3, "width": [8] * 3}
    assert built(folder, names=("denoiser",), level=5) == 1 and trt_double.CALLS[-1] == "build level 5"
    assert built(folder, names=("denoiser",), level=5, sizes=((8, 8), (16, 12))) == 1
    plan = folder / "mapper" / "model.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert built(folder, lines.append, ("mapper",)) == 1 and "is damaged" in lines[-2]
    plan.with_suffix(".plan.json").unlink()
    assert built(folder, lines.append, ("mapper",)) == 1 and "cannot be trusted" in lines[-2]
    machine.card.name = "Another GPU"
    assert built(folder, lines.append, ("mapper",)) == 1 and "was built for gpu A GPU, " in lines[-2]
    assert not list(folder.rglob("*.part"))


def test_what_cannot_be_built_is_one_line_and_leaves_nothing(folder, machine, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        built(folder)
    file = folder / "mapper" / "model.onnx"
    model = onnx.load(file)
    model.graph.node[0].op_type = "Strange"
    onnx.save(model, file)
    with pytest.raises(Mgp5Error, match=r"mapper/model\.onnx is damaged"):
        built(folder)
    manifest = read_manifest(folder)
    manifest["components"]["mapper"] = describe(folder, "mapper", "fp32")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Mgp5Error, match=r"cannot parse .*model\.onnx \(Strange: no such operator\)"):
        built(folder)
    assert not list(folder.rglob("*.plan"))


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_a_model_draws_by_the_double_as_by_pytorch(small_folder, small_export, folder, machine, split):
    """Step by step, and each step as a whole on buffers of its own, as a CUDA graph has it."""
    if not split:
        folder = without_denoiser(small_export, folder)
    model = load(small_folder, backend=None)
    generator, states = model.head.generator, torch.randn(1, 4, 32)

    @torch.no_grad()
    def results() -> tuple[torch.Tensor, ...]:
        return model.head.mapper(states), model.head.mapper.unconditional(4), draw(generator)

    expected = results()
    with pytest.raises(Mgp5Error, match=r"model\.plan is missing: build it: mgp5 export --trt --from"):
        engines.apply(generator, "trt", folder)
    assert built(folder) == len(NAMES)
    engines.apply(generator, "trt", folder)
    attach_condition(model.head, folder, "trt")
    for graphed, stream in ((False, 7), (True, 0)):
        generator.engine.graphed, machine.stream.cuda_stream = graphed, stream
        torch.testing.assert_close(results(), expected, atol=1e-4, rtol=1e-4)
        assert trt_double.CALLS[-1] == f"execute on stream {stream or 8}"  # on the default one TensorRT synchronizes
    with pytest.raises(Mgp5Error, match=r"\(2, 4, 12, 8\), .*model\.plan takes \(1, 4, 8, 8\) to \(2, 4, 8, 8\)"):
        draw(generator, height=24)
    machine.card.name = "Another GPU"
    with pytest.raises(Mgp5Error, match=r"model\.plan was built for gpu A GPU, .*, here it is Another GPU"):
        engines.apply(generator, "trt", folder)


TYPES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16"}


def unsupported(path: Path) -> list[str]:
    """What of an ONNX file is not on TensorRT's published list: operators, opset, types, and its restrictions."""
    listed = json.loads((Path(__file__).parent / "trt_operators.json").read_text())
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


def test_tensorrt_lists_every_operator_of_an_export(small_export):
    for name in read_manifest(small_export)["components"]:
        assert unsupported(small_export / name / "model.onnx") == [], name
