"""`mgp5 convert` of MM-Interleaved's checkpoint, from files of the published layout with tiny shapes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny import TEXT, VISION, picture
from tiny_mllm import llama_tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mgp5 import Conversation, Image, cli
from mgp5.apps.open_model import load
from mgp5.generators import load_generator
from mgp5.heads.mm_interleaved import MMInterleavedHead
from mgp5.heads.mm_release import BEGIN, released
from mgp5.heads.settings import MMInterleavedConfig, MMInterleavedSizes
from mgp5.inference.reply import generate
from mgp5.options import MMInterleavedOptions, reply_options

SIZES = MMInterleavedSizes(
    queries=3, token_width=8, token_layers=2, token_heads=2, interactions=2, adapter_heads=2, adapter_points=2, stem=8,
    resized=True, channel_norm=True, every=1, heads=16, points=2, images=6, context_heads=2, context_inner=24,
    earlier="last",
)  # fmt: skip
CONFIG = """model:
  llm_model_path: &tokenizer_path ./assets/lmsys/vicuna-13b-v1.3
  visual_tokenizer_config: {perceiver_config: {num_queries: 3, hidden_size: 8, num_hidden_layers: 2}}
  image_decoder_config: {perceiver_config: {num_attention_heads: 2}}
inference: {tokenizer_path: *tokenizer_path, generation_kwargs: {guidance_scale: 3.5}}
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A CLIP's vision tower and a LLaMA."""
    folder, words = tmp_path_factory.mktemp("parts"), llama_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **TEXT)).save_pretrained(folder / "llm")
    words.save_pretrained(folder / "llm")
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def published(diffusion_folder) -> tuple[dict[str, torch.Tensor], MMInterleavedHead]:
    """The tensors of a checkpoint, and the head that they were made of; there each level has a logit for nothing, the
    UNet tells fewer images apart, and a gate is a vector."""
    torch.manual_seed(3)
    painter = load_generator(str(diffusion_folder), torch.float32)
    shape = {"llm_width": TEXT["hidden_size"], "llm_layers": 2, "vision_width": 16, "vision_layers": 2, "patch": 14}
    config = MMInterleavedConfig(sizes=SIZES, image_size=(28, 28), condition=painter.condition_shape, **shape)
    head, state = MMInterleavedHead(painter, config), {}
    for name, part in head.parts().items():
        for key, value in part.module.state_dict().items() if part.saved else ():
            own = f"{name}.{key}"
            if own == "llm_mmfs.bias":
                continue
            value.copy_(torch.randn_like(value) * 0.1)
            if ".mmfs.logits." in own:
                levels = 3 if name == "llm_mmfs" else 4
                split = value.unflatten(0, (16, levels, 2))
                value = torch.cat([split, torch.full_like(split[:, :, :1], 9.0)], dim=2).flatten(0, 2)
            if own.endswith("ranks.weight") and name == "unet_mmfs":
                value[4:] = value[3]
                value = value[:4]
            state[released(own, 1, len(head.unet_mmfs.blocks))] = value[None] if own.endswith(".gate") else value
    rows, width = BEGIN + 2, TEXT["hidden_size"]
    state |= {"mm_decoder.embed_tokens.weight": torch.randn(rows, width), "soi_token": torch.randn(1, width)}
    for head_name, count in (("head", rows), ("head_new", 2)):
        state |= {f"text_decoder.{head_name}.weight": torch.randn(count, width)}
        state |= {f"text_decoder.{head_name}.bias": torch.full((count,), -4.0)}
    state["visual_tokenizer.pos_embed"] = torch.zeros(5, 16)
    state["image_decoder.decoder.noise"] = torch.zeros(1)  # unknown
    return state, head


def convert(parts: Path, generator: Path, out: Path, *files: Path):
    model = f"{parts / 'clip'}+{parts / 'llm'}+{generator}"
    return CliRunner().invoke(cli.main, ["convert", *map(str, files), "--model", model, "--out", str(out)])


def write(state: dict[str, torch.Tensor], folder: Path) -> list[Path]:
    """Two files, as a large checkpoint has, and the configuration."""
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        torch.save({name: state[name] for name in part}, folder / f"pytorch_model-{number}.bin")
    (folder / "mm_inference.yaml").write_text(CONFIG)
    return [*sorted(folder.glob("pytorch_model*")), folder / "mm_inference.yaml"]


def test_a_published_mm_interleaved_becomes_a_model_that_reads_and_draws(parts, published, diffusion_folder, tmp_path):
    state, made = published
    done = convert(parts, diffusion_folder, tmp_path / "made", *write(state, tmp_path))
    assert done.exit_code == 0 and "not used: image_decoder.decoder.noise" in done.stderr, done.output
    model = load((tmp_path / "made").rename(tmp_path / "moved"))
    assert model.head.config.sizes == SIZES and model.config.guidance == 3.5 and not model.config.system
    for name, part in made.parts().items():
        for key, value in part.module.state_dict().items() if part.saved else ():
            found = model.head.parts()[name].module.state_dict()[key].float()
            expected = torch.tensor(-8.0) if (name, key) == ("llm_mmfs", "bias") else value
            torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01, msg=f"{name}.{key}")
    begin, core = model.head.ids[0], model.backbone.core
    embedding = state["mm_decoder.embed_tokens.weight"][BEGIN] + state["soi_token"][0]
    row = state["text_decoder.head.weight"][BEGIN] + state["text_decoder.head_new.weight"][0]
    for weight, expected in ((core.get_input_embeddings().weight, embedding), (model.backbone.lm_head.weight, row)):
        torch.testing.assert_close(weight[begin].float(), expected, rtol=0.01, atol=0.02)
    llama, states = LlamaForCausalLM.from_pretrained(parts / "llm"), torch.randn(1, TEXT["hidden_size"])
    torch.testing.assert_close(core.get_input_embeddings().weight[7].float(), llama.model.embed_tokens.weight[7],
                               rtol=0.01, atol=0.01)  # fmt: skip
    logits = model.backbone.logits(states.to(model.backbone.lm_head.weight))[0, begin].float()
    torch.testing.assert_close(logits, states[0] @ row - 8, rtol=0.02, atol=0.1)
    way = reply_options(MMInterleavedOptions, image="always", max_tokens=1, steps=1)
    assert list(generate(model, Conversation().add("user", Image(pixels=picture()), "draw"), way))[-1].message.images


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ({"soi_token": None, "text_decoder.head_new.bias": None}, 1, "has no soi_token, text_decoder.head_new.bias"),
        ({"context_feat_proj.weight": None}, 1, "incomplete, it has no context_feat_proj.weight"),
        ({"context_feat_proj.weight": torch.zeros(3, 3)}, 1, "conditioner.project.weight is 3x3, expected 32x32"),
        ({"visual_tokenizer.perceiver_resampler.queries": torch.zeros(1, 5, 8)}, 2, "num_queries .* is 3 .*, 5 in the"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(change, code, told, parts, published, diffusion_folder, tmp_path):
    state = {name: value for name, value in (published[0] | change).items() if value is not None}
    done = convert(parts, diffusion_folder, tmp_path / "made", *write(state, tmp_path))
    assert done.exit_code == code and not (tmp_path / "made/mgp5").exists()
    assert re.search(told, done.stderr), done.stderr
