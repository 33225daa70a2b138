"""Draw a scene as a picture-book page, deterministic from (scene, seed).

Everything is drawn at three times the size and reduced with a box filter, which anti-aliases it.
"""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from .characters import character, coat, hand_at
from .details import Detail, kite
from .pen import INK, Pen
from .places import MARGIN, SIZE, VARIANTS, backdrop
from .props import PROPS
from .world import Scene

LIFT = 40  # how high a jump goes, in pixels of the 3x canvas
GROUND = 350


def draw(scene: Scene, seed: int, size: int = 128, detail: Detail | None = None) -> Image.Image:
    """Draw a scene as an RGB image of `size` x `size` pixels, with a kite if there is a `detail`; `seed` moves figure,
    scenery and flakes a little."""
    rng = random.Random(f"draw|{scene.indices()}|{seed}")
    slide = 3 * rng.randint(0, 2 * MARGIN // 3)
    canvas = backdrop(scene.place, scene.weather, rng.randrange(VARIANTS)).crop((slide, 0, slide + SIZE, SIZE))
    pen = ImageDraw.Draw(canvas)
    _falling(pen, scene.weather, rng)
    x, y = SIZE // 2 + 3 * rng.randint(-3, 3), GROUND + 3 * rng.randint(-2, 1)
    width = {"jumps": 44, "sleeps": 74}.get(scene.action, 62)
    ImageDraw.Draw(canvas, "RGBA").ellipse((x - width, y - 12, x + width, y + 12), fill=(*INK, 110))
    lift = LIFT if scene.action == "jumps" else 0
    figure = Pen(pen, x, y - lift)
    if scene.prop == "lantern":
        _glow(canvas, x + 88, y - lift - 44, scene.weather)
    character(figure, scene)
    if scene.prop != "nothing":
        PROPS[scene.prop](figure, *hand_at(scene))
        if scene.prop != "book":
            figure.oval(*hand_at(scene), 13, 13, coat(scene).main)  # the fist on its handle
    if scene.action == "waves":
        _swish(figure)
    elif scene.action == "sleeps":
        _snore(figure)
    if detail is not None:
        kite(pen, detail)
    canvas = canvas.reduce(3)
    return canvas if size == SIZE // 3 else canvas.resize((size, size), Image.Resampling.LANCZOS)


def _falling(pen: ImageDraw.ImageDraw, weather: str, rng: random.Random) -> None:
    """Draw rain or snow behind the character, one drop per cell of a grid, so that it is evenly spread."""
    if weather not in ("rainy", "snowy"):
        return
    for column in range(6):
        for row in range(5):
            x, y = 64 * column + rng.randint(4, 58), 64 + 64 * row + rng.randint(0, 40) - 32 * (column % 2)
            if weather == "rainy":
                pen.line((x + 5, y - 14, x - 5, y + 14), fill=(206, 228, 250), width=5)
            else:
                r = rng.choice((6, 7, 9))
                pen.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))


def _glow(canvas: Image.Image, x: int, y: int, weather: str) -> None:
    strength = 210 if weather == "night" else 120
    mask = Image.radial_gradient("L").resize((144, 144)).point(lambda v: max(0, (180 - v)) * strength // 180)
    canvas.paste((255, 214, 96), (x - 72, y - 72), mask)


def _swish(pen: Pen) -> None:
    for r in (25, 40):
        left, top, right, bottom = pen.x - 90 - r, pen.y - 144 - r, pen.x - 90 + r, pen.y - 144 + r
        pen.draw.arc((left - 4, top - 4, right + 4, bottom + 4), 196, 274, INK, 13)
        pen.draw.arc((left, top, right, bottom), 200, 270, (255, 255, 255), 5)


def _snore(pen: Pen) -> None:
    for x, y, s in ((-78, -206, 9), (-98, -244, 13), (-78, -286, 17)):
        zed = [(x - s, y - s), (x + s, y - s), (x - s, y + s), (x + s, y + s)]
        pen.stroke(zed, INK, 15)
        pen.stroke(zed, (255, 255, 255), 7)
