"""Memory plans: which fits the GPU, and where the parts of a model wait while others compute.

Generation has four phases: "encode" (vision tower), "read" (LLM), "draw" (denoiser) and "decode" (VAE). With a plan
that offloads, the weights of a phase are on the GPU only while it lasts. Neither backbones nor generators know of it:
`Offload` wraps their methods from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from ..backbones.quantization import Quantize
from ..errors import Mgp5Error
from ..files import GiB
from ..hub import Parts
from ..options import Memory
from .generation import Footprint, footprint
from .parts import memory_parts
from .plan import Plan, memory_plans, tile_vae

if TYPE_CHECKING:
    from ..model import InterleavedModel

CPU = torch.device("cpu")
# Methods of a backbone and of a generator, by the phase in which they compute.
BACKBONE_METHODS = {"encode": ("encode_images",), "read": ("embed", "forward", "logits", "new_cache")}
GENERATOR_METHODS = {"draw": ("draw", "predict", "begin", "step"), "decode": ("decode", "moments")}


def select_memory_plan(
    memory: Memory, parts: Parts, device: torch.device, dtype: torch.dtype, quantize: Quantize = "none"
) -> Plan:
    """Return the plan of a memory mode: `full` keeps everything on the GPU, `low` saves all it can, `auto` takes the
    first of `memory_plans` that fits what is free.

    Args:
        parts: where the model is; only its configurations are read.
        dtype: of the LLM and the generator.
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


def place(model: InterleavedModel, plan: Plan, device: torch.device) -> Offload | None:
    """Put a loaded model where the plan wants it; text encoders stay where they are."""
    if plan.tiling:
        tile_vae(model.head.generator)
    if plan.offload:
        return Offload(model, device, llm=plan.moves_llm)
    for part in memory_parts(model).values():
        for module in part.modules if part.phase != "never" else ():
            module.to(device)
    return None


class Offload:
    """Moves the weights of a model between two devices as phases begin.

    Methods that compute begin their phase, which costs nothing while it lasts. Only the data of tensors moves, so all
    modules that share them see it. The waiting copy is kept, as nothing trains here: leaving a phase copies nothing.

    Args:
        model: loaded and merged, on any device.
        device: where it computes.
        waiting: where parts wait.
        llm: whether the LLM moves, or stays on `device`.

    Attributes:
        parts: phase -> the tensors that move.
        phase: the one that lasts, "" before the first.
    """

    def __init__(
        self, model: InterleavedModel, device: torch.device, waiting: torch.device = CPU, *, llm: bool = True
    ) -> None:
        self.device, self.waiting, self.phase = device, waiting, ""
        if not llm:
            model.backbone.to(device)
        parts = memory_parts(model).values()
        for module in (module for part in parts if part.phase == "always" for module in part.modules):
            module.to(device)
        self.parts: dict[str, list[Tensor]] = {}
        for part in parts:
            if part.phase not in ("always", "never") and (llm or part.phase != "read"):
                self.parts.setdefault(part.phase, []).extend(part.tensors)
        self._kept: dict[int, Tensor] = {}
        for tensors in self.parts.values():
            self._leave(tensors)
        for part in model.head.parts().values():
            if part.phase:
                part.module.register_forward_pre_hook(lambda *_, phase=part.phase: self.enter(phase))
        owners = [(model.backbone, BACKBONE_METHODS)]
        if (generator := getattr(model.head, "generator", None)) is not None:  # an engine does not call the denoiser
            owners.append((generator, GENERATOR_METHODS))
        for owner, methods in owners:
            owner.compute_device = device
            for phase, names in methods.items():
                for name in names:
                    if hasattr(owner, name):
                        setattr(owner, name, self._beginning(phase, getattr(owner, name)))
        self.enter("draw")  # engines look at where the denoiser is

    def enter(self, phase: str) -> None:
        """Begin a phase: its weights come to `device`, after those of the phase before have made room."""
        if phase == self.phase:
            return
        if self.phase in self.parts:
            self._leave(self.parts[self.phase])
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the next weights are of other sizes
        self.phase = phase
        for tensor in self.parts.get(phase, ()):
            self._bring(tensor)

    def _beginning(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that begins its phase, and does so before each item that it yields."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            result = method(*args, **kwargs)
            return self._during(phase, result) if isinstance(result, Iterator) else result

        return call

    def _during(self, phase: str, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.enter(phase)  # others may have computed since the item before
            try:
                item = next(items)
            except StopIteration:
                return
            yield item

    @torch.inference_mode(False)
    def _bring(self, tensor: Tensor) -> None:
        tensor.data = self._kept[id(tensor)].to(self.device, copy=True)
        _move_scales(tensor, self.device)

    @torch.inference_mode(False)
    def _leave(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) not in self._kept:
                self._kept[id(tensor)] = tensor.detach().as_subclass(Tensor).to(self.waiting)
            _move_scales(tensor, self.waiting)
            tensor.data = self._kept[id(tensor)]


def _move_scales(tensor: Tensor, device: torch.device) -> None:
    """Move what layers of 4 bits have beside: their scales, in a state of bitsandbytes that all modules share."""
    if (state := getattr(tensor, "quant_state", None)) is not None:
        state.to(device)
