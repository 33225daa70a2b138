"""`mgp5 convert` of VAR and VARGPT-LLaVA v1, and the JSON of its data: tiny files of the published layout."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from test_var import published as published_var
from test_vqvae import published as published_vqvae
from tiny import TEXT, picture
from tiny_mllm import LLAVA_TEMPLATE, tiny_llm_tokenizer
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from mgp5 import Conversation, cli
from mgp5.apps.open_model import load
from mgp5.data import find_format, load_data
from mgp5.errors import Mgp5Error
from mgp5.hub import resolve
from mgp5.inference.reply import generate
from mgp5.loading import load_checkpoint
from mgp5.messages import Image, Text
from mgp5.options import VARGPTOptions, reply_options

WIDTH = TEXT["hidden_size"]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """VAR's two files."""
    paths = {"vae": tmp_path / "vae.pth", "var": tmp_path / "var.pth"}
    torch.save(published_vqvae(), paths["vae"])
    torch.save(published_var(5), paths["var"])
    return paths


def vargpt(llava_folder: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A folder of VARGPT-LLaVA v1; return its tensors."""
    words = ["<image>", "<image_gen_start>", "<image_gen>", "<image_gen_end>"]
    tokenizer = tiny_llm_tokenizer(words, LLAVA_TEMPLATE, "<s>", "</s>")
    llava = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    llava.resize_token_embeddings(len(tokenizer))
    llava.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(llava_folder).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    more = {"model_type": "vargpt_llava", "architectures": ["VARGPTLlavaForConditionalGeneration"], "special_ids": [1]}
    (folder / "config.json").write_text(json.dumps(config | more))
    tensors = {f"vargpt_gen.{name}": value for name, value in published_var(5).items()}
    for side, (wide, out) in {"": (16, WIDTH), "_out": (WIDTH, 16)}.items():
        shapes = {"ln_q.weight": (wide,), "ln_q.bias": (wide,), "mlp.0.weight": (wide, wide), "mlp.0.bias": (wide,)}
        shapes |= {"mlp.2.weight": (out, wide), "mlp.2.bias": (out,)}
        tensors |= {f"image_gen_projector{side}.{n}": torch.randn(shape) for n, shape in shapes.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model-9.safetensors")
    return tensors


def convert(*words: object):
    return CliRunner().invoke(cli.main, ["convert", *map(str, words)])


def drawn(model) -> tuple[int, int]:
    """Size of an image of a reply."""
    way = reply_options(VARGPTOptions, image="always", max_tokens=0)
    return list(generate(model, Conversation().add("user", "a"), way))[-1].message.images[0].load().size


def test_a_published_vargpt_becomes_a_model_that_draws(files, llava_folder, tmp_path):
    tensors = vargpt(llava_folder, tmp_path / "release")
    done = convert(files["vae"], "--model", tmp_path / "release", "--out", tmp_path / "made")
    assert done.exit_code == 0 and "not used: norm of projector in" in done.stderr, done.output
    model = load((tmp_path / "made").rename(tmp_path / "moved"))
    assert model.head.config.classes == "released" and model.head.config.var.num_classes == 1
    own = model.head.decoder.state_dict()
    torch.testing.assert_close(own["class_embed.weight"], tensors["vargpt_gen.class_emb.weight"][-2:])
    for module, name in ((model.head.projectors.to_llm, ""), (model.head.projectors.to_decoder, "_out")):
        torch.testing.assert_close(module[2].weight.data, tensors[f"image_gen_projector{name}.mlp.2.weight"])
    tokenizer = model.backbone.tokenizer
    assert list(model.head.ids) == tokenizer.convert_tokens_to_ids(list(model.head.spec.new_tokens))
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "moved" / "mllm")
    assert len(llava.get_input_embeddings().weight) == len(tokenizer)
    assert drawn(model) == (12, 12)


def test_a_var_begins_a_decoder_beside_an_llm(files, llava_folder, tmp_path):
    done = convert(files["vae"], files["var"], "--model", llava_folder, "--out", tmp_path / "made")
    assert done.exit_code == 0, done.output
    model = load_checkpoint(resolve(str(tmp_path / "made"))).eval()
    classes = published_var(5)["class_emb.weight"]
    mine = model.head.decoder.class_embed.weight
    torch.testing.assert_close(mine.data, torch.stack([classes[:-1].mean(0), classes[-1]]))
    assert drawn(model) == (12, 12)
    alone = convert(files["vae"], "--model", llava_folder, "--out", tmp_path / "other")
    assert alone.exit_code == 2 and "1 image tokenizers and 0 other files" in alone.stderr


def test_sharegpt_rows_are_conversations_and_what_is_wrong_is_counted(tmp_path):
    picture().save(tmp_path / "fox.png")
    turns = [{"role": "user", "content": "<image>\nAnother?"}]
    turns += [{"role": "assistant", "content": "So: <image_gen> there"}]
    talk = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "A fox"}]
    rows = [{"messages": turns, "images": ["fox.png", "fox.png"]}, {"conversations": talk, "image": "fox.png"}]
    rows += [{"messages": turns, "images": images} for images in (["fox.png"], ["fox.png", "none.png"])]
    rows += [{"text": "no conversation"}, {"messages": [{"role": "bird", "content": "a"}]}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert find_format(tmp_path) == "sharegpt" and find_format(tmp_path / "train.json") == "sharegpt"
    data = load_data("sharegpt", tmp_path)
    assert len(data) == 2 and data.key(0) == "train.json:1/1"
    kinds = [type(part) for message in data[0].messages for part in message.content]
    assert kinds == [Image, Text, Text, Image, Text]
    assert [message.role for message in data[1].messages] == ["user", "assistant"]
    assert data.problems == {"more or fewer images than places for them": 1, "missing image": 1, "bad row": 2}
    (tmp_path / "val.json").write_text("\n".join(json.dumps(row) for row in rows[:2]))
    assert len(load_data("sharegpt", tmp_path, "val")) == 2
    outside = {"messages": turns, "images": ["fox.png", "../fox.png"]}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/train.json").write_text(json.dumps([outside]))
    with pytest.raises(Mgp5Error, match=r"train\.json:1.*leaves its folder"):
        load_data("sharegpt", tmp_path / "in")
    (tmp_path / "test.json").write_text("[{")
    with pytest.raises(Mgp5Error, match=r"test\.json is not JSON"):
        load_data("sharegpt", tmp_path, "test")
