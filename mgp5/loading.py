"""Building, loading and saving a model: frozen parts from folders or the hub, what was trained as safetensors.

A trained folder holds `model.safetensors` (the head's saved parts, "adapter.*" for rows and LoRA, "prefix.*") and
`config.json`, the configuration that they belong to.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .backbones.hf import HFBackbone
from .backbones.quantization import Quantize
from .config import ModelConfig
from .errors import Mgp5Error
from .files import replacing, write_json
from .generators import load_generator
from .heads import Head, head_class
from .heads.settings import model_config_from
from .hub import Parts, explain, from_hub, read_config
from .model import InterleavedModel

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def build(
    mllm: str, diffusion: str, *, dtype: torch.dtype = torch.float32, quantize: Quantize = "none", **options: Any
) -> InterleavedModel:
    """Return a model with a fresh head, ready for its first stage; parts are folders or hub ids.
    `dtype` is that of the frozen parts, `options` are those of `assemble`."""
    return assemble(load_backbone(mllm, dtype, quantize), load_generator(diffusion, dtype), mllm, diffusion, **options)


def assemble(
    backbone: HFBackbone,
    generator: Any,
    mllm: str,  # where the parts are from
    diffusion: str,
    *,
    head: str = "minigpt5",
    guidance: float = 7.5,  # the model's default
    **shape: Any,  # see `Head.configure`
) -> InterleavedModel:
    """Return a model of loaded parts with a fresh head."""
    kind, head_type = backbone_kind(backbone), head_class(head)
    head_config = head_type.configure(backbone, generator, **shape)
    spec = head_type.spec_of(head_config)
    backbone.add_tokens(list(spec.new_tokens))  # before the head, so that a seed gives what it always gave
    fresh = head_type(generator, head_config)
    parts = {"mllm": mllm, "diffusion": diffusion, "mllm_kind": kind, "head_kind": fresh.description}
    return InterleavedModel(
        backbone, fresh, ModelConfig(head=head, head_config=head_config, guidance=guidance, **parts)
    )


def load_backbone(mllm: str, dtype: torch.dtype, quantize: Quantize = "none") -> HFBackbone:
    """Return the LLM from a folder or the hub. Raises Mgp5Error."""
    read = partial(HFBackbone.load, dtype=dtype, quantize=quantize)
    try:
        return from_hub(mllm, lambda name, revision: read(name, revision=revision))
    except (OSError, ValueError, SafetensorError) as error:
        raise explain(error, mllm) from error


def backbone_kind(backbone: HFBackbone) -> str:
    """Return a short description by which a checkpoint is matched to its LLM, as that was before tokens were added."""
    text = backbone.core.config.get_text_config()
    layers = f"{text.num_hidden_layers}x{text.hidden_size}"
    return f"{backbone.core.config.model_type} {layers} with {len(backbone.tokenizer)} tokens"


def load_checkpoint(
    parts: Parts, *, dtype: torch.dtype = torch.float32, quantize: Quantize = "none"
) -> InterleavedModel:
    """Return the model of a trained folder with its weights in it; the adapter is not merged yet.
    Raises Mgp5Error if weights are missing, or do not fit the LLM or the head."""
    assert parts.trained is not None
    path = parts.trained / CONFIG
    config = model_config_from(read_config(path), str(path))
    config = replace(config, mllm=parts.mllm, diffusion=parts.diffusion)
    backbone, head = load_backbone(parts.mllm, dtype, quantize), head_class(config.head).load(config, dtype)
    _check_parts(config, parts, backbone, head)
    model = InterleavedModel(backbone, head, config)
    tensors = read_weights(parts.trained / WEIGHTS)
    _check_tokens(model, tensors, parts)
    if config.stage is not None:
        model.adapt(config.lora, config.prefix)
    load_trained_tensors(model, tensors, parts)
    return model


def trained_tensors(model: InterleavedModel) -> dict[str, Tensor]:
    """Return all that the stages train, under stable names: NAME.* of the head's saved parts, "adapter.*", "prefix.*",
    "llm.*" of the LLM's own weights. Where processes share the weights (FSDP), all of them have to call it."""
    from peft import get_peft_model_state_dict

    backbone = model.backbone
    tensors = {name: part.module.state_dict() for name, part in model.head.parts().items() if part.saved}
    adapter = {}
    if backbone.model is not backbone.core:
        adapter = get_peft_model_state_dict(backbone.model, save_embedding_layers=False)
        once, twice = (dict(backbone.model.named_parameters(remove_duplicate=one)).keys() for one in (True, False))
        for name in twice - once:  # with tied embeddings one set of rows has two names: the first is kept
            adapter.pop(name.removesuffix(".default"), None)
    tensors["adapter"] = dict(sorted(adapter.items()))
    tensors["llm"] = model.llm_weights()
    tensors["prefix"] = backbone.prefix.state_dict() if backbone.prefix is not None else {}
    return {f"{kind}.{name}": full(value) for kind, part in tensors.items() for name, value in part.items()}


