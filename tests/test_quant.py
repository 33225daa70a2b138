"""Frozen LLMs in 4 and 8 bits: quantized layers, trained weights, and checkpoints for both kinds of weights."""

from dataclasses import replace

import pytest
import torch
from PIL import ImageChops, ImageStat
from tiny import picture

from mgp5 import Conversation, Image
from mgp5.apps.open_model import load
from mgp5.backbones.hf import HFBackbone
from mgp5.backbones.quantization import TORCHAO, quantization
from mgp5.errors import Mgp5Error
from mgp5.events import ImageDone
from mgp5.inference.reply import generate
from mgp5.loading import build, save_checkpoint
from mgp5.options import reply_options
from mgp5.training.batch import Collator
from mgp5.training.distributed import LossModule, launch
from mgp5.training.presets import preset

MLLMS = ("llava", "qwen", "qwen3", "minigpt4")
TYPES = {"4bit": torch.uint8, "8bit": torch.int8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def inner(weight):
    return getattr(weight, "qdata", weight)  # a tensor of torchao has it


def stored(weight):
    return inner(weight).dtype


def need(kind):
    pytest.importorskip("torchao" if kind in TORCHAO else "bitsandbytes")


def batch_for(model):
    talk = Conversation().add("user", "a", Image(pixels=picture("blue")), "fox")
    sample = talk.add("assistant", "here", Image(pixels=picture(), caption="a fox"))
    return Collator(model.backbone, model.head, 1000)([sample, sample])


def update(model, stage):
    """Do one update of a stage; return the names of changed weights."""
    config = replace(preset(stage), guidance_dropout=0.0, lr=1e-2, rows_lr=1e-2)
    model.prepare(config)
    before = {
        name: inner(value).float().clone() for name, value in model.state_dict().items() if torch.is_tensor(value)
    }
    model.train()
    optimizer = torch.optim.AdamW(model.parameter_groups(config))
    for _ in range(2):  # LoRA's first matrix has no gradient before its second has changed
        model(batch_for(model), config, torch.Generator().manual_seed(0)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        model.hidden(batch_for(model))
    after = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, inner(after[name]).float())}


@pytest.mark.parametrize(("kind", "library"), [("4bit", "bitsandbytes"), ("fp8", "torchao")])
def test_without_its_library_the_error_says_what_to_install(kind, library, monkeypatch):
    monkeypatch.setattr("mgp5.backbones.quantization.find_spec", lambda name: None)
    assert quantization("none") == {}
    with pytest.raises(Mgp5Error, match=f"quantize={kind} needs {library}"):
        quantization(kind)


@pytest.mark.parametrize("mllm", MLLMS)
@pytest.mark.parametrize("kind", TYPES)
def test_only_the_decoders_layers_are_quantised(kind, mllm, request):
    need(kind)
    backbone = HFBackbone.load(request.getfixturevalue(f"{mllm}_folder"), quantize=kind)
    quantized = {name for name, p in backbone.core.named_parameters() if stored(p) == TYPES[kind]}
    language = {id(m) for m in backbone.language.layers.modules()}
    linears = {name for name, m in backbone.core.named_modules() if "Linear" in type(m).__name__ and id(m) in language}
    assert quantized == {f"{name}.weight" for name in linears}
    assert len(quantized) == 7 * len(backbone.language.layers)


@pytest.mark.parametrize("kind", TYPES)
def test_both_stages_train_only_their_parts_and_the_checkpoint_loads_either_way(
    kind, llava_folder, diffusion_folder, tmp_path
):
    need(kind)
    torch.manual_seed(0)
    model = build(str(llava_folder), str(diffusion_folder), num_vokens=2, quantize=kind)
    changed = update(model, "pretrain")
    assert bool(LossModule(model)._ddp_params_and_buffers_to_ignore) == (kind in TORCHAO)
    assert all("trainable_tokens_delta" in name or "head.mapper." in name for name in changed)
    assert {name.split(".")[-2] for name in changed if "tokens_delta" in name} == {"trainable_tokens_delta"}
    model.merge()
    changed = update(model, "finetune")
    assert {"lora_A", "lora_B"} <= {part for name in changed for part in name.split(".")}
    parts = "lora_", "trainable_tokens_delta", "mapper.transformer"
    assert all(any(part in name for part in parts) for name in changed)
    save_checkpoint(model, tmp_path)
    batch = batch_for(model)
    with torch.no_grad():
        states = model.hidden(batch)
        model.merge()
        merged = model.hidden(batch)
        quantised = load(tmp_path, quantize=kind).hidden(batch)
        plain = load(tmp_path).hidden(batch)
    assert torch.equal(states, merged)  # LoRA stays beside the quantised layers
    assert torch.equal(quantised, merged) != (kind in TORCHAO)  # which quantises merged weights, to generate
    close = torch.nn.functional.cosine_similarity(plain, quantised, dim=-1)[batch.mask.bool()]
    assert 0.9 < close.mean() < 1 - 1e-7  # the same model, but for rounding
    way = reply_options(seed=1, steps=2, max_tokens=4, image="always")
    events = generate(load(tmp_path, quantize=kind), Conversation().add("user", "fox"), way)
    assert any(isinstance(event, ImageDone) for event in events)


def test_fsdp_does_not_go_with_torchao(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("mgp5.backbones.quantization.find_spec", lambda name: name)
    with pytest.raises(Mgp5Error, match="quantize is fp8, but FSDP cannot split"):
        launch(replace(preset("finetune"), quantize="fp8"), "cpu")


def test_without_torchao_the_error_says_what_to_install_before_weights_are_read(monkeypatch):
    monkeypatch.setattr("mgp5.backbones.quantization.find_spec", lambda name: None)
    monkeypatch.setattr("mgp5.loading.load_backbone", lambda *_: pytest.fail("it reads weights"))
    with pytest.raises(Mgp5Error, match="quantize=int8 needs torchao"):
        load("demo", quantize="int8")


@pytest.mark.parametrize(("kind", "most"), [("int8", 2), ("fp8", 6)])
def test_weights_of_llm_and_denoiser_are_stored_small_and_images_stay_close(kind, most):
    """`most` is the mean difference of pixels, of 255, of a picture by the demo."""
    pytest.importorskip("torchao")
    model, plain = (load("demo", quantize=each, backend="eager") for each in (kind, "none"))
    for layers, least in ((model.backbone.language.layers, 0.9), (model.head.generator.denoiser, 0.2)):
        sizes = {name: p.numel() for name, p in layers.named_parameters()}
        small = {name for name, p in layers.named_parameters() if stored(p) == TYPES[kind]}
        assert sum(sizes[name] for name in small) > least * sum(sizes.values())
    talk, way = Conversation().add("user", "A red fox."), reply_options(seed=1, steps=4, max_tokens=0, image="always")
    images = [list(generate(each, talk, way))[-1].message.images[0].load() for each in (model, plain)]
    difference = sum(ImageStat.Stat(ImageChops.difference(*images)).mean) / 3
    assert 0 < difference < most
