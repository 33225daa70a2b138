"""Tiny random multimodal LLMs of the real classes, saved to disk and loaded like real ones (no network)."""

from pathlib import Path

import torch
from tiny import LAYERS, TEXT, VISION
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

QUERIES = 5  # of the Q-Former
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m['role']] }}"
    "{% for c in m['content'] %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(folder: Path, model, *processors) -> Path:
    for part in (model, *processors):
        part.save_pretrained(folder)
    return folder


def tiny_llm_tokenizer(special: list[str], template: str, bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>")
    fast.add_tokens(special, special_tokens=True)
    fast.chat_template = template
    return fast


def save_llava(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_llm_tokenizer(["<image>"], LLAVA_TEMPLATE, "<s>", "</s>")
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    return save(folder, LlavaForConditionalGeneration(config), tokenizer, processor)


def save_any_qwen(folder: Path, config_class, model_class, rope: dict, text: dict, vision: dict) -> Path:
    """The vocabulary is padded beyond the tokenizer, and tied."""
    torch.manual_seed(0)
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = tiny_llm_tokenizer(marks, QWEN_TEMPLATE, None, "<|im_end|>")
    _, start, end, image, video = tokenizer.convert_tokens_to_ids(marks)
    rope = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    text = {"vocab_size": len(tokenizer) + 40, "rope_parameters": rope, "rope_scaling": rope, **TEXT, **text}
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14}
    config = config_class(
        text_config=text, vision_config=shared | vision, image_token_id=image, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end, tie_word_embeddings=True,
    )  # fmt: skip
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    return save(folder, model_class(config), tokenizer, processor)


def save_qwen(folder: Path) -> Path:
    vision = {"depth": 2, "window_size": 56, "fullatt_block_indexes": [1]}
    kind = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    return save_any_qwen(folder, *kind, {"mrope_section": [2, 3, 3]}, {}, vision)


def save_qwen3(folder: Path) -> Path:
    """Three deep levels of vision features, grouped heads wider than the states would have them."""
    rope = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {"num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    vision = {"depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 64}
    return save_any_qwen(folder, Qwen3VLConfig, Qwen3VLForConditionalGeneration, rope, text, vision)


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
    return save(folder, LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TEXT)), tokenizer)


def save_blip2(folder: Path) -> Path:
    """BLIP-2 with a T5, like the one that MiniGPT-4 takes its vision tower and Q-Former from."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = Blip2Config(
        vision_config={**VISION, "initializer_range": 0.1},  # the default makes all pictures alike
        qformer_config={**LAYERS, "hidden_size": 24, "vocab_size": 10},
        text_config={"model_type": "t5", **sizes},
        num_query_tokens=QUERIES,
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)  # they start as zeros
    return save(folder, model)


def save_minigpt4(folder: Path, parts: Path) -> Path:
    """A folder composed of the above and MiniGPT-4's linear layer, in the layout of its published file."""
    from mgp5.backbones.minigpt4 import compose

    generator, width = torch.Generator().manual_seed(0), TEXT["hidden_size"]
    linear = {"weight": torch.randn(width, 24, generator=generator), "bias": torch.randn(width, generator=generator)}
    sources = save_blip2(parts / "blip2"), save_llama(parts / "llama")
    torch.save({"model": {f"llama_proj.{name}": value for name, value in linear.items()}}, parts / "projection.pth")
    return compose(*sources, folder, parts / "projection.pth", dtype=torch.float32)
