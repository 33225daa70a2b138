"""How much GPU memory a training run takes, estimated without weights and without a GPU.

Weights, gradients and optimizer states are counted parameter by parameter. Activations are not a formula: one training
step runs on the meta device, through the model's own code, and every tensor that it makes is counted while it lives.

B samples, T tokens, S slots of one image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image as pil
from torch import Tensor, nn

from ..files import GiB
from ..heads.batch import Batch
from ..heads.losses import Losses, text_loss
from ..views import tables
from .host import AHEAD, HostNeeds, loaded
from .meter import MemoryMeter, fused_attention
from .offload import memory_parts

if TYPE_CHECKING:
    from rich.table import Table

    from ..config import TrainConfig
    from ..model import InterleavedModel

CONTEXT = 1.0 * GiB  # CUDA's context and the libraries' workspaces
FRAGMENTS = 0.1  # of the activations: what the allocator cannot use between them
BITS = {"4bit": 4 + 8 / 64 + 32 / (64 * 256), "8bit": 8.0}  # NF4 with doubly quantised scales; one scale a row
MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}  # bytes a parameter
CAPTION, STORY, REPLY = 72, 392, 60  # tokens of text: a caption's sample, a story's, and those with a text loss
IMAGES, PHOTO = 5, (4032, 3024)  # of a story that is planned for: number, width and height


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
    """What a run takes on one device: memory by part, operations of an update, and the T that was planned for."""

    rows: list[Row]
    flops: int
    length: int
    batch: int  # bytes of a batch, as data workers make it

    def host(self, config: TrainConfig, on_gpu: bool, workers: int) -> HostNeeds:
        """Return the bytes of the machine's memory that a process takes: batches in waiting, of which one is pinned,
        and the optimizer's state, gathered to be saved. On a CPU the whole run is there."""
        loading = loaded([(row.part, row.weights) for row in self.rows], config.quantize, on_gpu)
        batches = self.batch * (1 + AHEAD * workers)
        if not on_gpu:
            return HostNeeds(loading, self.total.total - CONTEXT + batches)
        return HostNeeds(loading, batches, batches + self.total.optimizer + self.total.gradients)

    @property
    def total(self) -> Row:
        """The sum of all rows."""
        names = [field.name for field in fields(Row)][1:]
        return Row("total", **{name: sum(getattr(row, name) for row in self.rows) for name in names})


def estimate(model: InterleavedModel, config: TrainConfig, length: int | None = None, cached: bool = False) -> Estimate:
    """Estimate memory and operations of a run by a model of `skeletons.skeleton`; a text encoder's few are left out.

    T, the `length`, is that of a caption for pretraining and of a story with five images for finetuning, if None. With
    `cached`, latents are not computed.
    """
    length = length or usual_length(model, config)
    rows, quantised = weigh(model, config)
    peak, flops = dry_run_step(model, config, length, cached)
    peak += max((p.numel() * 2 for p in quantised), default=0)  # the largest one, unpacked when it is used
    rows += Row("activations", other=peak), Row("context", other=CONTEXT + FRAGMENTS * peak)
    return Estimate(rows, flops * config.accumulation, length, _batch_bytes(model, config, length))


def weigh(model: InterleavedModel, config: TrainConfig) -> tuple[list[Row], set[nn.Parameter]]:
    """Return what each part takes without activations, and the matrices of the LLM that are quantised."""
    quantised = set()
    if config.quantize != "none":
        linears = [item for item in model.backbone.language.named_modules() if isinstance(item[1], nn.Linear)]
        quantised = {module.weight for name, module in linears if "lora_" not in name}
    rows = [_row(part, parameters, quantised, config) for part, parameters in _parameters(model).items()]
    return rows, quantised


def _batch_bytes(model: InterleavedModel, config: TrainConfig, length: int) -> int:
    """Return the bytes of the tensors of B samples with their context images."""
    target = model.head.target(pil.new("RGB", (64, 64)))
    talks = model.head.stage(config.stage).data == "conversations"
    context = model.backbone.preprocess([pil.new("RGB", PHOTO)]) if talks else {}
    images = sum(tensor.nbytes for tensor in target.values()) + IMAGES * sum(t.nbytes for t in context.values())
    return config.batch * (images + 3 * 8 * length)


