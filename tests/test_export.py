"""Export to ONNX: what is written, that it is proved, that a model runs by it, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import onnx
import pytest
import torch
from click.testing import CliRunner
from mgp5.export import proof, specs
from mgp5.export.job import Request, export
from mgp5.export.manifest import check, read_manifest
from mgp5.export.onnx import write
from mgp5.export.subject import load as load_subject
from tiny import save_pipeline
from tiny_sd3 import save_sd3

from mgp5 import engines
from mgp5.apps.open_model import load
from mgp5.cli import main
from mgp5.engines.exported import ExportedMapper, put_mapper_on
from mgp5.errors import Mgp5Error
from mgp5.generators import load_generator
from mgp5.heads.minigpt5 import FeatureMapper
from mgp5.loading import mapper_for

SLOW = pytest.mark.slow
NAMES = ["mapper", "unet", "vae_decoder", "condition", "denoiser"]


@pytest.fixture(scope="module")
def folder(small_folder):
    return small_folder


@pytest.fixture(scope="module")
def exported(small_export):
    return small_export


@pytest.fixture
def model(folder):
    return load(folder, backend=None)


def run(*args):
    return CliRunner().invoke(main, ["export", *map(str, args)])


def refused(result, *words, code=1):
    """One line on stderr that says what is wrong."""
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1 and all(word in result.stderr for word in words), result.stderr


def draw(diffusion, count=1, **options):
    generator = torch.Generator().manual_seed(3)
    conditions = torch.randn(count + 1, *diffusion.condition_shape, generator=generator)
    generators = [torch.Generator().manual_seed(k) for k in range(count)]
    settings = {"steps": 3, "guidance": 3.0, "sampler": "ddim"} | options
    *_, latents = diffusion.draw(conditions[1:], conditions[:1], generators=generators, **settings)
    return diffusion.decode(latents)


def test_the_manifest_says_what_was_proved(exported):
    manifest = read_manifest(exported)
    assert list(manifest["components"]) == NAMES
    for name, entry in manifest["components"].items():
        assert sum(entry["nodes"].values()) > 0 and entry["opset"] == 23 and entry["precision"] == "fp32"
        sizes = [tuple(v for k, v in row.items() if k in ("batch", "height", "width")) for row in entry["proof"]]
        assert len(set(sizes)) == 3 and (2, 4, 6) not in sizes, name
        assert all(row["relative"] < 1e-4 and row["cosine"] > 0.99999 for row in entry["proof"])
    assert manifest["image"]["steps"] == 20 and manifest["image"]["psnr"] > 80
    assert {"torch", "onnx", "onnxruntime"} <= manifest["versions"].keys()
    check(exported, manifest)


def test_names_and_layout_are_those_of_optimums_pipelines(exported):
    unet = onnx.load(exported / "unet" / "model.onnx").graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in unet.input}
    assert shapes["sample"] == ["batch", 4, "height", "width"] and shapes["timestep"] == ["batch"]
    assert shapes["encoder_hidden_states"][:2] == ["batch", "length"]
    assert [v.name for v in unet.output] == ["out_sample"]
    decoder = onnx.load(exported / "vae_decoder" / "model.onnx").graph
    assert [v.name for v in (*decoder.input, *decoder.output)] == ["latent_sample", "sample"]
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["scheduler"][1] == "DDIMScheduler"
    assert json.loads((exported / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert (exported / "scheduler" / "scheduler_config.json").is_file()


CALLS = [{}, {"count": 2}, {"guidance": 1.0}, {"height": 8, "width": 24}, {"guidance_until": 0.5, "steps": 4}, {}]


@pytest.mark.parametrize("whole", [False, True], ids=["split", "whole"])
def test_the_engine_of_a_folder_draws_the_same(exported, model, whole, tmp_path):
    diffusion = model.head.generator
    expected = [draw(diffusion, **call) for call in CALLS]
    if whole:
        shutil.copytree(exported, tmp_path / "whole")
        manifest = read_manifest(exported)
        manifest["components"].pop("denoiser")
        (tmp_path / "whole" / "manifest.json").write_text(json.dumps(manifest))
    assert engines.apply(diffusion, "onnx", tmp_path / "whole" if whole else exported).name == "onnx"
    found = [draw(diffusion, **call) for call in CALLS]
    assert all(float((a - b).abs().max()) < 1e-4 for a, b in zip(expected, found, strict=True))
    with pytest.raises(Mgp5Error, match="reuse 2"):
        draw(diffusion, reuse=2)
    with pytest.raises(Mgp5Error, match=r"cannot run .* with .*sample 2x4x5x8"):
        draw(diffusion, height=10, width=16)
    engines.remove(diffusion)
    assert torch.equal(draw(diffusion), expected[0])


def test_a_mapper_by_its_file(exported, model):
    states = torch.randn(3, 4, model.config.head_config.mapper.llm_width)
    with torch.no_grad():
        expected = model.head.mapper(states), model.head.unconditional(states)
    put_mapper_on(model.head, exported, torch.device("cpu"), "onnx")
    found = model.head.mapper(states), model.head.unconditional(states)
    assert isinstance(model.head.mapper, ExportedMapper)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True))


def test_a_story_by_the_exported_files(exported, folder, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (tmp_path / "lines.txt").write_text("A cat.\n")
    args = ["story", "--model", folder, "--text", tmp_path / "lines.txt", "--scenes", 0, "--steps", 2, "--seed", 1]
    for backend in (["--backend", "eager"], ["--backend", "onnx", "--exported", exported]):
        out = tmp_path / backend[1]
        result = CliRunner().invoke(main, [*map(str, args), *map(str, backend), "--out", str(out)])
        assert result.exit_code == 0, result.output
    from PIL import Image

    one, other = (next((tmp_path / name).glob("*.png")) for name in ("eager", "onnx"))
    one, other = (torch.tensor(list(Image.open(path).getdata())).double() / 255 for path in (one, other))
    assert proof.psnr(one, other) > 40


def test_the_store_is_filled_once(folder, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engines.apply(model.head.generator, "auto").name == "eager"  # too small to be worth it
    expected = draw(model.head.generator)
    times = []
    for _ in range(2):
        engines.apply(model.head.generator, "onnx")
        assert float((draw(model.head.generator) - expected).abs().max()) < 1e-4
        times += [path.stat().st_mtime_ns for path in tmp_path.rglob("model.onnx")]
    assert len(times) == 4 and times[:2] == times[2:]
    assert capsys.readouterr().err.count("exporting the denoiser") == 1


def test_damaged_and_foreign_files_are_refused(exported, model, folder, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    damaged = bytearray((copy / "denoiser" / "model.onnx").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (copy / "denoiser" / "model.onnx").write_bytes(damaged)
    with pytest.raises(Mgp5Error, match=r"denoiser/model.onnx is damaged"):
        engines.apply(model.head.generator, "onnx", copy)
    (copy / "denoiser" / "model.onnx").unlink()
    with pytest.raises(Mgp5Error, match=r"denoiser/model.onnx is missing"):
        engines.apply(model.head.generator, "onnx", copy)
    with pytest.raises(Mgp5Error, match=r"no readable manifest\.json"):
        engines.apply(model.head.generator, "onnx", tmp_path)
    manifest = {key: value for key, value in read_manifest(exported).items() if key != "format"}
    (copy / "manifest.json").write_text(json.dumps(manifest))  # as older versions wrote it
    with pytest.raises(Mgp5Error, match=r"another version of mgp5 \(format 1, expected 2\): export it again"):
        engines.apply(model.head.generator, "onnx", copy)
    with torch.no_grad():
        model.head.generator.unet.conv_out.weight.add_(1)
    with pytest.raises(Mgp5Error, match="with another denoiser"):
        engines.apply(model.head.generator, "onnx", exported)
    with pytest.raises(Mgp5Error, match="--backend eager takes no exported folder"):
        engines.apply(model.head.generator, "eager", exported)


def test_bad_input_is_one_line(exported, folder, llava_folder, tmp_path):
    out = tmp_path / "out"
    refused(run("--onnx", "--model", folder, "--out", exported), f"an export of {folder} in fp32", code=2)
    refused(run("--onnx", "--model", folder, "--out", tmp_path.parent), "holds other files", code=2)
    refused(run("--onnx", "--model", folder, "--out", out, "--component", "vae"), "no component vae", code=2)
    refused(run("--onnx", "--model", folder, "--out", out, "--precision", "fp8"), "fp8", code=2)
    refused(run("--onnx", "--model", f"{llava_folder}+{folder}/diffusion", "--out", out), "no trained mapper")
    refused(run("--model", folder, "--out", out), "nothing to do", code=2)
    refused(run("--onnx", "--model", folder), "--out", code=2)
    refused(run("--onnx", "--model", folder, "--out", out, "--height", 16), "go together", code=2)
    assert not out.exists() and not list(tmp_path.iterdir())


def test_files_that_compute_something_else_are_not_kept(folder, tmp_path):
    subject = load_subject(str(folder))
    with torch.no_grad():
        subject.diffusion.vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(Mgp5Error, match="vae_decoder differs from PyTorch by nan"):
        export(subject, Request(components=("vae_decoder",)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_weight_is_found(exported, folder):
    subject = load_subject(str(folder))
    with torch.no_grad():
        subject.diffusion.unet.conv_in.weight.mul_(1.05)
    component = specs.components(subject.diffusion, None, None, 4, False)["unet"]()
    session = proof.runner(exported / "unet" / "model.onnx", "fp32")
    with pytest.raises(Mgp5Error, match="unet differs from PyTorch by"):
        proof.prove(component, session, proof.LIMITS["fp32"], specs.latent_unit(subject.diffusion))


@pytest.mark.parametrize("name", ["unet", "denoiser"])
def test_a_file_with_one_timestep_for_all_rows_is_found(exported, folder, name):
    subject = load_subject(str(folder))
    component = specs.components(subject.diffusion, None, None, 4, True)[name]()
    run = proof.runner(exported / name / "model.onnx", "fp32")

    def of_the_first(**tensors):
        time = "timestep" if name == "unet" else "row"
        return run(**tensors | {time: tensors[time][:1].expand_as(tensors[time])})

    with pytest.raises(Mgp5Error, match=f"{name} differs from PyTorch by .*'batch': 3"):
        proof.prove(component, of_the_first, proof.LIMITS["fp32"], specs.latent_unit(subject.diffusion))


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from mgp5.cli import main
main(sys.argv[1:])
"""


