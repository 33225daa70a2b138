"""The replies of a system to the samples of a table, beside the true ones, and the numbers made of them (B rows)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..errors import Mgp5Error
from ..messages import Image, Message, Part, Text
from .intervals import mean_interval
from .relevance import align
from .tasks import Sample


@dataclass(frozen=True)
class Number:
    """A metric: its value, the number of rows behind it, and of means the ends of the 95 % interval."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    detail: dict[str, float | None] = field(default_factory=dict)


def mean(values: Tensor, groups: Sequence[str], generator: torch.Generator, **detail: float | None) -> Number:
    """Of values (B,) with its interval; the samples of a group are not independent."""
    value, low, high = mean_interval(values, groups, generator)
    return Number(value, len(values), low, high, detail)


class Replies:
    """What a system replied to the samples of a table.

    Args:
        rows: samples, true replies, and replies, those without a reply left out.
    """

    def __init__(self, rows: Sequence[tuple[Sample, Message, Message]]) -> None:
        self.rows = rows

    def pairs(self, kind: type) -> list[tuple[Part | None, Part, Sample]]:
        """Parts of a kind beside the true ones, None where one is missing."""
        found = ((align(reply.content, truth.content), sample) for sample, truth, reply in self.rows)
        return [(mine, true, sample) for pairs, sample in found for mine, true in pairs if isinstance(true, kind)]

    @cached_property
    def pictures(self) -> tuple[list[Image], list[Image], list[Sample]]:
        """Generated pictures, the true ones, and their samples; missing ones left out."""
        pairs = [pair for pair in self.pairs(Image) if pair[0]]
        if not pairs:
            raise Mgp5Error("no reply holds a picture that is due", "look at the replies")
        made, real, samples = zip(*pairs, strict=True)
        return list(made), list(real), list(samples)

    @cached_property
    def texts(self) -> tuple[list[str], list[str], list[str]]:
        """Texts, the true ones, and their groups; missing ones are ""."""
        pairs = self.pairs(Text)
        if not pairs:
            raise Mgp5Error("no true reply holds a text", "nothing to compare with")
        return [p.text if p else "" for p, _, _ in pairs], [t.text for _, t, _ in pairs], [s.group for _, _, s in pairs]

    def counts(self) -> dict[str, int]:
        """Replies, and how many lack what the true reply has."""
        lacks = {"without a picture that is due": Image, "without a text that is due": Text}
        found = {"replies": len(self.rows)}
        for name, kind in lacks.items():
            found[name] = sum(
                any(mine is None for mine, true in align(reply.content, truth.content) if type(true) is kind)
                for _, truth, reply in self.rows
            )
        return found
