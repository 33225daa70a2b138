"""A kite in a picture, of which no text says anything: what a picture after it must keep is seen, or lost.

Its place and shapes are known exactly, so what a picture shows of it is measured against drawings of all kites.

Letters: k kites, H and W pixels.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

from PIL import Image, ImageDraw

from .pen import WHITE, Colour, Pen
from .places import SIZE

COLOURS: dict[str, Colour] = {
    "orange": (255, 132, 0), "pink": (255, 96, 176), "teal": (0, 150, 150), "violet": (140, 60, 220),
    "brown": (132, 80, 36), "lime": (166, 226, 30),
}  # fmt: skip
PATTERNS = ("plain", "stripes", "dots", "cross")
RADII = {"small": 26, "medium": 36, "large": 46}  # pixels of the 3x canvas
CORNERS = {"high left": (56, 62), "high right": (328, 62), "low left": (56, 206), "low right": (328, 206)}


@dataclass(frozen=True)
class Detail:
    """A kite: the name of its colour, pattern, size and corner."""

    colour: str
    pattern: str
    size: str
    corner: str


def all_details() -> list[Detail]:
    """Return the 288 kites."""
    return [Detail(*each) for each in product(COLOURS, PATTERNS, RADII, CORNERS)]


def random_detail(rng: random.Random) -> Detail:
    """Draw any kite, all with the same probability."""
    return rng.choice(all_details())


def kite(draw: ImageDraw.ImageDraw, detail: Detail) -> None:
    """Draw a kite on a 3x canvas."""
    pen, r = Pen(draw, *CORNERS[detail.corner]), RADII[detail.size]
    pen.poly([(0, -r), (r, 0), (0, r), (-r, 0)], COLOURS[detail.colour], 7)
    if detail.pattern == "stripes":
        for y, half in ((-r / 3, r / 2), (0, r * 0.75), (r / 3, r / 2)):
            pen.stroke([(-half, y), (half, y)], WHITE, 6)
    elif detail.pattern == "dots":
        for x, y in ((0, -r / 2), (0, r / 2), (-r / 2, 0), (r / 2, 0)):
            pen.oval(x, y, r / 6, r / 6, WHITE, 0)
    elif detail.pattern == "cross":
        pen.stroke([(-r * 0.7, 0), (r * 0.7, 0)], WHITE, 8)
        pen.stroke([(0, -r * 0.7), (0, r * 0.7)], WHITE, 8)


@cache
def _drawings() -> tuple[Any, Any]:
    """Return all kites alone (k, 3, H, W), in [0, 1], and which of their pixels nothing shines through (k, 1, H, W)."""
    import torch

    drawn = []
    for detail in all_details():
        canvas = Image.new("RGBA", (SIZE, SIZE))
        kite(ImageDraw.Draw(canvas), detail)
        data = torch.frombuffer(bytearray(canvas.reduce(3).tobytes()), dtype=torch.uint8)
        drawn.append(data.view(SIZE // 3, SIZE // 3, 4).permute(2, 0, 1) / 255)
    stacked = torch.stack(drawn)
    return stacked[:, :3], (stacked[:, 3:] == 1).float()


def read_detail(image: Image.Image) -> Detail:
    """Return the kite whose drawing is nearest to an image, by the mean squared difference where it would be."""
    import torch

    image = image.convert("RGB").resize((SIZE // 3,) * 2)
    side = SIZE // 3
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1) / 255
    drawings, opaque = _drawings()
    difference = ((drawings - pixels).square() * opaque).sum((1, 2, 3)) / opaque.sum((1, 2, 3))
    return all_details()[int(difference.argmin())]


def kept(image: Image.Image, detail: Detail) -> dict[str, bool]:
    """Return for colour, pattern, size and corner of a kite whether an image shows them."""
    return {name: value == asdict(detail)[name] for name, value in asdict(read_detail(image)).items()}
