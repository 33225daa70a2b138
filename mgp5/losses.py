"""The losses of MiniGPT-5 as named terms. B samples, T tokens, V vocabulary, P pictures, L and C of a condition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .prompt import IGNORE


@dataclass(frozen=True)
class Losses:
    """Unweighted terms and their weights; a term that does not apply to a batch is left out."""

    terms: dict[str, Tensor]
    weights: dict[str, float]

    @property
    def total(self) -> Tensor:
        """What is minimised: the weighted sum (MiniGPT-5, eq. 5)."""
        return torch.stack([self.weights[name] * value for name, value in self.terms.items()]).sum()


def labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) that predict a label, and these labels: (K, D) and (K,)."""
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    return hidden[:, :-1][chosen], targets[chosen]


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token (eq. 1), mean over labelled tokens; logits (K, V), targets (K,)."""
    return F.cross_entropy(logits.float(), targets)


def caption_loss(condition: Tensor, encoding: Tensor) -> Tensor:
    """Mean squared distance to the generator's own encoding of the caption (eq. 2); both (P, L, C)."""
    return F.mse_loss(condition.float(), encoding.float())
