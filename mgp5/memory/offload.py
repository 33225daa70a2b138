"""Memory modes: which plan fits the GPU, and where the parts of a model are while it generates.

Generation has four phases: "see" (vision tower), "read" (LLM), "draw" (denoiser) and "decode" (VAE). With a plan that
offloads, the weights of a phase are on the GPU only while it lasts; the mapper, small, stays there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from ..backbones.quantization import Quantize
from ..errors import Mgp5Error
from ..files import GiB
from ..hub import Parts
from ..options import Backend
from .generation import Footprint, footprint

if TYPE_CHECKING:
    from ..generators.latent_diffusion import LatentDiffusion
    from ..model import InterleavedModel

Memory = Literal["auto", "low", "full"]
T = TypeVar("T")
CPU = torch.device("cpu")
TILE = 64  # latents along a side: in smaller tiles what is normalised over a tile is seen


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is held.

    Args:
        quantize: bits of the LLM's layers.
        offload: parts wait in the computer's memory until their phase.
        tiling: the VAE decodes pictures above 64 latents (512 pixels of Stable Diffusion) in tiles, which changes them
            a little, as each is normalised on its own.
        why: one line for the user, or "".
    """

    quantize: Quantize = "none"
    offload: bool = False
    tiling: bool = False
    why: str = ""

    @property
    def moves_llm(self) -> bool:
        """Layers of 8 bits keep tensors that bitsandbytes does not move before 0.48: they stay where they are."""
        return self.offload and self.quantize != "8bit"

    @property
    def name(self) -> str:
        """In words."""
        bits = [] if self.quantize == "none" else [f"LLM in {self.quantize[0]} bits"]
        return ", ".join(bits + ["offload"] * self.offload + ["VAE tiling"] * self.tiling) or "full"

    def engine(self, backend: Backend | None) -> Backend | None:
        """The engine that goes with it. Raises Mgp5Error for one that needs weights to stay where they are."""
        if self.offload and backend not in (None, "auto", "eager"):
            raise Mgp5Error(
                f"--backend {backend} needs weights that stay on the GPU, and this memory mode moves them",
                "take --backend eager, or --memory full",
                usage=True,
            )
        return "eager" if self.offload and backend == "auto" else backend


def select_memory_plan(
    memory: Memory, parts: Parts, device: torch.device, dtype: torch.dtype, quantize: Quantize = "none"
) -> Plan:
    """The plan of a memory mode: `full` keeps everything on the GPU, `low` is all that saves, `auto` the mildest that
    fits what is free.

    Args:
        quantize: what the user wants at least.

    Raises:
        Mgp5Error: an unknown mode, or nothing fits.
    """
    if memory not in get_args(Memory):
        raise Mgp5Error(f"no memory mode {memory!r}, expected {', '.join(get_args(Memory))}", "choose one", usage=True)
    if memory == "full" or (memory == "auto" and device.type == "cpu"):
        return Plan(quantize=quantize)
    if memory == "auto":
        try:
            needs = footprint(parts, dtype)
        except (RuntimeError, NotImplementedError) as error:  # its code looks into values, which nothing has yet
            raise Mgp5Error(f"no estimate for {parts.name} ({error})", "choose --memory full or low") from error
        return first_plan_that_fits(needs, torch.cuda.mem_get_info(device)[0], quantize, parts.name)
    if device.type == "cpu":
        why = "memory low: VAE tiling only, as on a CPU there is nowhere to move parts to"
        return Plan(quantize=quantize, tiling=True, why=why)
    least = memory_plans(quantize)[-1]
    return replace(least, why=f"memory low: {least.name}")


def memory_plans(quantize: Quantize = "none") -> list[Plan]:
    """All plans, the mildest first."""
    bits: list[Quantize] = ["none", "4bit"] if quantize == "none" else [quantize]
    choices = product(bits, (False, True), (False, True))
    return [Plan(quantize=kind, offload=offload, tiling=tiling) for kind, offload, tiling in choices]


