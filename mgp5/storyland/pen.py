"""A small outlined-shape pen over Pillow's ImageDraw, with a movable origin.

Letters: x, y pixels of the 3x canvas (y down), r radius, w width.
"""

from __future__ import annotations

from PIL import ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

INK: Colour = (44, 36, 56)
WHITE: Colour = (255, 255, 255)
LINE = 5


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Mix `share`, in [0, 1], of the second colour into the first."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


class Pen:
    """Draw filled shapes with a dark outline; all coordinates are relative to (x, y)."""

    def __init__(self, draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
        self.draw, self.x, self.y = draw, x, y

    def _at(self, points: list[Point]) -> list[Point]:
        return [(self.x + x, self.y + y) for x, y in points]

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour, line: int = LINE) -> None:
        """Draw an ellipse centred on (x, y); `line` 0 leaves the outline out."""
        box = (self.x + x - rx, self.y + y - ry, self.x + x + rx, self.y + y + ry)
        self.draw.ellipse(box, fill=fill, outline=INK if line else None, width=line or 1)

    def poly(self, points: list[Point], fill: Colour, line: int = LINE) -> None:
        """Draw a closed polygon with rounded outline joints."""
        moved = self._at(points)
        self.draw.polygon(moved, fill=fill)
        if line:
            self.draw.line([*moved, *moved[:2]], fill=INK, width=line, joint="curve")

    def stroke(self, points: list[Point], fill: Colour = INK, width: int = LINE) -> None:
        """Draw a polyline with round ends and joints."""
        moved = self._at(points)
        self.draw.line(moved, fill=fill, width=width, joint="curve")
        if width > 6:
            for x, y in (moved[0], moved[-1]):
                r = (width - 1) / 2
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def limb(self, points: list[Point], fill: Colour, width: int) -> None:
        """Draw a thick outlined tube along the points."""
        self.stroke(points, INK, width + 2 * LINE)
        self.stroke(points, fill, width)

    def arc(self, x: float, y: float, rx: float, ry: float, start: int, end: int, width: int = LINE) -> None:
        """Draw an open arc, degrees clockwise from three o'clock."""
        self.draw.arc((self.x + x - rx, self.y + y - ry, self.x + x + rx, self.y + y + ry), start, end, INK, width)

    def pie(self, x: float, y: float, r: float, start: float, end: float, fill: Colour) -> None:
        """Draw a slice of a disc without outline, degrees clockwise from three o'clock."""
        self.draw.pieslice((self.x + x - r, self.y + y - r, self.x + x + r, self.y + y + r), start, end, fill)
