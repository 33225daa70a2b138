"""Building, keeping and running engines on a recorded DOUBLE of TensorRT: the control flow, and no more than that.

No engine has been built here, and nothing has run on a GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
import trt_double
from click.testing import CliRunner
from mgp5.export import onnx as onnx_file
from mgp5.export.manifest import FORMAT, describe, read_manifest
from mgp5.export.specs import Component
from mgp5.export.trt import BuildOptions, build, refusal, source

from mgp5 import engines
from mgp5.apps.open_model import load
from mgp5.cli import main
from mgp5.engines.exported import put_mapper_on
from mgp5.errors import Mgp5Error


class Small(torch.nn.Module):
    """The inputs and outputs of a UNet, and next to nothing between them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, *tensors):
        sample, timestep, states = tensors
        return (self.conv(sample) + (timestep + states.mean((1, 2)))[:, None, None, None],)


def inputs(rows: int, side: int) -> dict[str, torch.Tensor]:
    return {
        "sample": torch.randn(rows, 4, side, side),
        "timestep": torch.arange(3.0, 3.0 + rows),
        "encoder_hidden_states": torch.randn(rows, 5, 6),
    }


def write_folder(folder: Path, seed: int) -> Path:
    axes = {"sample": {0: "batch", 2: "height", 3: "width"}, "timestep": {0: "batch"}}
    axes["encoder_hidden_states"] = {0: "batch", 1: "length"}
    shutil.rmtree(folder / "unet", ignore_errors=True)
    unet = Component(name="unet", module=Small(seed), inputs=inputs(2, 6), outputs=("out_sample",), axes=axes)
    onnx_file.write(unet, folder / "unet", 20)
    entry = describe(folder, "unet", "fp32")
    facts = {"format": FORMAT, "native": [8, 8], "length": 5, "components": {"unet": entry}}
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("exported"), 0)


@pytest.fixture(scope="session")
def trained_further(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("trained"), 1)


@pytest.fixture
def folder(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "export"))


@pytest.fixture
def double(monkeypatch):
    """The recorded double in TensorRT's place, and a GPU that is none. Gives the driver's version, to be changed."""
    stream = SimpleNamespace(cuda_stream=7, waits=[])
    own = SimpleNamespace(cuda_stream=8, wait_stream=lambda other: stream.waits.append("own waits"))
    stream.wait_stream = lambda other: stream.waits.append("current waits")
    card = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132)
    machine = SimpleNamespace(driver="580.1", card=card, stream=stream)
    monkeypatch.setitem(sys.modules, "tensorrt", trt_double)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr("torch.utils.collect_env.get_nvidia_driver_version", lambda run: machine.driver)
    trt_double.CALLS.clear()
    yield machine
    for module in ("mgp5.export.builder", "mgp5.engines.tensorrt"):
        if sys.modules.pop(module, None):
            package, _, name = module.rpartition(".")
            delattr(sys.modules[package], name)


def calls(kind: str) -> list[tuple]:
    return [call for call in trt_double.CALLS if call[0] == kind]


OPTIONS = BuildOptions(sizes=((8, 8),))


def test_without_tensorrt_or_a_gpu_it_says_what_is_missing_and_how_to_go_on(folder):
    if not refusal():
        pytest.skip("TensorRT and a GPU are here")
    with pytest.raises(Mgp5Error) as caught:
        build(folder, BuildOptions())
    error = caught.value
    assert error.exit_code == 1
    assert "TensorRT is not installed" in error.message or "cannot be loaded" in error.message or "GPU" in error.message
    assert "pip install 'mgp5[export-gpu]'" in error.hint and "mgp5 export --trt --from export" in error.hint
    with pytest.raises(Mgp5Error, match="has no vae, it has unet"):
        build(folder, BuildOptions(components=("vae",)))
    assert sorted(path.name for path in (folder / "unet").iterdir()) == ["model.onnx"]
    done = CliRunner().invoke(main, ["export", "--trt", "--from", str(folder)])
    assert done.exit_code == 1 and done.stderr == f"mgp5: {error}\n"
    wrong = {"level=6": "level 6", "batches=[0]": "batches (0,)", "fp16=true": "no setting fp16"}
    for setting, reason in wrong.items():
        done = CliRunner().invoke(main, ["export", "--trt", "--from", str(folder), "--set", setting])
        assert done.exit_code == 2 and reason in done.stderr
    with pytest.raises(Mgp5Error, match="--backend trt cannot run here: TensorRT is not installed"):
        engines.select_backend("trt", torch.device("cpu"), torch.float32)


