"""What training made, on disk: mapper, voken rows and LoRA as safetensors, and the configuration they belong to."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import ModelConfig, model_config_from
from .errors import Mgp5Error
from .hub import Parts, read_config
from .model import MiniGPT5, _load_parts, diffusion_kind

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def trained_tensors(model: MiniGPT5) -> dict[str, Tensor]:
    """All that the stages train, under stable names: "mapper.*" and "adapter.*" (rows and LoRA)."""
    from peft import get_peft_model_state_dict

    tensors = {f"mapper.{name}": value for name, value in model.head.mapper.state_dict().items()}
    adapter = get_peft_model_state_dict(model.backbone.model, save_embedding_layers=False)
    # With tied embeddings one set of rows has two names: the first is kept.
    single = {value.data_ptr(): name for name, value in reversed(adapter.items())}
    return tensors | {f"adapter.{name}": adapter[name] for name in sorted(single.values())}


def save_checkpoint(model: MiniGPT5, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `folder/mgp5`; each file appears whole or not at all."""
    place = folder / "mgp5"
    place.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in trained_tensors(model).items()}
    save_file(tensors, place / f"{WEIGHTS}.tmp", metadata={"format": "pt"})
    (place / f"{CONFIG}.tmp").write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    for name in (WEIGHTS, CONFIG):
        os.replace(place / f"{name}.tmp", place / name)


def load_checkpoint(parts: Parts, *, dtype: torch.dtype = torch.float32) -> MiniGPT5:
    """Build the model of a trained folder and put its weights in; the adapter is not merged yet.

    Raises:
        Mgp5Error: weights are missing, or do not fit the LLM, the diffusion model or the voken count.
    """
    assert parts.trained is not None
    config = model_config_from(read_config(parts.trained / CONFIG), str(parts.trained / CONFIG))
    backbone, diffusion = _load_parts(parts.mllm, parts.diffusion, dtype)
    _check_parts(config, parts, backbone.width, diffusion_kind(diffusion))
    model = MiniGPT5(backbone, diffusion, replace(config, mllm=parts.mllm, diffusion=parts.diffusion))
    tensors = read_weights(parts.trained / WEIGHTS)
    _check_vokens(config, tensors, parts)
    if config.stage is not None:
        model.prepare(config.stage, config.lora)
    put(model, tensors, parts)
    return model


def put(model: MiniGPT5, tensors: dict[str, Tensor], parts: Parts) -> None:
    """Put trained tensors into a prepared model. Raises Mgp5Error when names or shapes differ."""
    from peft import set_peft_model_state_dict

    expected = {name: value.shape for name, value in trained_tensors(model).items()}
    found = {name: value.shape for name, value in tensors.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        first = wrong[0]
        shapes = f"{first} is {_shape(found.get(first))}, expected {_shape(expected.get(first))}"
        raise Mgp5Error(
            f"the weights in {parts.trained} do not fit the model ({shapes})", "use the parts it was trained with"
        )
    mapper = {k.removeprefix("mapper."): v.float() for k, v in tensors.items() if k.startswith("mapper.")}
    model.head.mapper.load_state_dict(mapper)
    adapter = {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}
    set_peft_model_state_dict(model.backbone.model, adapter)
    model.head.train(model.head.training)  # forget what was computed from the old mapper


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises Mgp5Error when it is missing or broken."""
    if not path.is_file():
        raise Mgp5Error(f"no weights at {path}", "copy the whole model folder, or train it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Mgp5Error(f"{path} cannot be read ({error})", "copy it again") from None


def _check_parts(config: ModelConfig, parts: Parts, width: int, kind: str) -> None:
    if config.mapper.llm_width != width:
        raise Mgp5Error(
            f"{parts.name} was trained for an LLM of width {config.mapper.llm_width}, but {parts.mllm} has {width}",
            "use the multimodal LLM it was trained with",
        )
    if config.diffusion_kind and config.diffusion_kind != kind:
        raise Mgp5Error(
            f"{parts.name} was trained for {config.diffusion_kind}, but {parts.diffusion} is {kind}",
            "use the diffusion model it was trained with, or train the mapper again",
        )


def _check_vokens(config: ModelConfig, tensors: dict[str, Tensor], parts: Parts) -> None:
    counts = {len(value) for name, value in tensors.items() if "trainable_tokens" in name}
    if counts and counts != {config.num_vokens}:
        raise Mgp5Error(
            f"{parts.name} says {config.num_vokens} vokens, but its weights hold {sorted(counts)[0]}",
            f"set num_vokens to {sorted(counts)[0]} in {parts.trained}/{CONFIG}, or train again",
        )


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
