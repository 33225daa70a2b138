"""How a model is held in memory: its parts, plans for them, and weights that wait on the CPU while others compute.

Generation has four phases: "encode" (vision tower), "read" (LLM), "draw" (denoiser) and "decode" (VAE). With a plan
that offloads, the weights of a phase are on the GPU only while it lasts. Neither backbones nor generators know of it:
`Offload` wraps their methods from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import chain, product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones.quantization import TORCHAO, Quantize
from ..errors import Mgp5Error
from ..options import Backend

if TYPE_CHECKING:
    from ..model import InterleavedModel

PHASES = ("encode", "read", "draw", "decode")
# Methods of a backbone and of a generator, by the phase in which they compute.
BACKBONE_METHODS = {"encode": ("encode_images", "vision_tokens"), "read": ("embed", "forward", "logits", "new_cache")}
GENERATOR_METHODS = {"draw": ("predict", "begin", "step"), "decode": ("decode", "moments")}
CPU = torch.device("cpu")
TILE = 64  # latents along a side: in smaller tiles it shows that each is normalised on its own


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is held in memory: bits of the LLM's layers, whether parts wait on the CPU until their phase, and
    whether the VAE decodes images above 64 x 64 latents in tiles, which changes them a little."""

    quantize: Quantize = "none"
    offload: bool = False
    tiling: bool = False
    why: str = ""  # one line for the user

    @property
    def moves_llm(self) -> bool:
        """Whether the LLM waits too. Layers of 8 bits keep tensors that bitsandbytes does not move before 0.48."""
        return self.offload and self.quantize != "8bit"

    @property
    def name(self) -> str:
        """The plan in words."""
        bits = [] if self.quantize == "none" else [f"LLM in {self.quantize[0]} bits"]
        bits = [f"LLM and denoiser in {self.quantize}"] if self.quantize in TORCHAO else bits
        return ", ".join(bits + ["offload"] * self.offload + ["VAE tiling"] * self.tiling) or "full"

    def engine(self, backend: Backend | None) -> Backend | None:
        """Return the engine that goes with the plan. Raises Mgp5Error if `backend` needs weights to stay."""
        if self.offload and backend not in (None, "auto", "eager"):
            raise Mgp5Error(
                f"--backend {backend} needs weights that stay on the GPU, and this memory mode moves them",
                "take --backend eager, or --memory full",
                usage=True,
            )
        return "eager" if self.offload and backend == "auto" else backend


def memory_plans(quantize: Quantize = "none") -> list[Plan]:
    """Return all plans, from the one that takes most memory and least time."""
    bits: list[Quantize] = ["none", "4bit"] if quantize == "none" else [quantize]
    moves = (False,) if quantize in TORCHAO else (False, True)  # its tensors are not moved by their data
    choices = product(bits, moves, (False, True))
    return [Plan(quantize=kind, offload=offload, tiling=tiling) for kind, offload, tiling in choices]


class MemoryPart(NamedTuple):
    """A part of a model: when it computes, its modules, and their parameters and buffers without those of earlier
    parts. It computes in one of PHASES, or it is on the GPU "always" or "never"."""

    phase: str
    modules: list[nn.Module]
    tensors: list[Tensor]


def memory_parts(model: InterleavedModel) -> dict[str, MemoryPart]:
    """Return the parts of a model by name: LLM, vision tower, and those that its head lists."""
    backbone = model.backbone
    language = [m for m in (backbone.language, backbone.lm_head, backbone.prefix) if m is not None]
    rows = [*(("LLM", "read", module) for module in language), ("vision tower", "encode", backbone)]
    for name, part in model.head.parts().items():
        if part.phase or part.saved:
            rows.append((name, part.phase or "always", part.module))
        else:  # at most they encode the empty text, once
            rows.append(("text encoders" if name.startswith("text") else name, "never", part.module))
    parts: dict[str, MemoryPart] = {}
    taken: set[int] = set()
    for name, phase, module in rows:
        part = parts.setdefault(name, MemoryPart(phase, [], []))
        part.modules.append(module)
        new = {id(t): t for t in chain(module.parameters(), module.buffers()) if id(t) not in taken}
        part.tensors.extend(new.values())
        taken |= new.keys()
    return parts


