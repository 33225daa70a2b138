"""How much GPU memory a training run takes, estimated without weights and without a GPU.

Weights, gradients and optimizer states are counted parameter by parameter. Activations are not a formula: one training
step runs on the meta device, through the model's own code, and every tensor that it makes is weighed while it lives.

B samples, T tokens, S slots of one picture, n vokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image as pil
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..files import GiB
from ..heads.batch import Batch
from ..heads.losses import Losses, text_loss

if TYPE_CHECKING:
    from rich.table import Table

    from ..backbones.hf import HFBackbone
    from ..config import TrainConfig
    from ..model import InterleavedModel

CONTEXT = 1.0 * GiB  # CUDA's context and the libraries' workspaces
FRAGMENTS = 0.1  # of the activations: what the allocator cannot use between them
BITS = {"4bit": 4 + 8 / 64 + 32 / (64 * 256), "8bit": 8.0}  # NF4 with doubly quantised scales; one scale a row
MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}  # bytes a parameter
CAPTION, STORY, REPLY = 80, 400, 60  # tokens of text: a caption's sample, a story's, and those with a text loss


@dataclass(frozen=True)
class Row:
    """One part of a run: numbers of parameters, and bytes."""

    part: str
    parameters: int = 0
    trained: int = 0
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.other


@dataclass(frozen=True)
class Estimate:
    """What a run takes on one device.

    Attributes:
        rows: memory, part by part.
        flops: operations of an update.
        length: T that was planned for.
    """

    rows: list[Row]
    flops: int
    length: int

    @property
    def total(self) -> Row:
        """All rows together."""
        names = [field.name for field in fields(Row)][1:]
        return Row("total", **{name: sum(getattr(row, name) for row in self.rows) for name in names})


def estimate(model: InterleavedModel, config: TrainConfig, length: int | None = None, cached: bool = False) -> Estimate:
    """Memory and operations of a run; the text encoder's operations, which are few, are left out.

    Args:
        model: from `shapes.skeleton`, on the meta device, its frozen parts in the type they are trained with.
        length: T; None is a caption's for pretraining, and that of a story with five pictures for finetuning.
        cached: latents are not computed.
    """
    rows = [_row(part, parameters, model, config) for part, parameters in _parts(model).items()]
    length = length or usual_length(model.backbone, config)
    peak, flops = dry_run_step(model, config, length, cached)
    peak += _dequantised(model, config)
    rows += Row("activations", other=peak), Row("context", other=CONTEXT + FRAGMENTS * peak)
    return Estimate(rows, flops * config.accumulation, length)


def dry_run_step(model: InterleavedModel, config: TrainConfig, length: int, cached: bool = False) -> tuple[int, int]:
    """A step of `config.batch` samples of `length` tokens: bytes at its peak, weights and their gradients apart, and
    operations. Attention is fused: it keeps no (T, T) matrix."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    model.train()
    with _fused_attention(), MemoryMeter() as scale:
        step(model, config, length, cached).total.backward()
    return scale.peak, scale.flops


def step(model: InterleavedModel, config: TrainConfig, length: int, cached: bool = False) -> Losses:
    """The losses of a made-up batch by the model's own parts; it looks into no values.

    Every sample draws a picture, whose latents may be `cached`; those that it sees are encoded already.
    """
    count, device, diffusion = config.batch, model.backbone.device, model.head.generator
    ids = torch.zeros(count, length, dtype=torch.long, device=device)
    embeds = model.backbone.embed(ids, [])
    positions = torch.arange(length, device=device).expand(ids.shape)
    if hasattr(getattr(model.backbone.core, "model", None), "get_rope_index"):
        positions = positions.expand(3, *ids.shape)
    mask = torch.ones(count, 1, length, length, dtype=torch.bool, device=device)  # as padding makes one
    hidden = model.backbone(embeds, positions, mask)
    told = hidden[:, -min(REPLY, length) :].flatten(0, 1)
    terms = {"text": text_loss(model.backbone.logits(told), told.new_zeros(len(told), dtype=torch.long))}
    size, vokens = (diffusion.native_size,) * 2, model.head.num_vokens
    channels, *latents = diffusion.latent_shape(*size)
    targets = {"encodings": torch.zeros(count, *diffusion.condition_shape, device=device)}
    if cached:
        targets["moments"] = torch.zeros(count, 2 * channels, *latents, device=device)
    else:
        targets["pixels"] = torch.zeros(count, 3, *size, device=device)
    starts = (length - vokens - 1,) * count
    batch = Batch(
        *(ids, ids, ids),
        target_rows=tuple(range(count)),
        target_starts=starts,
        targets=targets,
        captions=("a",) * count,
    )
    losses = model.head.losses(hidden, batch, replace(config, guidance_dropout=0.0), torch.Generator())
    return Losses(terms, {"text": config.text_weight}) | losses


