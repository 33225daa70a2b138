"""A batch of training samples as tensors. B samples, T tokens, N context images, P target images, S slots, E width."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from ..messages import Skipped


@dataclass(frozen=True)
class Batch:
    """Right-padded samples.

    Attributes:
        ids: (B, T) int64.
        mask: (B, T) int64, 1 on tokens, 0 on padding.
        labels: (B, T) int64, IGNORE where there is no loss; not shifted.
        context_images: preprocessed context images of all samples in reading order, as the backbone's `preprocess`
            returns them; empty when there are none.
        target_rows, target_starts: (P,) where each target image begins: its sample, and the position of its trigger.
        targets: what the head's `target` made of each target image, stacked by name: (P, ...).
        captions: P descriptions, "" where there is none.
        features: of the context images, (S, E) each, where a cache had them; `context_images` then holds only grids.
        skipped: what was left out: samples, but of kind "history cut" only the beginning of one.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    context_images: dict[str, Tensor] = field(default_factory=dict)
    target_rows: tuple[int, ...] = ()
    target_starts: tuple[int, ...] = ()
    targets: dict[str, Tensor] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    features: tuple[Tensor, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @property
    def num_targets(self) -> int:
        """P, the number of target images."""
        return len(self.target_starts)

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on a device."""
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        tables = {name: _moved(getattr(self, name), device) for name in ("context_images", "targets")}
        return replace(self, **moved, **tables, features=tuple(value.to(device) for value in self.features))


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}
