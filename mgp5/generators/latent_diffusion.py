"""The base class of frozen latent-diffusion models: VAE, loss, denoising, and how parts of a pipeline are loaded.

Letters: B batch, H and W pixels, Z latent channels, h and w latents, L condition length, C condition width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, ModelMixin
from torch import Tensor, nn

from ..errors import Mgp5Error
from ..options import DiffusionOptions
from .denoising import DenoisingEngine, DenoisingState, PlainDenoiser, advance, begin, in_parts, without_autocast
from .pipeline import load_part, read_index
from .sampler import SamplerTable, Schedule, sampler_table

AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
CLIP_LENGTH = 77  # tokens of CLIP, for a model without its text encoder


class LatentDiffusion(nn.Module):
    """A frozen denoiser in the latent space of a VAE (Rombach et al., arXiv 2112.10752).

    Subclasses add the denoiser, `condition_shape`, `encode_text` and `predict`.
    """

    denoiser_name: ClassVar[str]  # of the attribute and of the pipeline's folder
    denoiser_class: ClassVar[type[ModelMixin]]
    schedule_class: ClassVar[type[Schedule]]
    text_parts: ClassVar[dict[str, tuple[Any, str, Any]]]  # name of an encoder -> class; tokenizer's name and class
    embeddings: ClassVar[tuple[str, ...]] = ()  # settings of embeddings beside cross-attention that `predict` knows
    vae: AutoencoderKL | AutoencoderTiny
    schedule: Schedule
    pooled_width = 0  # width of the pooled vector in the last row of a condition; 0 for a model without one
    engine: DenoisingEngine | None = None  # runs the denoising steps, see `mgp5.engines`; None: PyTorch
    coder: Callable[[], AutoencoderKL] | None = None  # gives a faster VAE to use for `vae`, see `mgp5.engines`
    compute_device: torch.device | None = None  # set where weights wait elsewhere while they are not needed
    text_device: torch.device | None = None  # of text encoders that are read later; None: that of the denoiser
    _empty: Tensor | None = None  # the encoding of the empty text

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[str, Callable[[], nn.Module]] = {}  # name of a text encoder -> what reads it

    @classmethod
    def load(cls, name: str, dtype: torch.dtype | None = None, revision: str | None = None) -> Self:
        """Load a folder or hub id in the layout of the diffusers pipeline; text encoders may be missing.

        Text encoders (10 GiB of Stable Diffusion 3) are read when a text is encoded, see `read_text_encoders`.
        Only safetensors files are read, as other formats can run code. Raises Mgp5Error if a part is missing or cannot
        be read, or the configuration of scheduler or VAE is not supported.
        """
        weights = {"dtype": dtype or torch.float32, "use_safetensors": True}
        scheduler = load_part(DDIMScheduler.load_config, name, "scheduler", revision)
        parts: dict[str, Any] = {"schedule": cls.schedule_class.from_config(scheduler)}
        load = cls.denoiser_class.from_pretrained
        parts[cls.denoiser_name] = load_part(load, name, cls.denoiser_name, revision, **weights)
        kind = load_part(AutoencoderKL.load_config, name, "vae", revision).get("_class_name")
        if kind not in AUTOENCODERS:
            raise Mgp5Error(f"vae is a {kind}, expected one of {', '.join(AUTOENCODERS)}", "choose another model")
        parts["vae"] = load_part(AUTOENCODERS[kind].from_pretrained, name, "vae", revision, **weights)
        index, readers = read_index(name, revision), {}
        for encoder, (encoder_class, tokenizer, tokenizer_class) in cls.text_parts.items():
            listed = (index.get(encoder) or [None])[-1] is not None
            if listed and (not Path(name).is_dir() or (Path(name) / encoder).is_dir()):
                readers[encoder] = partial(load_part, encoder_class.from_pretrained, name, encoder, revision, **weights)
                parts[tokenizer] = load_part(tokenizer_class.from_pretrained, name, tokenizer, revision)
        model = cls(**parts, **cls.more_parts(name, revision, **weights))
        model.readers = readers
        return model

    @classmethod
    def more_parts(cls, name: str, revision: str | None, **weights: Any) -> dict[str, Any]:
        """Read what else a subclass takes; `weights` are options of `from_pretrained`. Raises Mgp5Error as `load`."""
        return {}

    def freeze(self) -> None:
        """End the building of a model: nothing trains. Raises Mgp5Error for a denoiser that takes more than latents."""
        self.requires_grad_(False).train(False)
        takes, latents = self.denoiser.config.in_channels, self.vae.config.latent_channels
        unknown = {"class_embed_type", "addition_embed_type"} - set(self.embeddings)
        others = [name for name in sorted(unknown) if self.denoiser.config.get(name)]
        if takes != latents or others:
            found = ", ".join([f"{takes} channels", *others])
            case = f"the {self.denoiser_name} takes {found}, expected the {latents} channels of the VAE's latents alone"
            raise Mgp5Error(case, "take a text-to-image model, no inpainting, editing or upscaling one")

    @property
    def denoiser(self) -> ModelMixin:
        """Return the UNet or transformer."""
        return getattr(self, self.denoiser_name)

    @property
    def condition_shape(self) -> tuple[int, int]:
        """Return (L, C) of a condition."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Return the device of the computation, also while weights are offloaded."""
        return self.compute_device or self.denoiser.device

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:  # (B, L, C)
        """Encode B texts to conditions; the empty text alone is encoded once, and keeps no text encoders. Raises
        Mgp5Error if the model has no text encoder, or one cannot be read."""
        alone = texts == [""]
        if alone and self._empty is not None:
            return self._empty
        new = self.read_text_encoders(torch.device("cpu") if alone else None)
        encoded = self._encode_text(texts)
        if alone:
            self._empty = encoded
            self.drop_text_encoders(new)
        return encoded

    def _encode_text(self, texts: list[str]) -> Tensor:  # (B, L, C)
        """Encode B texts by the text encoders."""
        raise NotImplementedError

    def read_text_encoders(self, device: torch.device | None = None) -> list[str]:
        """Read the text encoders that are not there yet, to `device` or `text_device`; return their names. Raises
        Mgp5Error if one cannot be read."""
        new = [name for name in self.readers if getattr(self, name) is None]
        for name in new:
            encoder = self.readers[name]().requires_grad_(False).train(False)
            setattr(self, name, encoder.to(device or self.text_device or self.device))
        return new

    def drop_text_encoders(self, names: Iterable[str] | None = None) -> None:
        """Free text encoders, None for all: a model that was loaded reads them again when it needs them."""
        for name in self.text_parts if names is None else names:
            setattr(self, name, None)

    @property
    def _clip_length(self) -> int:
        """Return the number of tokens of a CLIP."""
        return CLIP_LENGTH if self.tokenizer is None else min(CLIP_LENGTH, self.tokenizer.model_max_length)

    def predict(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor, residuals: Sequence[Tensor] | None = None
    ) -> Tensor:  # (B, Z, h, w)
        """Predict noise, velocity or latents, by the schedule's `prediction_type`, in float32.

        Noisy latents (B, Z, h, w), timesteps (B,) or () in [0, num_train_timesteps], condition (B, L, C). Residuals
        (B, ...) are the inputs of layers that were attached to the denoiser, see `mmfs`.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Stay in evaluation mode: this model is frozen, whatever mode the model around it has."""
        return super().train(False)

    def checkpointing(self, on: bool) -> None:
        """Turn gradient checkpointing of the denoiser on or off; it works on a frozen model in evaluation mode."""
        (self.denoiser.enable_gradient_checkpointing if on else self.denoiser.disable_gradient_checkpointing)()

    @property
    def native_size(self) -> int:
        """Return the height and width in pixels that the model was trained for."""
        size = self.denoiser.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self._factor

    @property
    def _factor(self) -> int:
        """Return H / h, the pixels of one latent along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def _unit(self) -> int:
        """Return the number of pixels that H and W must be multiples of."""
        return self._factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (Z, h, w) of the latents of an image; height and width in pixels. Raises Mgp5Error if one of them is
        not a positive multiple of the VAE's factor."""
        unit = self._unit
        if min(height, width) < unit or height % unit or width % unit:
            raise Mgp5Error(
                f"image size {height}x{width}, expected multiples of {unit}",
                f"this model draws best at {self.native_size}x{self.native_size}",
            )
        return self.denoiser.config.in_channels, height // self._factor, width // self._factor

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:  # (B, 2Z, h, w)
        """Return mean and standard deviation of the VAE's posterior, for pixels (B, 3, H, W) in [-1, 1], in float32.

        A feature cache stores these of each image. AutoencoderTiny has no posterior: its deviation is zero.
        """
        with self._without_autocast():
            encoded = (self.coder() if self.coder else self.vae).encode(pixels.to(self.vae.device, self.vae.dtype))
        tiny, of = isinstance(self.vae, AutoencoderTiny), getattr(encoded, "latent_dist", None)
        moments = (encoded.latents, torch.zeros_like(encoded.latents)) if tiny else (of.mean, of.std)
        # The layout that a cache returns: convolutions round differently in another memory layout.
        return torch.cat(moments, dim=1).float().contiguous()

    def sample(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:  # (B, Z, h, w)
        """Return float32 latents of about unit variance, from moments (B, 2Z, h, w) of the VAE's posterior: a sample by
        a generator on the CPU, or the mean."""
        latents, deviation = moments.float().chunk(2, dim=1)
        if generator is not None:
            latents = latents + deviation * torch.randn(latents.shape, generator=generator).to(latents.device)
        return (latents - self._shift) * self.vae.config.scaling_factor

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:  # (B, Z, h, w)
        """Encode pixels (B, 3, H, W) in [-1, 1] to float32 latents of about unit variance; see `sample`."""
        return self.sample(self.moments(pixels), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:  # (B, 3, H, W)
        """Decode latents (B, Z, h, w) to float32 pixels in [-1, 1]; again in float32 where the VAE overflows."""
        latents = latents / self.vae.config.scaling_factor + self._shift
        if self.engine and self.engine.decode and not self.vae.use_tiling:
            pixels = self.engine.decode(latents)
        else:
            vae = self.coder() if self.coder else self.vae
            pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample
        half = self.vae.dtype != torch.float32 and not pixels.is_meta
        if half and not pixels.isfinite().all() and latents.isfinite().all():  # a copy: engines hold these weights
            pixels = deepcopy(self.vae).float().decode(latents.to(self.vae.device, torch.float32)).sample
        return pixels.float().clamp(-1, 1)

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    def loss(
        self,
        latents: Tensor,
        condition: Tensor,
        generator: torch.Generator,
        min_snr: float | None = None,
        at_once: int | None = None,
        **more: Any,
    ) -> Tensor:  # (B,)
        """Return the mean squared error of the prediction of each image, differentiable in the condition.

        Source: Rombach et al., arXiv 2112.10752, eq. 3; for flow matching, Esser et al., arXiv 2403.03206, section 2.
        Latents (B, Z, h, w) from `sample`, condition (B, L, C); the generator on the CPU draws timesteps and noise.
        `min_snr` is the gamma of the min-SNR weights (Hang et al., arXiv 2303.09556), Mgp5Error with flow matching; a
        frozen denoiser may take `at_once` images at a time, see `in_parts`; `more` goes to `predict`.
        """
        timesteps = self.schedule.draw_timesteps(len(latents), generator)
        weight = None if min_snr is None else self.schedule.min_snr_weight(timesteps, min_snr)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = self.schedule.add_noise(latents.float(), noise, timesteps)
        target = self.schedule.target(latents.float(), noise, timesteps)

        def losses(part: slice, condition: Tensor) -> Tensor:  # (b,)
            with self._without_autocast():
                prediction = self.predict(noisy[part], timesteps[part].to(latents.device), condition, **more)
            return (prediction - target[part]).square().flatten(1).mean(1)

        loss = in_parts(losses, condition, at_once or len(latents))
        return loss if weight is None else loss * weight.to(loss.device)

    def _without_autocast(self) -> AbstractContextManager[None]:
        """Turn autocast off for weights in half precision, where it would only run every norm in float32."""
        return nullcontext() if self.denoiser.dtype == torch.float32 else without_autocast(self.denoiser.device)

    def check(self, options: DiffusionOptions, residuals: bool = False) -> SamplerTable:
        """Return the sampler's table for an image with these options, and with or without residuals.

        Raises Mgp5Error for a size, sampler or number of steps that the model cannot draw, or if `reuse` is set without
        an engine that supports it; none runs with residuals."""
        engine = None if residuals else self.engine
        if options.reuse != 1 and not (engine and engine.model.deep):
            case = (
                f"reuse {options.reuse} of a {type(self.denoiser).__name__} {'by' if engine else 'without'} an engine"
            )
            raise Mgp5Error(f"{case}, expected a UNet with one", "take --reuse 1", usage=True)
        self.latent_shape(options.height or self.native_size, options.width or self.native_size)
        return sampler_table(options.sampler, self.schedule, options.steps)

    @torch.no_grad()
    def begin(
        self,
        condition: Tensor,
        unconditional: Tensor | None,
        options: DiffusionOptions,
        rng: torch.Generator,
        residuals: Sequence[Tensor] | None = None,
    ) -> DenoisingState:
        """Return the state of an image before its first denoising step.

        Condition and unconditional (1, L, C), the latter not needed with guidance 1; `options.guidance` must not be
        None; `rng` on the CPU draws the noise, so that an image does not depend on the device. Residuals (1, N, ...) go
        to both; no engine knows their layers, so none runs. Raises Mgp5Error as `check`, or for guidance without an
        unconditional condition."""
        if unconditional is None and options.guidance != 1.0:
            case = f"guidance {options.guidance} without an unconditional condition"
            raise Mgp5Error(case, "give one, or guidance 1")
        table = self.check(options, residuals is not None)
        shape = self.latent_shape(options.height or self.native_size, options.width or self.native_size)
        noise = torch.randn(shape, generator=rng)[None].to(self.device)
        guided = round(options.guidance_until * len(table))
        guidance = options.guidance if guided else 1.0
        engine = None if residuals is not None else self.engine
        model = engine.model_for(options.reuse) if engine else PlainDenoiser(self.predict)
        return begin(model, noise, condition, unconditional, table, guidance, guided, options.reuse, residuals or ())

    def step(self, states: Sequence[DenoisingState]) -> None:
        """Advance images with equal `key` by one step each, in one call of the denoiser."""
        (self.engine.advance if self.engine else advance)(states)

    def draw(
        self,
        condition: Tensor,
        unconditional: Tensor | None = None,
        *,
        generators: Sequence[torch.Generator],
        **options: Any,
    ) -> Iterator[Tensor]:
        """Denoise B images together; yield the float32 latents (B, Z, h, w) after each step.

        Condition (B, L, C), unconditional (1 or B, L, C), a generator for each image; options are fields of
        DiffusionOptions, guidance defaults to 7.5 and steps to 25. Raises Mgp5Error as `begin`, at the call.
        """
        if len(generators) != len(condition):
            raise Mgp5Error(f"{len(generators)} generators for {len(condition)} images", "give one for each image")
        each = DiffusionOptions(**{"guidance": 7.5, "steps": 25, **options})
        free = [None] * len(condition) if unconditional is None else unconditional.expand_as(condition).split(1)
        rows = zip(condition.split(1), free, generators, strict=True)
        states = [self.begin(*conditions, each, rng) for *conditions, rng in rows]

        def steps() -> Iterator[Tensor]:
            while not states[0].done:
                self.step(states)
                yield torch.cat([state.latents for state in states])

        return steps()


def no_text_encoder() -> Mgp5Error:
    """Return the error of `encode_text` for a model without a text encoder."""
    return Mgp5Error("this diffusion model has no text encoder", "add its text_encoder and tokenizer folders")
