"""The components of a model as modules whose inputs and outputs are named as in optimum's ONNX Runtime pipelines.

Letters: B batch, N vokens, D width of the LLM, L and C of a condition, P of its pooled vector, n timesteps, R = 2B rows
of the guidance batch, S columns of a step's row, h and w of latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.exported import split_denoiser
from ..generators.denoising import guidance_batch
from ..generators.latent_diffusion import LatentDiffusion
from .exportable import Exportable

BATCH = 2  # of the example: torch.export takes a size of 1 for a constant
LATENT = {0: "batch", 2: "height", 3: "width"}
ROWS = {0: "batch", 1: "length"}


@dataclass(frozen=True, kw_only=True)
class Component:
    """A module to export as one graph.

    Args:
        name: of its folder.
        module: takes the inputs in their order and returns a tuple of the outputs.
        inputs: an example of each, with no dynamic dimension of size 1.
        outputs: their names.
        axes: name of an input -> dynamic dimension -> its name; the same name is the same size.
        config: what diffusers writes beside the weights.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    config: dict[str, Any] = field(default_factory=dict)


class _Call(nn.Module):
    """A function of tensors as a module, with the weights of `part`."""

    def __init__(self, part: nn.Module, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.part, self.function = part, function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.function(*tensors)


def components(model: Exportable, split: bool, opset: int = 23) -> dict[str, Callable[[], Component]]:
    """Return a function for each component of a model that makes it, by name.

    Args:
        split: also `condition`, all that is constant over the steps, and `denoiser`, which takes it.
        opset: decides which operations `denoiser` is made of.
    """
    makers: dict[str, Callable[[], Component]] = {}
    if model.mapper is not None:
        makers["mapper"] = partial(_mapper, model)
    if hasattr(model.generator, "unet"):
        makers["unet"] = partial(_unet, model.generator)
    else:
        makers["transformer"] = partial(_transformer, model.generator)
    makers["vae_decoder"] = partial(_vae_decoder, model.generator)
    if split:
        if model.mapper is not None:
            makers["condition"] = partial(_condition, model)
        makers["denoiser"] = partial(_denoiser, model.generator, opset)
    return makers


def latent_unit(generator: LatentDiffusion) -> int:
    """Return what height and width of the latents are multiples of."""
    config = generator.denoiser.config
    return config.patch_size if "patch_size" in config else 2 ** (len(config.block_out_channels) - 1)


def _mapper(model: Exportable) -> Component:
    """States (B, N, D) -> condition (B, L, C), and the unconditional one (1, L, C), a constant. For Stable Diffusion 3
    the pooled vectors (B, P), which the mapper returns in its last row, are outputs of their own."""
    mapper, config = model.mapper, model.mapper.config
    constant = model.unconditional.to(mapper.mlp[0].weight).clone()
    names: tuple[str, ...] = ("condition", "unconditional")
    if config.pooled:
        names = "condition", "pooled", "unconditional", "unconditional_pooled"

    def unpacked(rows: Tensor) -> tuple[Tensor, ...]:
        return (rows[:, :-1], rows[:, -1, : config.pooled]) if config.pooled else (rows,)

    constants = [part.clone() for part in unpacked(constant)]
    return Component(
        name="mapper",
        module=_Call(mapper, lambda states: (*unpacked(mapper(states)), *constants)),
        inputs={"states": constant.new_ones(BATCH, model.num_vokens, config.llm_width)},
        outputs=names,
        axes={"states": {0: "batch"}},
    )


def _unet(generator: LatentDiffusion) -> Component:
    unet, latents = generator.denoiser, _latents(generator)
    length = generator.condition_shape[0]
    return Component(
        name="unet",
        module=_Call(unet, lambda *tensors: unet(*tensors, return_dict=False)),
        inputs={
            "sample": latents,
            "timestep": torch.ones(BATCH),  # in float32 at any precision
            "encoder_hidden_states": latents.new_ones(BATCH, length, unet.config.cross_attention_dim),
        },
        outputs=("out_sample",),
        axes={"sample": LATENT, "timestep": {0: "batch"}, "encoder_hidden_states": ROWS},
        config=dict(unet.config),
    )


def _transformer(generator: LatentDiffusion) -> Component:
    transformer, latents = generator.denoiser, _latents(generator)
    length = generator.condition_shape[0]
    return Component(
        name="transformer",
        module=_Call(transformer, lambda *tensors: transformer(*tensors, return_dict=False)),
        inputs={
            "hidden_states": latents,
            "encoder_hidden_states": latents.new_ones(BATCH, length, transformer.config.joint_attention_dim),
            "pooled_projections": latents.new_ones(BATCH, generator.pooled_width),
            "timestep": torch.ones(BATCH),
        },
        outputs=("out_hidden_states",),
        axes={
            "hidden_states": LATENT,
            "encoder_hidden_states": ROWS,
            "pooled_projections": {0: "batch"},
            "timestep": {0: "batch"},
        },
        config=dict(transformer.config),
    )


def _vae_decoder(generator: LatentDiffusion) -> Component:
    """Latents (B, C, h, w), already divided by the VAE's scale -> pixels (B, 3, H, W)."""
    vae = generator.vae
    height, width = _sides(generator)
    return Component(
        name="vae_decoder",
        module=_Call(vae, lambda latents: vae.decode(latents, return_dict=False)),
        inputs={"latent_sample": torch.ones(BATCH, vae.config.latent_channels, height, width, dtype=vae.dtype)},
        outputs=("sample",),
        axes={"latent_sample": LATENT},
        config=dict(vae.config),
    )


def _denoiser(generator: LatentDiffusion, opset: int) -> Component:
    """One step of the denoiser: latents (B, C, h, w), a row (B, S) of the table and the context that `condition`
    returns -> prediction (B, C, h, w)."""
    parts, latents = split_denoiser(generator, opset), _latents(generator)
    table, context = parts.constants(torch.ones(2), latents.new_ones(BATCH, *generator.condition_shape))
    inputs = {"sample": latents, "row": table[0].expand(BATCH, -1).contiguous()}
    inputs |= {f"context_{i}": part.contiguous() for i, part in enumerate(context)}
    return Component(
        name="denoiser",
        module=_Call(parts.model, lambda latents, row, *context: parts(latents, row, list(context))[:1]),
        inputs=inputs,
        outputs=("out_sample",),
        axes={name: {0: "batch"} for name in inputs} | {"sample": LATENT},
    )


def _condition(model: Exportable) -> Component:
    """States (B, N, D) and timesteps (n) -> the table (n, 1 or R, S) and the context (R, ...) of `denoiser`."""
    mapper, parts = model.mapper, split_denoiser(model.generator)
    constant = model.unconditional.to(mapper.mlp[0].weight)
    states, timesteps = constant.new_ones(BATCH, model.num_vokens, mapper.config.llm_width), torch.ones(3)

    def run(states: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        table, context = parts.constants(timesteps, guidance_batch(mapper(states), constant, 2.0))
        return table, *(part.contiguous() for part in context)

    count = len(run(states, timesteps)) - 1
    return Component(
        name="condition",
        module=_Call(nn.ModuleList([mapper, model.generator.denoiser]), run),
        inputs={"states": states, "timesteps": timesteps},
        outputs=("table", *(f"context_{i}" for i in range(count))),
        axes={"states": {0: "batch"}, "timesteps": {0: "steps"}},
    )


def _sides(generator: LatentDiffusion) -> tuple[int, int]:
    """Return height and width of the example's latents."""
    unit = latent_unit(generator)
    return 2 * unit, 3 * unit


def _latents(generator: LatentDiffusion) -> Tensor:  # (B, C, h, w)
    denoiser = generator.denoiser
    return torch.ones(BATCH, denoiser.config.in_channels, *_sides(generator), dtype=denoiser.dtype)