class MemoryMeter(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations make, as long as they live; on any device.

    Attributes:
        live, peak: bytes now, and at most so far.
        flops: operations so far, of products of matrices and convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return output

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in self._sizes or key in given:
            return
        self._sizes[key] = -(-storage.nbytes() // 512) * 512  # the size of CUDA's smallest block
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def table(told: Estimate) -> Table:
    """An estimate for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    names = ("parameters (M)", "trained (M)", "weights", "gradients", "optimizer", "GiB")
    view = Table("part", *names, box=SIMPLE_HEAD)
    view.columns[0].no_wrap = True
    for column in view.columns[1:]:
        column.justify = "right"
    for row in [*told.rows, told.total]:
        counts = (f"{n / 1e6:,.2f}" if n else "" for n in (row.parameters, row.trained))
        sizes = (f"{n / GiB:.2f}" if n else "" for n in (row.weights, row.gradients, row.optimizer, row.total))
        view.add_row(row.part, *counts, *sizes, style="bold" if row.part == "total" else None)
    return view


def _parts(model: InterleavedModel) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter once, under the part that it belongs to."""
    backbone, generator = model.backbone, model.head.generator
    frozen = {id(p) for m in (backbone.language, backbone.lm_head) for p in m.parameters()}
    whose = {id(p): "denoiser" for p in generator.denoiser.parameters()}
    whose |= {id(p): "VAE" for p in generator.vae.parameters()}
    whose |= {id(p): "mapper" for p in model.head.parameters()}
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            part = "LLM" if id(parameter) in frozen else "vision tower"
            part = "adapter" if parameter.requires_grad else part
        else:
            part = whose.get(id(parameter), "text encoders")
        parts.setdefault(part, {})[name] = parameter
    return parts


def _row(part: str, parameters: dict[str, nn.Parameter], model: InterleavedModel, config: TrainConfig) -> Row:
    """What trains is held in float32, with its gradients, the optimizer's moments and the moving average."""
    quantised = _quantised(model, config) if part == "LLM" else set()
    bits = {id(p): BITS[config.quantize] for p in quantised}
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    frozen = [p for p in parameters.values() if not p.requires_grad]
    weights = sum(p.numel() * bits.get(id(p), 8 * p.element_size()) / 8 for p in frozen)
    return Row(
        part,
        parameters=sum(p.numel() for p in parameters.values()),
        trained=trained,
        weights=weights + 4 * trained,
        gradients=4 * trained,
        optimizer=trained * (MOMENTS[config.optimizer] + 4 * bool(config.ema)),
    )


def _quantised(model: InterleavedModel, config: TrainConfig) -> set[nn.Parameter]:
    if config.quantize == "none":
        return set()
    linears = (
        m for name, m in model.backbone.language.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name
    )
    return {linear.weight for linear in linears}


def _dequantised(model: InterleavedModel, config: TrainConfig) -> int:
    """The largest matrix, which is unpacked when it is used."""
    return max((p.numel() * 2 for p in _quantised(model, config)), default=0)


def usual_length(backbone: HFBackbone, config: TrainConfig) -> int:
    """T of the samples that are planned for."""
    if config.stage == "pretrain":
        return CAPTION
    slots = backbone.slots(backbone.preprocess([pil.new("RGB", (640, 480))]))
    return min(STORY + 5 * slots[0], backbone.context_length)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch would choose the plain attention, which keeps its weights (T, T)."""
    plain = F.scaled_dot_product_attention

    def fused(
        query: Tensor,  # (B, heads, T, d)
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if attn_mask is not None:  # the kernel adds it: one of numbers is made in each layer
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        operation = torch.ops.aten._scaled_dot_product_efficient_attention
        return operation(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
