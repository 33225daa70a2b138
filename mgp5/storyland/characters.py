"""The eight animals of Storyland, their poses and what they wear.

Coordinates are pixels of the 3x canvas relative to the point on the ground between the feet; y grows downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from .pen import INK, WHITE, Colour, Pen, Point, mix
from .world import Scene

BODY: dict[str, Colour] = {
    "purple": (152, 82, 204), "green": (74, 176, 76), "red": (228, 62, 54),
    "blue": (62, 118, 232), "yellow": (252, 210, 58), "white": (249, 248, 244),
}  # fmt: skip
CREAM: Colour = (255, 246, 224)
PINK: Colour = (255, 150, 170)
ORANGE: Colour = (255, 150, 30)
HAT, BAND = (255, 138, 24), (88, 44, 110)
TEAL: Colour = (22, 168, 172)
HOT_PINK: Colour = (255, 78, 158)


@dataclass(frozen=True, kw_only=True)
class Coat:
    """Shades of one character; `y` is the centre of its head."""

    main: Colour
    light: Colour
    dark: Colour
    inner: Colour
    blush: Colour
    y: float


def coat(scene: Scene) -> Coat:
    """Return the shades of a scene's character."""
    main = BODY[scene.colour]
    white = scene.colour == "white"
    return Coat(
        main=main,
        light=(255, 222, 212) if white else mix(main, WHITE, 0.62),
        dark=(206, 206, 214) if white else mix(main, INK, 0.32),
        inner=mix(main, (255, 186, 198), 0.8),
        blush=mix(main, (255, 140, 160), 0.5 if scene.colour in ("white", "yellow") else 0.72),
        y=-136 if scene.action == "sleeps" else -150,
    )


def character(pen: Pen, scene: Scene) -> None:
    """Draw the animal without its prop and the fist on it, back to front."""
    c = coat(scene)
    _tail(pen, c, scene.species)
    _ears(pen, c, scene.species)
    _feet(pen, c, scene)
    _torso(pen, c, scene)
    _arms(pen, c, scene)
    _head(pen, c, scene.species)
    face = [_eyes, _muzzle, _wear] if scene.species != "frog" else [_wear, _eyes, _muzzle]
    for part in face:
        part(pen, c, scene)
    if scene.species == "elephant":
        _trunk(pen, c)


def hand_at(scene: Scene) -> Point:
    """Return where the right hand holds the prop, relative to the pen's origin."""
    return (74, -76) if scene.action == "sleeps" else (74, -84)


def _arms(pen: Pen, c: Coat, scene: Scene) -> None:
    low = 8 if scene.action == "sleeps" else 0
    down = [(-40, -84 + low), (-57, -50 + low)]
    left = {"waves": [(-38, -86), (-76, -96), (-90, -140)], "jumps": [(-38, -88), (-84, -108)]}.get(scene.action, down)
    right = [(-x, y) for x, y in (left if scene.action == "jumps" else down)]
    if scene.prop != "nothing":
        right = [(38, -86 + low), (58, -70 + low), hand_at(scene)]
    for points in (left, right):
        pen.limb(points, c.main, 19)
    for side in (-1, 1):  # The shoulder's outline is painted over so that the arm grows out of the body.
        pen.oval(side * 33, -84 + low, 11, 11, c.main, 0)


def _tail(pen: Pen, c: Coat, species: str) -> None:
    if species == "fox":
        pen.poly([(-30, -20), (-58, -14), (-86, -36), (-96, -76), (-84, -92), (-68, -70), (-44, -52)], c.main)
        pen.poly([(-96, -70), (-97, -84), (-85, -98), (-72, -76), (-82, -66)], WHITE)
    elif species == "cat":
        pen.limb([(-36, -22), (-66, -18), (-82, -36), (-80, -62), (-92, -78)], c.main, 13)
    elif species == "rabbit":
        pen.oval(-46, -24, 19, 18, WHITE)
    elif species == "duck":
        pen.poly([(-30, -24), (-82, -62), (-74, -36), (-88, -28), (-62, -12)], c.main)
    elif species == "elephant":
        pen.stroke([(-40, -40), (-66, -26), (-70, -8)], INK, 7)
        pen.oval(-70, -6, 7, 9, c.dark)
    elif species == "bear":
        pen.oval(-46, -22, 13, 13, c.main)