@SLOW
def test_a_full_disk(folder, tmp_path):
    """Files may not grow, as on a disk without room."""
    args = ["export", "--onnx", "--model", folder, "--out", tmp_path / "out", "--component", "vae_decoder"]
    done = subprocess.run([sys.executable, "-c", FULL, *map(str, args)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "cannot be written" in done.stderr.splitlines()[-1], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("precision", "opset"), [("fp16", 18), pytest.param("bf16", 20, marks=SLOW)])
def test_half_precision_is_in_the_file(folder, tmp_path, precision, opset):
    subject = load_subject(str(folder))
    manifest = export(subject, Request(components=("vae_decoder",), precision=precision, opset=opset), tmp_path / "out")
    assert manifest["components"]["vae_decoder"]["opset"] == opset
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "out/vae_decoder/model.onnx")).graph
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert all(kinds[node.input[1]] == half for node in graph.node if node.op_type == "Conv")
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    assert norms and all(types[node.input[0]] == onnx.TensorProto.FLOAT for node in norms)


def exported_by_hand(diffusion, folder, opset=23):
    """Every component of a diffusion model, proved."""
    torch.manual_seed(2)
    mapper = FeatureMapper(mapper_for(16, diffusion, encoder_layers=1, decoder_layers=1)).eval()
    with torch.no_grad():
        made = specs.components(diffusion, mapper, mapper.unconditional(4), 4, True)
    for name, make in made.items():
        path = write(make(), folder / name, opset)
        rows = proof.prove(make(), proof.runner(path, "fp32"), proof.LIMITS["fp32"], specs.latent_unit(diffusion))
        assert all(row["relative"] < 1e-4 for row in rows)
    return list(made)


@SLOW
@pytest.mark.parametrize("sd35", [False, True])
def test_stable_diffusion_3(tmp_path, sd35):
    diffusion = load_generator(str(save_sd3(tmp_path / "sd3", sd35)))
    names = exported_by_hand(diffusion, tmp_path / "onnx")
    assert names == ["mapper", "transformer", "vae_decoder", "condition", "denoiser"]


@SLOW
@pytest.mark.parametrize("opset", [18, 20])
def test_older_opsets(tmp_path, opset):
    exported_by_hand(load_generator(str(save_pipeline(tmp_path / "sd2", "epsilon"))), tmp_path / "onnx", opset)
