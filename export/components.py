"""Parts of a model, loaded without the LLM, as modules with inputs and outputs named as in optimum's pipelines.

Letters: B batch, K vokens or codes, D width of the LLM, L and C of a condition, P of its pooled vector, n timesteps, R
guidance rows (2B), S width of a step's time embedding, Z latent channels, h and w latents; of scales T codes, Q codes
before them, V codes in all, W width, N layers, A heads and E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.exported import class_width, split_denoiser
from ..engines.scales import tabulate
from ..errors import Mgp5Error
from ..generators import load_generator
from ..generators.denoising import guidance_batch
from ..generators.latent_diffusion import LatentDiffusion
from ..generators.var import VARDecoder
from ..generators.vqvae import VQVAE
from ..heads import head_class
from ..heads.minigpt5 import FeatureMapper
from ..heads.seed import SeedHead
from ..heads.settings import model_config_from
from ..hub import read_config, resolve
from ..loading import CONFIG, WEIGHTS, read_weights

BATCH = 2  # of the example: torch.export takes a size of 1 for a constant
BATCHED, LATENT = {0: "batch"}, {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """What is exported of a model; its weights may be rounded on the way."""

    name: str  # for people
    generator: LatentDiffusion | VQVAE  # on the CPU in float32; a VQVAE with a `decoder` of scales
    source: str = ""  # folder or hub id of the generator, for its scheduler's configuration; "" leaves that out
    mapper: FeatureMapper | None = None
    coder: SeedHead | None = None  # makes conditions of codes
    decoder: VARDecoder | None = None
    unconditional: Tensor | None = None  # (1, L, C), the unconditional condition of guidance; with a mapper
    num_vokens: int = 8  # how many states the mapper takes

    @property
    def parts(self) -> dict[str, nn.Module]:  # whose hashes the manifest has
        if self.decoder is not None:
            return {"decoder": self.decoder, "vae": self.generator}
        parts = {"denoiser": self.generator.denoiser, "vae": self.generator.vae}
        parts |= {} if self.coder is None else {"detokenizer": self.coder.tokenizer.detokenizer}
        return parts | ({} if self.mapper is None else {"mapper": self.mapper})

    @property
    def sizes(self) -> dict[str, Any]:
        """Return height and width of the latents, and the length of a condition, as the manifest has them."""
        generator, native = self.generator, self.generator.native_size
        if self.decoder is not None:
            return {"native": [self.decoder.config.patch_nums[-1]] * 2}
        # Rows that are no tokens of text: a pooled vector, or an image and its noise level.
        length = generator.condition_shape[0] - bool(generator.pooled_width) - 2 * bool(class_width(generator.denoiser))
        return {"native": list(generator.latent_shape(native, native)[1:]), "length": length}


def load_exportable(name: str, components: Sequence[str] = ()) -> Exportable:
    """Load the parts of a trained model that export needs, or of one that is not trained those of its generator.

    Raises Mgp5Error if there is no such model, or the named components (none: all) need a mapper that it lacks.
    """
    parts = resolve(name)
    if parts.trained is None and (not components or {"mapper", "condition"} & {*components}):
        hint = f"train one: mgp5 train --stage pretrain --model {name}; or export --component unet, say"
        raise Mgp5Error(f"{name} has no trained mapper", hint)
    generator = load_generator(parts.diffusion, torch.float32)
    if parts.trained is None:
        return Exportable(name=name, source=parts.diffusion, generator=generator)
    path = parts.trained / CONFIG
    config = model_config_from(read_config(path), str(path))
    head = head_class(config.head)(generator, config.head_config).eval()
    part = next((part for part in ("mapper", "tokenizer", "decoder") if hasattr(head, part)), "")
    if not part:
        case = f"{name} has the head {config.head}, whose denoiser takes what no exported file does"
        raise Mgp5Error(case, "draw with --backend eager")
    start, saved = len(part) + 1, read_weights(parts.trained / WEIGHTS)
    try:
        getattr(head, part).load_state_dict({k[start:]: v.float() for k, v in saved.items() if k[:start] == f"{part}."})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise Mgp5Error(f"the {part} in {parts.trained} does not fit its config ({reason})", "copy it again") from None
    if part == "decoder":
        return Exportable(name=name, generator=generator, decoder=head.decoder)
    own = {"coder": head} if part == "tokenizer" else {"mapper": head.mapper, "num_vokens": head.num_vokens}
    if part == "mapper":
        with torch.no_grad():
            own["unconditional"] = head.unconditional(next(head.mapper.parameters()))
    return Exportable(name=name, generator=generator, source=parts.diffusion, **own)


@dataclass(frozen=True, kw_only=True)
class Component:
    """A module to export as one graph: it takes the inputs in their order and returns a tuple of the outputs."""

    name: str  # of its folder
    module: nn.Module
    inputs: dict[str, Tensor]  # an example of each, with no dynamic dimension of size 1
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]  # name of an input -> dynamic dimension -> its name; the same name, the same size
    config: dict[str, Any] = field(default_factory=dict)  # what diffusers writes beside the weights
    cases: tuple[dict[str, int], ...] = ()  # sizes of dynamic dimensions to compare at; none: those of `parity`


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
    if model.decoder is not None:
        return {"scale": partial(_scale, model.decoder), "vae_decoder": partial(_painter, generator)}
    makers: dict[str, Callable[[], Component]] = {} if model.mapper is None else {"mapper": partial(_mapper, model)}
    makers |= {} if model.coder is None else {"detokenizer": partial(_detokenizer, model.coder)}
    makers["unet" if hasattr(generator, "unet") else "transformer"] = partial(_whole_denoiser, generator)
    makers["vae_decoder"] = partial(_vae_decoder, generator)
    if split:
        makers |= {} if model.mapper is None else {"condition": partial(_condition, model)}
        makers["denoiser"] = partial(_denoiser, generator, opset)
    return makers


def latent_unit(generator: LatentDiffusion) -> int:
    """Return what height and width of the latents are multiples of."""
    if isinstance(generator, VQVAE):
        return 1
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


def _detokenizer(head: SeedHead) -> Component:
    """Codes (B, K) -> condition (B, L, C)."""
    shape = head.config.tokenizer
    codes = torch.full((BATCH, shape.queries), shape.codes - 1)
    with torch.no_grad():
        head.condition(codes)  # keeps the encoding of the empty text, which for Stable unCLIP is a part of it
    return Component(
        name="detokenizer",
        module=_Call(head.tokenizer.detokenizer, lambda codes: (head.condition(codes),)),
        inputs={"codes": codes},
        outputs=("condition",),
        axes={"codes": BATCHED},
    )


def _scale(decoder: VARDecoder) -> Component:
    """The inputs of one scale with their positions (B, T, W), classes (B) and cache (N, 2, B, A, Q, E) -> logits
    (B, T, V) and cache (N, 2, B, A, Q + T, E): one file, compared at the sizes of each scale."""
    tabulate(decoder)
    shape, sizes = decoder.config, decoder.config.sizes
    before = [sum(sizes[:scale]) for scale in range(len(sizes))]
    inputs = decoder.positions.new_ones(BATCH, sizes[-1], shape.width)
    past = inputs.new_ones(shape.depth, 2, BATCH, shape.heads, before[-1], shape.width // shape.heads)
    pairs = [(2, *pair) for pair in zip(sizes, before, strict=True)]
    return Component(
        name="scale",
        module=_Call(decoder, decoder.run_scale),
        inputs={"inputs": inputs, "classes": torch.full((BATCH,), shape.num_classes), "cache": past},
        outputs=("logits", "new_cache"),
        axes={"inputs": {0: "batch", 1: "codes"}, "classes": BATCHED, "cache": {2: "batch", 4: "past"}},
        cases=tuple(dict(zip(("batch", "codes", "past"), case, strict=True)) for case in [*pairs, (1, *pairs[-1][1:])]),
    )


def _painter(vqvae: VQVAE) -> Component:
    """Sums of scales (B, Z, h, w) -> pixels (B, 3, H, W), not clamped."""
    side = vqvae.config.patch_nums[-1]
    return Component(
        name="vae_decoder",
        module=_Call(vqvae, lambda f_hat: (vqvae.paint(f_hat),)),
        inputs={"f_hat": torch.ones(BATCH, vqvae.config.code_width, side, side)},
        outputs=("sample",),
        axes={"f_hat": BATCHED},
    )


def _whole_denoiser(generator: LatentDiffusion) -> Component:
    """The denoiser as diffusers has it: latents (B, Z, h, w), timesteps (B), condition -> prediction (B, Z, h, w)."""
    model, length = generator.denoiser, generator.condition_shape[0]
    latents, times = _latents(generator, model), torch.ones(BATCH)  # times are in float32 at any precision
    if hasattr(generator, "unet"):
        condition = latents.new_ones(BATCH, length, model.config.cross_attention_dim)
        name, inputs = "unet", {"sample": latents, "timestep": times, "encoder_hidden_states": condition}
        if width := class_width(model):
            inputs["class_labels"] = latents.new_ones(BATCH, width)
    else:
        condition = latents.new_ones(BATCH, length, model.config.joint_attention_dim)
        pooled = latents.new_ones(BATCH, generator.pooled_width)
        name, inputs = "transformer", {"hidden_states": latents, "encoder_hidden_states": condition}
        inputs |= {"pooled_projections": pooled, "timestep": times}
    first = next(iter(inputs))
    return Component(
        name=name,
        module=_Call(model, lambda *tensors: model(**dict(zip(inputs, tensors, strict=True)), return_dict=False)),
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