def first_plan_that_fits(needs: Footprint, free: int, quantize: Quantize = "none", name: str = "the model") -> Plan:
    """The mildest plan that fits `free` bytes; why tells the numbers. Raises Mgp5Error when none does."""
    plans = memory_plans(quantize)
    sizes = [needs.total(plan) / GiB for plan in plans]
    have = f"{free / GiB:.1f} GiB are free"
    for plan, size in zip(plans, sizes, strict=True):
        if size * GiB <= free:
            more = "" if plan is plans[0] else f"; {plans[0].name} would take {sizes[0]:.1f}"
            return replace(plan, why=f"memory auto: {plan.name}, about {size:.1f} GiB, and {have}{more}")
    least = f"{name} takes about {sizes[-1]:.1f} GiB of the GPU at least ({plans[-1].name}), and {have}"
    raise Mgp5Error(least, "free some, draw with --device cpu, or take a smaller model")


def place(model: InterleavedModel, plan: Plan, device: torch.device) -> None:
    """Put a loaded model where the plan wants it. Text encoders stay on the CPU: at most they run once."""
    if plan.tiling:
        tile(model.head.generator)
    model.head.mapper.to(device)
    if plan.offload:
        Placement(model, device, llm=plan.moves_llm)
    else:
        for part in (model.backbone, model.head.generator.denoiser, model.head.generator.vae):
            part.to(device)


def tile(diffusion: LatentDiffusion) -> None:
    """Let the VAE decode large pictures in tiles, which overlap."""
    vae, size = diffusion.vae, diffusion.native_size
    vae.enable_tiling()
    vae.tile_sample_min_size = TILE * (size // diffusion.latent_shape(size, size)[1])
    vae.tile_latent_min_size = TILE


class Placement:
    """Moves a model's parts between two devices as phases begin; they begin by `enter`, which is cheap in a phase.

    Only the tensors' data moves: every module that shares them sees it. The waiting copy is kept, as nothing trains
    here: leaving a phase copies nothing.

    Args:
        model: loaded and merged, on any device.
        device: where it computes.
        waiting: where parts wait.
        llm: whether the LLM moves, or stays on `device`.
    """

    def __init__(
        self, model: InterleavedModel, device: torch.device, waiting: torch.device = CPU, *, llm: bool = True
    ) -> None:
        backbone, diffusion = model.backbone, model.head.generator
        self.device, self.waiting = device, waiting
        if not llm:
            backbone.to(device)
        adapter = [backbone.prefix] if backbone.prefix else []
        read = _tensors(backbone.language, backbone.lm_head, *adapter)
        see = {key: tensor for key, tensor in _tensors(backbone).items() if key not in read}
        self.parts = {"see": see, "draw": _tensors(diffusion.denoiser), "decode": _tensors(diffusion.vae)}
        if llm:
            self.parts["read"] = read
        self._kept: dict[int, Tensor] = {}
        self.phase = ""
        for part in self.parts.values():
            self._leave(part)
        backbone.placement = diffusion.placement = self
        self.enter("draw")  # engines look at where the denoiser is

    def enter(self, phase: str) -> None:
        """Begin a phase: its weights come to `device`, and those of the others make room before."""
        if phase == self.phase:
            return
        if self.phase in self.parts:
            self._leave(self.parts[self.phase])
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the next weights are of other sizes
        self.phase = phase
        if phase in self.parts:
            self._bring(self.parts[phase])

    def during(self, phase: str, steps: Iterator[T]) -> Iterator[T]:
        """The items of an iterator, each made in `phase`: others may begin and end between them."""
        while True:
            self.enter(phase)
            try:
                step = next(steps)
            except StopIteration:
                return
            yield step

    @torch.inference_mode(False)
    def _bring(self, part: dict[int, Tensor]) -> None:
        for tensor in part.values():
            tensor.data = self._kept[id(tensor)].to(self.device, copy=True)
            _move_scales(tensor, self.device)

    @torch.inference_mode(False)
    def _leave(self, part: dict[int, Tensor]) -> None:
        for key, tensor in part.items():
            if key not in self._kept:
                self._kept[key] = tensor.detach().as_subclass(Tensor).to(self.waiting)
            _move_scales(tensor, self.waiting)
            tensor.data = self._kept[key]


def _move_scales(tensor: Tensor, device: torch.device) -> None:
    """Layers of 4 bits have their scales beside, in a state of bitsandbytes, and all modules share it."""
    if (state := getattr(tensor, "quant_state", None)) is not None:
        state.to(device)


def _tensors(*modules: nn.Module) -> dict[int, Tensor]:
    """Parameters and buffers, each once."""
    return {id(tensor): tensor for module in modules for tensor in chain(module.parameters(), module.buffers())}
