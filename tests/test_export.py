"""Export to ONNX: what is written, that it is compared with PyTorch, that a model runs by it, and what is refused."""

import json
import os
import resource
import shutil
import signal
from functools import partial

import onnx
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL
from mgp5.export import cache, parity
from mgp5.export.components import Exportable, components, latent_unit, load_exportable
from mgp5.export.onnx import write
from mgp5.export.request import EngineOptions, ExportRequest
from mgp5.export.run import export, write_export
from PIL import Image
from test_engines import generator_of
from tiny_export import draw, without_denoiser

from mgp5 import engines
from mgp5.apps.open_model import load
from mgp5.cli import main
from mgp5.engines.exported import ExportedMapper, attach_condition, check_files, read_manifest
from mgp5.errors import Mgp5Error
from mgp5.heads.minigpt5 import FeatureMapper, mapper_for

SLOW = pytest.mark.slow
NAMES = ["mapper", "unet", "vae_decoder", "condition", "denoiser"]


@pytest.fixture
def model(small_folder):
    return load(small_folder, backend=None)


def assert_near(outputs, expected, limit=1e-4):
    assert all(float((a - b).abs().max()) < limit for a, b in zip(outputs, expected, strict=True))


def test_the_manifest_says_how_near_the_files_are(small_export):
    manifest = read_manifest(small_export)
    assert list(manifest["components"]) == NAMES
    for name, entry in manifest["components"].items():
        assert sum(entry["nodes"].values()) > 0 and entry["opset"] == 23 and entry["precision"] == "fp32"
        sizes = [tuple(v for k, v in row.items() if k in ("batch", "height", "width")) for row in entry["parity"]]
        assert len(set(sizes)) == 3 and (2, 2, 3) not in sizes, name
        assert all(row["relative"] < 1e-4 and row["cosine"] > 0.99999 for row in entry["parity"])
    assert manifest["image"]["steps"] == 20 and manifest["image"]["psnr"] > 80
    assert {"torch", "onnx", "onnxruntime"} <= manifest["versions"].keys()
    check_files(small_export, manifest)


