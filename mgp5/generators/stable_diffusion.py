"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752), frozen: a UNet in the latent space of a VAE.

Letters: B batch, Z latent channels, h and w latents, L condition length, C condition width.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from . import read_index
from .latent_diffusion import CLIP_LENGTH, LatentDiffusion, load_part, load_text_parts, load_vae, no_text_encoder
from .schedule import NoiseSchedule

TEXT_PARTS = {"text_encoder": (CLIPTextModel, "tokenizer", CLIPTokenizer)}


class StableDiffusion(LatentDiffusion):
    """A frozen Stable Diffusion 1.x or 2.x with epsilon or v prediction; it implements LatentDiffusion.

    Its condition (B, L, C) are the last states of CLIP's text encoder: L is 77, C is 768 or 1024.

    Args:
        unet: the denoiser; a module with the same call, `config`, `device` and `dtype` may replace it.
        vae: encodes pixels to latents and decodes latents to pixels.
        schedule: noise schedule.
        text_encoder, tokenizer: CLIP; None where the model has none.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | AutoencoderTiny,
        schedule: NoiseSchedule,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.vae = vae
        self.schedule = schedule
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.requires_grad_(False).train(False)

    @classmethod
    def load(cls, name: str, dtype: torch.dtype = torch.float32, revision: str | None = None) -> StableDiffusion:
        """Load a model in the layout of StableDiffusionPipeline; the text encoder may be missing.

        Only safetensors files are read, as other formats can run code.

        Args:
            name: a folder, or a hub id.
            dtype: dtype of the weights.
            revision: branch, tag or commit on the hub.

        Raises:
            Mgp5Error: a part is missing or cannot be read, or the scheduler configuration is not supported.
        """
        weights = {"dtype": dtype, "use_safetensors": True}
        return cls(
            schedule=NoiseSchedule.from_config(load_part(DDIMScheduler.load_config, name, "scheduler", revision)),
            unet=load_part(UNet2DConditionModel.from_pretrained, name, "unet", revision, **weights),
            vae=load_vae(name, revision, **weights),
            **load_text_parts(name, read_index(name, revision), TEXT_PARTS, revision, **weights),
        )

    @property
    def denoiser(self) -> UNet2DConditionModel:
        """Return the UNet."""
        return self.unet

    @property
    def condition_shape(self) -> tuple[int, int]:
        """Return (L, C) of a condition, (77, 1024) for Stable Diffusion 2.1."""
        length = CLIP_LENGTH if self.text_encoder is None else self.text_encoder.config.max_position_embeddings
        return length, self.unet.config.cross_attention_dim

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:  # (B, L, C)
        """Encode B texts, padded or truncated to L tokens: the text encoder's states after its final LayerNorm.

        Raises:
            Mgp5Error: the model has no text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise no_text_encoder()
        length, _ = self.condition_shape
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        # No attention mask: Stable Diffusion was trained on conditions that include the padding.
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device)).last_hidden_state

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:  # (B, Z, h, w)
        """Predict the noise or the velocity, by `schedule.prediction_type`, with one call of the UNet, in float32.

        Args:
            latents: (B, Z, h, w), noisy.
            timesteps: (B,) or (), in [0, 1000).
            condition: (B, L, C).
        """
        dtype = self.unet.dtype
        outputs = self.unet(
            latents.to(dtype),
            timesteps.to(torch.float32),  # always the same dtype, so that a compiled or exported UNet has one signature
            encoder_hidden_states=condition.to(dtype),
            return_dict=False,
        )
        return outputs[0].float()
