"""How much GPU memory generation takes, part by part and phase by phase, estimated before weights are loaded.

Weights are counted from configurations. The LLM's cache and the activations are measured while the model's own code
runs on the meta device. T tokens, H and W pixels of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones.quantization import Quantize
from ..heads import DrawContext, Embeds, Forced, Request, Response, Sample, Step
from ..hub import Parts
from .estimate import BITS, CONTEXT, FRAGMENTS, story_length
from .meter import peak_bytes
from .parts import PHASES, memory_parts
from .plan import Plan, tile_vae
from .skeletons import generating_skeleton

if TYPE_CHECKING:
    from ..model import InterleavedModel


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a model takes, in bytes.

    Attributes:
        parameters: number of parameters and buffers of each part.
        weights: bytes of each part. The mapper is in float32.
        phases_of: when each part computes: a phase, "always" or "never".
        quantized: bytes of the LLM in 4 and in 8 bits.
        unpacked: bytes of the largest quantised matrix, which is unpacked when it is used.
        cache: the LLM's keys and values, with room for T tokens.
        activations: at the peak of "read" (a prefill of T tokens; no less is taken for "encode", as those of a vision
            tower are fewer and narrower), of "draw" (a guided step), of "decode" (the VAE) and of "tiles" (a tile).
        tokens, size: T, and (H, W).
    """

    parameters: dict[str, int]
    weights: dict[str, int]
    phases_of: dict[str, str]
    quantized: dict[Quantize, float]
    unpacked: int
    cache: int
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
    parts: Parts,
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Footprint:
    """Estimate what a model takes for one conversation; configurations are read, no weights.

    Args:
        parts: of `hub.resolve`.
        dtype: of the LLM and the generator.
        tokens: T; None is a story with five images, or the model's whole context where that is shorter.
        height, width: in pixels; the native size when None.

    Raises:
        Mgp5Error: a configuration that is missing, or not known here.
    """
    model = generating_skeleton(parts, dtype)
    backbone, generator = model.backbone, model.head.generator
    tokens = tokens or story_length(backbone)
    size = height or generator.native_size, width or generator.native_size
    cache, read = _measure_prefill(model, tokens)
    draw, decode = _measure_drawing(model, size)
    decoding = peak_bytes(decode)
    tile_vae(generator)
    tensors = {name: part.tensors for name, part in memory_parts(model).items()}
    weights = {name: sum(tensor.nbytes for tensor in own) for name, own in tensors.items()}
    linears = [m.weight.numel() for m in backbone.language.modules() if isinstance(m, nn.Linear)]
    kept = weights["LLM"] - sum(linears) * dtype.itemsize
    return Footprint(
        parameters={name: sum(tensor.numel() for tensor in own) for name, own in tensors.items()},
        weights=weights,
        phases_of={name: part.phase for name, part in memory_parts(model).items()},
        quantized={kind: kept + sum(linears) * bits / 8 for kind, bits in BITS.items()},
        unpacked=max(linears) * 2,
        cache=cache,
        activations={
            "read": read,
            "draw": draw,
            "decode": decoding,
            "tiles": peak_bytes(decode),
        },
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
        slots = torch.arange(tokens, device="meta")[None]
        cache.index.at(torch.zeros(1, dtype=torch.long, device="meta"), slots, tokens, True)
        mask = torch.zeros(1, 1, tokens, tokens, dtype=embeds.dtype, device="meta")
        hidden = backbone(embeds, slots, mask, cache)
        return backbone.logits(hidden[:, -1:]).float()

    peak = peak_bytes(prefill)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return size, peak - size


def _measure_drawing(model: InterleavedModel, size: tuple[int, int]) -> tuple[int, Callable[[], Any]]:
    """Return the bytes of drawing an image of (H, W) pixels at their peak, and what decodes it."""
    next(request for request in _drawing(model, size) if isinstance(request, Step))  # computes what all images share
    requests, decoding = _drawing(model, size), []
    peak = peak_bytes(lambda: decoding.extend(islice(filter(_decodes, requests), 1)))
    return peak, lambda: [model.head.step(request.key, [request.inputs]) for request in decoding]


def _decodes(request: Request) -> bool:
    return isinstance(request, Step) and request.key[0] == "decode"


def _drawing(model: InterleavedModel, size: tuple[int, int]) -> Iterator[Request]:
    """Draw an image on the meta device in two steps; yield each request of the head, and then answer it."""
    head = model.head
    known = {"steps": 2, "guidance": 7.5, "height": size[0], "width": size[1]}
    names = {field.name for field in fields(head.spec.image_options)}
    options = head.spec.image_options(**{name: value for name, value in known.items() if name in names})

    def states(count: int) -> Tensor:
        return torch.zeros(1, count, model.backbone.width, device="meta")

    drawing = head.draw(DrawContext(states(1), options, lambda use: torch.Generator()))
    response = None
    while True:
        try:
            request = drawing.send(response)
        except StopIteration:
            return
        yield request
        match request:
            case Forced(ids=ids):
                response = Response(states(len(ids)), ids)
            case Sample(count=count, allowed=allowed):
                response = Response(states(count), tuple(ids[0] for ids in allowed))
            case Embeds(embeds=embeds):
                response = Response(states(embeds.shape[1]))
            case Step(key=key, inputs=inputs):
                response = Response(output=head.step(key, [inputs])[0])
            case _:
                response = Response(states(1))
