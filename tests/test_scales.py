"""Engines of the decoder of scales, and the export of VARGPT's and SEED's parts: all compute what PyTorch does."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from mgp5.export.components import load_exportable
from mgp5.export.onnx import write
from mgp5.export.request import ExportRequest
from mgp5.export.run import export
from test_seed import TINY as SEED
from test_unclip import IMAGE, save_unclip
from test_var import TINY, new
from test_vargpt import VAR
from tiny_export import small_unet

from mgp5.engines import scales
from mgp5.engines.exported import attach_condition, read_manifest
from mgp5.errors import Mgp5Error
from mgp5.generators.vqvae import VQVAE, VQVAEConfig
from mgp5.loading import build, save_checkpoint

SHAPE = {"code_width": 4, "channels": (8, 8), "layers_per_block": 1, "norm_groups": 4, "attention": False}


def run(decoder, rows: int, seed: int = 0) -> list[torch.Tensor]:
    """Logits of all scales, and the last cache."""
    generator, cache, found = torch.Generator().manual_seed(seed), None, []
    for scale, size in enumerate(TINY.sizes):
        inputs = torch.randn(rows, size, TINY.width, generator=generator)
        logits, cache = decoder.decode_scale(inputs, scale, torch.arange(rows) % 2, cache)
        found.append(logits)
    return [*found, cache]


def recorded(work, pool):
    """A graph on a CPU: a replay does the work again and writes what it returns to the same memory."""
    outputs = work()
    return lambda: [kept.copy_(value) for kept, value in zip(outputs, work(), strict=True)], outputs


@torch.inference_mode()
@pytest.mark.parametrize("name", ["eager", "triton", "compile"])
def test_an_engine_computes_the_same_and_is_removed(name, monkeypatch):
    decoder, vqvae = new(), VQVAE(VQVAEConfig(patch_nums=TINY.patch_nums, num_codes=16, **SHAPE))
    expected = {rows: run(decoder, rows) for rows in (1, 3, 6)}
    if name == "compile":  # traced as for `compile`, without its C++
        compiled = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compiled(block, backend="eager", **how))
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
    decoder.engine = engine = scales.ScaleEngine(name, decoder)
    if name == "triton":
        monkeypatch.setattr(scales, "record", recorded)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        engine.graphed = True
    for rows in (3, 6) if name == "compile" else (3, 6, 1, 3):  # graphs of other rows are forgotten
        torch.testing.assert_close(run(decoder, rows), expected[rows], rtol=1e-4, atol=1e-5)
    if name == "triton":
        assert len(engine.graphs) == len(TINY.patch_nums) and len(engine.cache) == 2 * 2 * 6 * 2 * 5 * 8
    if name == "compile":  # for both blocks and all rows: without a cache, with one of size 1, and any
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
        torch.compiler.reset()
    scales.remove(decoder, vqvae)
    for value, other in zip(run(decoder, 3), expected[3], strict=True):
        assert torch.equal(value, other)


def copied_or_written(exported, component, folder, opset):
    source = exported / component.name
    return shutil.copytree(source, folder) if source.is_dir() else write(component, folder, opset)


@pytest.fixture(scope="module")
def vargpt(tmp_path_factory, llava_folder, vqvae_folder):
    """A trained folder of the head of VARGPT, and its export."""
    torch.manual_seed(0)
    model, folder = build(str(llava_folder), str(vqvae_folder), head="vargpt", var=VAR), tmp_path_factory.mktemp("var")
    torch.nn.init.normal_(model.head.decoder.blocks[0].modulation.weight, std=0.1)
    save_checkpoint(model, folder)
    export(ExportRequest(model=str(folder), onnx=True, out=folder / "onnx"))
    return folder


@torch.inference_mode()
def test_scales_run_by_an_exported_file(vargpt):
    manifest = read_manifest(vargpt / "onnx")
    assert [*manifest["components"]] == ["scale", "vae_decoder"] and manifest["native"] == [3, 3]
    rows = [(row["codes"], row["past"]) for row in manifest["components"]["scale"]["parity"]]
    assert rows == [(1, 0), (4, 1), (9, 5), (9, 5)] and manifest["image"]["scales"] == 3
    assert manifest["image"]["psnr"] > 80 and manifest["image"]["codes_equal"] == 1
    model = load_exportable(str(vargpt))
    decoder, vqvae = model.decoder, model.generator
    inputs, f_hat = torch.randn(2, 1, 24), torch.randn(2, 8, 3, 3)
    expected = [*decoder.decode_scale(inputs, 0, torch.tensor([0, 1]), None), vqvae.decode(f_hat)]
    assert scales.apply(decoder, vqvae, "onnx", vargpt / "onnx").name == "onnx"
    found = [*decoder.decode_scale(inputs, 0, torch.tensor([0, 1]), None), vqvae.decode(f_hat)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    decoder.head.weight.mul_(2)
    for words, backend, folder in (
        ("with another decoder", "onnx", vargpt / "onnx"),
        ("mgp5 export --onnx --out DIR", "onnx", None),
        ("has none", "trt", vargpt / "onnx"),
    ):
        with pytest.raises(Mgp5Error, match=words):
            scales.apply(decoder, vqvae, backend, folder)
    with pytest.raises(Mgp5Error, match="no TensorRT engine of a decoder of scales"):
        export(ExportRequest(trt=True, source=vargpt / "onnx"))


@pytest.mark.parametrize("unclip", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_detokenizer_goes_with_its_unet(unclip, tmp_path, llava_folder, small_folder, small_export, monkeypatch):
    torch.manual_seed(0)
    diffusion, image = small_folder / "diffusion", {"projection_class_embeddings_input_dim": 2 * IMAGE}
    if unclip:
        diffusion = save_unclip(tmp_path / "unclip", small_unet(class_embed_type="projection", **image))
    else:  # that UNet is a file already
        monkeypatch.setattr("mgp5.export.onnx.write", partial(copied_or_written, small_export))
    model = build(str(llava_folder), str(diffusion), head="seed", tokenizer=SEED).eval()
    save_checkpoint(model, tmp_path)
    out, parts = tmp_path / "onnx", ("detokenizer", "unet")
    export(ExportRequest(model=str(tmp_path), onnx=True, out=out, components=parts))
    manifest = read_manifest(out)
    assert all(row["relative"] < 1e-4 for name in parts for row in manifest["components"][name]["parity"])
    assert manifest["image"]["psnr"] > 60
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    with torch.no_grad():
        expected = model.head.condition(codes)
    attach_condition(model.head, out, "onnx")
    torch.testing.assert_close(model.head.condition(codes), expected, rtol=1e-4, atol=1e-4)
