"""Frozen latent-diffusion generators and their samplers (B batch, C, h and w of latents, L and D of conditions)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import Mgp5Error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .sampler import Schedule

# What model_index.json calls a pipeline -> the module and class here that load it.
PIPELINES = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
}


class LatentDiffusion(Protocol):
    """What the rest of mgp5 asks of a diffusion model; it is frozen, and gradients reach only the condition."""

    schedule: Schedule

    @property
    def native_size(self) -> int:
        """Height and width in pixels that the model was trained for."""

    @property
    def condition_shape(self) -> tuple[int, int]:
        """(L, D) of a condition."""

    @property
    def pooled_width(self) -> int:
        """How many numbers of a condition's last row are a pooled vector, before zeros; 0: it is a row like all."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of height x width pixels."""

    def checkpointing(self, on: bool) -> None:
        """Turn gradient checkpointing of the denoiser on or off."""

    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to float32 (B, 2C, h, w): mean and deviation of the VAE's posterior."""

    def sample(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Moments to float32 latents (B, C, h, w) of about unit variance: the mean without a generator."""

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to float32 latents (B, C, h, w): `sample` of `moments`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to float32 pixels (B, 3, H, W) in [-1, 1]."""

    def encode_text(self, texts: list[str]) -> Tensor:
        """The model's own conditions (B, L, D) for texts: the target of the caption loss."""

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """One call of the model: latents (B, C, h, w), timesteps (B,) or (), condition (B, L, D) to (B, C, h, w)."""

    def loss(
        self, latents: Tensor, condition: Tensor, generator: torch.Generator, min_snr: float | None = None
    ) -> Tensor:
        """The denoising loss of each image, (B,)."""

    def draw(
        self,
        condition: Tensor,
        unconditional: Tensor | None,
        *,
        steps: int,
        guidance: float,
        sampler: str,
        height: int | None,
        width: int | None,
        generators: list[torch.Generator],
    ) -> Iterator[Tensor]:
        """Yield the latents (B, C, h, w) after each step; the last are the result."""


def load_diffusion(name: str, *, dtype: torch.dtype | None = None, revision: str | None = None) -> LatentDiffusion:
    """Load a frozen diffusion model from a folder or a hub id in the layout of diffusers' pipelines.

    Args:
        name: a folder, or a hub id.
        dtype: of the weights; float32 when None.
        revision: branch, tag or commit on the hub.

    Raises:
        Mgp5Error: nothing there, a part is missing, or a pipeline of a kind not known here.
    """
    kind = read_index(name, revision).get("_class_name")
    if kind not in PIPELINES:
        raise Mgp5Error(f"{name} holds a {kind}, expected one of {', '.join(PIPELINES)}", "choose another model")
    module, attribute = PIPELINES[kind]
    loader = getattr(import_module(f"{__name__}.{module}"), attribute)
    return loader.load(name, **({} if dtype is None else {"dtype": dtype}), revision=revision)


def read_index(name: str, revision: str | None = None) -> dict[str, Any]:
    """Read model_index.json, the list of a pipeline's parts.

    Raises:
        Mgp5Error: there is none, or it is not JSON.
    """
    hint = "give a folder or a hub id in the layout of diffusers' pipelines"
    try:
        if Path(name).is_dir():
            file = Path(name) / "model_index.json"
        else:
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(str(name), "model_index.json", revision=revision)
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Mgp5Error(f"no readable model_index.json in {name} ({reason})", hint) from error
