"""The losses of MiniGPT-5 as named terms. B samples, T tokens, V vocabulary, P pictures, L and C of a condition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prompts import IGNORE


@dataclass(frozen=True)
class Losses:
    """Unweighted terms and their weights; a term that does not apply to a batch is left out."""

    terms: dict[str, Tensor]
    weights: dict[str, float]

    @property
    def total(self) -> Tensor:
        """What is minimised: the weighted sum (MiniGPT-5, section 3.3); 0 without any term."""
        return sum((self.weights[name] * value for name, value in self.terms.items()), start=torch.zeros(()))


def labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) that predict a label, and these labels: (K, D) and (K,)."""
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    return hidden[:, :-1][chosen], targets[chosen]


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token (eq. 1), mean over labelled tokens; logits (K, V), targets (K,)."""
    return F.cross_entropy(logits.float(), targets)


def caption_loss(condition: Tensor, encoding: Tensor, pooled: int = 0, distance: str = "mse") -> Tensor:
    """Distance to the generator's own encoding of the caption (eq. 4), mean over pictures; both (P, L, C).

    Args:
        pooled: length of the pooled vector in the last row, 0 where there is none. It is a term of its own beside the
            rows: as one row among 334 it would hardly count, and it modulates every layer of the generator.
        distance: "mse", or "l2": GILL's, the Euclidean length of a row's difference (arXiv 2305.17216).
    """
    difference = condition.float() - encoding.float()
    rows = difference[:, :-1] if pooled else difference
    parts = [rows, difference[:, -1:, :pooled]] if pooled else [rows]
    if distance == "l2":
        return torch.stack([part.norm(dim=-1).mean() for part in parts]).sum()
    return torch.stack([part.square().mean() for part in parts]).sum()
