"""Tokenizers in the layouts that real repositories have."""

from __future__ import annotations

import json
import shutil

import pytest
import sentencepiece

from mgp5.backbones import processors
from mgp5.backbones.hf import HFBackbone
from mgp5.errors import Mgp5Error


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


def test_what_reads_a_tokenizer_model_is_named_where_it_is_missing(vicuna, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")  # as transformers says it

    monkeypatch.setattr(processors.transformers.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(processors, "find_spec", lambda module: None)
    with pytest.raises(Mgp5Error, match="expected sentencepiece and protobuf") as caught:
        processors.load_tokenizer(vicuna)
    assert caught.value.hint == "pip install 'mgp5[sentencepiece]'"


def test_a_template_may_stand_where_only_processors_read_it(tmp_path, llava_folder):
    """As in llava-hf/llava-1.5-7b-hf."""
    shutil.copytree(llava_folder, tmp_path / "llava")
    template = (tmp_path / "llava" / "chat_template.jinja").read_text()
    (tmp_path / "llava" / "chat_template.jinja").unlink()
    (tmp_path / "llava" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert HFBackbone.load(tmp_path / "llava").tokenizer.chat_template == template
    (tmp_path / "llava" / "chat_template.json").unlink()
    with pytest.raises(Mgp5Error, match="no chat template"):
        HFBackbone.load(tmp_path / "llava")