def test_the_command_writes_and_proves_the_onnx_files_first(small_folder, tmp_path):
    if not refusal():
        pytest.skip("TensorRT and a GPU are here")
    flags = ["--model", str(small_folder), "--out", str(tmp_path / "onnx"), "--component", "vae_decoder"]
    done = CliRunner().invoke(main, ["export", "--trt", *flags])
    assert done.exit_code == 1 and done.stderr.splitlines()[-1].startswith("mgp5: no TensorRT engine was built: ")
    assert len(read_manifest(tmp_path / "onnx")["components"]["vae_decoder"]["proof"]) == 3


def test_engines_are_built_once_for_each_shape(folder, double):
    two, one = build(folder, OPTIONS)
    assert re.fullmatch(r"model-2x8x8x5-[0-9a-f]{12}\.plan", two.name) and one.name.startswith("model-1x8x8x5-")
    note = json.loads(two.with_suffix(".json").read_text())
    assert note["key"]["machine"] == {
        "tensorrt": trt_double.__version__,
        "gpu": "A GPU",
        "capability": "9.0",
        "multiprocessors": 132,
        "driver": "580.1",
    }
    assert note["key"]["shapes"] == {"batch": [2, 2, 2], "height": [8] * 3, "width": [8] * 3, "length": [5] * 3}
    assert calls("build") == [("build", [], 3)] * 2  # float32 stays float32: no TF32
    assert build(folder, OPTIONS) == [two, one] and len(calls("build")) == 2
    flagged = build(folder, replace(OPTIONS, batches=(2,), level=5, refit=True, weight_streaming=True))
    assert flagged[0] != two and calls("build")[2:] == [("build", ["REFIT", "WEIGHT_STREAMING"], 5)]
    assert not [path for path in (folder / "unet").iterdir() if path.name.endswith(".part")]


def test_a_plan_that_is_stale_foreign_or_damaged_is_built_again(folder, double, capsys):
    options = replace(OPTIONS, batches=(2,))
    (first,) = build(folder, options)

    def again(reason: str) -> Path:
        built = len(calls("build"))
        (place,) = build(folder, options)
        assert len(calls("build")) == built + 1
        assert reason in capsys.readouterr().err
        return place

    first.write_bytes(first.read_bytes()[:-1])
    assert again("it is damaged") == first
    first.with_suffix(".json").unlink()
    assert again("tells where it is from") == first
    double.driver = "590.2"
    second = again("which takes minutes")
    assert second != first
    for suffix in (".plan", ".json"):  # the other driver's under this one's name
        shutil.copy(first.with_suffix(suffix), second.with_suffix(suffix))
    assert again("it was built for another driver (580.1, here 590.2)") == second
    double.card.name = "Another GPU"
    assert again("which takes minutes") not in (first, second)


def test_a_call_binds_tensors_where_they_lie_on_the_current_stream(folder, double):
    from mgp5.engines.tensorrt import Sessions, Workspace

    run = Sessions(source(folder, read_manifest(folder), "unet"), Workspace(torch.device("cpu")))
    for rows, side in ((2, 8), (1, 8), (2, 8)):
        given = inputs(rows, side)
        torch.testing.assert_close(run(**given)["out_sample"], Small(0)(*given.values())[0])
        _, stream, addresses, _ = calls("execute")[-1]
        assert stream == 7 and all(addresses[name] == tensor.data_ptr() for name, tensor in given.items())
    assert (
        len(calls("build")) == len(calls("deserialize")) == 2
    )  # a shape that came before is not built or loaded again
    assert {call[3] for call in calls("execute")} == {run.workspace.memory.data_ptr()}  # they share their memory
    session = run.loaded[2, 8, 8, 5]
    with pytest.raises(Mgp5Error, match=r"sample is \(2, 4, 9, 9\), model-2x8x8x5-.* takes \(2, 4, 8, 8\)"):
        session(**inputs(2, 9))
    double.stream.cuda_stream = 0  # the default stream, on which TensorRT would synchronise
    run(**given)
    assert calls("execute")[-1][1] == 8 and double.stream.waits == ["own waits", "current waits"]


