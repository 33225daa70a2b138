"""Image generators: frozen latent-diffusion models, their noise schedules and their samplers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import Mgp5Error
from ..hub import from_hub
from .pipeline import read_index

if TYPE_CHECKING:
    import torch

    from .latent_diffusion import LatentDiffusion

# Pipeline class in model_index.json -> the module of this package and its class that load it.
PIPELINES = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "VQVAE": ("vqvae", "VQVAE"),
    "StableUnCLIPPipeline": ("unclip", "StableUnCLIP"),
    "StableUnCLIPImg2ImgPipeline": ("unclip", "StableUnCLIP"),
}


def load_generator(name: str, dtype: torch.dtype | None = None) -> LatentDiffusion:
    """Load a frozen diffusion model from a folder or a hub id in the layout of diffusers' pipelines; None is float32.
    Raises Mgp5Error if the model or a part of it is missing, or its pipeline class is not supported."""

    def load(name: str, revision: str | None) -> LatentDiffusion:
        return generator_class(name, read_index(name, revision).get("_class_name")).load(name, dtype, revision)

    return from_hub(name, load)


def generator_class(name: str, pipeline: str | None) -> type[LatentDiffusion]:
    """Return the class that loads the model `name` of a pipeline class. Raises Mgp5Error if it is not supported."""
    if pipeline not in PIPELINES:
        raise Mgp5Error(f"{name} holds a {pipeline}, expected one of {', '.join(PIPELINES)}", "choose another model")
    module, attribute = PIPELINES[pipeline]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
