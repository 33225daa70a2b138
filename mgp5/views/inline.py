"""Pictures inside a terminal: iTerm2, kitty, sixel or coloured half blocks; sizes are in character cells."""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    import PIL.Image

Images = Literal["auto", "blocks", "off"]
Painter = Callable[["PIL.Image.Image"], None]
COLUMNS = 36  # width of a picture; a square one is then 18 lines high and fits the classic 24
ANSWER_SECONDS = 0.5


def painter(images: Images, stdout: TextIO) -> Painter | None:
    """What draws a picture on this terminal, or None where it should not be drawn.

    Terminals are known by their environment where possible, since a question to the terminal costs time and may be
    answered into the user's next line. Only sixel has to be asked for, and only when somebody is there to answer.
    """
    name = os.environ.get("TERM", "")
    if images == "off" or not stdout.isatty() or name == "dumb":
        return None
    if images == "auto":
        program = os.environ.get("TERM_PROGRAM", "")
        multiplexed = "TMUX" in os.environ or name.startswith(("screen", "tmux"))  # inherits variables, draws nothing
        if not multiplexed:
            if program in ("iTerm.app", "WezTerm") or os.environ.get("LC_TERMINAL") == "iTerm2":
                return partial(_draw_iterm2, stdout)
            if program == "ghostty" or name in ("xterm-kitty", "xterm-ghostty") or "KITTY_WINDOW_ID" in os.environ:
                return partial(_draw_kitty, stdout)
        if _answers_sixel(stdout):
            return partial(_draw_sixel, stdout)
    return _blocks_painter(stdout)


def _cells(picture: PIL.Image.Image) -> tuple[int, int]:
    """Columns and rows for a picture: at most COLUMNS wide, and inside the window; a cell is twice as high as wide."""
    import shutil

    window = shutil.get_terminal_size()
    most_rows = max(1, window.lines - 2)
    columns = max(1, min(COLUMNS, window.columns - 1, 2 * most_rows * picture.width // picture.height))
    return columns, max(1, min(most_rows, round(columns * picture.height / picture.width / 2)))


def _png(picture: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _draw_iterm2(stdout: TextIO, picture: PIL.Image.Image) -> None:
    columns, rows = _cells(picture)
    stdout.write(f"\x1b]1337;File=inline=1;width={columns};height={rows}:{_png(picture)}\a\n")
    stdout.flush()


def _draw_kitty(stdout: TextIO, picture: PIL.Image.Image) -> None:
    columns, rows = _cells(picture)
    data = _png(picture)
    chunks = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    for index, chunk in enumerate(chunks):
        more = int(index < len(chunks) - 1)
        keys = f"a=T,f=100,q=2,c={columns},r={rows},m={more}" if index == 0 else f"m={more}"
        stdout.write(f"\x1b_G{keys};{chunk}\x1b\\")
    stdout.write("\n")
    stdout.flush()


def _draw_sixel(stdout: TextIO, picture: PIL.Image.Image) -> None:
    from rich.console import Console

    # At import, textual-image asks the terminal again and impatiently; without a stdout it does not.
    known, sys.__stdout__ = sys.__stdout__, None
    try:
        from textual_image.renderable.sixel import Image as Sixel
    finally:
        sys.__stdout__ = known
    columns, rows = _cells(picture)
    Console(file=stdout).print(Sixel(picture, width=columns, height=rows), end="")


def _blocks_painter(stdout: TextIO) -> Painter | None:
    """Half blocks need colour; None where the terminal or the user (NO_COLOR) has none."""
    from rich.console import Console

    console = Console(file=stdout)
    if console.color_system is None or console.no_color:
        return None
    return lambda picture: _draw_blocks(console, picture)


def _draw_blocks(console: object, picture: PIL.Image.Image) -> None:
    """Two pixels per cell: the colour of the upper half block is the upper pixel, its background the lower one."""
    from rich.color import Color
    from rich.segment import Segment, Segments
    from rich.style import Style

    columns, rows = _cells(picture)
    pixels = picture.convert("RGB").resize((columns, 2 * rows)).load()
    segments = []
    for row in range(rows):
        for column in range(columns):
            upper, lower = (Color.from_rgb(*pixels[column, 2 * row + half]) for half in (0, 1))
            segments.append(Segment("▀", Style(color=upper, bgcolor=lower)))
        segments.append(Segment.line())
    console.print(Segments(segments), end="")


def _answers_sixel(stdout: TextIO) -> bool:
    """Ask the terminal what it is (DA1, which practically all answer): a 4 in the answer stands for sixel.

    Not asked when the answer cannot come: stdin is no terminal, or this is a background job (which would be stopped);
    nor in a window of unknown size, where textual-image divides by its width.
    """
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
        return False
    try:
        import termios
        import tty
    except ImportError:  # Windows
        return False
    stdin = sys.stdin.fileno()
    try:
        if os.tcgetpgrp(stdin) != os.getpgrp() or 0 in os.get_terminal_size(stdout.fileno()):
            return False
        before = termios.tcgetattr(stdin)
        try:
            tty.setcbreak(stdin, termios.TCSANOW)
            answer = _ask(stdin, stdout)
        finally:
            termios.tcsetattr(stdin, termios.TCSANOW, before)
    except (OSError, termios.error):
        return False
    return b"4" in answer.split(b";")


def _ask(stdin: int, stdout: TextIO) -> bytes:
    """The numbers of the terminal's DA1 answer, b"" if none comes."""
    from select import select

    if select([stdin], [], [], 0)[0]:
        return b""  # the user types ahead: those keys must not be swallowed
    stdout.write("\x1b[c")
    stdout.flush()
    answer, end = b"", time.monotonic() + ANSWER_SECONDS
    while (left := end - time.monotonic()) > 0 and select([stdin], [], [], left)[0]:
        answer += os.read(stdin, 256)
        if found := re.search(rb"\x1b\[\?([\d;]*)c", answer):
            return found[1]
    return b""
