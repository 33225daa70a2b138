"""Show images inside a terminal, by textual-image: kitty's protocol, sixel or coloured half blocks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from select import select
from typing import Any, Literal, TextIO

Images = Literal["auto", "blocks", "off"]
Painter = Callable[[Any], None]  # takes a PIL image
COLUMNS = 36  # width of an image; a square one is then 18 lines high and fits the classic 24


def painter(images: Images, stdout: TextIO) -> Painter | None:
    """Return a function that prints an image on this terminal, or None where images cannot or should not be shown."""
    if images == "off" or not stdout.isatty() or os.environ.get("TERM") == "dumb" or not _size_is_known():
        return None
    from rich.console import Console

    console, protocol = Console(file=stdout), _protocol() if images == "auto" else "halfcell"
    if protocol == "halfcell" and (console.color_system is None or console.no_color):
        return None
    if protocol != "sixel" and not console.encoding.startswith("utf"):  # blocks, and kitty's marks, are characters
        return None
    renderable = _load(protocol).Image

    def paint(image: Any) -> None:
        columns, rows = _cells(image)
        console.print(renderable(image, width=columns, height=rows), end="")

    return paint


def _protocol() -> Literal["tgp", "sixel", "halfcell"]:
    """Return the module of textual-image that shows images best here.

    The environment tells where possible: a question to the terminal costs time, and its answer may arrive in the user's
    next line. The question is for sixel, and only asked when it can be answered.
    """
    name, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    if not ("TMUX" in os.environ or name.startswith(("screen", "tmux"))):  # they inherit variables, and show nothing
        if program in ("iTerm.app", "WezTerm") or os.environ.get("LC_TERMINAL") == "iTerm2":
            return "sixel"
        if program == "ghostty" or name in ("xterm-kitty", "xterm-ghostty") or "KITTY_WINDOW_ID" in os.environ:
            return "tgp"
    return "sixel" if _answers() and _load("sixel").query_terminal_support() else "halfcell"


def _answers() -> bool:
    """Whether the terminal can be asked: stdin is a terminal in the foreground, and nobody has typed ahead."""
    try:
        stdin = sys.stdin.fileno()
        foreground = os.isatty(stdin) and os.tcgetpgrp(stdin) == os.getpgrp()
        return foreground and not select([stdin], [], [], 0)[0]
    except (AttributeError, OSError, ValueError):  # no stdin, a closed one, or Windows
        return False


def _size_is_known() -> bool:
    """Whether the window has a size; textual-image divides by it."""
    terminal = sys.__stdout__
    return not (terminal and terminal.isatty() and 0 in os.get_terminal_size(terminal.fileno()))


def _cells(image: Any) -> tuple[int, int]:
    """Return columns and rows for a PIL image, at most COLUMNS wide and inside the window; cells are 1 by 2."""
    window = shutil.get_terminal_size()
    most_rows = max(1, window.lines - 2)
    columns = max(1, min(COLUMNS, window.columns - 1, 2 * most_rows * image.width // image.height))
    return columns, max(1, min(most_rows, round(columns * image.height / image.width / 2)))


def _load(protocol: str) -> Any:
    """Import a module of textual-image. At its import it asks the terminal what it is; without a stdout it does not."""
    known, sys.__stdout__ = sys.__stdout__, None
    try:
        return import_module(f"textual_image.renderable.{protocol}")
    finally:
        sys.__stdout__ = known
