"""The published configurations of the papers' models, and models of these shapes without weights: on the meta device
they take no memory, which is enough to count what trains and to estimate what training takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)

from ..backbones.hf import HFBackbone
from ..backbones.image_processor import load_image_processor
from ..errors import Mgp5Error
from ..generators import PIPELINES, read_index, sd3
from ..generators import stable_diffusion as sd2
from ..generators.flow import FlowSchedule
from ..generators.latent_diffusion import AUTOENCODERS, CLIP_LENGTH, LatentDiffusion, load_part
from ..generators.schedule import NoiseSchedule
from ..hub import REPOS

if TYPE_CHECKING:
    from ..config import ModelConfig, TrainConfig
    from ..model import InterleavedModel

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L |= {"projection_dim": 768}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_H |= {"hidden_act": "gelu"}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_G |= {"hidden_act": "gelu", "projection_dim": 1280}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
VAE_3 = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
VAE_3 = VAE | VAE_3 | {"use_quant_conv": False, "use_post_quant_conv": False}
UNET_2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
DDPM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MMDIT = {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
MMDIT |= {"pos_embed_max_size": 192}
SD_3 = {
    "_class_name": "StableDiffusion3Pipeline",
    "transformer": MMDIT,
    "vae": VAE_3,
    "scheduler": {"shift": 3.0},
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5_XXL,
}


def _stable_diffusion(unet: dict[str, Any], text: dict[str, Any], prediction: str = "epsilon") -> dict[str, Any]:
    parts = {"unet": unet, "vae": VAE, "text_encoder": text, "scheduler": DDPM | {"prediction_type": prediction}}
    return {"_class_name": "StableDiffusionPipeline"} | parts


# The config.json of each part, by the names of its folders; only what differs from the classes' defaults.
GENERATORS: dict[str, dict[str, Any]] = {
    "sd-1.5": _stable_diffusion({"sample_size": 64, "cross_attention_dim": 768}, CLIP_L),
    "sd-2.1-base": _stable_diffusion({"sample_size": 64} | UNET_2, CLIP_H),
    "sd-2.1": _stable_diffusion({"sample_size": 96, "upcast_attention": True} | UNET_2, CLIP_H, "v_prediction"),
    "sd-3": SD_3,
    "sd-3.5-medium": SD_3
    | {
        "transformer": MMDIT
        | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
    },
}

LLAMA = {"model_type": "llama"}  # the defaults are those of LLaMA 7B


def _qwen(kind: str, vision: dict[str, Any], sections: tuple[int, ...], theta: float, **text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": list(sections), "rope_theta": theta}
    if kind == "qwen3_vl":
        text |= {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
        rope["mrope_interleaved"] = True
    tied = {"tie_word_embeddings": text.setdefault("tie_word_embeddings", False)}
    vision = vision | {"out_hidden_size": text["hidden_size"]}
    return {"model_type": kind, "vision_config": vision, "text_config": text | {"rope_parameters": rope}} | tied


_VIT_25 = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
MLLMS: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "model_type": "llava",
        "text_config": LLAMA | {"vocab_size": 32064, "max_position_embeddings": 4096},
        "image_token_index": 32000,
    },
    "qwen2.5-vl-3b": _qwen(
        "qwen2_5_vl",
        _VIT_25 | {"tokens_per_second": 2},
        (16, 24, 24),
        1e6,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=128000,
        tie_word_embeddings=True,
    ),
    "qwen2.5-vl-7b": _qwen(
        "qwen2_5_vl",
        _VIT_25 | {"tokens_per_second": 2},
        (16, 24, 24),
        1e6,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=128000,
    ),
    "qwen3-vl-4b": _qwen(
        "qwen3_vl",
        {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "deepstack_visual_indexes": [5, 11, 17]},
        (24, 20, 20),
        5e6,
        hidden_size=2560,
        intermediate_size=9728,
        max_position_embeddings=262144,
        tie_word_embeddings=True,
    ),
    "qwen3-vl-8b": _qwen(
        "qwen3_vl",
        {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "deepstack_visual_indexes": [8, 16, 24]},
        (24, 20, 20),
        5e6,
        hidden_size=4096,
        intermediate_size=12288,
        max_position_embeddings=262144,
    ),
    # No repository: a folder that `backbones.minigpt4.compose` has put together. EVA ViT-g, Q-Former and Vicuna v0 are
    # what transformers' classes have as defaults.
    "minigpt4": {
        "model_type": "blip-2",
        "text_config": LLAMA | {"vocab_size": 32001},
        "vision_config": {},
        "qformer_config": {},
        "image_token_index": 32000,
    },
}
# How many tokens the tokenizers know, and the special ones; the rest of the vocabulary is padding.
LLAMA_TOKENS = {"<s>": 1, "</s>": 2}
QWEN_TOKENS = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|image_pad|>": 151655}
TOKENS = {
    "llava": (32002, LLAMA_TOKENS | {"<image>": 32000, "<pad>": 32001}),
    "qwen2_5_vl": (151665, QWEN_TOKENS),
    "qwen3_vl": (151669, QWEN_TOKENS),
    "blip-2": (32001, LLAMA_TOKENS | {"<ImageHere>": 32000}),
}
PROCESSORS = {
    "llava": lambda: CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
    "qwen2_5_vl": Qwen2VLImageProcessorPil,
    "qwen3_vl": lambda: Qwen2VLImageProcessorPil(patch_size=16),
    "blip-2": CLIPImageProcessorPil,
}
# What load_generator makes of a pipeline: class, name and class of the denoiser, schedule, text encoders.
KINDS = {
    "StableDiffusionPipeline": (sd2.StableDiffusion, "unet", UNet2DConditionModel, NoiseSchedule, sd2.TEXT_PARTS),
    "StableDiffusion3Pipeline": (
        sd3.StableDiffusion3,
        "transformer",
        SD3Transformer2DModel,
        FlowSchedule,
        sd3.TEXT_PARTS,
    ),
}


def skeleton(
    mllm: str,
    diffusion: str,
    config: TrainConfig,
    *,
    num_vokens: int = 8,
    trained: ModelConfig | None = None,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.float32,
) -> InterleavedModel:
    """A model of real classes and shapes without real weights, prepared for a stage by the code that trains.

    Args:
        mllm, diffusion: names or hub ids of the tables above, which need no network, with tokenizers that know as many
            tokens as the real ones but spell none of them; or folders and other hub ids: configurations and tokenizers
            are read, weights are not.
        trained: of a model that goes on from a stage before: its vokens and mapper, instead of the configuration's.
        device: "meta", or another: then the weights are random.
        dtype: of the frozen parts.

    Raises:
        Mgp5Error: a pipeline of a kind not known here.
    """
    from ..loading import assemble
    from ..model import InterleavedModel

    with torch.device(device):
        with _default_dtype(dtype):
            backbone, generator = backbone_shape(mllm), generator_shape(diffusion)
        if trained:
            model = InterleavedModel(backbone, generator, trained)
        else:
            layers = {name: getattr(config, name) for name in ("encoder_layers", "decoder_layers", "inner", "kind")}
            model = assemble(backbone, generator, mllm, diffusion, num_vokens=num_vokens, **layers)
        model.prepare(config)
    return model


def backbone_shape(name: str) -> HFBackbone:
    """The multimodal LLM `name` with random weights, of torch's default device and type."""
    known = MLLMS.get(_known(name))
    if known is None:
        config = AutoConfig.from_pretrained(name)
        tokenizer, processor = AutoTokenizer.from_pretrained(name), load_image_processor(name)
    else:
        kind = known["model_type"]
        config, processor = AutoConfig.for_model(**known), PROCESSORS[kind]()
        tokenizer = _llm_tokenizer(*TOKENS[kind])
    model = AutoModelForImageTextToText.from_config(config)
    return HFBackbone(model.eval().requires_grad_(False), tokenizer, processor)


