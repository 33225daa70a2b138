"""What is exported: the parts of a model as modules whose inputs and outputs are named as in optimum's ORT pipelines.

Letters: B batch, N vokens, D width of the LLM, L and C of a condition, P of its pooled vector, n timesteps, R = 2B rows
of the guidance batch, h and w of latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from optimum.utils import (
    DummyInputGenerator,
    DummySeq2SeqDecoderTextInputGenerator,
    DummyTransformerTextInputGenerator,
    DummyTransformerTimestepInputGenerator,
    DummyTransformerVisionInputGenerator,
    DummyVisionInputGenerator,
    NormalizedConfig,
)
from torch import Tensor, nn

from ..engines.exported import plain_group_norm, precomputed
from ..generators.denoising import guidance_batch
from ..generators.latent_diffusion import LatentDiffusion
from ..heads.minigpt5 import FeatureMapper

BATCH = 2  # of the exported example: nothing of size 1, which torch.export takes for a constant
LATENT = {0: "batch", 2: "height", 3: "width"}
ROWS = {0: "batch", 1: "length"}


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph.

    Args:
        name: of its folder.
        module: takes the inputs in their order and gives a tuple of the outputs.
        inputs: an example; nothing of size 1 where it may change.
        axes: name of an input -> dimension -> its name, where it may change. The same name is the same size.
        config: what a reader of the file may want to know, as diffusers writes it.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    config: dict[str, Any] = field(default_factory=dict)


class _Call(nn.Module):
    """A function of tensors whose weights are those of `part`."""

    def __init__(self, part: nn.Module, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.part, self.function = part, function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.function(*tensors)


def components(
    diffusion: LatentDiffusion,
    mapper: FeatureMapper | None,
    unconditional: Tensor | None,
    num_vokens: int,
    split: bool,
    opset: int = 23,
) -> dict[str, Callable[[], Component]]:
    """The components of a model by name, each made when called.

    Args:
        mapper: None without the two that need it.
        unconditional: (1, L, C), the other half of guidance.
        split: also `condition` and `denoiser`: what is constant over the steps, and the denoiser that takes it.
    """
    known: dict[str, Callable[[], Component]] = {}
    if mapper is not None and unconditional is not None:
        known["mapper"] = lambda: mapper_component(mapper, unconditional, num_vokens)
    name = "unet" if hasattr(diffusion, "unet") else "transformer"
    known[name] = lambda: (_unet if name == "unet" else _transformer)(diffusion)
    known["vae_decoder"] = lambda: vae_decoder(diffusion)
    if split:
        if mapper is not None and unconditional is not None:
            known["condition"] = lambda: _condition(diffusion, mapper, unconditional, num_vokens)
        known["denoiser"] = lambda: denoiser(diffusion, opset)
    return known


def mapper_component(mapper: FeatureMapper, unconditional: Tensor, num_vokens: int) -> Component:
    """States (B, N, D) -> condition (B, L, C), and the constant one of guidance's other half (1, L, C); for Stable
    Diffusion 3 without the pooled vector in their last rows, which are outputs of their own, (B, P)."""
    config, constant = mapper.config, unconditional.to(mapper.mlp[0].weight).clone()
    names: tuple[str, ...] = ("condition", "unconditional")
    if config.pooled:
        names = "condition", "pooled", "unconditional", "unconditional_pooled"

    def parts(rows: Tensor) -> tuple[Tensor, ...]:
        return (rows[:, :-1], rows[:, -1, : config.pooled]) if config.pooled else (rows,)

    constants = [part.clone() for part in parts(constant)]
    example = constant.new_ones(BATCH, num_vokens, config.llm_width)
    module = _Call(mapper, lambda states: (*parts(mapper(states)), *constants))
    return Component(
        name="mapper", module=module, inputs={"states": example}, outputs=names, axes={"states": {0: "batch"}}
    )


def _unet(diffusion: LatentDiffusion) -> Component:
    unet = diffusion.denoiser
    config = NormalizedConfig(
        unet.config,
        allow_new=True,
        num_channels="in_channels",
        hidden_size="cross_attention_dim",
        vocab_size="norm_num_groups",
    )
    makers = DummyVisionInputGenerator, DummyTransformerTimestepInputGenerator, DummySeq2SeqDecoderTextInputGenerator
    axes = {"sample": LATENT, "timestep": {0: "batch"}, "encoder_hidden_states": ROWS}
    return Component(
        name="unet",
        module=_Call(unet, lambda *tensors: unet(*tensors, return_dict=False)),
        inputs=_dummies(config, makers, tuple(axes), diffusion),
        outputs=("out_sample",),
        axes=axes,
        config=dict(unet.config),
    )


def _transformer(diffusion: LatentDiffusion) -> Component:
    transformer = diffusion.denoiser
    config = NormalizedConfig(
        transformer.config,
        allow_new=True,
        num_channels="in_channels",
        vocab_size="attention_head_dim",
        hidden_size="joint_attention_dim",
    )
    makers = DummyTransformerVisionInputGenerator, DummyTransformerTextInputGenerator
    makers += (DummyTransformerTimestepInputGenerator,)
    inputs = _dummies(config, makers, ("hidden_states", "encoder_hidden_states"), diffusion)
    # Not by optimum: its generator of this name asks for an attribute that it does not have (2.3).
    inputs["pooled_projections"] = inputs["hidden_states"].new_ones(BATCH, diffusion.pooled_width)
    inputs |= _dummies(config, makers, ("timestep",), diffusion)
    axes = {"hidden_states": LATENT, "encoder_hidden_states": ROWS, "pooled_projections": {0: "batch"}}
    axes |= {"timestep": {0: "batch"}}
    return Component(
        name="transformer",
        module=_Call(transformer, lambda *tensors: transformer(*tensors, return_dict=False)),
        inputs=inputs,
        outputs=("out_hidden_states",),
        axes=axes,
        config=dict(transformer.config),
    )


def vae_decoder(diffusion: LatentDiffusion) -> Component:
    """Latents (B, C, h, w), already divided by the VAE's scale, to pixels (B, 3, H, W)."""
    vae = diffusion.vae
    config = NormalizedConfig(vae.config, allow_new=True, num_channels="latent_channels")
    return Component(
        name="vae_decoder",
        module=_Call(vae, lambda latents: vae.decode(latents, return_dict=False)),
        inputs=_dummies(config, (DummyVisionInputGenerator,), ("latent_sample",), diffusion),
        outputs=("sample",),
        axes={"latent_sample": LATENT},
        config=dict(vae.config),
    )


