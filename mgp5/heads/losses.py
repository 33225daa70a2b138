"""Loss terms by name, and the text loss, which does not depend on the head.

Letters: B batch, T tokens, D LLM width, V vocabulary, J labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prompts import IGNORE


@dataclass(frozen=True)
class Losses:
    """Unweighted loss terms (scalars) and their weights, by name; a term that does not apply to a batch is left out."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Return the loss to minimize, the weighted sum of the terms; 0 without any term."""
        return sum((self.weights[name] * value for name, value in self.terms.items()), start=torch.zeros(()))

    def shared(self, shares: Mapping[str, float]) -> Losses:
        """Return the terms with weights times a share; 1 for a name that has none."""
        return Losses(self.terms, {name: weight * shares.get(name, 1.0) for name, weight in self.weights.items()})

    def __or__(self, other: Losses) -> Losses:
        return Losses(self.terms | other.terms, self.weights | other.weights)


def labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states (J, D) that predict a label, and these labels (J,), from hidden (B, T, D) and labels (B, T),
    which are not shifted and IGNORE where there is no loss."""
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    return hidden[:, :-1][chosen], targets[chosen]


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of the next token, mean over labels (MiniGPT-5, eq. 1); logits (J, V), targets (J,)."""
    return F.cross_entropy(logits.float(), targets)


def caption_loss(condition: Tensor, encoding: Tensor, pooled: int = 0, distance: str = "mse") -> Tensor:
    """Return the distance of the mapper's condition to the encoding of the caption, both (P, L, C) (eq. 4).

    The pooled vector of width `pooled` in the last row, if there is one, is a separate term: as one row among 334 it
    would hardly count, although it modulates every layer of the generator. `distance` is "mse", or "l2", the mean
    Euclidean distance of rows of GILL (arXiv 2305.17216).
    """
    difference = condition.float() - encoding.float()
    parts = [difference[:, :-1], difference[:, -1:, :pooled]] if pooled else [difference]
    measure = (lambda part: part.norm(dim=-1)) if distance == "l2" else torch.square
    return torch.stack([measure(part).mean() for part in parts]).sum()