def test_a_dynamic_engine_takes_all_shapes_in_its_range(folder, double):
    from mgp5.engines.tensorrt import Sessions, Workspace

    (place,) = build(folder, BuildOptions(sizes=((8, 8), (12, 10)), dynamic=True))
    assert place.name.startswith("model-1x8x8x5-to-2x12x10x5-")
    run = Sessions(source(folder, read_manifest(folder), "unet"), Workspace(torch.device("cpu")))
    for rows, side in ((2, 9), (1, 10)):
        given = inputs(rows, side)
        torch.testing.assert_close(run(**given)["out_sample"], Small(0)(*given.values())[0])
    assert len(calls("build")) == len(calls("deserialize")) == 1
    one, other = run.loaded.values()  # the same weights, and a context for each shape that a graph may hold
    assert one.engine is other.engine and one.context is not other.context


def test_new_weights_are_put_into_an_engine_that_can_be_refit(folder, trained_further, double):
    from mgp5.engines.tensorrt import Session, Workspace

    options = replace(OPTIONS, batches=(2,), refit=True)
    (old,) = build(folder, options)
    shutil.copytree(trained_further, folder, dirs_exist_ok=True)
    (new,) = build(folder, options)
    assert new != old and len(calls("build")) == len(calls("refit")) == 1
    given = inputs(2, 8)
    workspace = Workspace(torch.device("cpu"))
    output = Session(workspace.load(new), new.name, workspace)(**given)["out_sample"]
    torch.testing.assert_close(output, Small(1)(*given.values())[0])


def test_what_cannot_be_built_is_one_line_and_leaves_nothing(folder, double, monkeypatch):
    file, manifest = folder / "unet" / "model.onnx", read_manifest(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(Mgp5Error, match=r"model\.onnx is damaged"):
        build(folder, OPTIONS)
    file.write_bytes(whole)
    monkeypatch.setattr(
        "rich.progress.Progress.update", lambda *_, **__: signal.default_int_handler(signal.SIGINT, None)
    )
    with pytest.raises(KeyboardInterrupt):
        build(folder, OPTIONS)
    model = onnx.load(file)
    model.graph.node[0].op_type = "Strange"
    onnx.save(model, file)
    entry = describe(folder, "unet", "fp32")
    (folder / "manifest.json").write_text(json.dumps(manifest | {"components": {"unet": entry}}))
    with pytest.raises(Mgp5Error, match=r"cannot parse .*Strange node_7: no such operator"):
        build(folder, OPTIONS)
    assert not list(folder.glob("unet/*.plan"))


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_a_model_draws_by_the_double_as_by_pytorch(small_folder, small_export, tmp_path, double, split):
    """Both ways of the loop: step by step, and each step as a whole on buffers of its own, as a CUDA graph has it."""
    from mgp5.engines import tensorrt as trt

    shutil.copytree(small_export, tmp_path / "export")
    if not split:
        shutil.rmtree(tmp_path / "export" / "denoiser")
        manifest = read_manifest(tmp_path / "export")
        del manifest["components"]["denoiser"]
        (tmp_path / "export" / "manifest.json").write_text(json.dumps(manifest))
    model = load(small_folder, backend=None)
    diffusion, states = model.head.generator, torch.randn(1, 4, 32)

    def draw() -> torch.Tensor:
        with torch.no_grad():
            condition, other = model.head.mapper(states), model.head.mapper.unconditional(4)
        settings = {"steps": 3, "guidance": 3.0, "sampler": "ddim", "generators": [torch.Generator().manual_seed(0)]}
        *_, latents = diffusion.draw(condition, other, **settings)
        return diffusion.decode(latents)

    expected = draw()
    diffusion.engine = trt.put_on(diffusion, tmp_path / "export")
    put_mapper_on(model.head, tmp_path / "export", torch.device("cpu"), "trt")
    for whole in (False, True):
        diffusion.engine.graphed = whole
        torch.testing.assert_close(draw(), expected, atol=1e-4, rtol=1e-4)
    names = {path.parent.name for path in (tmp_path / "export").glob("*/*.plan")}
    assert names == {"mapper", "vae_decoder", "denoiser" if split else "unet"}
    assert len(calls("build")) == 3 and len(calls("execute")) == 2 * (2 + 3 + 1)
    made = build(tmp_path / "export", BuildOptions())  # the native size, guided and not
    assert {path.parent.name for path in made} == names and len(made) == 4 and len(calls("build")) == 4
