"""What training made, on disk: mapper, voken rows and LoRA as safetensors, and the configuration they belong to."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .backbones.hf import HFBackbone
from .backbones.quantization import Quantize
from .config import ModelConfig, model_config_from
from .errors import Mgp5Error
from .files import replacing, write_json
from .hub import Parts, read_config
from .model import InterleavedModel, _load_parts, backbone_kind, diffusion_kind

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def trained_tensors(model: InterleavedModel) -> dict[str, Tensor]:
    """All that the stages train, under stable names: "mapper.*", "adapter.*" (rows and LoRA) and "prefix.*".

    Where processes share the weights (FSDP), all of them have to call it.
    """
    from peft import get_peft_model_state_dict

    backbone = model.backbone
    adapter = get_peft_model_state_dict(backbone.model, save_embedding_layers=False)
    once, twice = (dict(backbone.model.named_parameters(remove_duplicate=one)).keys() for one in (True, False))
    for name in twice - once:  # with tied embeddings one set of rows has two names: the first is kept
        adapter.pop(name.removesuffix(".default"), None)
    prefix = backbone.prefix.state_dict() if backbone.prefix is not None else {}
    parts = {"mapper": model.head.mapper.state_dict(), "adapter": dict(sorted(adapter.items())), "prefix": prefix}
    return {f"{kind}.{name}": full(value) for kind, part in parts.items() for name, value in part.items()}


def full(value: Tensor) -> Tensor:
    """A tensor, gathered where processes hold a shard of it each (FSDP)."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def save_checkpoint(model: InterleavedModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `folder/mgp5`; each file appears whole or not at all."""
    write_weights(trained_tensors(model), model.config, folder / "mgp5", dtype)


def write_weights(
    tensors: dict[str, Tensor], config: ModelConfig, place: Path, dtype: torch.dtype | None = None
) -> None:
    """Write the two files of a trained folder."""
    place.mkdir(parents=True, exist_ok=True)
    with replacing(place / WEIGHTS) as part:
        write_tensors({name: value.to(dtype or value.dtype) for name, value in tensors.items()}, part)
    write_json(place / CONFIG, asdict(config))


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def load_checkpoint(
    parts: Parts, *, dtype: torch.dtype = torch.float32, quantize: Quantize = "none"
) -> InterleavedModel:
    """Build the model of a trained folder and put its weights in; the adapter is not merged yet.

    Raises:
        Mgp5Error: weights are missing, or do not fit the LLM, the diffusion model or the voken count.
    """
    assert parts.trained is not None
    config = model_config_from(read_config(parts.trained / CONFIG), str(parts.trained / CONFIG))
    backbone, diffusion = _load_parts(parts.mllm, parts.diffusion, dtype, quantize)
    _check_parts(config, parts, backbone, diffusion_kind(diffusion))
    model = InterleavedModel(backbone, diffusion, replace(config, mllm=parts.mllm, diffusion=parts.diffusion))
    tensors = read_weights(parts.trained / WEIGHTS)
    _check_vokens(config, tensors, parts)
    if config.stage is not None:
        model.adapt(config.lora, config.prefix)
    put(model, tensors, parts)
    return model


def put(model: InterleavedModel, tensors: dict[str, Tensor], parts: Parts) -> None:
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
    parts_of = {kind: {} for kind in ("mapper", "adapter", "prefix")}
    for name, value in tensors.items():
        kind, _, own = name.partition(".")
        parts_of[kind][own] = value if kind == "adapter" else value.float()
    model.head.mapper.load_state_dict(parts_of["mapper"])
    set_peft_model_state_dict(model.backbone.model, parts_of["adapter"])
    if model.backbone.prefix is not None:
        model.backbone.prefix.load_state_dict(parts_of["prefix"])
    model.head.train(model.head.training)  # forget what was computed from the old mapper


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises Mgp5Error when it is missing or broken."""
    if not path.is_file():
        raise Mgp5Error(f"no weights at {path}", "copy the whole model folder, or train it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Mgp5Error(f"{path} cannot be read ({error})", "copy it again") from None


def _check_parts(config: ModelConfig, parts: Parts, backbone: HFBackbone, kind: str) -> None:
    width = config.mapper.llm_width
    expected, found = config.mllm_kind or f"an LLM of width {width}", backbone_kind(backbone)
    if width != backbone.width or config.mllm_kind not in ("", found):
        raise Mgp5Error(
            f"{parts.name} was trained for {expected}, but {parts.mllm} is {found}",
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
