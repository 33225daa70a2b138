"""The replies of a system to the samples of a table, beside the true ones, and the numbers made of them (B rows)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import Mgp5Error
from ..messages import Image, Message, Part, Text
from .metrics import group_means, mean_interval
from .tasks import Sample

if TYPE_CHECKING:
    from .encoders import Encoders


@dataclass(frozen=True)
class Number:
    """A metric: its value, the number of rows behind it, and of means the ends of the 95 % interval."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    detail: dict[str, float | None] = field(default_factory=dict)


def mean(values: Tensor, groups: Sequence[str], generator: torch.Generator, **detail: float | None) -> Number:
    """Return the mean of values (B,) with its interval over groups, see `mean_interval`."""
    value, low, high = mean_interval(values, groups, generator)
    return Number(value, len(values), low, high, detail)


@dataclass(frozen=True)
class Metric:
    """One number of a report.

    Attributes:
        measure: makes it of replies; raises Mgp5Error where there is no number.
        needs: names of `weights.WEIGHTS`, and packages of the extras eval and fid.
        unit: range, and what the number is: a mean of "rows", or one "number" of the whole set.
        protocol: whose it is; "the release" is MiniGPT-5's code.
        better: which way is better.
    """

    measure: Callable[[Replies, Encoders, torch.Generator], Number]
    needs: tuple[str, ...]
    unit: str
    protocol: str
    better: Literal["higher", "lower"] = "higher"


def align(generated: Sequence[Part], real: Sequence[Part]) -> list[tuple[Part | None, Part]]:
    """Pair true parts with the generated part of the same kind and number, None where it is missing, as MMDialog does.
    Generated parts beyond have no partner."""
    pairs: list[tuple[Part | None, Part]] = []
    for kind in (Text, Image):
        ours, true = ([part for part in parts if isinstance(part, kind)] for parts in (generated, real))
        pairs += zip_longest(ours[: len(true)], true)
    return pairs


class Replies:
    """What a system replied to the samples of a table: rows of samples, true replies, and replies."""

    def __init__(self, rows: Sequence[tuple[Sample, Message, Message]]) -> None:
        self.rows = rows
        self.groups = [sample.group for sample, _, _ in rows]

    def _pairs(self, kind: type) -> list[tuple[Part | None, Part, Sample]]:
        aligned = ((align(reply.content, truth.content), sample) for sample, truth, reply in self.rows)
        return [(part, true, sample) for pairs, sample in aligned for part, true in pairs if isinstance(true, kind)]

    @cached_property
    def images(self) -> tuple[list[Image], list[Image], list[Sample]]:
        """Generated images, the true ones, and their samples, where one was generated. Raises Mgp5Error if none was."""
        pairs = [pair for pair in self._pairs(Image) if pair[0]]
        if not pairs:
            raise Mgp5Error("no reply holds a picture that is due", "look at the replies")
        return tuple(map(list, zip(*pairs, strict=True)))

    @cached_property
    def texts(self) -> tuple[list[str], list[str], list[str]]:
        """Generated texts ("" for a missing one), the true ones, and their groups. Raises Mgp5Error if none is due."""
        pairs = self._pairs(Text)
        if not pairs:
            raise Mgp5Error("no true reply holds a text", "nothing to compare with")
        return [p.text if p else "" for p, _, _ in pairs], [t.text for _, t, _ in pairs], [s.group for _, _, s in pairs]

    def mean_of_texts(self, values: Tensor, generator: torch.Generator) -> Number:
        """Return the mean of values (B,) of `texts`; of dialogues that of their own means, as the release has it."""
        groups = self.texts[2]
        if self.rows[0][0].kind == "dialogue":
            values, groups = group_means(values, groups)
        return mean(values, groups, generator)

    def counts(self) -> dict[str, int]:
        """Return how many replies there are, and how many lack what the true reply has."""
        kinds = {"without a picture that is due": Image, "without a text that is due": Text}
        lacking = {name: {s.key for part, _, s in self._pairs(kind) if part is None} for name, kind in kinds.items()}
        return {"replies": len(self.rows)} | {name: len(keys) for name, keys in lacking.items()}
