"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206), frozen.

A transformer in the latent space of a VAE, trained by flow matching, with the tokens of two CLIPs and a T5 and a pooled
vector as its condition.

Letters: B batch, Z latent channels, h and w latents, L condition length, C condition width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from ..errors import Mgp5Error
from .flow import FlowSchedule
from .latent_diffusion import LatentDiffusion, no_text_encoder

T5_LENGTH = 256  # tokens for T5, the default of StableDiffusion3Pipeline, unless the tokenizer allows fewer


class StableDiffusion3(LatentDiffusion):
    """A frozen Stable Diffusion 3 or 3.5; it implements LatentDiffusion.

    Its condition is one tensor (B, L, C): the states of both CLIPs, concatenated along the width and padded with zeros
    to C, then those of T5, and in the last row the pooled vector, padded too. Only `encode_text`, `predict` and the
    feature mapper depend on this layout. Text encoders may be None; without a T5 its rows are zeros. A module with the
    same call, `config`, `device` and `dtype` may replace the transformer.

    Raises Mgp5Error if the pooled vector is wider than the condition.
    """

    denoiser_name, denoiser_class, schedule_class = "transformer", SD3Transformer2DModel, FlowSchedule
    text_parts: ClassVar = {
        "text_encoder": (CLIPTextModelWithProjection, "tokenizer", CLIPTokenizer),
        "text_encoder_2": (CLIPTextModelWithProjection, "tokenizer_2", CLIPTokenizer),
        "text_encoder_3": (T5EncoderModel, "tokenizer_3", T5TokenizerFast),
    }

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL | AutoencoderTiny,
        schedule: FlowSchedule,
        text_encoder: CLIPTextModelWithProjection | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5TokenizerFast | None = None,
    ) -> None:
        super().__init__()
        self.transformer, self.vae, self.schedule = transformer, vae, schedule
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.text_encoder_3, self.tokenizer_3 = text_encoder_3, tokenizer_3
        self.freeze()
        if self.pooled_width > self.condition_shape[1]:
            widths = f"the pooled vector has {self.pooled_width} numbers and a row {self.condition_shape[1]}"
            raise Mgp5Error(f"{widths}, expected no more than in a row", "choose another diffusion model")

    @property
    def condition_shape(self) -> tuple[int, int]:
        """Return (L, C) of a condition: rows of CLIP, of T5, and one of the pooled vector; published: (334, 4096)."""
        return self._clip_length + self._t5_length + 1, self.transformer.config.joint_attention_dim

    @property
    def pooled_width(self) -> int:
        """Return the width of the pooled vector in the last row of a condition; 2048 for the published models."""
        return self.transformer.config.pooled_projection_dim

    @property
    def _t5_length(self) -> int:
        return T5_LENGTH if self.tokenizer_3 is None else min(T5_LENGTH, self.tokenizer_3.model_max_length)

    @property
    def _unit(self) -> int:
        return self._factor * self.transformer.config.patch_size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (Z, h, w) of the latents of an image; height and width in pixels.

        Raises Mgp5Error for one that is not a positive multiple of 16 (for the published models), or that is too large
        for the transformer's position embeddings.
        """
        limit = self.transformer.config.pos_embed_max_size * self._unit
        if max(height, width) > limit:
            hint = f"this model draws best at {self.native_size}x{self.native_size}"
            raise Mgp5Error(f"image size {height}x{width}, expected at most {limit}", hint)
        return super().latent_shape(height, width)

    def _encode_text(self, texts: list[str]) -> Tensor:  # (B, L, C)
        """Encode B texts as StableDiffusion3Pipeline does, with the pooled vector as last row; zeros without a T5.
        Raises Mgp5Error if the model has no weights of a CLIP."""
        if self.text_encoder is None or self.text_encoder_2 is None:
            raise no_text_encoder()
        _, width = self.condition_shape
        clips = (self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)
        states = [
            encoder(_ids(texts, tokenizer, self._clip_length).to(encoder.device), output_hidden_states=True)
            for encoder, tokenizer in clips
        ]
        rows = torch.cat([state.hidden_states[-2] for state in states], dim=-1)  # (B, 77, widths of both)
        pooled = torch.cat([state.text_embeds for state in states], dim=-1)[:, None]  # (B, 1, pooled width)
        if self.text_encoder_3 is None:
            last = rows.new_zeros(len(texts), self._t5_length, width)
        else:
            ids = _ids(texts, self.tokenizer_3, self._t5_length).to(self.text_encoder_3.device)
            last = self.text_encoder_3(ids).last_hidden_state  # (B, 256, C)
        return torch.cat([pad(part, (0, width - part.shape[-1])) for part in (rows, last, pooled)], dim=1)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:  # (B, Z, h, w)
        """Predict the velocity with one call of the transformer, in float32.
        Noisy latents (B, Z, h, w), timesteps (B,) or () in [0, 1000], fractions allowed, condition (B, L, C)."""
        condition = condition.to(self.transformer.dtype)
        outputs = self.transformer(
            latents.to(self.transformer.dtype),
            encoder_hidden_states=condition[:, :-1],
            pooled_projections=condition[:, -1, : self.pooled_width],
            timestep=timesteps.to(torch.float32).expand(len(latents)),
            return_dict=False,
        )
        return outputs[0].float()


def _ids(texts: list[str], tokenizer: CLIPTokenizer | T5TokenizerFast, length: int) -> Tensor:  # (B, length)
    """Return token ids, padded or truncated; StableDiffusion3Pipeline passes no attention mask either."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
