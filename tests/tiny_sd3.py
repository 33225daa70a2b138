"""A tiny random Stable Diffusion 3 of the real classes, saved to disk (no network); all generators by name."""

from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny import LENGTH, SIZE, save_pipeline, tiny_text_config, tiny_tokenizer, tiny_vae
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

CLIP_WIDTHS = {16: 12, 24: 20}  # hidden width -> projection
WIDTH, POOLED = 48, sum(CLIP_WIDTHS.values())  # D of the condition, P of the pooled vector
ROWS = LENGTH + 256  # tokens of a condition, without the pooled vector
CHANNELS = 16


def tiny_transformer(sd35: bool = False) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=SIZE,
        **({"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if sd35 else {}),
    )


def tiny_sd3_vae() -> AutoencoderKL:
    scaling = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    return tiny_vae(latent_channels=CHANNELS, use_quant_conv=False, use_post_quant_conv=False, **scaling)


def tiny_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """The encoder, and a tokenizer whose pieces are letters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    tokenizer = T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(pieces), feed_forward_proj="gated-gelu", **sizes)), tokenizer


def save_sd3(folder: Path, sd35: bool = False) -> Path:
    """Stable Diffusion 3 medium in small, or 3.5 medium with its normed queries and keys and dual attention."""
    torch.manual_seed(0)
    configs = [tiny_text_config(hidden_size=width, projection_dim=out) for width, out in CLIP_WIDTHS.items()]
    encoder, encoder_2 = (CLIPTextModelWithProjection(config) for config in configs)
    encoder_3, tokenizer_3 = tiny_t5()
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_transformer(sd35), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_sd3_vae(),
        text_encoder=encoder, tokenizer=tiny_tokenizer(), text_encoder_2=encoder_2, tokenizer_2=tiny_tokenizer(),
        text_encoder_3=encoder_3, tokenizer_3=tokenizer_3,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


GENERATORS = {
    "epsilon": partial(save_pipeline, prediction="epsilon"),  # SD 1.5, 2.1-base
    "v_prediction": partial(save_pipeline, prediction="v_prediction"),  # SD 2.1
    "sd3": save_sd3,
    "sd3.5": partial(save_sd3, sd35=True),
}
