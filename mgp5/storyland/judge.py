"""The judge of Storyland: a small CNN that reads the seven attributes of an image (B images, F features).

It was trained on renders only, never on a model's images; examples/storyland/judge.py trains it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from .world import ATTRIBUTES

if TYPE_CHECKING:
    import PIL.Image

SIZE = 64  # pixels to which images are averaged
WIDTHS = ((3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 128, 1), (128, 128, 2), (128, 128, 1), (128, 128, 1))
SURE = 0.97  # least probability of an attribute that the judge is sure of
FILE = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """Read attributes by eight convolutions, mean and maximum over the image, and one linear head per attribute."""

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
        """Return pooled features, also good for a Frechet distance between sets of images."""
        maps = self.body(functional.adaptive_avg_pool2d(pixels, SIZE))
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:  # (B, 3, 128, 128) in [-1, 1] -> name: (B, values)
        features = self.features(pixels)
        return {name: head(features) for name, head in self.heads.items()}


def load_judge(path: Path = FILE) -> Judge:
    """Return the trained judge in float32, frozen and in evaluation mode."""
    judge = Judge().eval().requires_grad_(False)
    judge.load_state_dict({key: value.float() for key, value in load_file(path).items()}, strict=False)
    return judge


_judge = cache(load_judge)


@torch.no_grad()
def is_foreign(picture: PIL.Image.Image) -> bool:
    """Return whether an image in RGB is not of Storyland: the judge is unsure of two or more of its attributes.

    It is sure of six at least of every render, drawn at any size, as a JPEG, trimmed or dimmed, and of what the demo
    draws; of photos it is not (examples/storyland).
    """
    pixels = np.asarray(picture.resize((2 * SIZE, 2 * SIZE)), dtype=np.float32) / 127.5 - 1
    read = _judge()(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    return sum(logits.softmax(1).max().item() < SURE for logits in read.values()) >= 2


@torch.no_grad()
def look(judge: Judge, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attribute indices (B, 7) read in images (B, 3, 128, 128) in [-1, 1], and their features (B, F)."""
    where = next(judge.parameters()).device
    features = torch.cat([judge.features(part.to(where).float()) for part in pixels.split(64)])
    read = torch.stack([head(features).argmax(1) for head in judge.heads.values()], dim=1)
    return read.cpu(), features.cpu()
