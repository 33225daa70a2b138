"""Print tables on the terminal."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
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


def bench_tables(rows: list[dict[str, Any]]) -> Group:
    """Return a table for each size of a benchmark, a line for each way; shares of parts are columns as well."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table

    views: list[Any] = []
    for (name, size), group in groupby(rows, key=lambda row: (row["name"], row["size"])):
        flat = [row | row.get("parts", {}) for row in group]
        done = [row for row in flat if "skipped" not in row]
        view = Table(title=f"{name}: {size}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        hidden = {"name", "size", "provider", "unit", "parts", "tolerance"}
        columns = [key for key in {key: 0 for row in done for key in row} if key not in hidden]
        view.add_column("", no_wrap=True)
        for column in columns:
            title = done[0].get("unit", column) if column == "median" else column.replace("_", " ")
            view.add_column(title, justify="right", min_width=max(map(len, title.split())), overflow="fold")
        for row in done:
            view.add_row(row["provider"], *(_cell(row.get(column)) for column in columns))
        views += [view] if done else [f"{name}: {size}"]
        views += [f"  {row['provider']} skipped: {row['skipped']}" for row in flat if "skipped" in row]
    return Group(*views)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
