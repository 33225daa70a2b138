"""The judge of Storyland: a small CNN that reads the seven attributes of a picture (B pictures, F features).

It has seen renders only, never a model's pictures; examples/storyland/judge.py trains it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from .world import ATTRIBUTES

SIZE = 64  # what the judge looks at, pixels
WIDTHS = ((3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 128, 1), (128, 128, 2), (128, 128, 1), (128, 128, 1))
FILE = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """Eight convolutions, mean and maximum over the picture, one linear head per attribute; 0.57M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for fan_in, fan_out, stride in WIDTHS:
            self.body.append(nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False))
            self.body.append(nn.BatchNorm2d(fan_out))
            self.body.append(nn.SiLU())
        width = 2 * WIDTHS[-1][1]
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})

    def features(self, pixels: Tensor) -> Tensor:  # (B, 3, 128, 128) in [-1, 1] -> (B, F = 256)
        """Pooled features, also good for a Frechet distance between sets of pictures."""
        maps = self.body(functional.adaptive_avg_pool2d(pixels, SIZE))
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:  # (B, 3, 128, 128) in [-1, 1] -> name: (B, values)
        features = self.features(pixels)
        return {name: head(features) for name, head in self.heads.items()}


def load_judge(path: Path = FILE) -> Judge:
    """The trained judge in float32, ready to read pictures."""
    judge = Judge().eval().requires_grad_(False)
    judge.load_state_dict({key: value.float() for key, value in load_file(path).items()}, strict=False)
    return judge


@torch.no_grad()
def look(judge: Judge, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Attribute indices (B, 7) that the judge reads in pictures (B, 3, 128, 128) in [-1, 1], and features (B, F)."""
    where = next(judge.parameters()).device
    features = torch.cat([judge.features(part.to(where).float()) for part in pixels.split(64)])
    read = torch.stack([head(features).argmax(1) for head in judge.heads.values()], dim=1)
    return read.cpu(), features.cpu()


def right(judge: Judge, pixels: Tensor, rows: np.ndarray | Tensor) -> Tensor:  # -> (B, 7) bool
    """Which attributes of pictures (B, 3, 128, 128) are read as the true ones, indices (B, 7)."""
    return look(judge, pixels)[0] == torch.as_tensor(rows)


def scores(hits: Tensor) -> dict[str, float]:  # (B, 7) bool
    """Share of pictures with each attribute right, their mean, and the share with all of them right."""
    shares = dict(zip(ATTRIBUTES, hits.float().mean(0).tolist(), strict=True))
    return shares | {"mean": hits.float().mean().item(), "all": hits.all(1).float().mean().item()}