def full(value: Tensor) -> Tensor:
    """Return a tensor, gathered where processes hold a shard of it each (FSDP)."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def load_trained_tensors(model: InterleavedModel, tensors: dict[str, Tensor], parts: Parts) -> None:
    """Put trained tensors into a prepared model. Raises Mgp5Error when names or shapes differ."""
    from peft import set_peft_model_state_dict

    named = {name.removeprefix("llm.") for name in tensors if name.startswith("llm.")}
    model.llm_names |= named & {*model.llm_weights(everything=True)}
    expected = {name: value.shape for name, value in trained_tensors(model).items()}
    found = {name: value.shape for name, value in tensors.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        first = wrong[0]
        shapes = f"{first} is {_shape(found.get(first))}, expected {_shape(expected.get(first))}"
        message = f"the weights in {parts.trained} do not fit the model ({shapes})"
        raise Mgp5Error(message, "use the parts it was trained with")
    by_part: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, inner = name.partition(".")
        by_part.setdefault(kind, {})[inner] = value if kind == "adapter" else value.float()
    for name, part in model.head.parts().items():
        if part.saved:
            part.module.load_state_dict(by_part.get(name, {}))
    with torch.no_grad():
        for name, weight in model.llm_weights().items():
            weight.copy_(by_part["llm"][name])
    if "adapter" in by_part:
        set_peft_model_state_dict(model.backbone.model, by_part["adapter"])
    if model.backbone.prefix is not None:
        model.backbone.prefix.load_state_dict(by_part["prefix"])
    model.head.train(model.head.training)  # drops what was computed from the old weights


def save_checkpoint(model: InterleavedModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `folder/mgp5`; each file appears whole or not at all."""
    write_weights(trained_tensors(model), model.config, folder / "mgp5", dtype)


def write_weights(
    tensors: dict[str, Tensor], config: ModelConfig, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write the two files of a trained folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as part:
        write_tensors({name: value.to(dtype or value.dtype) for name, value in tensors.items()}, part)
    write_json(folder / CONFIG, asdict(config))


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises Mgp5Error when it is missing or broken."""
    if not path.is_file():
        raise Mgp5Error(f"no weights at {path}", "copy the whole model folder, or train it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Mgp5Error(f"{path} cannot be read ({error})", "copy it again") from None


def _check_parts(config: ModelConfig, parts: Parts, backbone: HFBackbone, head: Head) -> None:
    mapper = getattr(config.head_config, "mapper", None)
    width = mapper.llm_width if mapper else backbone.width
    expected, found = config.mllm_kind or f"an LLM of width {width}", backbone_kind(backbone)
    if width != backbone.width or config.mllm_kind not in ("", found):
        message = f"{parts.name} was trained for {expected}, but {parts.mllm} is {found}"
        raise Mgp5Error(message, "use the multimodal LLM it was trained with")
    if config.head_kind and config.head_kind != head.description:
        message = f"{parts.name} was trained for {config.head_kind}, but {parts.diffusion} is {head.description}"
        raise Mgp5Error(message, "use the generator it was trained with, or train the head again")


def _check_tokens(model: InterleavedModel, tensors: dict[str, Tensor], parts: Parts) -> None:
    expected = len(model.head.ids)
    counts = {len(value) for name, value in tensors.items() if "trainable_tokens" in name}
    if counts and counts != {expected}:
        message = f"{parts.name} says {expected} tokens of its head, but its weights hold {sorted(counts)[0]}"
        raise Mgp5Error(message, f"correct {parts.trained}/{CONFIG}, or train again")


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