def denoiser(diffusion: LatentDiffusion, opset: int) -> Component:
    """The denoiser as a step: latents, a step's row for each, and what `condition` gives."""
    parts, model = precomputed(diffusion, opset), diffusion.denoiser
    length, width = diffusion.condition_shape
    example = torch.ones(BATCH, length, width, dtype=model.dtype, device=model.device)
    table, context = parts.constants(torch.ones(2, device=model.device), example)
    inputs = {"sample": example.new_ones(BATCH, model.config.in_channels, *_sides(diffusion))}
    inputs |= {"row": table[0].expand(BATCH, -1).contiguous()}
    inputs |= {f"context_{i}": part.contiguous() for i, part in enumerate(context)}
    return Component(
        name="denoiser",
        module=_Call(parts.model, lambda latents, row, *context: parts(latents, row, list(context))[:1]),
        inputs=inputs,
        outputs=("out_sample",),
        axes={name: {0: "batch"} for name in inputs} | {"sample": LATENT},
    )


def _condition(diffusion: LatentDiffusion, mapper: FeatureMapper, unconditional: Tensor, num_vokens: int) -> Component:
    """States (B, N, D) and timesteps (n) -> the table of rows and the context of `denoiser`, for R = 2B rows."""
    parts, constant = precomputed(diffusion), unconditional.to(mapper.mlp[0].weight)
    states = constant.new_ones(BATCH, num_vokens, mapper.config.llm_width)
    timesteps = torch.ones(3, device=states.device)

    def run(states: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        table, context = parts.constants(timesteps, guidance_batch(mapper(states), constant, 2.0))
        return table, *(part.contiguous() for part in context)

    count = len(run(states, timesteps)) - 1
    return Component(
        name="condition",
        module=_Call(nn.ModuleList([mapper, diffusion.denoiser]), run),
        inputs={"states": states, "timesteps": timesteps},
        outputs=("table", *(f"context_{i}" for i in range(count))),
        axes={"states": {0: "batch"}, "timesteps": {0: "steps"}},
    )


class Float32GroupNorm(nn.GroupNorm):
    """GroupNorm for opsets before 21, which have none: what stands for it there would have statistics in half."""

    def forward(self, x: Tensor) -> Tensor:
        return plain_group_norm(x, self.weight, self.bias, self.num_groups, self.eps, False)


def latent_unit(diffusion: LatentDiffusion) -> int:
    """Height and width of latents are multiples of this."""
    config = diffusion.denoiser.config
    return config.patch_size if "patch_size" in config else 2 ** (len(config.block_out_channels) - 1)


def _sides(diffusion: LatentDiffusion) -> tuple[int, int]:
    """Height and width of the example's latents."""
    unit = latent_unit(diffusion)
    return 2 * unit, 3 * unit


def _dummies(
    config: NormalizedConfig, makers: tuple[type[DummyInputGenerator], ...], names: tuple[str, ...], of: LatentDiffusion
) -> dict[str, Tensor]:
    """An example of each input by optimum's generators, in the model's type; timesteps stay in float32."""
    height, width = _sides(of)
    sizes = {"batch_size": BATCH, "height": height, "width": width, "sequence_length": of.condition_shape[0]}
    found = {}
    for name in names:
        own = next(maker for maker in makers if name in maker.SUPPORTED_INPUT_NAMES)
        value = own("semantic-segmentation", config, **sizes).generate(name)
        value = value[0] if isinstance(value, tuple) else value
        found[name] = value if name == "timestep" else value.to(of.denoiser.device, of.denoiser.dtype)
    return found
