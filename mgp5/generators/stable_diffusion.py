"""Stable Diffusion 1.x and 2.x: a UNet in the latent space of a VAE, conditioned on a sequence of CLIP's width.

Letters: B batch, C, h and w of the latents, L length and D width of the condition.
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
    """A frozen Stable Diffusion 1.x or 2.x, epsilon or v prediction.

    `unet` may be replaced by anything that is called alike and has its `config`, `device` and `dtype`.
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
        """Load from a folder or a hub id in the layout of StableDiffusionPipeline; the text encoder may be missing.

        Only safetensors files are read, as other formats can run code.

        Raises:
            Mgp5Error: a part is missing or cannot be read, or the scheduler config is not understood.
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
        """The UNet."""
        return self.unet

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(L, D) of a condition."""
        length = CLIP_LENGTH if self.text_encoder is None else self.text_encoder.config.max_position_embeddings
        return length, self.unet.config.cross_attention_dim

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:  # (B, L, D)
        """The text encoder's last states behind its final LayerNorm, padded or cut to L tokens.

        Raises:
            Mgp5Error: the model came without a text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise no_text_encoder()
        length, _ = self.condition_shape
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        # No attention mask: Stable Diffusion was trained on conditions that include the padding.
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device)).last_hidden_state

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:  # (B, C, h, w)
        """One call of the UNet; see LatentDiffusion."""
        dtype = self.unet.dtype
        outputs = self.unet(
            latents.to(dtype),
            timesteps.to(torch.float32),  # one type always, so that a compiled or exported UNet has one signature
            encoder_hidden_states=condition.to(dtype),
            return_dict=False,
        )
        return outputs[0].float()
