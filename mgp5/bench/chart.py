"""A bar chart of a benchmark's rows: a group of horizontal bars for each size, the shorter the faster; a thin line goes
from the 20th to the 80th percentile."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image as pil
from PIL import ImageDraw, ImageFont

from ..files import replacing

WIDTH, MARGIN, BAR, GAP, HEADING = 1800, 56, 34, 10, 66  # pixels; of a row, between rows, above a group
SIZES = {"title": 40, "text": 25, "heading": 30}
INK, FAINT, LINE = "#1d2733", "#6b7785", "#e3e8ee"
OURS, PEERS = "#2d7dd2", "#9aa7b5"
COLOURS = {"eager": "#8ec5f5", "compile": OURS, "triton": "#134f8c", "diffusers compiled": "#6b7a8c"}


def chart(machine: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Draw rows of `mgp5 bench` into a PNG that appears whole or not at all. Each group has a scale of its own."""
    fonts = {name: ImageFont.load_default(size) for name, size in SIZES.items()}
    timed = [row for row in rows if row["name"] != "limit"]
    groups = [list(group) for _, group in groupby(timed, key=lambda row: (row["name"], row["size"]))]
    top = MARGIN + 2 * SIZES["title"] + 2 * SIZES["text"]
    height = top + MARGIN + sum(HEADING + len(group) * (BAR + GAP) + GAP for group in groups)
    canvas = pil.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(canvas)
    card = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    draw.text((MARGIN, MARGIN), f"mgp5 on {card}", INK, fonts["title"])
    where = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers", "transformers", "mgp5"))
    below = MARGIN + int(1.4 * SIZES["title"])
    draw.text((MARGIN, below), f"{machine['date'][:10]}, {where}. {_limits(rows)}", FAINT, fonts["text"])
    left = MARGIN + max([int(fonts["text"].getlength(row["provider"])) for row in timed], default=0) + 20
    for group in groups:
        draw.line((MARGIN, top, WIDTH - MARGIN, top), LINE, 2)
        draw.text((MARGIN, top + 18), f"{group[0]['name']}: {group[0]['size']}", INK, fonts["heading"])
        top = _bars(draw, group, fonts["text"], left, top + HEADING) + GAP
    with replacing(path) as part:
        canvas.save(part, "PNG")


def _bars(draw: ImageDraw.ImageDraw, group: list[dict[str, Any]], font: Any, left: int, top: int) -> int:
    """A group's bars; returns where they end."""
    values = [_value(row) for row in group]
    room = (
        WIDTH - MARGIN - left - 20 - max((font.getlength(_value(row)) for row in group if "median" in row), default=0)
    )
    longest = max(row.get("p80", row.get("median", 0)) for row in group) or 1
    for row, value in zip(group, values, strict=True):
        middle = top + BAR / 2
        draw.text((left - 20, middle), row["provider"], INK, font, anchor="rm")
        end, *spread = (left + room * row.get(mark, 0) / longest for mark in ("median", "p20", "p80"))
        if "median" in row:
            usual = PEERS if row["provider"].startswith(("diffusers", "transformers")) else OURS
            colour = COLOURS.get(row["provider"], usual)
            draw.rounded_rectangle((left, top, max(end, left + 3), top + BAR), 5, colour)
            if "p80" in row:
                draw.line((spread[0], middle, spread[1], middle), INK, 2)
            end = max(end, spread[1])
        draw.text((end + 16 if "median" in row else left, middle), value, INK if "median" in row else FAINT, font, "lm")
        top += BAR + GAP
    return top


def _value(row: dict[str, Any]) -> str:
    """What stands beside a bar."""
    if "skipped" in row:
        return f"skipped: {row['skipped']}"[:90]
    shares = {"matmul": row.get("share_of_matmul"), "copy": row.get("share_of_copy")}
    long = row["unit"] == "ms" and row["median"] >= 1000
    told = [f"{row['median'] / 1000:.3g} s" if long else f"{row['median']:.3g} {row['unit']}"]
    told += [f"{row['tokens_per_s']:.3g} tokens/s"] if "tokens_per_s" in row else []
    told += [f"{share:.0%} of {name}" for name, share in shares.items() if share is not None]
    if "image_ms" in row:
        told.append(f"an image {row['image_ms'] / 1000:.3g} s")
    return ", ".join(told)


def _limits(rows: list[dict[str, Any]]) -> str:
    """What shares are of."""
    found = {row["provider"]: row for row in rows if row["name"] == "limit"}
    if not found:
        return ""
    return f"Matmul {found['matmul']['tflop_per_s']:g} TFLOP/s, copy {found['copy']['gb_per_s']:g} GB/s"
