"""Image generators: frozen latent-diffusion models, their noise schedules and their samplers."""

from __future__ import annotations

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Mgp5Error
from ..hub import from_hub

if TYPE_CHECKING:
    import torch

    from .latent_diffusion import LatentDiffusion

# Pipeline class in model_index.json -> the module of this package and its class that load it.
PIPELINES = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
}


def load_generator(name: str, dtype: torch.dtype | None = None) -> LatentDiffusion:
    """Load a frozen diffusion model from a folder or a hub id in the layout of diffusers' pipelines.

    Args:
        name: a folder, or a hub id; mirrors of known ids are tried too.
        dtype: dtype of the weights; float32 when None.

    Raises:
        Mgp5Error: the model does not exist, a part of it is missing, or its pipeline class is not supported.
    """
    return from_hub(name, partial(_load, dtype=dtype))


def _load(name: str, revision: str | None, dtype: torch.dtype | None) -> LatentDiffusion:
    kind = read_index(name, revision).get("_class_name")
    if kind not in PIPELINES:
        raise Mgp5Error(f"{name} holds a {kind}, expected one of {', '.join(PIPELINES)}", "choose another model")
    module, attribute = PIPELINES[kind]
    loader = getattr(import_module(f"{__name__}.{module}"), attribute)
    return loader.load(name, **({} if dtype is None else {"dtype": dtype}), revision=revision)


def read_index(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return the contents of model_index.json, which lists the parts of a diffusers pipeline.

    Args:
        name: a folder, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        Mgp5Error: the file is missing or is not JSON.
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
