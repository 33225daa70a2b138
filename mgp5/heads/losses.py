"""Loss terms by name, and the text loss, which does not depend on the head.

Letters: B batch, T tokens, D LLM width, V vocabulary, J labels; N rows here and M elsewhere of features of width P.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
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


class _Gather(torch.autograd.Function):
    """Stack the equal shapes of all processes; the gradient of each is the sum of what they all want of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # (N, P) -> (processes, N, P)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def gather_others(rows: Tensor) -> Tensor:  # (N, P) -> (M, P)
    """Return the rows of all other processes, each of which calls this with some of its own; gradients go back there.

    Where every process takes the mean over its own rows, the mean over processes is that of one large batch.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world)]
    dist.all_gather(counts, counts[0] + len(rows))
    padded = F.pad(rows, (0, 0, 0, int(max(counts)) - len(rows)))
    parts = zip(_Gather.apply(padded.contiguous()), counts, strict=True)
    return torch.cat([part[: int(count)] for index, (part, count) in enumerate(parts) if index != rank])


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
