"""How much GPU memory generation takes, part by part and phase by phase, estimated before weights are loaded.

Weights are counted from configurations. The LLM's cache and the activations are weighed while the model's own code runs
on the meta device. T tokens, H and W pixels of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image as pil
from torch import Tensor, nn

from ..backbones.quantization import Quantize
from ..hub import Parts, explain, read_config
from .estimate import BITS, CONTEXT, FRAGMENTS, STORY, MemoryMeter, _fused_attention

if TYPE_CHECKING:
    from ..model import InterleavedModel
    from .offload import Plan

PICTURES = 5  # of the conversation that is planned for


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a model takes, in bytes.

    Attributes:
        parameters: of each part: LLM, vision tower, mapper, denoiser, VAE, text encoders. These last never go to the
            GPU: at most they encode the empty text, once.
        weights: of each part. The mapper is in float32.
        quantized: of the LLM in 4 and 8 bits.
        unpacked: the largest matrix of few bits, which is unpacked when it is used.
        cache: the LLM's keys and values, with room for T tokens.
        activations: at the peak of "read" (a prefill of T tokens; no less is taken for "see", as a vision tower's are
            fewer and narrower), of "draw" (a guided step), of "decode" (the VAE) and of "tiles" (the VAE's tiles).
        tokens, size: T, and (H, W).
    """

    parameters: dict[str, int]
    weights: dict[str, int]
    quantized: dict[Quantize, float]
    unpacked: int
    cache: int
    activations: dict[str, int]
    tokens: int
    size: tuple[int, int]

    def phases(self, plan: Plan) -> dict[str, float]:
        """Bytes on the GPU in each phase, CUDA's context and the allocator's gaps among them."""
        llm = self.quantized.get(plan.quantize, self.weights["LLM"])
        own = {"see": self.weights["vision tower"], "read": llm}
        own |= {"draw": self.weights["denoiser"], "decode": self.weights["VAE"]}
        active = self.activations | {"see": self.activations["read"]}
        active["read"] += self.unpacked if plan.quantize in self.quantized else 0
        active["decode"] = self.activations["tiles"] if plan.tiling else active["decode"]
        always = self.weights["mapper"] + self.cache + CONTEXT
        stay = set(own) if not plan.offload else set() if plan.moves_llm else {"read"}
        return {
            phase: always + (1 + FRAGMENTS) * active[phase] + sum(own[part] for part in {phase} | stay) for phase in own
        }

    def total(self, plan: Plan) -> float:
        """Bytes on the GPU at most."""
        return max(self.phases(plan).values())


def footprint(
    parts: Parts,
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Footprint:
    """The estimate for one conversation; configurations are read, no weights.

    Args:
        parts: of `hub.resolve`.
        dtype: of the LLM and the diffusion model.
        tokens: T; None is a story with five pictures, or the model's whole context where that is shorter.
        height, width: in pixels; the native size when None.

    Raises:
        Mgp5Error: a configuration that is missing, or not known here.
    """
    from .offload import tile

    model = _shape(parts, dtype)
    backbone, diffusion = model.backbone, model.head.generator
    if tokens is None:
        (slots,) = backbone.slots(backbone.preprocess([pil.new("RGB", (640, 480))]))
        tokens = min(STORY + PICTURES * slots, backbone.context_length)
    size = height or diffusion.native_size, width or diffusion.native_size
    cache, read = _read(model, tokens)
    draw, latents = _draw(model, size)
    decode = _peak(diffusion.decode, latents)
    tile(diffusion)
    counts, sizes = _weights(model)
    linears = [m.weight.numel() for m in backbone.language.modules() if isinstance(m, nn.Linear)]
    kept = sizes["LLM"] - sum(linears) * dtype.itemsize
    return Footprint(
        parameters=counts,
        weights=sizes,
        quantized={kind: kept + sum(linears) * bits / 8 for kind, bits in BITS.items()},
        unpacked=max(linears) * 2,
        cache=cache,
        activations={"read": read, "draw": draw, "decode": decode, "tiles": _peak(diffusion.decode, latents)},
        tokens=tokens,
        size=size,
    )


def _shape(parts: Parts, dtype: torch.dtype) -> InterleavedModel:
    """The model on the meta device, as it generates: what was trained is merged."""
    from ..config import model_config_from
    from ..heads import head_class
    from ..loading import CONFIG, assemble
    from ..model import InterleavedModel
    from .skeletons import backbone_shape, generator_shape

    with torch.device("meta"):
        try:
            backbone = backbone_shape(parts.mllm)
        except (OSError, ValueError) as error:
            raise explain(error, parts.mllm) from error
        generator = generator_shape(parts.diffusion)
        backbone.to(dtype), generator.to(dtype)
        if parts.trained is None:
            return assemble(backbone, generator, parts.mllm, parts.diffusion)
        place = parts.trained / CONFIG
        config = model_config_from(read_config(place), str(place))
        return InterleavedModel(backbone, head_class(config.head)(generator, config.head_config), config)


def _weights(model: InterleavedModel) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters and bytes of each part."""
    backbone, diffusion = model.backbone, model.head.generator
    modules = {"LLM": [backbone.language, backbone.lm_head], "vision tower": [backbone], "mapper": [model.head.mapper]}
    modules |= {"denoiser": [diffusion.denoiser], "VAE": [diffusion.vae], "text encoders": [diffusion]}
    seen: set[int] = set()
    counts, sizes = {}, {}
    for part, own in modules.items():  # what an earlier part has is not counted again
        tensors = {id(t): t for module in own for t in (*module.parameters(), *module.buffers()) if id(t) not in seen}
        seen |= tensors.keys()
        counts[part] = sum(t.numel() for t in tensors.values())
        sizes[part] = sum(t.nbytes for t in tensors.values())
    return counts, sizes


def _read(model: InterleavedModel, tokens: int) -> tuple[int, int]:
    """Bytes of the cache, and besides of a prefill at its peak."""
    from ..inference.decoder import Decoder

    backbone, decoder = model.backbone, Decoder(model.backbone)

    def prefill() -> Tensor:
        embeds = backbone.embed(torch.zeros(1, tokens, dtype=torch.long, device="meta"), [])
        return backbone.logits(decoder.feed([0], embeds)[:, -1:]).float()

    peak = _peak(prefill)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in decoder.cache.layers)
    return size, peak - size


def _draw(model: InterleavedModel, size: tuple[int, int]) -> tuple[int, Tensor]:
    """Bytes of mapping and guided steps at their peak, and the latents."""
    mapper, latents = model.head.mapper, []

    def draw() -> None:
        condition = mapper(torch.zeros(1, model.head.num_vokens, model.backbone.width, device="meta"))
        options: dict[str, Any] = {"height": size[0], "width": size[1], "generators": [torch.Generator()]}
        latents[:] = list(model.head.generator.draw(condition, condition, steps=2, **options))[-1:]

    return _peak(draw), latents[0]


class _Weigh(MemoryMeter):
    """Weighs convolutions with copies of what they take and give: libraries lay these out anew (cuDNN, oneDNN)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket is torch.ops.aten.convolution:
            self.peak = max(self.peak, self.live + sum(tensor.nbytes for tensor in (*args[:2], output)))
        return output


@torch.no_grad()
def _peak(run: Any, *args: Any) -> int:
    """Bytes of tensors that `run` makes, at most at once; attention keeps no (T, T) matrix."""
    with _fused_attention(), _Weigh() as scale:
        run(*args)
    return scale.peak
