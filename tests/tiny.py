"""Tiny random generators of the real classes, saved to disk and loaded like real ones (no network); test images."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image as pil
from PIL import ImageChops
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mgp5.generators.vqvae import VQVAE, VQVAEConfig
from mgp5.heads import ImageContext
from mgp5.heads.minigpt5 import to_pixels

LENGTH, WIDTH, SIZE = 11, 16, 8  # L and D of the condition, sides of the latents
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"image_size": 28, "patch_size": 14, **LAYERS}
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


def tiny_unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=8, **options,
    )  # fmt: skip


def tiny_vae(**options) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, **options,
    )  # fmt: skip


def tiny_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def tiny_text_config(**options) -> CLIPTextConfig:
    ends = {"bos_token_id": 52, "eos_token_id": 53}
    return CLIPTextConfig(vocab_size=54, max_position_embeddings=LENGTH, **ends, **LAYERS | options)


def tiny_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(tiny_text_config())


def save_pipeline(folder, prediction: str):
    torch.manual_seed(0)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        skip_prk_steps=True, steps_offset=1,
    )  # fmt: skip
    parts = {"unet": tiny_unet(), "vae": tiny_vae(), "text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(scheduler=scheduler, **parts, **extras).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = tiny_text_config().to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=WIDTH)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    return folder


def save_vqvae(folder: Path) -> None:
    """Images of 12x12 pixels, 14 codes of three scales."""
    torch.manual_seed(1)
    shape = {"channels": (8, 8, 8), "norm_groups": 4, "layers_per_block": 1, "attention": False}
    vqvae = VQVAE(VQVAEConfig(patch_nums=(1, 2, 3), num_codes=16, code_width=8, **shape)).eval()
    with torch.no_grad():
        vqvae.quantizer.codebook.weight.normal_()
    vqvae.save(folder)


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


def story_of(folder: Path) -> dict:
    """The story.json of a folder."""
    return json.loads((folder / "story.json").read_text())


def parts_of(folder: Path) -> list[tuple[str, str]]:
    """(role, kind) of every part of a story."""
    return [(m["role"], part["type"]) for m in story_of(folder)["messages"] for part in m["content"]]


class TargetHead:
    """What a collator asks of a head, without weights: a run of tokens for each image, all with labels."""

    def __init__(self, backbone, tokens: tuple[str, ...], size: tuple[int, int]) -> None:
        self.spec, self.size = SimpleNamespace(new_tokens=tokens, opens=True), size
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


def allocated(run) -> int:
    """The most bytes that the CPU's allocator held at once while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    live = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


@torch.inference_mode()
def feed(session, ids: tuple[int, ...]) -> torch.Tensor:  # (1, k, D)
    """Read tokens in one forward; return the state after each."""
    embeds, keys = session.embed(ids)
    hidden = session.decoder.feed([session.row], embeds)
    session.append(hidden, keys)
    return hidden
