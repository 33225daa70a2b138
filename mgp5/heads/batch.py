"""A batch of training samples as tensors.

Letters: B batch, T tokens, N context images, P target images, S slots of one image, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from PIL import Image as pil
from PIL import ImageOps
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..messages import Skipped
from ..prompts import IGNORE


@dataclass(frozen=True)
class Batch:
    """Right-padded samples."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 on tokens, 0 on padding
    labels: Tensor  # (B, T) int64, IGNORE where there is no loss; not shifted
    context_images: dict[str, Tensor] = field(default_factory=dict)  # of all samples, as of `Backbone.preprocess`
    target_rows: tuple[int, ...] = ()  # (P,), the sample of each target image
    target_starts: tuple[int, ...] = ()  # (P,), the position of its trigger
    begins: Tensor | None = None  # (B, T) int64, where the document of each token begins, in packed rows
    isolated: bool = True  # whether self-attention of packed rows keeps to a token's document
    targets: dict[str, Tensor] = field(default_factory=dict)  # (P, ...) by name, stacked from `Head.target` of each
    captions: tuple[str, ...] = ()  # (P,), "" without one
    features: tuple[Tensor, ...] = ()  # N of (S, E) from a cache; `context_images` then holds only grids
    context: Any = None  # ImageContext of all context images, once they are encoded
    together: bool = False  # whether other processes train now too, each with target images: they may exchange features
    skipped: tuple[Skipped, ...] = ()  # samples left out; with the kind "history cut" only the beginning of one was

    @property
    def num_targets(self) -> int:
        """Return P, the number of target images."""
        return len(self.target_starts)

    @property
    def num_samples(self) -> int:
        """Return the number of samples: rows, or the documents in them."""
        return len(self.ids) if self.begins is None else int(self.first_tokens[self.mask > 0].sum())

    @property
    def first_tokens(self) -> Tensor:  # (B, T) bool
        """Return which tokens of packed rows begin a document."""
        return self.begins == torch.arange(self.ids.shape[1], device=self.ids.device)

    @property
    def target_begins(self) -> list[int]:
        """Return where the document of each of P target images begins in its row."""
        if self.begins is None:
            return [0] * self.num_targets
        return self.begins[list(self.target_rows), list(self.target_starts)].tolist()

    def count(self, term: str) -> int:
        """Return what a loss term of this name is a mean of: labels, images with a caption, or images."""
        if term == "text":
            return int((self.labels[:, 1:] != IGNORE).sum())
        return sum(map(bool, self.captions)) if term == "caption" else self.num_targets

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on a device; from pinned memory the copy does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the same batch in page-locked memory; data loaders call it."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{f.name: tree_map_only(Tensor, change, getattr(self, f.name)) for f in fields(self)})


def to_pixels(image: pil.Image, size: tuple[int, int]) -> Tensor:  # (3, H, W)
    """Convert an RGB image to pixels in [-1, 1]: center-crop to the aspect ratio of `size` (H, W), then resize."""
    height, width = size
    image = ImageOps.fit(image, (width, height), pil.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1


def from_pixels(pixels: Tensor) -> pil.Image:  # (3, H, W)
    """Convert pixels in [-1, 1] to an RGB image."""
    data = pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    return pil.fromarray(data.cpu().numpy())
