"""The components of a model as modules whose inputs and outputs are named as in optimum's ONNX Runtime pipelines.

Letters: B batch, K vokens, D width of the LLM, L and C of a condition, P of its pooled vector, n timesteps, R guidance
rows (2B), S width of a step's time embedding, Z latent channels, h and w latents.
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
BATCHED, LATENT = {0: "batch"}, {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True, kw_only=True)
class Component:
    """A module to export as one graph: it takes the inputs in their order and returns a tuple of the outputs."""

    name: str  # of its folder
    module: nn.Module
    inputs: dict[str, Tensor]  # an example of each, with no dynamic dimension of size 1
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]  # name of an input -> dynamic dimension -> its name; the same name, the same size
    config: dict[str, Any] = field(default_factory=dict)  # what diffusers writes beside the weights


class _Call(nn.Module):
    """A function of tensors as a module, with the weights of `part`."""

    def __init__(self, part: nn.Module, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.part, self.function = part, function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.function(*tensors)


def components(model: Exportable, split: bool, opset: int = 23) -> dict[str, Callable[[], Component]]:
    """Return a function for each component of a model that makes it, by name.

    With `split`, also `condition`, all that is constant over the steps, and `denoiser`, which takes it; `opset` decides
    which operations `denoiser` is made of.
    """
    generator = model.generator
    makers: dict[str, Callable[[], Component]] = {} if model.mapper is None else {"mapper": partial(_mapper, model)}
    makers["unet" if hasattr(generator, "unet") else "transformer"] = partial(_whole_denoiser, generator)
    makers["vae_decoder"] = partial(_vae_decoder, generator)
    if split:
        makers |= {} if model.mapper is None else {"condition": partial(_condition, model)}
        makers["denoiser"] = partial(_denoiser, generator, opset)
    return makers


def latent_unit(generator: LatentDiffusion) -> int:
    """Return what height and width of the latents are multiples of."""
    config = generator.denoiser.config
    return config.patch_size if "patch_size" in config else 2 ** (len(config.block_out_channels) - 1)


def _latents(generator: LatentDiffusion, part: nn.Module) -> Tensor:  # (B, Z, h, w), in the type of a part
    unit, channels = latent_unit(generator), generator.denoiser.config.in_channels
    return torch.ones(BATCH, channels, 2 * unit, 3 * unit, dtype=part.dtype)


def _mapper(model: Exportable) -> Component:
    """States (B, K, D) -> condition (B, L, C), and the unconditional one (1, L, C), a constant. For Stable Diffusion 3
    the pooled vectors (B, P), which the mapper returns in its last row, are outputs of their own."""
    mapper, config = model.mapper, model.mapper.config
    constant = model.unconditional.to(mapper.mlp[0].weight).clone()

    def unpacked(rows: Tensor) -> tuple[Tensor, ...]:
        return (rows[:, :-1], rows[:, -1, : config.pooled]) if config.pooled else (rows,)

    constants = [part.clone() for part in unpacked(constant)]
    outputs = "condition", "pooled", "unconditional", "unconditional_pooled"
    return Component(
        name="mapper",
        module=_Call(mapper, lambda states: (*unpacked(mapper(states)), *constants)),
        inputs={"states": constant.new_ones(BATCH, model.num_vokens, config.llm_width)},
        outputs=outputs if config.pooled else outputs[::2],
        axes={"states": BATCHED},
    )


def _whole_denoiser(generator: LatentDiffusion) -> Component:
    """The denoiser as diffusers has it: latents (B, Z, h, w), timesteps (B), condition -> prediction (B, Z, h, w)."""
    model, length = generator.denoiser, generator.condition_shape[0]
    latents, times = _latents(generator, model), torch.ones(BATCH)  # times are in float32 at any precision
    if hasattr(generator, "unet"):
        condition = latents.new_ones(BATCH, length, model.config.cross_attention_dim)
        name, inputs = "unet", {"sample": latents, "timestep": times, "encoder_hidden_states": condition}
    else:
        condition = latents.new_ones(BATCH, length, model.config.joint_attention_dim)
        pooled = latents.new_ones(BATCH, generator.pooled_width)
        name, inputs = "transformer", {"hidden_states": latents, "encoder_hidden_states": condition}
        inputs |= {"pooled_projections": pooled, "timestep": times}
    first = next(iter(inputs))
    return Component(
        name=name,
        module=_Call(model, lambda *tensors: model(*tensors, return_dict=False)),
        inputs=inputs,
        outputs=(f"out_{first}",),
        axes=dict.fromkeys(inputs, BATCHED) | {first: LATENT, "encoder_hidden_states": {0: "batch", 1: "length"}},
        config=dict(model.config),
    )


def _vae_decoder(generator: LatentDiffusion) -> Component:
    """Latents (B, Z, h, w), already divided by the VAE's scale -> pixels (B, 3, H, W)."""
    vae = generator.vae
    return Component(
        name="vae_decoder",
        module=_Call(vae, lambda latents: vae.decode(latents, return_dict=False)),
        inputs={"latent_sample": _latents(generator, vae)},
        outputs=("sample",),
        axes={"latent_sample": LATENT},
        config=dict(vae.config),
    )


def _denoiser(generator: LatentDiffusion, opset: int) -> Component:
    """One step of the denoiser: latents (B, Z, h, w), time embeddings (B, S) as `row` and the inputs of cross-attention
    that `condition` returns -> prediction (B, Z, h, w)."""
    parts, latents = split_denoiser(generator, opset), _latents(generator, generator.denoiser)
    table, context = parts.constants(torch.ones(2), latents.new_ones(BATCH, *generator.condition_shape))
    inputs = {"sample": latents, "row": table[0].expand(BATCH, -1).contiguous()}
    inputs |= {f"context_{i}": part.contiguous() for i, part in enumerate(context)}
    return Component(
        name="denoiser",
        module=_Call(parts.model, lambda latents, row, *context: parts(latents, row, list(context))[:1]),
        inputs=inputs,
        outputs=("out_sample",),
        axes=dict.fromkeys(inputs, BATCHED) | {"sample": LATENT},
    )


def _condition(model: Exportable) -> Component:
    """States (B, K, D) and timesteps (n) -> time embeddings (n, 1 or R, S) as `table`, and inputs of cross-attention
    (R, ...)."""
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
        axes={"states": BATCHED, "timesteps": {0: "steps"}},
    )
