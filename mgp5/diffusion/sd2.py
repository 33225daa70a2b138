"""Stable Diffusion 1.x and 2.x: a UNet in the latent space of a VAE, conditioned on a sequence of CLIP's width.

Letters: B batch, H and W pixels, C, h and w of the latents, L length and D width of the condition.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import Mgp5Error
from . import read_index
from .sampler import denoise, sampler_table
from .schedule import NoiseSchedule

AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
CLIP_LENGTH = 77  # L of a model that comes without its text encoder


class StableDiffusion(nn.Module):
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
        index = read_index(name, revision)
        weights = {"dtype": dtype, "use_safetensors": True}
        schedule = NoiseSchedule.from_config(_load_part(DDIMScheduler.load_config, name, "scheduler", revision))
        vae_class = _autoencoder(_load_part(AutoencoderKL.load_config, name, "vae", revision))
        text_encoder = tokenizer = None
        if _has_text_encoder(name, index):
            text_encoder = _load_part(CLIPTextModel.from_pretrained, name, "text_encoder", revision, **weights)
            tokenizer = _load_part(CLIPTokenizer.from_pretrained, name, "tokenizer", revision)
        return cls(
            unet=_load_part(UNet2DConditionModel.from_pretrained, name, "unet", revision, **weights),
            vae=_load_part(vae_class.from_pretrained, name, "vae", revision, **weights),
            schedule=schedule,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )

    def train(self, mode: bool = True) -> StableDiffusion:
        """Stay in eval mode: the model is frozen, whatever the model around it does."""
        return super().train(False)

    @property
    def native_size(self) -> int:
        """Height and width in pixels that the model was trained for."""
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self._factor

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(L, D) of a condition."""
        length = CLIP_LENGTH if self.text_encoder is None else self.text_encoder.config.max_position_embeddings
        return length, self.unet.config.cross_attention_dim

    @property
    def _factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of height x width pixels.

        Raises:
            Mgp5Error: height or width is not a positive multiple of the VAE's factor.
        """
        factor = self._factor
        if min(height, width) < factor or height % factor or width % factor:
            raise Mgp5Error(
                f"image size {height}x{width}, expected multiples of {factor}",
                f"this model draws best at {self.native_size}x{self.native_size}",
            )
        return self.unet.config.in_channels, height // factor, width // factor

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:  # (B, C, h, w)
        """Pixels (B, 3, H, W) in [-1, 1] to float32 latents of about unit variance.

        `generator`, on the CPU, samples the VAE's posterior; without one, and for AutoencoderTiny, it is the mean.
        """
        encoded = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype))
        if isinstance(self.vae, AutoencoderTiny):
            latents = encoded.latents.float()
        else:
            latents = encoded.latent_dist.mean.float()
            if generator is not None:
                noise = torch.randn(latents.shape, generator=generator).to(latents.device)
                latents = latents + encoded.latent_dist.std.float() * noise
        return (latents - self._shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:  # (B, 3, H, W)
        """Latents (B, C, h, w) to float32 pixels in [-1, 1]."""
        latents = latents / self.vae.config.scaling_factor + self._shift
        return self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample.float().clamp(-1, 1)

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:  # (B, L, D)
        """The text encoder's last states behind its final LayerNorm, padded or cut to L tokens.

        Raises:
            Mgp5Error: the model came without a text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise Mgp5Error("this diffusion model has no text encoder", "add its text_encoder and tokenizer folders")
        length, _ = self.condition_shape
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        # No attention mask: Stable Diffusion was trained on conditions that include the padding.
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device)).last_hidden_state

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:  # (B, C, h, w)
        """One call of the UNet: what the schedule's `prediction_type` says, in float32.

        Args:
            latents: (B, C, h, w), noisy.
            timesteps: (B,) or (), in [0, T).
            condition: (B, L, D).
        """
        dtype = self.unet.dtype
        outputs = self.unet(
            latents.to(dtype),
            timesteps.to(torch.float32),  # one type always, so that a compiled or exported UNet has one signature
            encoder_hidden_states=condition.to(dtype),
            return_dict=False,
        )
        return outputs[0].float()

    def loss(
        self, latents: Tensor, condition: Tensor, generator: torch.Generator, min_snr: float | None = None
    ) -> Tensor:  # (B,)
        """The denoising loss of each image (Rombach et al., arXiv 2112.10752, eq. 3), differentiable in the condition.

        Args:
            latents: (B, C, h, w), from `encode`.
            condition: (B, L, D).
            generator: on the CPU; draws timesteps and noise.
            min_snr: gamma of the min-SNR weights (Hang et al., arXiv 2303.09556); None leaves the loss plain.
        """
        timesteps = torch.randint(self.schedule.num_train_timesteps, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = self.schedule.add_noise(latents.float(), noise, timesteps)
        target = self.schedule.target(latents.float(), noise, timesteps)
        prediction = self.predict(noisy, timesteps.to(latents.device), condition)
        loss = (prediction - target).square().flatten(1).mean(1)
        return loss if min_snr is None else loss * self._min_snr_weight(timesteps, min_snr).to(loss.device)

    def _min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:  # (B,)
        """min(SNR, gamma), the weight of the clean latents, expressed for what the model predicts."""
        snr = self.schedule.snr(timesteps)
        if self.schedule.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1)
        return snr.clamp(max=gamma) / (snr + 1 if self.schedule.prediction_type == "v_prediction" else 1)

    def draw(
        self,
        condition: Tensor,  # (B, L, D)
        unconditional: Tensor | None = None,  # (1 or B, L, D)
        *,
        steps: int = 25,
        guidance: float = 7.5,
        sampler: str = "dpm++",
        height: int | None = None,
        width: int | None = None,
        generators: list[torch.Generator],
    ) -> Iterator[Tensor]:
        """Yield the float32 latents (B, C, h, w) after each step; the last are the result, ready for `decode`.

        Args:
            condition: one for each image.
            unconditional: the other half of guidance; not needed with guidance 1.
            steps: of the sampler; PNDM takes one more.
            sampler: a key of `sampler.SAMPLERS`.
            height, width: in pixels; the native size when None.
            generators: one for each image, on the CPU, so that an image does not depend on the device or its batch.

        Raises:
            Mgp5Error: a size, sampler or number of steps that cannot be; at once, not at the first step.
        """
        if len(generators) != len(condition):
            raise Mgp5Error(f"{len(generators)} generators for {len(condition)} images", "give one for each image")
        if unconditional is None and guidance != 1.0:
            raise Mgp5Error(f"guidance {guidance} without an unconditional condition", "give one, or guidance 1")
        table = sampler_table(sampler, self.schedule, steps)
        shape = self.latent_shape(height or self.native_size, width or self.native_size)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return denoise(self.predict, noise.to(self.unet.device), condition, unconditional, table, guidance)


