"""The parts of a model that memory is counted by, and that offloading moves."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..model import InterleavedModel

PHASES = ("encode", "read", "draw", "decode")  # vision tower, LLM, image generator, its decoder to pixels


class MemoryPart(NamedTuple):
    """A part of a model.

    Attributes:
        modules: what it consists of; they may share tensors with earlier parts.
        tensors: its parameters and buffers, each once; what an earlier part has is left out.
        phase: the one of PHASES in which it computes; "always": it stays on the GPU; "never": it stays off.
    """

    modules: tuple[nn.Module, ...]
    tensors: list[Tensor]
    phase: str


def memory_parts(model: InterleavedModel) -> dict[str, MemoryPart]:
    """Return the parts of a model by name: LLM, vision tower, and those that its head lists."""
    backbone = model.backbone
    prefix = () if backbone.prefix is None else (backbone.prefix,)
    modules: dict[str, tuple[tuple[nn.Module, ...], str]] = {
        "LLM": ((backbone.language, backbone.lm_head, *prefix), "read"),
        "vision tower": ((backbone,), "encode"),
    }
    for name, part in model.head.parts().items():
        if part.phase or part.saved:
            modules[name] = (part.module,), part.phase or "always"
        else:  # at most they encode the empty text, once
            modules["text encoders"] = (*modules.get("text encoders", ((), ""))[0], part.module), "never"
    taken: set[int] = set()
    parts = {}
    for name, (members, phase) in modules.items():
        tensors = {id(t): t for member in members for t in chain(member.parameters(), member.buffers())}
        parts[name] = MemoryPart(members, [tensors[key] for key in tensors.keys() - taken], phase)
        taken |= tensors.keys()
    return parts
