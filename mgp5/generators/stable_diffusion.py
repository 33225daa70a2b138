"""Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752), frozen: a UNet in the latent space of a VAE.

Letters: B batch, Z latent channels, h and w latents, L condition length, C condition width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from .latent_diffusion import LatentDiffusion, no_text_encoder
from .schedule import NoiseSchedule


class StableDiffusion(LatentDiffusion):
    """A frozen Stable Diffusion 1.x or 2.x with epsilon or v prediction; it implements LatentDiffusion.

    Its condition (B, L, C) are the last states of CLIP's text encoder: L is 77, C is 768 or 1024. The text encoder and
    its tokenizer may be None. A module with the same call, `config`, `device` and `dtype` may replace the UNet.
    """

    denoiser_name, denoiser_class, schedule_class = "unet", UNet2DConditionModel, NoiseSchedule
    text_parts: ClassVar = {"text_encoder": (CLIPTextModel, "tokenizer", CLIPTokenizer)}

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | AutoencoderTiny,
        schedule: NoiseSchedule,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.schedule = unet, vae, schedule
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.freeze()

    @property
    def condition_shape(self) -> tuple[int, int]:
        """Return (L, C) of a condition, (77, 1024) for Stable Diffusion 2.1."""
        return self._clip_length, self.unet.config.cross_attention_dim

    def _encode_text(self, texts: list[str]) -> Tensor:  # (B, L, C)
        """Encode B texts, padded or truncated to L tokens: the text encoder's states after its final LayerNorm.
        Raises Mgp5Error if there is none."""
        if self.text_encoder is None or self.tokenizer is None:
            raise no_text_encoder()
        options = {"padding": "max_length", "max_length": self._clip_length, "truncation": True}
        tokens = self.tokenizer(texts, **options, return_tensors="pt")
        # No attention mask: Stable Diffusion was trained on conditions that include the padding.
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device)).last_hidden_state

    def predict(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor, residuals: Sequence[Tensor] | None = None
    ) -> Tensor:  # (B, Z, h, w)
        """Predict noise or velocity, by `schedule.prediction_type`, with one call of the UNet, in float32.

        Noisy latents (B, Z, h, w), timesteps (B,) or () in [0, 1000), condition (B, L, C), residuals (B, ...) as of
        `LatentDiffusion.predict`.
        """
        dtype, extra = self.unet.dtype, {} if residuals is None else {"residuals": residuals}
        outputs = self.unet(
            latents.to(dtype),
            timesteps.to(torch.float32),  # always the same dtype, so that a compiled or exported UNet has one signature
            encoder_hidden_states=condition.to(dtype),
            return_dict=False,
            **extra,
        )
        return outputs[0].float()


class UNetAdapter(nn.Module):
    """Small trained matrices beside the attention's projections of a frozen UNet, which begin at zero (LoRA, Hu et al.,
    arXiv 2106.09685): for who cannot store a UNet of its own."""

    def __init__(self, unet: nn.Module, rank: int) -> None:
        super().__init__()
        layers = [layer for name, layer in unet.named_modules() if re.search(r"attn\d\.to_(q|k|v|out\.0)$", name)]
        self.down = nn.ModuleList(nn.Linear(layer.in_features, rank, bias=False) for layer in layers)
        self.up = nn.ModuleList(nn.Linear(rank, layer.out_features, bias=False) for layer in layers)
        for layer, down, up in zip(layers, self.down, self.up, strict=True):
            nn.init.zeros_(up.weight)
            layer.register_forward_hook(
                lambda _, inputs, output, down=down, up=up: (
                    output + up(down(inputs[0].to(down.weight.dtype))).to(output.dtype)
                )
            )
