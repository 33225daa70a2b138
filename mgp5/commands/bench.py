"""mgp5 bench: how fast it is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from .flags import COUNT, PATH, say


@click.command()
@click.option("--suite", type=click.Choice(["cpu", "gpu", "kernels", "train"]), default="cpu")
@click.option("--model", help="Instead of the suite's; random weights unless it is trained.")
@click.option("--head", help="Whose training is measured.  [minigpt5]")
@click.option("--steps", type=COUNT, help="Images and replies, or updates, to time in each row.")
@click.option("--batch", type=COUNT, help="Samples of an update.  [default: 48; 12 on a CPU]")
@click.option(
    "--minutes", type=click.FloatRange(0), help="Rows not begun by then are left out.  [cpu: 5; gpu, train: 10]"
)
@click.option(
    "--backend",
    "backends",
    type=click.Choice(["eager", "compile", "triton", "onnx"]),
    multiple=True,
    help="Of ours; repeatable.  [cpu: eager; gpu: all]",
)
@click.option("--exported", type=PATH, help="Folder of mgp5 export that onnx runs.")
@click.option("--device", default="auto")
@click.option("--out", type=PATH, required=True, help="JSON file for the report.")
@click.option("--against", type=PATH, help="Earlier report: tell what got slower than there, and fail.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row on stdout.")
def bench(out: Path, against: Path | None, as_json: bool, **options: Any) -> None:
    """Measure what the demo draws and writes (cpu), real sizes of models with random weights beside diffusers and
    transformers (gpu), every kernel (kernels), or the first stage of training (train; --model demo on a CPU).

    With --against, the exit code is 1 where a row is slower than its own in that report by more than its tolerance.
    """
    from ..device import machine, quiet_libraries

    quiet_libraries()
    from ..bench.run import BenchRequest, measure, read_reference, slower
    from ..views.tables import bench_tables, show

    reference = read_reference(against) if against else None
    request, began, rows = BenchRequest(out=out, **options), time.monotonic(), []
    for row in measure(request, lambda text: say(f"[{time.monotonic() - began:4.0f} s] {text}")):
        rows.append(row)
        if as_json:
            click.echo(json.dumps(row))
    if not as_json:
        show(bench_tables(rows))
    say(f"The report is in {out}")
    if reference:
        lines = slower(rows, reference)
        for line in lines:
            click.echo(f"slower: {line}", err=as_json)
        cards = [facts.get("gpu", "no GPU") for facts in (reference.get("machine", {}), machine())]
        say(f"{len(lines)} times slower than {against} ({cards[0]}; here {cards[1]})")
        if lines:
            raise click.exceptions.Exit(1)
