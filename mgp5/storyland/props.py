"""The things a character holds in its right hand.

Coordinates are pixels of the 3x canvas relative to the point on the ground between the feet; y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .pen import INK, WHITE, Colour, Pen, mix

PAPER: Colour = (255, 250, 232)
GOLD: Colour = (255, 214, 70)


def _ball(pen: Pen, x: float, y: float) -> None:
    x, y, r = x + 14, y - 2, 32
    for k in range(6):
        pen.pie(x, y, r, 60 * k + 15, 60 * k + 75, (236, 50, 52) if k % 2 else WHITE)
    pen.arc(x, y, r, r, 0, 360)
    pen.oval(x, y, 7, 7, WHITE, 0)


def _balloon(pen: Pen, x: float, y: float) -> None:
    top_x, top_y = x + 22, y - 148
    pen.stroke([(x, y), (x + 8, y - 50), (top_x, top_y + 46)], INK, 4)
    pen.poly([(top_x - 9, top_y + 52), (top_x, top_y + 38), (top_x + 9, top_y + 52)], (224, 40, 130), 4)
    pen.oval(top_x, top_y, 36, 43, (255, 82, 160))
    pen.oval(top_x - 13, top_y - 16, 8, 12, (255, 190, 218), 0)


def _umbrella(pen: Pen, x: float, y: float) -> None:
    cx, cy = x + 16, y - 112
    pen.stroke([(x, y + 16), (cx, cy)], INK, 11)
    pen.stroke([(x, y + 16), (cx, cy)], (150, 92, 48), 5)
    left, top, right, bottom = pen.x + cx - 66, pen.y + cy - 58, pen.x + cx + 66, pen.y + cy + 58
    pen.draw.pieslice((left, top, right, bottom), 180, 360, (30, 190, 186), INK, 5)
    pen.draw.pieslice((left + 40, top + 3, right - 40, bottom), 180, 360, (150, 236, 226))
    for k in (-44, 0, 44):
        pen.draw.pieslice((pen.x + cx + k - 22, pen.y + cy - 9, pen.x + cx + k + 22, pen.y + cy + 9), 180, 360, INK)
    pen.stroke([(cx, cy - 56), (cx, cy - 68)], INK, 7)


def _flower(pen: Pen, x: float, y: float) -> None:
    cx, cy = x + 14, y - 56
    pen.stroke([(x, y + 22), (cx, cy)], INK, 13)
    pen.stroke([(x, y + 22), (cx, cy)], (50, 160, 60), 6)
    petals = [(cx + 20 * math.cos(a), cy + 20 * math.sin(a)) for a in (math.tau * k / 6 for k in range(6))]
    for px, py in petals:
        pen.oval(px, py, 17, 17, INK, 0)
    for px, py in petals:
        pen.oval(px, py, 13, 13, (255, 134, 190), 0)
    pen.oval(cx, cy, 13, 13, GOLD, 4)


def _book(pen: Pen, x: float, y: float) -> None:
    x, y = x + 12, y - 6
    pen.poly([(x - 44, y - 30), (x, y - 20), (x + 44, y - 30), (x + 44, y + 32), (x, y + 42), (x - 44, y + 32)],
             (150, 70, 30))  # fmt: skip
    for s in (-1, 1):
        pen.poly([(x, y - 24), (x + s * 38, y - 35), (x + s * 38, y + 24), (x, y + 34)], PAPER, 4)
        for dy in (-12, 2, 16):
            pen.stroke([(x + s * 9, y + dy - 3), (x + s * 29, y + dy - 9)], (120, 104, 96), 4)


def _lantern(pen: Pen, x: float, y: float) -> None:
    x, y = x + 14, y + 40
    pen.arc(x, y - 30, 17, 18, 180, 360, 6)
    pen.poly([(x - 22, y - 26), (x + 22, y - 26), (x + 27, y + 28), (x - 27, y + 28)], GOLD)
    pen.oval(x, y + 4, 12, 18, mix(GOLD, WHITE, 0.75), 0)
    pen.poly([(x - 25, y - 22), (x - 14, y - 38), (x + 14, y - 38), (x + 25, y - 22)], (96, 62, 44))
    pen.poly([(x - 30, y + 24), (x + 30, y + 24), (x + 30, y + 36), (x - 30, y + 36)], (96, 62, 44))


PROPS: dict[str, Callable[[Pen, float, float], None]] = {
    "ball": _ball, "balloon": _balloon, "umbrella": _umbrella, "flower": _flower, "book": _book, "lantern": _lantern,
}  # fmt: skip
