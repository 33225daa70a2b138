"""Rows of a benchmark as tables for the terminal."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group


def tables(rows: list[dict[str, Any]]) -> Group:
    """Return a table for each size, a line for each way; the share of a part of an update is a column as well."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table

    views: list[Any] = []
    for (name, size), group in groupby(rows, key=lambda row: (row["name"], row["size"])):
        flat = [row | row.get("parts", {}) for row in group]
        done = [row for row in flat if "skipped" not in row]
        view = Table(title=f"{name}: {size}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        hidden = {"name", "size", "provider", "unit", "parts"}
        columns = [key for key in {key: 0 for row in done for key in row} if key not in hidden]
        view.add_column("", no_wrap=True)
        for column in columns:
            title = done[0].get("unit", column) if column == "median" else column.replace("_", " ")
            view.add_column(title, justify="right", min_width=max(map(len, title.split())))
        for row in done:
            view.add_row(row["provider"], *(_cell(row.get(column)) for column in columns))
        views += [view] if done else [f"{name}: {size}"]
        views += [f"  {row['provider']} skipped: {row['skipped']}" for row in flat if "skipped" in row]
    return Group(*views)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
