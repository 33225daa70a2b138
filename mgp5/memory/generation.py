"""How much GPU memory generation takes, part by part and phase by phase, and the first plan that fits.

Weights are counted from configurations. The LLM's cache and the activations are measured while the model's own code
runs on the meta device. T tokens, H and W pixels of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from ..backbones.kv_cache import read
from ..backbones.quantization import Quantize
from ..errors import Mgp5Error
from ..files import GiB
from ..heads import DrawContext, Embeds, Forced, Head, Request, Response, Sample, Step
from ..hub import Parts
from ..options import Memory
from .estimate import BITS, CONTEXT, FRAGMENTS, story_length
from .meter import peak_bytes
from .offload import PHASES, Plan, memory_parts, memory_plans, tile_vae
from .skeletons import generating_skeleton

if TYPE_CHECKING:
    from ..model import InterleavedModel


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a model takes, in bytes, of T tokens and an image of (H, W) pixels."""

    parameters: dict[str, int]  # number of parameters and buffers of each part
    weights: dict[str, int]  # bytes of each part; the mapper is in float32
    phases_of: dict[str, str]  # phase of each part, "always" or "never"
    quantized: dict[Quantize, float]  # the LLM in 4 and in 8 bits
    unpacked: int  # the largest quantised matrix, which is unpacked when it is used
    cache: int  # the LLM's keys and values, with room for T tokens
    # At the peak of "read" (a prefill of T tokens; no less is taken for "encode", as those of a vision tower are fewer
    # and narrower), of "draw" (a guided step of all images that are drawn at once), of "decode" (the VAE, of one image)
    # and of "tiles" (a tile of it).
    activations: dict[str, int]
    tokens: int
    size: tuple[int, int]

    def phases(self, plan: Plan) -> dict[str, float]:
        """Return the bytes on the GPU in each phase, with CUDA's context and the allocator's gaps."""
        weights = self.weights | {"LLM": self.quantized.get(plan.quantize, self.weights["LLM"])}
        sizes = dict.fromkeys((*PHASES, "always", "never"), 0.0)
        for part, phase in self.phases_of.items():
            sizes[phase] += weights[part]
        active = self.activations | {"encode": self.activations["read"]}
        active["read"] += self.unpacked if plan.quantize in self.quantized else 0
        active["decode"] = self.activations["tiles"] if plan.tiling else active["decode"]
        always = sizes["always"] + self.cache + CONTEXT
        stay = set(PHASES) if not plan.offload else set() if plan.moves_llm else {"read"}
        return {
            phase: always + (1 + FRAGMENTS) * active[phase] + sum(sizes[each] for each in {phase} | stay)
            for phase in PHASES
        }

    def total(self, plan: Plan) -> float:
        """Return the bytes on the GPU at most."""
        return max(self.phases(plan).values())


def footprint(
    parts: Parts, dtype: torch.dtype = torch.bfloat16, *, tokens: int | None = None, images: int = 1
) -> Footprint:
    """Estimate what a model takes for one conversation and images of native size, by its configurations alone.

    T is that of a story with five images by default. Raises Mgp5Error for a configuration that is missing or unknown.
    """
    model = generating_skeleton(parts, dtype)
    backbone, generator = model.backbone, model.head.generator
    tokens = tokens or story_length(model)
    cache, read = _measure_prefill(model, tokens)
    size = generator.native_size, generator.native_size
    draw, decode = _measure_drawing(model, size)
    activations = {"read": read, "draw": draw * images, "decode": peak_bytes(decode)}
    tile_vae(generator)
    activations["tiles"] = peak_bytes(decode)
    held = memory_parts(model)
    weights = {name: sum(tensor.nbytes for tensor in part.tensors) for name, part in held.items()}
    linears = [m.weight.numel() for m in backbone.language.modules() if isinstance(m, nn.Linear)]
    kept = weights["LLM"] - sum(linears) * dtype.itemsize
    return Footprint(
        parameters={name: sum(tensor.numel() for tensor in part.tensors) for name, part in held.items()},
        weights=weights,
        phases_of={name: part.phase for name, part in held.items()},
        quantized={kind: kept + sum(linears) * bits / 8 for kind, bits in BITS.items()},
        unpacked=max(linears) * 2,
        cache=cache,
        activations=activations,
        tokens=tokens,
        size=size,
    )