def _ears(pen: Pen, c: Coat, species: str) -> None:
    y = c.y
    for s in (-1, 1):
        if species == "fox":
            pen.poly([(s * 10, y - 36), (s * 48, y - 96), (s * 62, y - 14)], c.main)
            pen.poly([(s * 28, y - 42), (s * 46, y - 78), (s * 54, y - 30)], INK, 0)
        elif species == "cat":
            pen.poly([(s * 8, y - 38), (s * 52, y - 84), (s * 60, y - 10)], c.main)
            pen.poly([(s * 28, y - 42), (s * 47, y - 68), (s * 52, y - 28)], PINK, 0)
        elif species == "rabbit":
            pen.oval(s * 32, y - 80, 20, 58, c.main)
            pen.oval(s * 32, y - 78, 9, 42, PINK, 0)
        elif species == "bear":
            pen.oval(s * 46, y - 38, 25, 25, c.main)
            pen.oval(s * 46, y - 38, 13, 13, c.inner, 0)
        elif species == "elephant":
            pen.oval(s * 66, y - 4, 44, 50, c.main)
            pen.oval(s * 70, y - 2, 29, 35, c.inner, 0)
        elif species == "owl":
            pen.poly([(s * 14, y - 38), (s * 56, y - 78), (s * 60, y - 10)], c.main)
    if species == "duck":
        pen.limb([(0, y - 44), (-6, y - 66), (-20, y - 72)], c.main, 7)
        pen.limb([(2, y - 44), (8, y - 64), (20, y - 66)], c.main, 7)


def _feet(pen: Pen, c: Coat, scene: Scene) -> None:
    fill = ORANGE if scene.species in ("duck", "owl") else c.dark
    if scene.action == "jumps":
        for s in (-1, 1):
            pen.limb([(s * 22, -16), (s * 38, 4)], fill, 14)
            pen.oval(s * 42, 8, 18, 12, fill)
    elif scene.action != "sleeps":
        for s in (-1, 1):
            pen.oval(s * 25, -6, 25, 13, fill)


def _torso(pen: Pen, c: Coat, scene: Scene) -> None:
    sits = scene.action == "sleeps"
    y, ry = (-50, 50) if sits else (-62, 56)
    pen.oval(0, y, 52 if sits else 48, ry, c.main)
    pen.oval(0, y + 8, 34 if sits else 31, ry - 16, c.light, 0)
    if scene.species == "owl":
        for x, dy in ((-14, 0), (14, 0), (0, 16)):
            pen.stroke([(x - 9, y + dy), (x, y + dy + 9), (x + 9, y + dy)], c.dark, 5)
    if sits:  # Soles towards the reader.
        fill = ORANGE if scene.species in ("duck", "owl") else c.dark
        for s in (-1, 1):
            pen.oval(s * 44, -12, 20, 20, fill)
            pen.oval(s * 45, -10, 10, 10, mix(fill, WHITE, 0.5), 0)


def _head(pen: Pen, c: Coat, species: str) -> None:
    y = c.y
    if species == "fox":
        pen.poly([(-50, y - 20), (-84, y + 16), (-50, y + 36), (50, y + 36), (84, y + 16), (50, y - 20)], c.main)
        pen.oval(0, y, 60, 50, c.main)
        white = c.light if c.main == BODY["white"] else WHITE
        pen.poly([(-77, y + 16), (-30, y + 4), (0, y + 24), (30, y + 4), (77, y + 16), (46, y + 33), (0, y + 47),
                  (-46, y + 33)], white, 0)  # fmt: skip
    elif species == "frog":
        pen.oval(0, y + 6, 70, 46, c.main)
    elif species in ("elephant", "duck"):
        pen.oval(0, y, 56, 52, c.main)
    else:
        pen.oval(0, y, 62, 51, c.main)
    if species == "cat":
        for x in (-16, 0, 16):
            pen.stroke([(x, y - 42 + abs(x) / 5), (x, y - 29)], c.dark, 7)


def _eyes(pen: Pen, c: Coat, scene: Scene) -> None:
    species, closed = scene.species, scene.action == "sleeps"
    spread, dy, rx, ry = {"owl": (26, -6, 25, 26), "frog": (36, -40, 22, 22)}.get(species, (26, -6, 13, 17))
    big = species in ("owl", "frog")  # eyes with a white around the pupil
    for s in (-1, 1):
        x, y = s * spread, c.y + dy
        if big:
            pen.oval(x, y, rx, ry, CREAM if species == "owl" else c.main if closed else WHITE)
        if closed:
            pen.arc(x, y - 3, 14, 13, 15, 165, 7)
            continue
        x -= s * (3 if big else 0)
        pen.oval(x, y, *((14, 15) if big else (rx, ry)), INK, 0)
        pen.oval(x + 4, y - 6, 6, 6, WHITE, 0)
        pen.oval(x - 4, y + 7, 3, 3, WHITE, 0)


