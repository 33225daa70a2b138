"""Print tables on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """Return a table of texts; a column that begins with a number is flush right, headings may all be empty."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=any(columns))
    for index, column in enumerate(columns):
        number = bool(rows) and rows[0][index].replace(",", "").replace(".", "").isdigit()
        view.add_column(column, justify="right" if number and any(columns) else "left")
    for row in rows:
        view.add_row(*map(escape, row))  # mgp5[extra] is not markup
    return view


def show(*tables: Table) -> None:
    """Print tables; where stdout is no terminal, they are 160 characters wide."""
    from rich.console import Console

    view = Console(width=None if sys.stdout.isatty() else 160)
    for one in tables:
        view.print(one)
