"""Print tables on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WIDE = 10_000  # characters, more than any table has


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """Return a table of texts, names first; columns of numbers are flush right, headings may all be empty."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=any(columns))
    for index, column in enumerate(columns):
        number = next((row[index][:1].isdigit() for row in rows if row[index]), False) and any(columns)
        view.add_column(column, justify="right" if number else "left", no_wrap=index == 0, overflow="fold")
    for row in rows:
        view.add_row(*map(escape, row))  # mgp5[extra] is not markup
    return view


def show(*tables: RenderableType, file: TextIO | None = None) -> None:
    """Print tables on stdout or `file`; where that is no terminal, they are as wide as what is in them."""
    from rich.console import Console

    file = file or sys.stdout
    view = Console(file=file, width=None if file.isatty() else WIDE)
    for one in tables:
        view.print(one)