def _muzzle(pen: Pen, c: Coat, scene: Scene) -> None:
    species, y = scene.species, c.y
    glad = scene.action in ("jumps", "waves")
    if species not in ("owl", "fox"):
        for s in (-1, 1):
            pen.oval(s * (50 if species == "frog" else 43), y + 16, 10, 7, c.blush, 0)
    if species == "owl":
        pen.poly([(-11, y + 8), (11, y + 8), (0, y + 30)], ORANGE)
    elif species == "duck":
        if glad:
            pen.oval(0, y + 29, 21, 15, (232, 104, 20))
        pen.oval(0, y + 20, 35, 15, ORANGE)
        pen.arc(0, y + 12, 27, 16, 30, 150, 4)
    elif species == "frog":
        if glad:
            _open_mouth(pen, y + 15, 38, 23, 5)
        else:
            pen.arc(0, y - 2, 44, 26, 20, 160, 6)
        for s in (-1, 1):
            pen.oval(s * 8, y + 2, 3, 3, INK, 0)
    elif species != "elephant":
        _snout(pen, c, species, glad)


def _open_mouth(pen: Pen, y: float, rx: float, ry: float, line: int) -> None:
    box = (pen.x - rx, pen.y + y - ry, pen.x + rx, pen.y + y + ry)
    pen.draw.chord(box, 0, 180, (186, 40, 62), INK, line)


def _snout(pen: Pen, c: Coat, species: str, glad: bool) -> None:
    y = c.y
    if species == "bear":
        pen.oval(0, y + 22, 30, 22, c.light, 4)
    elif species == "rabbit":
        pen.oval(-11, y + 22, 15, 12, WHITE, 0)
        pen.oval(11, y + 22, 15, 12, WHITE, 0)
    if species == "fox":
        pen.oval(0, y + 24, 11, 9, INK, 0)
    else:
        nose = INK if species == "bear" else (232, 84, 116)
        pen.oval(0, y + 12, *((12, 8) if species == "bear" else (9, 7)), nose, 0)
    top = {"fox": 30, "bear": 20}.get(species, 18)
    if species == "rabbit":
        pen.poly([(-7, y + 27), (7, y + 27), (7, y + 41), (-7, y + 41)], WHITE, 4)
    elif glad and species != "fox":
        _open_mouth(pen, y + top + 6, 13, 15, 4)
    else:
        pen.arc(-9, y + top, 9, 9, 0, 160, 5)
        pen.arc(9, y + top, 9, 9, 20, 180, 5)
    if species == "cat":
        for s in (-1, 1):
            pen.stroke([(s * 38, y + 16), (s * 76, y + 8)], INK, 4)
            pen.stroke([(s * 38, y + 25), (s * 74, y + 30)], INK, 4)


def _trunk(pen: Pen, c: Coat) -> None:
    y = c.y
    for s in (-1, 1):
        pen.poly([(s * 20, y + 28), (s * 32, y + 24), (s * 32, y + 52)], CREAM, 4)
    pen.limb([(0, y + 8), (0, y + 40), (-6, y + 58), (-20, y + 66), (-33, y + 56)], c.main, 22)
    pen.oval(0, y + 4, 13, 15, c.main, 0)
    for dy in (24, 38):
        pen.stroke([(-9, y + dy), (9, y + dy)], c.dark, 4)


def _wear(pen: Pen, c: Coat, scene: Scene) -> None:
    if scene.wears == "hat":
        _hat(pen, c.y - (36 if scene.species == "frog" else 44))
    elif scene.wears == "scarf":
        drop, side = (56, 1) if scene.species == "elephant" else (46, -1)  # its trunk hangs to the left
        _scarf(pen, c.y + drop, side)
    elif scene.wears == "bow":
        _bow(pen, *((0, c.y - 56) if scene.species == "frog" else (-34, c.y - 44)))


def _hat(pen: Pen, y: float) -> None:
    pen.oval(0, y, 60, 13, HAT)
    pen.poly([(-34, y - 2), (-31, y - 50), (31, y - 50), (34, y - 2)], HAT)
    pen.poly([(-33, y - 3), (-32, y - 17), (32, y - 17), (33, y - 3)], BAND, 0)
    pen.oval(0, y - 50, 31, 9, mix(HAT, WHITE, 0.3))


def _scarf(pen: Pen, y: float, side: int) -> None:
    x = side * 30
    pen.limb([(x, y + 2), (x, y + 44)], TEAL, 19)
    pen.stroke([(x - 8, y + 32), (x + 8, y + 32)], WHITE, 6)
    pen.limb([(-44, y - 6), (-22, y + 4), (0, y + 7), (22, y + 4), (44, y - 6)], TEAL, 19)
    for x, dy, lean in ((-34, -1, -3), (0, 7, 0), (34, -1, 3)):
        pen.stroke([(x - lean, y + dy - 9), (x + lean, y + dy + 9)], WHITE, 8)


def _bow(pen: Pen, x: float, y: float) -> None:
    for s in (-1, 1):
        pen.poly([(x, y), (x + s * 30, y - 24), (x + s * 38, y), (x + s * 30, y + 22)], HOT_PINK)
    pen.oval(x, y, 12, 13, mix(HOT_PINK, WHITE, 0.35))