def _measure_prefill(model: InterleavedModel, tokens: int) -> tuple[int, int]:
    """Return the bytes of the cache, and besides those of a prefill at its peak."""
    backbone = model.backbone
    cache = backbone.new_cache()

    def prefill() -> Tensor:
        cache.reserve(tokens)
        embeds = backbone.embed(torch.zeros(1, tokens, dtype=torch.long, device="meta"), [])
        hidden = read(backbone, cache, [0], [0], embeds, torch.arange(tokens, device="meta")[None])
        return backbone.logits(hidden[:, -1:]).float()

    peak = peak_bytes(prefill)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return size, peak - size


def _measure_drawing(model: InterleavedModel, size: tuple[int, int]) -> tuple[int, Callable[[], Any]]:
    """Return the bytes of drawing an image of (H, W) pixels in two steps, at their peak, and what decodes it."""
    head, width = model.head, model.backbone.width
    options = head.spec.image_options.taking(steps=2, guidance=7.5, height=size[0], width=size[1])
    context = DrawContext(torch.zeros(1, 1, width, device="meta"), options, lambda use: torch.Generator())
    decoding = []

    def draw() -> None:
        drawing, response = head.draw(context), None
        while not (isinstance(request := drawing.send(response), Step) and request.key[0] == "decode"):
            response = _answer(request, head, width)
        decoding.append(request)

    peak = peak_bytes(draw)
    return peak, lambda: _answer(decoding[0], head, width)


def _answer(request: Request, head: Head, width: int) -> Response:
    """Answer a head with states of the LLM's width that hold nothing, or by its own step."""
    match request:
        case Step(key=key, inputs=inputs):
            return Response(output=head.step(key, [inputs])[0])
        case Forced(ids=ids):
            pass
        case Sample(allowed=allowed):
            ids = tuple(choices[0] for choices in allowed)
        case Embeds(embeds=embeds):
            ids = (0,) * embeds.shape[1]
        case _:
            ids = (0,)
    return Response(torch.zeros(1, len(ids), width, device="meta"), ids)


def select_memory_plan(
    memory: Memory, parts: Parts, device: torch.device, dtype: torch.dtype, quantize: Quantize = "none", images: int = 1
) -> Plan:
    """Return the plan of a memory mode, with at most the bits of `quantize`; `images` are drawn at once.

    `full` keeps everything on the GPU, `low` saves all it can, `auto` takes the first of `memory_plans` that fits what
    is free. Only configurations are read. Raises Mgp5Error for an unknown mode, or when nothing fits.
    """
    if memory not in get_args(Memory):
        raise Mgp5Error(f"no memory mode {memory!r}, expected {', '.join(get_args(Memory))}", "choose one", usage=True)
    if memory == "full" or (memory == "auto" and device.type == "cpu"):
        return Plan(quantize=quantize)
    if memory == "auto":
        try:
            needs = footprint(parts, dtype, images=images)
        except (RuntimeError, NotImplementedError) as error:  # its code looks into values, and on meta there are none
            raise Mgp5Error(f"no estimate for {parts.name} ({error})", "choose --memory full or low") from error
        return first_plan_that_fits(needs, torch.cuda.mem_get_info(device)[0], quantize, parts.name)
    if device.type == "cpu":
        why = "memory low: VAE tiling only, as on a CPU there is nowhere to move parts to"
        return Plan(quantize=quantize, tiling=True, why=why)
    least = memory_plans(quantize)[-1]
    return replace(least, why=f"memory low: {least.name}")


def first_plan_that_fits(needs: Footprint, free: int, quantize: Quantize = "none", name: str = "the model") -> Plan:
    """Return the first plan that fits `free` bytes; its `why` has the numbers. Raises Mgp5Error when none does."""
    plans = memory_plans(quantize)
    sizes = [needs.total(plan) / GiB for plan in plans]
    have = f"{free / GiB:.1f} GiB are free"
    for plan, size in zip(plans, sizes, strict=True):
        if size * GiB <= free:
            more = "" if plan is plans[0] else f"; {plans[0].name} would take {sizes[0]:.1f}"
            return replace(plan, why=f"memory auto: {plan.name}, about {size:.1f} GiB, and {have}{more}")
    least = f"{name} takes about {sizes[-1]:.1f} GiB of the GPU at least ({plans[-1].name}), and {have}"
    raise Mgp5Error(least, "free some, draw with --device cpu, or take a smaller model")
