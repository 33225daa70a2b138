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
from ..backbones.quantization import TORCHAO, Quantize, check_quantization
from ..device import host_memory
from ..errors import Mgp5Error
from ..files import GiB
from ..heads import DrawContext, Embeds, Forced, Head, Request, Response, Sample, Step
from ..hub import Parts
from ..options import Memory
from .estimate import BITS, CONTEXT, FRAGMENTS, story_length
from .host import HostNeeds, check_loading, loaded, surely_fits
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

    def _weights(self, plan: Plan) -> dict[str, float]:
        kind = "8bit" if plan.quantize in TORCHAO else plan.quantize  # the denoiser's convolutions stay as they are
        return self.weights | {"LLM": self.quantized.get(kind, self.weights["LLM"])}

    def host(self, plan: Plan, on_gpu: bool = True) -> HostNeeds:
        """Return the bytes of the machine's memory; text encoders are not read to generate."""
        weights = {part: size for part, size in self._weights(plan).items() if self.phases_of[part] != "never"}
        held = self.weights if plan.quantize in TORCHAO else weights  # which takes them as they were loaded
        loading = loaded([(part, held[part]) for part in weights], plan.quantize, on_gpu)
        if not on_gpu:
            return HostNeeds(loading, self.total(plan) - CONTEXT)
        moves = {*PHASES} - (set() if plan.moves_llm else {"read"}) if plan.offload else set()
        return HostNeeds(loading, sum(size for part, size in weights.items() if self.phases_of[part] in moves))

    def phases(self, plan: Plan) -> dict[str, float]:
        """Return the bytes on the GPU in each phase, with CUDA's context and the allocator's gaps."""
        weights = self._weights(plan)
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
        case Forced(ids=ids, then=then) if then:
            states = torch.zeros(1, 1 + len(ids), width, device="meta")
            return Response(states[:, 1:], ids, then(states))
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

    `full` keeps everything on the device, `low` saves all it can, `auto` takes the first of `memory_plans` that fits
    what is free, of the GPU and of the machine. Only configurations are read. Raises Mgp5Error for an unknown mode, or
    when nothing fits: in the other modes, when the weights cannot be loaded.
    """
    if memory not in get_args(Memory):
        raise Mgp5Error(f"no memory mode {memory!r}, expected {', '.join(get_args(Memory))}", "choose one", usage=True)
    check_quantization(quantize)
    on_gpu = device.type != "cpu"
    plans = memory_plans(quantize) if on_gpu else [Plan(quantize=quantize), Plan(quantize=quantize, tiling=True)]
    plan = plans[-1 if memory == "low" else 0]
    if memory == "low":
        why = plan.name if on_gpu else "VAE tiling only, as on a CPU there is nowhere to move parts to"
        plan = replace(plan, why=f"memory low: {why}")
    measures = memory == "auto" and on_gpu
    if not measures and surely_fits(parts):
        return plan
    try:
        needs = footprint(parts, dtype, images=images)
    except (RuntimeError, NotImplementedError) as error:  # its code looks into values, and on meta there are none
        if not measures:
            return plan
        raise Mgp5Error(f"no estimate for {parts.name} ({error})", "choose --memory full or low") from error
    if memory != "auto":
        check_loading(needs.host(plan, on_gpu), parts.name)
        return plan
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else None
    return first_plan_that_fits(needs, free, quantize, parts.name)


def first_plan_that_fits(
    needs: Footprint, free: int | None, quantize: Quantize = "none", name: str = "the model"
) -> Plan:
    """Return the first plan that fits `free` bytes of a GPU, None for a CPU, and the machine's memory.

    Its `why` has the numbers. Raises Mgp5Error when none does.
    """
    on_gpu, memory = free is not None, host_memory()
    plans = [plan for plan in memory_plans(quantize) if on_gpu or not plan.offload]
    hosts = [needs.host(plan, on_gpu).most for plan in plans]
    sizes = [needs.total(plan) if on_gpu else host for plan, host in zip(plans, hosts, strict=True)]
    most = memory.free if free is None else free
    have = f"{most / GiB:.1f} GiB are free"
    for plan, size, host in zip(plans, sizes, hosts, strict=True):
        if size <= most and host <= memory.free:
            if not on_gpu and plan is plans[0]:
                return plan
            more = "" if plan is plans[0] else f"; {plans[0].name} would take {sizes[0] / GiB:.1f}"
            return replace(plan, why=f"memory auto: {plan.name}, about {size / GiB:.1f} GiB, and {have}{more}")
    of = "the GPU" if on_gpu and sizes[-1] > most else "this machine's memory"
    size = sizes[-1] if of == "the GPU" else min(hosts)
    least = f"{name} takes about {size / GiB:.1f} GiB of {of} at least ({plans[-1].name}), and "
    hint = "free some, draw with --device cpu, or take a smaller model"
    if of != "the GPU":
        have, hint = memory.told, "free some, raise the container's limit, or take a smaller model"
    raise Mgp5Error(least + have, hint)