def tile_vae(generator: Any) -> None:
    """Let the VAE decode large images in overlapping tiles."""
    if (vae := getattr(generator, "vae", None)) is None:  # that of codes decodes images of one size, a small one
        return
    size = generator.native_size
    vae.enable_tiling()
    vae.tile_sample_min_size = TILE * (size // generator.latent_shape(size, size)[1])
    vae.tile_latent_min_size = TILE


def place(model: InterleavedModel, plan: Plan, device: torch.device) -> Offload | None:
    """Put a loaded model where the plan wants it; text encoders stay on the CPU."""
    if (generator := getattr(model.head, "generator", None)) is not None:
        generator.text_device = CPU
    if plan.tiling:
        tile_vae(model.head.generator)
    if plan.offload:
        return Offload(model, device, llm=plan.moves_llm)
    for part in memory_parts(model).values():
        for module in part.modules if part.phase != "never" else ():
            module.to(device)
    return None


class Offload:
    """Moves the weights of a merged model between the CPU and `device` as phases begin.

    Methods that compute begin their phase, which costs nothing while it lasts. Only the data of tensors moves, so all
    modules that share them see it. The waiting copy is kept, as nothing trains here: leaving a phase copies nothing.

    Attributes:
        parts: phase -> the tensors that move; without those of the LLM where `llm` is False.
        phase: the one that lasts.
    """

    def __init__(self, model: InterleavedModel, device: torch.device, *, llm: bool = True) -> None:
        self.device, self.phase = device, ""
        self.parts: dict[str, list[Tensor]] = {}
        self._waiting: dict[int, Tensor] = {}
        if not llm:
            model.backbone.to(device)
        for part in memory_parts(model).values():
            if part.phase == "always":
                for module in part.modules:
                    module.to(device)
            elif part.phase != "never" and (llm or part.phase != "read"):
                self.parts.setdefault(part.phase, []).extend(part.tensors)
        for phase in self.parts:
            self._leave(phase)
        self._wrap(model)
        self.enter("draw")  # engines look at where the denoiser is

    def _wrap(self, model: InterleavedModel) -> None:
        """Let the methods of backbone and generator, and the head's steps and the modules of its parts, begin their
        phases."""
        for part in model.head.parts().values():
            if part.phase:
                part.module.register_forward_pre_hook(lambda *_, phase=part.phase: self.enter(phase))
        owners = [(model.backbone, BACKBONE_METHODS)]
        if (generator := getattr(model.head, "generator", None)) is not None:  # an engine does not call the denoiser
            owners.append((generator, GENERATOR_METHODS))
        for owner, methods in owners:
            owner.compute_device = self.device
            for phase, names in methods.items():
                for name in names:
                    if hasattr(owner, name):
                        setattr(owner, name, self._beginning(phase, getattr(owner, name)))

        model.head.step = self._by_key(model.head.step)  # a head need not call the `forward` of its parts

    def _by_key(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def call(key: tuple[Any, ...], inputs: list[Any]) -> list[Any]:
            self.enter("decode" if key[0] == "decode" else "draw")
            return step(key, inputs)

        return call

    def _beginning(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            return method(*args, **kwargs)

        return call

    @torch.inference_mode(False)
    def enter(self, phase: str) -> None:
        """Begin a phase: its weights come to `device`, after those of the phase before have made room."""
        if phase == self.phase:
            return
        self._leave(self.phase)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next weights are of other sizes
        self.phase = phase
        for tensor in self.parts.get(phase, ()):
            tensor.data = self._waiting[id(tensor)].to(self.device, copy=True)
            _move_scales(tensor, self.device)

    @torch.inference_mode(False)
    def _leave(self, phase: str) -> None:
        for tensor in self.parts.get(phase, ()):
            if id(tensor) not in self._waiting:
                self._waiting[id(tensor)] = tensor.detach().as_subclass(Tensor).to(CPU)
            _move_scales(tensor, CPU)
            tensor.data = self._waiting[id(tensor)]


def _move_scales(tensor: Tensor, device: torch.device) -> None:
    """Move what layers of 4 bits have beside: their scales, in a state of bitsandbytes that all modules share."""
    if (state := getattr(tensor, "quant_state", None)) is not None:
        state.to(device)
