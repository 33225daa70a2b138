"""Tiny random parts of MiniGPT-4 and a tiny Qwen3-VL, of the real classes, saved to disk (no network)."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import QWEN_TEMPLATE, TEXT, tiny_llm_tokenizer
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

QUERIES = 5  # of the Q-Former


def llama_tokenizer() -> LlamaTokenizer:
    """Bytes, ASCII letters, and the ways in which LLaMA's vocabulary spells "###"."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(code) for code in range(33, 127)]
    merges = [("▁", "#"), ("▁#", "#"), ("▁##", "#"), ("#", "#")]
    vocab = {token: number for number, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    return LlamaTokenizer(vocab=vocab, merges=merges)


def save_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = llama_tokenizer()
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TEXT)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_blip2(folder: Path) -> Path:
    """BLIP-2 with a T5, like the one that MiniGPT-4 takes its vision tower and Q-Former from."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "image_size": 28, "patch_size": 14, **layers}
    vision["initializer_range"] = 0.1  # the default makes all pictures alike
    config = Blip2Config(
        vision_config=vision,
        qformer_config={"hidden_size": 24, "intermediate_size": 32, "vocab_size": 10, **layers},
        text_config={
            "model_type": "t5",
            "vocab_size": 30,
            "d_model": 12,
            "d_kv": 6,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
        },
        num_query_tokens=QUERIES,
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)  # they start as zeros
    model.save_pretrained(folder)
    return folder


def save_projection(path: Path) -> Path:
    """MiniGPT-4's linear layer in the layout of its published file."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(TEXT["hidden_size"], 24, generator=generator), torch.randn(TEXT["hidden_size"])
    torch.save({"model": {"llama_proj.weight": weight, "llama_proj.bias": bias}}, path)
    return path


def save_minigpt4(folder: Path, parts: Path) -> Path:
    from mgp5.backbones.minigpt4 import compose

    sources = save_blip2(parts / "blip2"), save_llama(parts / "llama")
    return compose(*sources, folder, save_projection(parts / "projection.pth"), dtype=torch.float32)


def save_qwen3(folder: Path) -> Path:
    """Three deep levels of vision features, grouped heads wider than the states would have them."""
    torch.manual_seed(0)
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = tiny_llm_tokenizer(marks, QWEN_TEMPLATE, None, "<|im_end|>")
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    shape = TEXT | {"num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    config = Qwen3VLConfig(
        text_config={"vocab_size": len(tokenizer) + 40, "rope_parameters": rope, "rope_scaling": rope, **shape},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "depth": 4,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "patch_size": 14,
            "deepstack_visual_indexes": [0, 1, 2],
            "num_position_embeddings": 64,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112).save_pretrained(folder)
    return folder
