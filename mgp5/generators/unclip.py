"""Stable unCLIP (Stable Diffusion 2.1 finetuned to take an image embedding of CLIP; Ramesh et al., arXiv 2204.06125).

SEED-2 draws with it. Letters: B batch, Z latent channels, h and w latents, L condition length, C condition width, P
width of an image embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..errors import Mgp5Error
from .pipeline import load_part
from .schedule import NoiseSchedule
from .stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    import PIL.Image


class StableUnCLIP(StableDiffusion):
    """A frozen Stable Diffusion whose UNet also takes an image embedding; it implements LatentDiffusion.

    Its condition (B, L, C) has the rows of the text, then the image embedding and the embedding of that one's noise
    level, each padded with zeros to C; L is 79, C and P are 1024. Where both last rows are zeros there is no image: so
    are the conditions of `encode_text`, and that of the empty text is the unconditional one of diffusers' pipeline.

    Raises Mgp5Error if the UNet takes another kind of embedding, or one that does not fit in a row.
    """

    embeddings = ("class_embed_type",)

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | AutoencoderTiny,
        schedule: NoiseSchedule,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        image_noise: NoiseSchedule | None = None,  # of image embeddings; None adds no noise
        normalizer: StableUnCLIPImageNormalizer | None = None,  # mean and deviation of image embeddings
        read_image_encoder: Callable[[], CLIPVisionModelWithProjection] | None = None,
        image_size: int = 224,  # pixels of each side that it reads
    ) -> None:
        kind, width = unet.config.class_embed_type, unet.config.projection_class_embeddings_input_dim
        if kind != "projection" or not width or width % 2 or width // 2 > unet.config.cross_attention_dim:
            case = f"the unet takes {width} numbers of an image by {kind}, expected by projection"
            raise Mgp5Error(f"{case}, at most twice a row of {unet.config.cross_attention_dim}", "take another model")
        super().__init__(unet, vae, schedule, text_encoder, tokenizer)
        self.image_noise, self.read_image_encoder, self.image_size = image_noise, read_image_encoder, image_size
        self.image_encoder: CLIPVisionModelWithProjection | None = None
        scale = StableUnCLIPImageNormalizer(self.image_width) if normalizer is None else normalizer
        self.register_buffer("image_mean", scale.mean.detach())
        self.register_buffer("image_deviation", scale.std.detach())

    @classmethod
    def more_parts(cls, name: str, revision: str | None, **weights: Any) -> dict[str, Any]:
        """Read how image embeddings are normalized and noised; their encoder is read when it is needed."""
        noise = load_part(DDIMScheduler.load_config, name, "image_noising_scheduler", revision)
        load = StableUnCLIPImageNormalizer.from_pretrained
        parts = {
            "image_noise": NoiseSchedule.from_config(noise),
            "normalizer": load_part(load, name, "image_normalizer", revision, use_safetensors=True),
        }
        if not Path(name).is_dir() or (Path(name) / "image_encoder").is_dir():
            at = name, "image_encoder", revision
            encoder = CLIPVisionModelWithProjection.from_pretrained
            parts["read_image_encoder"] = partial(load_part, encoder, *at, **weights)
            parts["image_size"] = load_part(CLIPVisionConfig.from_pretrained, *at).image_size
        return parts

    @classmethod
    def more_shapes(cls, name: str) -> dict[str, Any]:
        """Return how the image encoder is made without weights, and its size, by its configuration; {} of a folder
        without one, which `more_parts` reads too."""
        if Path(name).is_dir() and not (Path(name) / "image_encoder").is_dir():
            return {}
        config = load_part(CLIPVisionConfig.from_pretrained, name, "image_encoder", None)
        return {"read_image_encoder": partial(CLIPVisionModelWithProjection, config), "image_size": config.image_size}

    @property
    def image_width(self) -> int:
        """Return P, the width of an image embedding; 1024 for CLIP's ViT-H."""
        return self.unet.config.projection_class_embeddings_input_dim // 2

    @property
    def condition_shape(self) -> tuple[int, int]:
        """Return (L, C) of a condition: rows of the text, the image, and its noise level; published: (79, 1024)."""
        return self._clip_length + 2, self.unet.config.cross_attention_dim

    def _encode_text(self, texts: list[str]) -> Tensor:  # (B, L, C)
        """Encode B texts as Stable Diffusion does; the two last rows are zeros: no image."""
        return pad(super()._encode_text(texts), (0, 0, 0, 2))

    def preprocess_images(self, images: Sequence[PIL.Image.Image]) -> Tensor:  # (B, 3, H, W)
        """Return the pixels of B images for `embed_pixels`; runs in data workers, without weights."""
        processor = CLIPImageProcessorPil(size={"shortest_edge": self.image_size}, crop_size=self.image_size)
        return processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values

    def require_image_encoder(self) -> None:
        """Read the model's own CLIP, if it is not there. Raises Mgp5Error if the model has none."""
        if self.image_encoder is None:
            if self.read_image_encoder is None:
                raise Mgp5Error("this diffusion model has no image encoder", "add its folder image_encoder")
            encoder = self.read_image_encoder().requires_grad_(False).eval()
            self.image_encoder = encoder.to(self.text_device or self.device)

    @torch.no_grad()
    def embed_pixels(self, pixels: Tensor) -> Tensor:  # (B, P)
        """Return the image embeddings of preprocessed pixels, see `require_image_encoder`."""
        self.require_image_encoder()
        return self.image_encoder(pixels.to(self.image_encoder.device, self.image_encoder.dtype)).image_embeds

    def image_condition(self, embeds: Tensor, rng: torch.Generator | None = None) -> Tensor:  # (B, L, C)
        """Return the condition of image embeddings (B, P) with the empty text, at noise level 0.

        At this level there still is a little noise (Ho et al., arXiv 2006.11239, eq. 4 with t = 0, of the normalized
        embedding); a generator on the CPU draws it, without one it is its mean, zero. Raises Mgp5Error as
        `encode_text`.
        """
        if self.image_noise is not None:
            alpha = self.image_noise.alphas_cumprod[0] ** 0.5
            scaled = alpha * (embeds - self.image_mean) / self.image_deviation
            if rng is not None:
                noise = torch.randn(embeds.shape, generator=rng).to(embeds)
                scaled = scaled + (1 - alpha**2) ** 0.5 * noise
            embeds = scaled * self.image_deviation + self.image_mean
        # The sinusoidal embedding of level 0, as a timestep's: cosines of 0, then sines of 0.
        level = torch.zeros_like(embeds)
        level[:, : self.image_width // 2] = 1
        rows = pad(torch.stack([embeds, level], dim=1), (0, self.condition_shape[1] - self.image_width))
        text = self.encode_text([""])[:, :-2].to(rows)
        return torch.cat([text.expand(len(rows), -1, -1), rows], dim=1)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:  # (B, Z, h, w)
        """Predict noise or velocity with one call of the UNet, in float32; arguments as in StableDiffusion."""
        condition = condition.to(self.unet.dtype)
        outputs = self.unet(
            latents.to(self.unet.dtype),
            timesteps.to(torch.float32),
            encoder_hidden_states=condition[:, :-2],
            class_labels=condition[:, -2:, : self.image_width].flatten(1),
            return_dict=False,
        )
        return outputs[0].float()
