"""mgp5 doctor: what this machine has, and what is chosen on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table


@click.command()
@click.option("--model", help="Tell how much GPU memory it takes in each memory mode; no weights are loaded.")
@click.option("--all", "every", is_flag=True, help="Tell the GPU memory of each named model; takes a minute or two.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(model: str | None, every: bool, as_json: bool) -> None:
    """Tell what this machine has, which weights are here, which engine and kernels are chosen, and why.

    With --model it first says on which cards that fits.
    """
    from ..doctor import examine
    from ..views.tables import show

    if model or every:  # nothing else imports them, which takes seconds
        from ..device import quiet_libraries

        quiet_libraries()
    found = examine(model, every)
    if as_json:
        click.echo(json.dumps(found))
        return
    for line in _answers(found):
        click.echo(line)
    show(*_tables(found))
    for line in found["next"]:
        click.echo(line)


def _answers(found: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each size of card, and for this one: whether the model fits, and how."""
    if (memory := found.get("memory")) is None:
        return
    precision = memory["dtype"].replace("bfloat", "bf").replace("float", "fp")
    cards = {f"{size} GB": name for size, name in memory["cards"].items()}
    if (free := memory["free"]) is not None:
        fitting = (mode["name"] for mode in memory["modes"] if mode["total"] <= free)
        cards = {f"this GPU ({_gib(free)} GiB free)": next(fitting, None)} | cards
    for card, name in cards.items():
        how = name if not name or "bits" in name else f"in {precision}, {name}".removesuffix(", full")
        yield f"{memory['model']} fits on {card}: {f'yes, {how}' if how else 'no'}"
    host = memory["host"]
    answer = "yes" if host["fits"] else "no"
    yield f"{memory['model']} fits without a GPU: {answer}, it takes {_gib(host['needs'])} GiB and {host['told']}"
    yield ""


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    """Yield what `examine` found as tables."""
    from ..apps.library import on_disk
    from ..views.tables import table

    if "memory" in found:
        yield from _memory_tables(found["memory"])
        rows = [[p["part"], p["path"], p["why"]] for p in found["paths"]]
        yield table(f"{found['memory']['model']} with --backend auto", ["part", "by", "why"], rows)
    facts = [[name.replace("_gib", " (GiB)"), str(value)] for name, value in found["machine"].items()]
    facts += [[name, number or "not installed"] for name, number in found["versions"].items()]
    yield table("machine", ["", ""], facts)
    rows = [[e["name"], e["chosen"] or "cannot run", e["why"]] for e in found["engines"]]
    yield table("engines", ["--backend", "chosen", "why"], rows)
    rows = [[o["name"], o["chosen"], o["why"]] for o in found["operations"]]
    yield table("operations of the engine triton", ["operation", "chosen", "why"], rows)
    rows = [[w["name"], w["made_of"], f"{w['size']:.2f}", on_disk(w)] for w in found["weights"]]
    yield table("named models", ["name", "what", "GB", "on this disk"], rows)
    rows = [[m["name"], m["what"], f"{m['megabytes']:,}", m["path"] or m["get"]] for m in found["metrics"]]
    yield table("weights of metrics", ["name", "what", "MB", "where, or how to get them"], rows)
    if "models" in found:
        totals = [(m["model"], [mode["total"] for mode in m["modes"]]) for m in found["models"]]
        rows = [[name, _gib(full), _gib(least)] for name, (full, *_, least) in totals]
        yield table("GPU memory (GiB)", ["model", "full", "at least"], rows)


def _memory_tables(memory: dict[str, Any]) -> Iterator[Table]:
    from ..views.tables import table

    title = f"{memory['model']} in {memory['dtype']}"
    rows = []
    for part in memory["parts"]:
        name = part["name"] + ", not on the GPU" * (part["phase"] == "never")
        rows.append([name, f"{part['parameters'] / 1e6:,.2f}", _gib(part["bytes"])])
    rows += [[f"LLM in {kind[0]} bits", "", _gib(size)] for kind, size in memory["quantized"].items()]
    rows.append([f"cache of {memory['tokens']} tokens", "", _gib(memory["cache"])])
    yield table(title, ["part", "parameters (M)", "GiB"], rows)
    phases = "encode", "read", "draw", "decode", "total", "host"
    rows = [[mode["name"], *(_gib(mode[phase]) for phase in phases)] for mode in memory["modes"]]
    columns = ["held as", "encoding", "reading", "drawing", "decoding", "GPU memory (GiB)", "machine's memory"]
    if memory["free"] is not None:
        columns.append("fits")
        for row, mode in zip(rows, memory["modes"], strict=True):
            row.append("yes" if mode["total"] <= memory["free"] else "no")
    yield table(f"{title}, a picture of {'x'.join(map(str, memory['size']))}", columns, rows)


def _gib(size: float) -> str:
    from ..files import GiB

    return f"{size / GiB:.2f}"
