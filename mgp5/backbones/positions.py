"""Places of the pixels of feature maps, and their embeddings.

Letters: h and w of a map.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_centers(height: int, width: int, device: torch.device | None = None) -> Tensor:  # (h w, 2)
    """Return x and y of the centres of the pixels of a map, in (0, 1), in reading order."""
    y, x = ((torch.arange(size, device=device) + 0.5) / size for size in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1)


def sincos(positions: Tensor, width: int) -> Tensor:  # (...) -> (..., width)
    """Return sines and cosines of positions at wavelengths from 2 pi to 20000 pi (Vaswani et al., arXiv 1706.03762);
    `width` is even."""
    rates = 10000.0 ** -(torch.arange(width // 2, device=positions.device) / (width // 2))
    angles = positions[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(width: int, height_width: tuple[int, int], device: torch.device | None = None) -> Tensor:  # (h w, width)
    """Return position embeddings of the pixels of a map: half for the column, half for the row; `width` is a multiple
    of 4."""
    rows, columns = (torch.arange(size, device=device) for size in height_width)
    grid = torch.meshgrid(columns, rows, indexing="xy")
    return torch.cat([sincos(axis.flatten(), width // 2) for axis in grid], dim=-1)
