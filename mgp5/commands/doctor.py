"""mgp5 doctor: what this machine has, and what is chosen on it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table


@click.command()
@click.option("--model", help="Tell how much GPU memory it takes in each memory mode; no weights are loaded.")
@click.option("--all", "every", is_flag=True, help="Tell the GPU memory of each named model; takes a minute or two.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(model: str | None, every: bool, as_json: bool) -> None:
    """Tell what this machine has, which weights are here, which engine and kernels are chosen, and why."""
    from ..doctor import examine
    from ..views.tables import show

    if model or every:  # nothing else imports them, which takes seconds
        from ..device import quiet_libraries

        quiet_libraries()
    found = examine(model, every)
    if as_json:
        click.echo(json.dumps(found))
        return
    show(*_tables(found))
    for line in found["next"]:
        click.echo(line)


def _tables(found: dict[str, Any]) -> list[Table]:
    """Return what `examine` found as tables."""
    from ..apps.library import on_disk
    from ..views.tables import table

    facts = [[name.replace("_gib", " (GiB)"), str(value)] for name, value in found["machine"].items()]
    facts += [[name, number or "not installed"] for name, number in found["versions"].items()]
    ways = [[e["name"], e["chosen"] or "cannot run", e["why"]] for e in found["engines"]]
    operations = [[o["name"], o["chosen"], o["why"]] for o in found["operations"]]
    views = [table("machine", ["", ""], facts), table("engines", ["--backend", "chosen", "why"], ways)]
    views.append(table("operations of the engine triton", ["operation", "chosen", "why"], operations))
    weights = [[w["name"], w["made_of"], f"{w['size']:.2f}", on_disk(w)] for w in found["weights"]]
    views.append(table("named models", ["name", "what", "GB", "on this disk"], weights))
    metrics = [[m["name"], m["what"], f"{m['megabytes']:,}", m["path"] or m["get"]] for m in found["metrics"]]
    views.append(table("weights of metrics", ["name", "what", "MB", "where, or how to get them"], metrics))
    views += _memory_tables(found["memory"]) if "memory" in found else []
    if "models" in found:
        rows = [
            [m["model"], *(_gib(modes[place]["total"]) for place in (0, -1))]
            for m in found["models"]
            if (modes := m["modes"])
        ]
        views.append(table("GPU memory (GiB)", ["model", "full", "at least"], rows))
    return views


def _memory_tables(memory: dict[str, Any]) -> list[Table]:
    from ..views.tables import table

    rows = []
    for part in memory["parts"]:
        name = part["name"] + ", not on the GPU" * (part["phase"] == "never")
        rows.append([name, f"{part['parameters'] / 1e6:,.2f}", _gib(part["bytes"])])
    rows += [[f"LLM in {kind[0]} bits", "", _gib(size)] for kind, size in memory["quantized"].items()]
    rows.append([f"cache of {memory['tokens']} tokens", "", _gib(memory["cache"])])
    names = "encode", "read", "draw", "decode", "total"
    modes = [[mode["name"], *(_gib(mode[name]) for name in names)] for mode in memory["modes"]]
    columns = ["held as", "encoding", "reading", "drawing", "decoding", "GPU memory (GiB)"]
    if memory["free"] is not None:
        columns.append("fits")
        for row, mode in zip(modes, memory["modes"], strict=True):
            row.append("yes" if mode["total"] <= memory["free"] else "no")
    title = f"{memory['model']} in {memory['dtype']}"
    size = "x".join(map(str, memory["size"]))
    parts = table(title, ["part", "parameters (M)", "GiB"], rows)
    return [parts, table(f"{title}, a picture of {size}", columns, modes)]


def _gib(size: float) -> str:
    from ..files import GiB

    return f"{size / GiB:.2f}"
