"""Tiny random models of the real classes, saved to disk and loaded like real ones (no network)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image as pil
from PIL import ImageChops
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from mgp5.heads import ImageContext
from mgp5.heads.minigpt5 import to_pixels

LENGTH, WIDTH, SIZE = 11, 16, 8  # L and D of the condition, sides of the latents
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m['role']] }}"
    "{% for c in m['content'] %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )


def tiny_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def tiny_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=52,
        eos_token_id=53,
    )
    return CLIPTextModel(config)


def save_pipeline(folder, prediction: str):
    torch.manual_seed(0)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        skip_prk_steps=True,
        steps_offset=1,
    )
    parts = {"unet": tiny_unet(), "vae": tiny_vae(), "text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(scheduler=scheduler, **parts, **extras).save_pretrained(folder)
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
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    return folder


def save_qwen(folder: Path, tied: bool = True) -> Path:
    torch.manual_seed(0)
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = tiny_llm_tokenizer(marks, QWEN_TEMPLATE, None, "<|im_end|>")
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": len(tokenizer) + 40, "rope_parameters": rope, "rope_scaling": rope, **TEXT},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = tiny_text_encoder().config.to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    return folder


def conditions_of(diffusion, seed: int, count: int) -> torch.Tensor:  # (count, L, D)
    """Random conditions of a seed, made on the CPU and put where the generator is, in its type."""
    length, width = diffusion.condition_shape
    length = LENGTH if hasattr(diffusion, "unet") else length  # a UNet takes any
    drawn = torch.randn(count, length, width, generator=torch.Generator().manual_seed(seed))
    parameter = next(diffusion.denoiser.parameters())
    return drawn.to(parameter.device, parameter.dtype)


def same_pixels(one: Path | pil.Image, other: Path | pil.Image) -> bool:
    """Whether two images, or files of them, differ by at most 2 of 255, as CPUs of several makers may round."""
    first, second = (pil.open(image) if isinstance(image, Path) else image for image in (one, other))
    extremes = ImageChops.difference(first.convert("RGB"), second.convert("RGB")).getextrema()
    return first.size == second.size and max(high for _, high in extremes) <= 2


def picture(color: str = "red", size: tuple[int, int] = (40, 30)) -> pil.Image:
    return pil.new("RGB", size, color)


class TargetHead:
    """What a collator asks of a head, without weights: a run of tokens for each image, all with labels."""

    def __init__(self, backbone, tokens: tuple[str, ...], size: tuple[int, int]) -> None:
        self.spec, self.size = SimpleNamespace(new_tokens=tokens), size
        self.ids = tuple(backbone.tokenizer.convert_tokens_to_ids(list(tokens)))

    def target(self, image):
        return {"pixels": to_pixels(image, self.size)}

    def layout(self, target, config=None):
        return list(self.ids), list(self.ids)

    def context_slots(self, backbone, inputs):
        return backbone.slots(inputs)


def llm_only(backbone) -> SimpleNamespace:
    """What a session asks of a model, without a head that draws; the states of all tokens are kept."""
    spec = SimpleNamespace(reads_prefix=True, reads_side=False)
    head = SimpleNamespace(spec=spec, encode_images=lambda _, inputs: ImageContext(backbone.encode_images(inputs)))
    return SimpleNamespace(backbone=backbone, head=head)
