"""Places of the pixels of feature maps, and their embeddings.

Letters: h and w of a map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def sincos_2d(
    width: int, size: tuple[int, int], device: torch.device | None = None, base: tuple[int, int] | None = None
) -> Tensor:  # (h w, width)
    """Return position embeddings of the pixels of a map of `size` h and w: half for the row, half for the column;
    `width` is a multiple of 4. Those of another size than `base` are interpolated from a map of that size."""
    rows, columns = (torch.arange(side, device=device) for side in base or size)
    grid = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.cat([sincos(axis.flatten(), width // 2) for axis in grid], dim=-1)
    if base is None or tuple(base) == tuple(size):
        return places
    maps = places.T.unflatten(1, base)[None]
    return F.interpolate(maps, size=size, mode="bicubic", align_corners=False)[0].flatten(1).T


def isolated(positions: Tensor, begins: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rotary positions (B, T) or (3, B, T), and what is added to the scores of self-attention (B, 1, T, T), of
    packed rows whose tokens attend to their own documents only; `begins` (B, T) is where these begin."""
    steps = torch.arange(begins.shape[1], device=begins.device)
    hidden = (begins[:, None] != begins[..., None]) | (steps > steps[:, None])
    mask = torch.zeros(hidden.shape, dtype=dtype, device=begins.device).masked_fill_(hidden, torch.finfo(dtype).min)
    return positions - positions.gather(-1, begins.expand_as(positions)), mask[:, None]
