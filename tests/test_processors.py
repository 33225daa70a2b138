"""Tokenizers and image processors in the layouts that real repositories have."""

import json
import shutil

import pytest
import sentencepiece
import torch
from PIL import Image as pil
from tiny import TEXT
from tiny_mllm import save_blip2
from transformers import LlamaConfig, LlamaForCausalLM

from mgp5.backbones import processors
from mgp5.backbones.hf import HFBackbone
from mgp5.backbones.minigpt4 import compose
from mgp5.config import ModelConfig
from mgp5.errors import Mgp5Error
from mgp5.loading import load_backbone


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    """The tokenizer of a LLaMA as Vicuna's repositories have it: a tokenizer.model, and no tokenizer.json."""
    folder = tmp_path_factory.mktemp("vicuna")
    lines = iter(["a red fox waves with a ball on the beach", "she goes to the forest and it rains", *"bdgijklmpquvyz"])
    options = {"model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=file, vocab_size=330, **options)
    marks = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **marks}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_a_tokenizer_model_alone_is_read(vicuna):
    tokenizer = processors.load_tokenizer(vicuna)
    ids = tokenizer.encode("a red fox")
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == "a red fox"


def test_minigpt4_is_composed_of_a_vicuna_in_its_layout(vicuna, tmp_path):
    """As of lmsys/vicuna-7b-v1.5 and Vision-CAIR/vicuna-7b: weights as .bin, a generation config that is not valid."""
    folder = shutil.copytree(vicuna, tmp_path / "vicuna")
    tokenizer = processors.load_tokenizer(folder)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TEXT))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation | {"max_length": 4096}))
    marks = {name: {"content": mark} for name, mark in (("bos_token", "<s>"), ("eos_token", "</s>"))}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    composed = compose(save_blip2(tmp_path / "blip2"), folder, tmp_path / "minigpt4", dtype=torch.float32)
    backbone = HFBackbone.load(composed)
    assert backbone.tokenizer.encode("a red fox") == tokenizer.encode("a red fox")
    assert backbone.tokenizer.chat_template and tokenizer.eos_token_id in backbone.stop_ids
    weights = model.get_input_embeddings().weight
    assert torch.equal(backbone.language.get_input_embeddings().weight[: len(weights)], weights)


def test_what_reads_a_tokenizer_model_is_named_where_it_is_missing(vicuna, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")  # as transformers says it

    monkeypatch.setattr(processors.transformers.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(processors, "find_spec", lambda module: None)
    with pytest.raises(Mgp5Error, match="expected sentencepiece and protobuf") as caught:
        processors.load_tokenizer(vicuna)
    assert caught.value.hint == "pip install 'mgp5[sentencepiece]'"


CLIP = {"crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "size": {"shortest_edge": 336}}
QWEN = {"temporal_patch_size": 2, "merge_size": 2}
# Of each family: preprocessor_config.json, other files, and the slots of a phone's photo (without a limit: 15,552 and
# 11,844 of the Qwens).
LAYOUTS = {
    "llava": (
        CLIP | {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"},
        {"processor_config": {"patch_size": 14, "image_token": "<image>"}, "added_tokens": {"<image>": 259}},
        576,
    ),
    "qwen": (
        QWEN
        | {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}
        | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"},
        {},
        27 * 20,
    ),
    "qwen3": (
        QWEN
        | {"patch_size": 16, "size": {"longest_edge": 16777216, "shortest_edge": 65536}}
        | {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"},
        {"video_preprocessor_config": {"video_processor_type": "Qwen3VLVideoProcessor"}},
        24 * 18,
    ),
}


@pytest.mark.parametrize("nested", [False, True])  # as transformers 5 writes it: all in processor_config.json
@pytest.mark.parametrize("family", LAYOUTS)
def test_named_models_load_as_their_repositories_are_laid_out(family, nested, request, tmp_path):
    """As of llava-hf/llava-1.5-7b-hf, Qwen/Qwen2.5-VL-3B-Instruct, Qwen/Qwen3-VL-4B-Instruct."""
    folder, (images, files, slots) = tmp_path / family, LAYOUTS[family]
    shutil.copytree(request.getfixturevalue(f"{family}_folder"), folder)
    for name in ("chat_template.jinja", "preprocessor_config.json"):
        (folder / name).rename(tmp_path / name)
    template = (tmp_path / "chat_template.jinja").read_text()
    files = files | {"chat_template": {"chat_template": template}, "preprocessor_config": images}
    if nested:
        files["processor_config"] = {"image_processor": files.pop("preprocessor_config")}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    backbone = HFBackbone.load(folder)
    assert backbone.tokenizer.chat_template == template
    backbone.limit_pixels(ModelConfig.max_pixels)
    assert backbone.slots(backbone.preprocess([pil.new("RGB", (4032, 3024))])) == [slots]
    strips = [pil.new("RGB", size) for size in ((100, 1), (1, 100), (4000, 40), (30, 3000))]  # the thinnest
    assert all(0 < number <= 576 for number in backbone.slots(backbone.preprocess(strips)))


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_weights_of_half_precision_alone_are_read(half, tmp_path, llava_folder):
    folder = shutil.copytree(llava_folder, tmp_path / "llava")
    (folder / "model.safetensors").rename(folder / f"model.{half}.safetensors")
    halves, whole = HFBackbone.load(folder), HFBackbone.load(llava_folder)
    assert all(map(torch.equal, halves.parameters(), whole.parameters()))
    (folder / f"model.{half}.safetensors").rename(folder / "model.other.safetensors")
    with pytest.raises(Mgp5Error, match=r"cannot load .*model\.safetensors"):
        load_backbone(str(folder), torch.float32)


def test_a_folder_without_a_template_is_refused(tmp_path, llava_folder):
    shutil.copytree(llava_folder, tmp_path / "llava")
    (tmp_path / "llava" / "chat_template.jinja").unlink()
    with pytest.raises(Mgp5Error, match="no chat template"):
        HFBackbone.load(tmp_path / "llava")
