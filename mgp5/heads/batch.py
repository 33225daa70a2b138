"""A batch of training samples as tensors.

Letters: B batch, T tokens, N context images, P target images, S slots of one image, E embedding width.
"""

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
        target_rows, target_starts: (P,), the sample of each target image and the position of its trigger.
        targets: tensors (P, ...) by name, stacked from `Head.target` of each target image.
        captions: P captions of the target images, "" without one.
        features: N tensors (S, E) of the context images from a cache; `context_images` then holds only grids.
        skipped: samples that were left out; with the kind "history cut" only the beginning of one was.
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