def _parameters(model: InterleavedModel) -> dict[str, list[nn.Parameter]]:
    """Return every parameter once, under the part that it belongs to; what trains in the LLM is its adapter."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, part in memory_parts(model).items():
        for parameter in part.tensors:
            if isinstance(parameter, nn.Parameter):
                adapter = parameter.requires_grad and name in ("LLM", "vision tower")
                parts.setdefault("adapter" if adapter else name, []).append(parameter)
    return parts


def _row(part: str, parameters: list[nn.Parameter], quantised: set[nn.Parameter], config: TrainConfig) -> Row:
    """Count a part: what trains is held in float32, with gradients, the optimizer's moments and the moving average."""
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    bits = {p: BITS.get(config.quantize, 8.0) if p in quantised else 8 * p.element_size() for p in parameters}
    return Row(
        part,
        parameters=sum(p.numel() for p in parameters),
        trained=trained,
        weights=sum(p.numel() * bits[p] / 8 for p in parameters if not p.requires_grad) + 4 * trained,
        gradients=4 * trained,
        optimizer=trained * (MOMENTS[config.optimizer] + 4 * bool(config.ema)),
    )


def dry_run_step(model: InterleavedModel, config: TrainConfig, length: int, cached: bool = False) -> tuple[int, int]:
    """Run a step of B = `config.batch` samples of T tokens on the meta device, with fused attention; return its
    operations and, before them, the bytes at its peak, weights and their gradients apart."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    model.train()
    with fused_attention(), MemoryMeter() as meter:
        step(model, config, length, cached).total.backward()
    return meter.peak, meter.flops


def step(model: InterleavedModel, config: TrainConfig, length: int, cached: bool = False) -> Losses:
    """Return the losses of a made-up batch by the model's own parts; no value is looked into.

    Each sample draws an image, whose latents may be `cached`; context images are encoded already.
    """
    count, device, settings = config.batch, model.backbone.device, replace(config, guidance_dropout=0.0)
    ids = torch.zeros(count, length, dtype=torch.long, device=device)
    batch = _batch(model, ids, config, cached)
    if not model.head.stage(config.stage).llm:
        return model.head.losses(None, batch, settings, torch.Generator())
    batch = model.head.complete(model.backbone, batch, settings, torch.Generator())
    embeds = model.head.embed_targets(model.backbone.embed(batch.ids, []), batch)
    positions = torch.arange(length, device=device).expand(ids.shape)
    if hasattr(getattr(model.backbone.core, "model", None), "get_rope_index"):
        positions = positions.expand(3, *ids.shape)
    mask = torch.ones(count, 1, length, length, dtype=torch.bool, device=device)  # as padding makes one
    hidden = model.backbone(embeds, positions, mask)
    states = hidden[:, -min(REPLY, length) :].flatten(0, 1)
    text = text_loss(model.backbone.logits(states), states.new_zeros(len(states), dtype=torch.long))
    image = model.head.losses(hidden, batch, settings, torch.Generator())
    return Losses({"text": text}, {"text": config.text_weight}) | image


def _batch(model: InterleavedModel, ids: Tensor, config: TrainConfig, cached: bool) -> Batch:
    """Return a batch with a target image at the end of each row of ids (B, T)."""
    count, length = ids.shape
    target = model.head.target(pil.new("RGB", (64, 64)))
    stored = model.head.cached_shapes()
    live = {name: value.shape for name, value in target.items()}
    shapes = stored if cached else live | {name: stored[name] for name in ("encodings",) if name in stored}
    return Batch(
        *(ids, ids, ids),
        target_rows=tuple(range(count)),
        target_starts=(length - len(model.head.layout(target, config)[0]) - 1,) * count,
        targets={name: torch.zeros(count, *shape, device=ids.device) for name, shape in shapes.items()},
        captions=("a",) * count,
    )


def table(estimate: Estimate) -> Table:
    """Return an estimate for the terminal; the last row is the total."""
    rows = []
    for row in (*estimate.rows, estimate.total):
        counts = (f"{n / 1e6:,.2f}" if n else "" for n in (row.parameters, row.trained))
        sizes = (f"{n / GiB:.2f}" if n else "" for n in (row.weights, row.gradients, row.optimizer, row.total))
        rows.append([row.part, *counts, *sizes])
    names = ["part", "parameters (M)", "trained (M)", "weights", "gradients", "optimizer", "GiB"]
    return tables.table("", names, rows)


def usual_length(model: InterleavedModel, config: TrainConfig) -> int:
    """Return T of the samples that are planned for."""
    if model.head.stage(config.stage).data != "captions":
        return story_length(model)
    return CAPTION + model.head.spec.positions


def story_length(model: InterleavedModel) -> int:
    """Return T of a story with five images of a phone's size, at most the LLM's whole context."""
    backbone = model.backbone
    (slots,) = model.head.context_slots(backbone, backbone.preprocess([pil.new("RGB", PHOTO)]))
    return min(STORY + model.head.spec.positions + IMAGES * slots, backbone.context_length)