def generator_shape(name: str) -> LatentDiffusion:
    """The diffusion model `name` with random weights, of torch's default device and type."""
    known = GENERATORS.get(_known(name))
    index = known or read_index(name)
    if index.get("_class_name") not in KINDS:
        found = f"{name} holds a {index.get('_class_name')}"
        raise Mgp5Error(f"{found}, expected one of {', '.join(PIPELINES)}", "choose another model")
    whole, denoiser, unet, schedule, texts = KINDS[index["_class_name"]]

    def config(kind: Any, part: str) -> dict[str, Any]:
        return known[part] if known else load_part(kind.load_config, name, part, None)

    vae = config(AUTOENCODERS["AutoencoderKL"], "vae")
    parts: dict[str, Any] = {
        denoiser: unet.from_config(config(unet, denoiser)),
        "vae": AUTOENCODERS[vae["_class_name"]].from_config(vae),
        "schedule": schedule.from_config(config(DDIMScheduler, "scheduler")),
    }
    for encoder, (model, tokenizer, words) in texts.items():
        if known:
            parts[encoder] = model(model.config_class(**known[encoder]))
            parts[tokenizer] = _clip_tokenizer() if words is CLIPTokenizer else None
        elif (index.get(encoder) or [None])[-1] is not None:
            parts[encoder] = model(load_part(model.config_class.from_pretrained, name, encoder, None))
            parts[tokenizer] = load_part(words.from_pretrained, name, tokenizer, None)
    return whole(**parts)


def _known(name: str) -> str:
    """The name in our tables of a hub id; other names stay as they are."""
    return next((own for own, repo in REPOS.items() if name in (repo.id, *repo.mirrors)), name)


def _llm_tokenizer(size: int, special: dict[str, int]) -> PreTrainedTokenizerFast:
    names = {number: token for token, number in special.items()}
    words = {names.get(number, f"<{number}>"): number for number in range(size)}
    end = "<|im_end|>" if "<|im_end|>" in special else "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), eos_token=end)


def _clip_tokenizer() -> CLIPTokenizer:
    words = {"<|startoftext|>": 49406, "<|endoftext|>": 49407} | {f"{chr(97 + i)}</w>": i for i in range(26)}
    return CLIPTokenizer(vocab=words, merges=[], model_max_length=CLIP_LENGTH)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