def _has_text_encoder(name: str, index: dict[str, Any]) -> bool:
    """Whether the index lists a text encoder and, of a local folder, whether it is there."""
    listed = (index.get("text_encoder") or [None])[-1] is not None
    return listed and (not Path(name).is_dir() or (Path(name) / "text_encoder").is_dir())


def _autoencoder(config: dict[str, Any]) -> type[AutoencoderKL] | type[AutoencoderTiny]:
    kind = config.get("_class_name")
    if kind not in AUTOENCODERS:
        raise Mgp5Error(f"vae is a {kind}, expected one of {', '.join(AUTOENCODERS)}", "choose another model")
    return AUTOENCODERS[kind]


def _load_part(load: Any, name: str, part: str, revision: str | None, **options: Any) -> Any:
    """Call a `from_pretrained` or `load_config` on one folder of a pipeline.

    Raises:
        Mgp5Error: it is missing or cannot be read; the part is named.
    """
    if Path(name).is_dir() and not (Path(name) / part).is_dir():
        raise Mgp5Error(f"{name} has no folder {part}, expected unet, vae and scheduler", "copy the whole model")
    try:
        return load(str(name), subfolder=part, revision=revision, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Mgp5Error(f"cannot load {part} of {name} ({reason})", "only safetensors weights are read") from error
