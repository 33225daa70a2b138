"""Places and weather of Storyland: the cached backdrops behind the characters.

Letters: W, H size of the backdrop in pixels of the 3x canvas, y grows downwards, k variant of the scenery.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .pen import Colour, Pen, mix

SIZE = 384  # the canvas, three times the picture
MARGIN = 18  # the backdrop reaches this far beyond both sides, so that it can slide
WIDTH = SIZE + 2 * MARGIN
HORIZON = 236
VARIANTS = 4
STARS = ((128, 24), (180, 66), (236, 28), (300, 58), (362, 26), (394, 112), (96, 118), (30, 136), (330, 128))
SKY: dict[str, tuple[Colour, Colour]] = {
    "sunny": ((86, 178, 250), (206, 238, 255)),
    "rainy": ((104, 116, 140), (172, 182, 196)),
    "snowy": ((176, 198, 226), (232, 240, 250)),
    "night": ((16, 18, 64), (66, 62, 138)),
}


def tint(colour: Colour, weather: str, ground: bool = False) -> Colour:
    """Return a colour of the scenery in a weather; `ground` lies under snow when it snows."""
    if weather == "rainy":
        return mix(mix(colour, (100, 110, 130), 0.34), (0, 0, 0), 0.06)
    if weather == "snowy":
        return mix(colour, (240, 245, 252), 0.74 if ground else 0.3)
    if weather == "night":
        return mix(tuple(round(v * 0.6) for v in colour), (34, 40, 112), 0.42)
    return colour


@lru_cache(maxsize=4 * 6 * VARIANTS)
def backdrop(place: str, weather: str, k: int) -> Image.Image:
    """Draw sky, weather and scenery, WIDTH x SIZE; variant `k` in [0, VARIANTS) moves the details a little."""
    top, bottom = (np.array(colour, dtype=float) for colour in SKY[weather])
    rows = np.linspace(0, 1, SIZE)[:, None] / (HORIZON / SIZE)
    sky = top + (bottom - top) * np.clip(rows, 0, 1)
    image = Image.fromarray(np.repeat(sky[:, None, :], WIDTH, axis=1).round().astype("uint8"))
    rng = random.Random(f"backdrop|{place}|{k}")
    _heavens(image, weather, rng)
    PLACES[place](Scenery(image, weather, rng))
    return image


class Scenery(Pen):
    """A pen without outlines whose colours follow the weather."""

    def __init__(self, image: Image.Image, weather: str, rng: random.Random) -> None:
        super().__init__(ImageDraw.Draw(image), MARGIN, 0)
        self.image, self.weather, self.rng = image, weather, rng

    def shape(self, points: list[tuple[float, float]], colour: Colour, ground: bool = False) -> None:
        self.poly(points, tint(colour, self.weather, ground), 0)

    def blob(self, x: float, y: float, rx: float, ry: float, colour: Colour, ground: bool = False) -> None:
        self.oval(x, y, rx, ry, tint(colour, self.weather, ground), 0)

    def box(self, x: float, y: float, right: float, bottom: float, colour: Colour, ground: bool = False) -> None:
        self.shape([(x, y), (right, y), (right, bottom), (x, bottom)], colour, ground)

    def hills(self, y: float, height: float, wave: float, phase: float, colour: Colour, ground: bool = True) -> None:
        """Fill everything below a sine-shaped skyline."""
        xs = range(-MARGIN, SIZE + MARGIN + 1, 6)
        line = [(x, y - height * math.sin(x / wave + phase)) for x in xs]
        self.shape([*line, (SIZE + MARGIN, SIZE), (-MARGIN, SIZE)], colour, ground)

    def snow_on(self, points: list[tuple[float, float]]) -> None:
        """Draw a white shape when it snows."""
        if self.weather == "snowy":
            self.poly(points, (250, 252, 255), 0)


def _cloud(draw: ImageDraw.ImageDraw, x: float, y: float, scale: float, colour: Colour) -> None:
    for dx, dy, rx, ry in ((-34, 6, 28, 18), (0, -4, 34, 26), (34, 6, 30, 19), (0, 14, 52, 13)):
        left, top = x + scale * (dx - rx), y + scale * (dy - ry)
        draw.ellipse((left, top, left + 2 * scale * rx, top + 2 * scale * ry), fill=colour)


def _heavens(image: Image.Image, weather: str, rng: random.Random) -> None:
    x, y = MARGIN + 48 + rng.randint(-5, 5), 46 + rng.randint(-4, 4)
    if weather in ("sunny", "night"):  # A soft halo first: it is blurred, the disc on top stays crisp.
        halo = Image.new("L", image.size)
        ImageDraw.Draw(halo).ellipse((x - 52, y - 52, x + 52, y + 52), fill=150 if weather == "sunny" else 90)
        colour = (255, 246, 190) if weather == "sunny" else (150, 150, 220)
        image.paste(colour, mask=halo.filter(ImageFilter.GaussianBlur(18)))
    draw = ImageDraw.Draw(image)
    if weather == "sunny":
        _sun(draw, x, y)
        for cx, cy, scale in ((190, 40, 0.6), (345, 84, 0.75)):
            _cloud(draw, cx + rng.randint(-14, 14), cy + rng.randint(-8, 8), scale, (246, 251, 255))
    elif weather == "night":
        crescent = Image.new("L", image.size)
        ImageDraw.Draw(crescent).ellipse((x - 29, y - 29, x + 29, y + 29), fill=255)
        ImageDraw.Draw(crescent).ellipse((x - 12, y - 37, x + 42, y + 17), fill=0)
        image.paste((255, 246, 196), mask=crescent)
        for sx, sy in STARS:
            _star(draw, sx + rng.randint(-9, 9), sy + rng.randint(-8, 8), rng.choice((7, 9, 10)))
    elif weather == "rainy":
        for cx, cy in ((18, 26), (118, 18), (222, 22), (322, 16), (410, 28)):
            _cloud(draw, cx + rng.randint(-10, 10), cy + rng.randint(-5, 5) + 6, 1.25, (70, 78, 100))
            _cloud(draw, cx + rng.randint(-10, 10), cy + rng.randint(-5, 5) - 6, 1.15, (88, 98, 122))
    else:
        for cx, cy in ((70, 20), (210, 12), (350, 22)):
            _cloud(draw, cx + rng.randint(-12, 12), cy + rng.randint(-5, 5), 1.4, (240, 245, 251))


def _sun(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    for ray in range(12):
        c, s = math.cos(math.tau * ray / 12), math.sin(math.tau * ray / 12)
        draw.line((x + 34 * c, y + 34 * s, x + 46 * c, y + 46 * s), fill=(255, 208, 40), width=7)
    draw.ellipse((x - 28, y - 28, x + 28, y + 28), fill=(255, 222, 66))


def _star(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    t = r * 0.3
    right = [(x, y - r), (x + t, y - t), (x + r, y), (x + t, y + t)]
    left = [(x, y + r), (x - t, y + t), (x - r, y), (x - t, y - t)]
    draw.polygon(right + left, fill=(255, 250, 214))


def _beach(s: Scenery) -> None:
    r = s.rng
    s.box(-MARGIN, 196, SIZE + MARGIN, 300, (34, 126, 206))
    s.box(-MARGIN, 222, SIZE + MARGIN, 300, (54, 156, 222))
    for x, y in ((70, 212), (240, 208), (350, 232), (30, 236)):
        x += r.randint(-12, 12)
        s.stroke([(x - 20, y), (x + 20, y)], tint((170, 220, 248), s.weather), 5)
    x = 86 + r.randint(-12, 12)
    s.shape([(x - 26, 192), (x + 26, 192), (x + 16, 206), (x - 16, 206)], (178, 84, 52))
    s.shape([(x - 2, 144), (x - 2, 187), (x - 24, 187)], (250, 250, 250))
    s.shape([(x + 3, 152), (x + 3, 187), (x + 22, 187)], (250, 120, 90))
    phase = r.uniform(0, 1)
    s.hills(262, 9, 74, phase, (236, 246, 250), False)
    s.hills(270, 9, 74, phase, (250, 222, 150))
    s.hills(316, 7, 96, phase + 2, (242, 206, 128))
    s.blob(60 + r.randint(-9, 9), 350, 15, 9, (240, 130, 110))
    _palm(s, 318 + r.randint(-8, 8), 296)


def _palm(s: Scenery, x: float, y: float) -> None:
    trunk = tint((150, 98, 54), s.weather)
    s.stroke([(x, y), (x + 3, y - 46), (x + 14, y - 92), (x + 26, y - 122)], trunk, 17)
    x, y = x + 26, y - 126
    for dx, dy, lift in ((-62, 22, -30), (-48, -26, -40), (48, -26, -40), (60, 24, -30), (4, 48, 0)):
        middle = (x + dx * 0.5, y + dy * 0.5 + lift)
        s.shape([(x, y), middle, (x + dx, y + dy), (x + dx * 0.45, y + dy * 0.5 + 6)], (48, 158, 76))
        s.snow_on([(x, y), middle, (x + dx, y + dy), (x + dx * 0.45, y + dy * 0.4 + lift * 0.6)])
    s.blob(x - 6, y + 7, 9, 9, (116, 72, 40))
    s.blob(x + 10, y + 9, 9, 9, (116, 72, 40))


def _fir(s: Scenery, x: float, y: float, size: float, colour: Colour) -> None:
    s.box(x - size * 0.09, y - size * 0.2, x + size * 0.09, y, (112, 74, 46))
    for tier in range(3):
        top, half = y - size * (1 - tier * 0.25), size * (0.2 + tier * 0.08)
        bottom = top + size * 0.42
        s.shape([(x, top), (x + half, bottom), (x - half, bottom)], colour)
        if size > 145:  # the front row only: a second row of white would be noise
            low = top + size * 0.24
            s.snow_on([(x, top), (x + half * 0.6, low), (x, top + size * 0.2), (x - half * 0.6, low)])


def _forest(s: Scenery) -> None:
    r = s.rng
    for x in range(-20, 410, 46):
        _fir(s, x + r.randint(-8, 8), HORIZON + 8, r.randint(118, 140), (96, 164, 116))
    s.hills(HORIZON, 5, 60, r.uniform(0, 6), (98, 156, 72))
    for x in (-4, 58, 112, 272, 326, 388):
        _fir(s, x + r.randint(-8, 8), HORIZON + 28 + r.randint(-4, 4), r.randint(150, 178), (34, 112, 66))
    s.hills(HORIZON + 26, 5, 80, r.uniform(0, 6), (84, 140, 58))
    for x, y in ((52, 340), (322, 354)):
        x += r.randint(-12, 12)
        s.box(x - 6, y - 12, x + 6, y + 6, (250, 240, 220))
        s.shape([(x - 20, y - 10), (x - 12, y - 24), (x + 12, y - 24), (x + 20, y - 10)], (216, 60, 50))


def _mountains(s: Scenery) -> None:
    r = s.rng
    peaks = ((70, 112, 128, (146, 142, 176)), (322, 100, 132, (146, 142, 176)), (196, 64, 158, (112, 108, 146)))
    for x, top, half, colour in peaks:
        x, top = x + r.randint(-10, 10), top + r.randint(-6, 6)
        slope = half / (HORIZON + 14 - top)
        s.shape([(x, top), (x + half, HORIZON + 14), (x - half, HORIZON + 14)], colour)
        s.shape([(x, top), (x + half, HORIZON + 14), (x + half * 0.25, HORIZON + 14)], mix(colour, (50, 40, 90), 0.25))
        d = 58 if s.weather != "snowy" else 88
        cap = [(x, top), (x + d * slope, top + d), (x + d * slope * 0.5, top + d * 0.72), (x + 2, top + d * 1.05),
               (x - d * slope * 0.45, top + d * 0.7), (x - d * slope, top + d)]  # fmt: skip
        s.shape(cap, (252, 253, 255))
    s.hills(HORIZON + 4, 8, 50, r.uniform(0, 6), (112, 128, 110))
    s.hills(HORIZON + 34, 6, 90, r.uniform(0, 6), (148, 144, 132))
    for x, y, size in ((42, 322, 24), (76, 360, 14), (338, 306, 18), (318, 356, 26)):
        x += r.randint(-8, 8)
        s.shape([(x - size, y), (x - size * 0.6, y - size * 0.7), (x + size * 0.3, y - size * 0.85), (x + size, y)],
                (112, 108, 108))  # fmt: skip
        cap = ((-0.6, -0.6), (0.3, -0.9), (0.6, -0.5))
        s.snow_on([(x + dx * size, y + dy * size) for dx, dy in cap])


def _town(s: Scenery) -> None:
    r = s.rng
    walls = [(244, 190, 120), (228, 130, 112), (246, 222, 164), (140, 184, 206), (222, 148, 170)]
    roofs = [(176, 70, 58), (120, 82, 104), (186, 92, 56)]
    x, k = -MARGIN - r.randint(0, 16), r.randint(0, 4)
    while x < SIZE + MARGIN:
        width, top = 76, 128 + (k * 29) % 46
        _house(s, x, top, width, walls[k % 5], roofs[k % 3])
        x, k = x + width + 3, k + 1
    s.box(-MARGIN, 258, SIZE + MARGIN, 288, (206, 200, 192), True)
    s.box(-MARGIN, 284, SIZE + MARGIN, SIZE, (134, 132, 142), True)
    for x in range(-MARGIN - r.randint(0, 40), SIZE + MARGIN, 92):
        s.box(x, 330, x + 46, 339, (240, 236, 214))


def _house(s: Scenery, x: float, top: float, width: float, wall: Colour, roof: Colour) -> None:
    s.box(x, top, x + width, 262, wall)
    s.shape([(x - 6, top), (x + width / 2, top - 46), (x + width + 6, top)], roof)
    s.snow_on([(x + 8, top - 14), (x + width / 2, top - 48), (x + width - 8, top - 14), (x + width / 2, top - 24)])
    lit = (255, 220, 96)
    for dx in (12, 44):
        for y in (top + 14, top + 54):
            if s.weather == "night":
                s.poly([(x + dx, y), (x + dx + 20, y), (x + dx + 20, y + 26), (x + dx, y + 26)], lit, 0)
            else:
                s.box(x + dx, y, x + dx + 20, y + 26, (90, 122, 158))
    s.box(x + 28, 226, x + 50, 262, (128, 82, 60))


def _cactus(s: Scenery, x: float, y: float, size: float) -> None:
    colour = tint((62, 142, 76), s.weather)
    for dx, low, high in ((-0.3, 0.45, 0.72), (0.3, 0.35, 0.62)):
        s.stroke([(x, y - size * low), (x + dx * size, y - size * low), (x + dx * size, y - size * high)], colour, 17)
    s.stroke([(x, y - 4), (x, y - size)], colour, 24)
    s.snow_on([(x - 12, y - size), (x - 7, y - size - 12), (x + 7, y - size - 12), (x + 12, y - size)])


def _desert(s: Scenery) -> None:
    r = s.rng
    x = 258 + r.randint(-12, 12)
    s.shape([(x - 76, 220), (x - 54, 150), (x + 46, 150), (x + 72, 220)], (206, 116, 74))
    s.shape([(x + 8, 220), (x + 14, 150), (x + 46, 150), (x + 72, 220)], (180, 94, 66))
    s.hills(212, 20, 58, r.uniform(-0.3, 0.3), (242, 176, 96))
    s.hills(246, 16, 76, 2.4 + r.uniform(-0.3, 0.3), (234, 158, 76))
    _cactus(s, 46 + r.randint(-8, 8), 296, 118)
    _cactus(s, 342 + r.randint(-8, 8), 278, 92)
    s.hills(300, 10, 100, 4.5 + r.uniform(-0.3, 0.3), (224, 142, 64))


def _meadow(s: Scenery) -> None:
    r = s.rng
    s.hills(208, 20, 66, r.uniform(-0.3, 0.3), (156, 214, 110))
    for x, y, size in ((58, 204, 34), (330, 214, 28)):
        x += r.randint(-10, 10)
        s.box(x - 6, y, x + 6, y + 30, (126, 86, 52))
        s.blob(x, y - size * 0.5, size, size, (88, 172, 80))
        s.snow_on([(x - size * 0.7, y - size * 1.1), (x, y - size * 1.5), (x + size * 0.7, y - size * 1.1)])
    s.hills(242, 12, 86, 2.6 + r.uniform(-0.3, 0.3), (128, 200, 86))
    s.hills(286, 7, 110, 4.4 + r.uniform(-0.3, 0.3), (108, 186, 72))
    spots = ((34, 280), (82, 316), (26, 352), (106, 362), (352, 290), (306, 330), (358, 352), (290, 366))
    for i, (x, y) in enumerate(spots):
        x, y = x + r.randint(-10, 10), y + r.randint(-6, 6)
        petal = [(255, 255, 255), (255, 112, 150), (255, 226, 92)][i % 3]
        for dx, dy in ((-7, 0), (7, 0), (0, -7), (0, 7)):
            s.blob(x + dx, y + dy, 7, 7, petal)
        s.blob(x, y, 5, 5, (250, 176, 50))


PLACES: dict[str, Callable[[Scenery], None]] = {
    "beach": _beach, "forest": _forest, "mountains": _mountains, "town": _town, "desert": _desert, "meadow": _meadow,
}  # fmt: skip
