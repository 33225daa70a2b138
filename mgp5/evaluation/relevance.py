"""MM-Relevance: how well a reply of text and pictures fits the true one, by CLIP (M and N parts, E embedding).

Parts are unit vectors of CLIP ViT-B/32, in the order of the reply. F1 = 2PR / (P + R) = 2S / (M + N), S the sum of the
cosines of aligned parts, P = S / M and R = S / N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor

from ..messages import Image, Part, Text


@dataclass(frozen=True)
class Relevance:
    """Precision, recall and F1, each in [-1, 1]; precision is 0 for an empty reply."""

    precision: float
    recall: float
    f1: float


def _relevance(total: float, made: int, real: int) -> Relevance:
    return Relevance(total / made if made else 0.0, total / real, 2 * total / (made + real))


def mm_relevance(made: Tensor, real: Tensor) -> Relevance:
    """MM-Relevance of one reply (M, E) against the true one (N, E), as MMDialog defines it (Feng et al., 2022).

    Parts are aligned from the left, whatever their kind, up to the shorter reply. The data set's number is the mean of
    F1 over replies; MMDialog's tables show x100.
    """
    aligned = min(len(made), len(real))
    return _relevance(float((made[:aligned] * real[:aligned]).sum()), len(made), len(real))


def mm_relevance_pooled(made: Sequence[dict[str, Tensor]], real: Sequence[dict[str, Tensor]]) -> Relevance:
    """The MiniGPT-5 release's MM-Relevance of one dialogue, only to compare with its table.

    The parts of all turns are pooled, and text goes with text, picture with picture, one of each at most; what is
    missing counts in recall, what is too much in precision. The release's number is the mean of F1 over dialogues.

    Args:
        made: for each turn the vectors (E,) of "text" and "image", those that it has.
        real: the same of the true turns.
    """
    pairs = [(mine[kind], true[kind]) for mine, true in zip(made, real, strict=True) for kind in mine.keys() & true]
    return _relevance(sum(float(a @ b) for a, b in pairs), sum(map(len, made)), sum(map(len, real)))


def align(made: Sequence[Part], real: Sequence[Part]) -> list[tuple[Part | None, Part]]:
    """The true parts of a turn, each with the generated part of the same kind and number, or None where it is missing.

    So MMDialog aligns what metrics of one modality (BLEU, CLIP-I) then compare; generated parts beyond have no partner.
    """
    pairs: list[tuple[Part | None, Part]] = []
    for kind in (Text, Image):
        mine, true = ([part for part in parts if isinstance(part, kind)] for parts in (made, real))
        pairs += [(part, other) for part, other in zip_longest(mine[: len(true)], true)]
    return pairs


def picture_rate(drawn: Sequence[bool], due: Sequence[bool]) -> dict[str, float | None]:
    """Shares of replies that hold a picture, where the true one does ("due") and where it does not; None: no such."""
    found: dict[str, float | None] = {}
    for name, wanted in (("due", True), ("not due", False)):
        rows = [mine for mine, true in zip(drawn, due, strict=True) if true == wanted]
        found[name] = sum(rows) / len(rows) if rows else None
    return found