def test_names_and_layout_are_those_of_optimums_pipelines(small_export):
    entries = read_manifest(small_export)["components"]
    shapes = {name: value["shape"] for name, value in entries["unet"]["inputs"].items()}
    assert shapes["sample"] == ["batch", 4, "height", "width"] and shapes["timestep"] == ["batch"]
    assert shapes["encoder_hidden_states"][:2] == ["batch", "length"]
    assert [*entries["unet"]["outputs"]] == ["out_sample"]
    assert [*entries["vae_decoder"]["inputs"], *entries["vae_decoder"]["outputs"]] == ["latent_sample", "sample"]
    index = json.loads((small_export / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["scheduler"][1] == "DDIMScheduler"
    assert json.loads((small_export / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert (small_export / "scheduler" / "scheduler_config.json").is_file()


CALLS = [{}, {"count": 2}, {"guidance": 1.0}, {"height": 8, "width": 24}, {"guidance_until": 0.5, "steps": 4}, {}]


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_the_engine_of_a_folder_draws_the_same(small_export, model, split, tmp_path):
    generator, folder = model.head.generator, small_export
    expected = [draw(generator, **call) for call in CALLS]
    if not split:
        folder = without_denoiser(small_export, tmp_path / "whole")
    assert engines.apply(generator, "onnx", folder).name == "onnx"
    assert_near([draw(generator, **call) for call in CALLS], expected)
    if split:  # layers inside a file cannot be left out: PyTorch does that
        reused = draw(generator, reuse=2)
        engines.apply(generator, "eager")
        assert_near([reused], [draw(generator, reuse=2)])
        engines.apply(generator, "onnx", folder)
    else:
        with pytest.raises(Mgp5Error, match="reuse 2"):
            draw(generator, reuse=2)
    engines.remove(generator)
    assert torch.equal(draw(generator), expected[0])


def test_a_mapper_by_its_file(small_export, model):
    states = torch.randn(3, 4, model.config.head_config.mapper.llm_width)
    with torch.no_grad():
        expected = model.head.mapper(states), model.head.unconditional(states)
    attach_condition(model.head, small_export, "onnx")
    outputs = model.head.mapper(states), model.head.unconditional(states)
    assert isinstance(model.head.mapper, ExportedMapper)
    assert_near(outputs, expected, 1e-5)


def test_a_story_by_the_exported_files(small_export, small_folder, tmp_path):
    (tmp_path / "lines.txt").write_text("A cat.\n")
    args = ["story", "--model", small_folder, "--text", tmp_path / "lines.txt", "--scenes", 0, "--steps", 2]
    pixels = []
    for backend in (["--backend", "eager"], ["--backend", "onnx", "--exported", small_export]):
        out = tmp_path / backend[1]
        result = CliRunner().invoke(main, [*map(str, [*args, *backend, "--seed", 1, "--out", out])])
        assert result.exit_code == 0, result.output
        pixels.append(torch.tensor(list(Image.open(next(out.glob("*.png"))).getdata())).double() / 255)
    assert parity.psnr(*pixels) > 40


def test_the_cache_is_filled_once_and_on_request(model, small_export, tmp_path, monkeypatch, capsys):
    def copied(model, request, out):
        assert request.split and request.components == ("denoiser", "vae_decoder")
        shutil.copytree(small_export, out)

    def paths() -> list:
        return [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("model.onnx"))]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("mgp5.export.run.write_export", copied)
    generator = model.head.generator
    assert cache.apply(generator, "auto").why == "the fastest on a CPU that starts at once"  # too small to be worth it
    expected = draw(generator)
    monkeypatch.setattr(cache, "TINY", 0)
    choice = cache.apply(generator, "auto")  # which does not wait
    assert choice.name == "eager" and "mgp5 export --cache" in choice.why and not paths()
    assert cache.apply(generator, "onnx").name == "onnx"
    made = paths()
    generator.denoiser.register_to_config(_name_or_path="elsewhere")  # it lies in the folder of another model
    assert cache.apply(generator, "auto").name == "onnx" and paths() == made and len(made) == len(NAMES)
    assert_near([draw(generator)], [expected])
    assert capsys.readouterr().err.count("exporting the denoiser") == 1
    with pytest.raises(Mgp5Error, match="nothing is exported for meta"):
        cache.cached_denoiser(generator.to("meta"))


def test_the_cache_keeps_what_was_used_last_and_is_emptied(model, small_export, tmp_path, monkeypatch):
    def copied(model, request, out):
        shutil.copytree(small_export, out)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("mgp5.export.run.write_export", copied)
    size = sum(path.stat().st_size for path in small_export.rglob("*") if path.is_file())
    monkeypatch.setattr(cache, "LIMIT", 2 * size)
    kept = []
    for number in range(3):
        with torch.no_grad():
            next(model.head.generator.denoiser.parameters()).add_(1)  # another denoiser
        kept.append(cache.cached_denoiser(model.head.generator))
        os.utime(kept[-1], (number, number))
    assert [folder.exists() for folder in kept] == [False, True, True]
    result = CliRunner().invoke(main, ["export", "--empty-cache"])
    assert result.exit_code == 0 and f"{2 * size / 1e6:.0f} MB removed" in result.stderr
    assert not any(folder.exists() for folder in kept)


def test_shapes_that_a_file_cannot_take_are_told(small_export):
    session = parity.load_session(small_export / "vae_decoder" / "model.onnx", "fp32")
    with pytest.raises(Mgp5Error, match=r"cannot run .* with latent_sample 2x3x5x8"):
        session(latent_sample=torch.zeros(2, 3, 5, 8))


def test_damaged_and_foreign_files_are_refused(small_export, model, tmp_path):
    def refuse(words, folder, backend="onnx"):
        with pytest.raises(Mgp5Error, match=words):
            engines.apply(model.head.generator, backend, folder)

    folder = shutil.copytree(small_export, tmp_path / "copy")
    file, manifest = folder / "denoiser" / "model.onnx", read_manifest(small_export)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    refuse(r"denoiser/model.onnx is damaged", folder)
    file.unlink()
    refuse(r"denoiser/model.onnx is missing", folder)
    refuse(r"no readable manifest\.json", tmp_path)
    old = {key: value for key, value in manifest.items() if key != "format"}  # as older versions wrote it
    (folder / "manifest.json").write_text(json.dumps(old))
    refuse(r"another version of mgp5 \(format 1, expected 2\): export it again", folder)
    outside = manifest | {"components": {"../unet": {"files": {"../unet/model.onnx": {}}}}}
    (folder / "manifest.json").write_text(json.dumps(outside))
    refuse(r"no readable manifest\.json in .*lists no files", folder)
    refuse("--backend eager takes no exported folder", small_export, "eager")
    refuse("--backend onnx needs an exported folder: mgp5 export --onnx --split", None)
    with torch.no_grad():
        model.head.generator.unet.conv_out.weight.add_(1)
    refuse("with another denoiser", small_export)


def test_bad_input_is_one_line(small_export, small_folder, llava_folder, tmp_path):
    def refused(*words, options=(), model=small_folder, code=2, out=tmp_path / "out"):
        args = ["export", *options, "--model", str(model), *(["--out", str(out)] if out else [])]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == code, result.output
        assert result.stderr.count("\n") == 1 and all(word in result.stderr for word in words), result.stderr

    onnx = ("--onnx",)
    refused(f"an export of {small_folder} in fp32", options=onnx, out=small_export)
    refused("holds other files", options=onnx, out=tmp_path.parent)
    refused("no component vae,", "unet", options=(*onnx, "--component", "vae"))
    refused("no component transformer", "this model has mapper, unet", options=(*onnx, "--component", "transformer"))
    refused("fp8", options=(*onnx, "--precision", "fp8"))
    refused("no trained mapper", options=onnx, model=f"{llava_folder}+{small_folder}/diffusion", code=1)
    refused("nothing to do", "component denoiser needs --split", options=("--component", "denoiser"))
    refused("--out", options=onnx, out=None)
    refused("go together", options=(*onnx, "--height", "16"))
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_with_a_request_is_reported_together():
    with pytest.raises(Mgp5Error) as caught:
        ExportRequest(onnx=True, precision="fp8", opset=9, size=(0, 8))
    assert caught.value.exit_code == 2
    assert all(word in str(caught.value) for word in ("--out DIR", "'fp8'", "opset is 9", "size is (0, 8)"))
    with pytest.raises(Mgp5Error, match=r"batches \(0,\).*; level 6"):
        EngineOptions(batches=(0,), level=6)


def test_files_that_compute_something_else_are_not_kept(small_folder, small_export, tmp_path, monkeypatch):
    def copied(component, folder, opset):
        shutil.copytree(small_export / component.name, folder)

    monkeypatch.setattr("mgp5.export.onnx.write", copied)
    model = load_exportable(str(small_folder))
    with torch.no_grad():
        model.generator.vae.decoder.conv_out.bias[0] = float("nan")
    request = ExportRequest(onnx=True, out=tmp_path / "out", components=("vae_decoder",))
    with pytest.raises(Mgp5Error, match="vae_decoder differs from PyTorch by nan"):
        write_export(model, request, request.out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["unet", "denoiser"])
def test_a_file_with_other_weights_or_one_timestep_for_all_rows_is_found(small_export, small_folder, name):
    model = load_exportable(str(small_folder))
    make = components(model, True)[name]
    session = parity.load_session(small_export / name / "model.onnx", "fp32")
    compare = partial(parity.compare, limit=parity.LIMITS["fp32"], unit=latent_unit(model.generator))

    def of_the_first(**tensors):
        time = "timestep" if name == "unet" else "row"
        return session(**tensors | {time: tensors[time][:1].expand_as(tensors[time])})

    with pytest.raises(Mgp5Error, match=f"{name} differs from PyTorch by .*'batch': 3"):
        compare(make(), of_the_first)
    with torch.no_grad():
        model.generator.unet.conv_in.weight.mul_(1.05)
    with pytest.raises(Mgp5Error, match=f"{name} differs from PyTorch by"):
        compare(make(), session)


@SLOW
def test_a_full_disk(small_folder, tmp_path):
    """Files may not grow, as on a disk without room."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    request = ExportRequest(model=str(small_folder), onnx=True, out=tmp_path / "out", components=("vae_decoder",))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(Mgp5Error, match="cannot be written"):
            export(request)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("precision", "opset"), [("fp16", 18), pytest.param("bf16", 20, marks=SLOW)])
def test_half_precision_is_in_the_file(small_folder, tmp_path, precision, opset, monkeypatch):
    monkeypatch.setattr("mgp5.export.components.LATENT", {0: "batch"})  # quickly exported, as is one block
    out, options = tmp_path / "out", {"precision": precision, "opset": opset, "components": ("vae_decoder",)}
    model = load_exportable(str(small_folder))
    model.generator.vae = AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False
    )
    write_export(model, ExportRequest(onnx=True, out=out, **options), out)
    assert read_manifest(out)["components"]["vae_decoder"]["opset"] == opset
    graph = onnx.shape_inference.infer_shapes(onnx.load(out / "vae_decoder" / "model.onnx")).graph
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert all(kinds[node.input[1]] == half for node in graph.node if node.op_type == "Conv")
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    assert norms and all(types[node.input[0]] == onnx.TensorProto.FLOAT for node in norms)


@SLOW
@pytest.mark.parametrize(("kind", "opset"), [("sd3", 23), ("sd3.5", 23), ("epsilon", 18), ("epsilon", 20)])
def test_other_generators_and_older_opsets(tmp_path, kind, opset):
    generator = generator_of(kind, tmp_path / kind)
    torch.manual_seed(2)
    mapper = FeatureMapper(mapper_for(16, generator, encoder_layers=1, decoder_layers=1)).eval()
    with torch.no_grad():
        unconditional = mapper.unconditional(4)
    parts = {"mapper": mapper, "unconditional": unconditional, "num_vokens": 4}
    makers = components(Exportable(name=kind, generator=generator, **parts), True)
    assert [*makers] == [name if kind == "epsilon" or name != "unet" else "transformer" for name in NAMES]
    for name, make in makers.items():
        session = parity.load_session(write(make(), tmp_path / "onnx" / name, opset), "fp32")
        rows = parity.compare(make(), session, parity.LIMITS["fp32"], latent_unit(generator))
        assert all(row["relative"] < 1e-4 for row in rows)
