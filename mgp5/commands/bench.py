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
@click.option("--steps", type=COUNT, help="Images and replies, or updates, to time in each row.")
@click.option("--batch", type=COUNT, help="Samples of an update.  [default: 48; 8 on a CPU]")
@click.option("--minutes", type=click.FloatRange(0), help="Rows not begun by then are left out.  [cpu: 5; gpu: 8]")
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
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row on stdout.")
def bench(out: Path, as_json: bool, **options: Any) -> None:
    """Measure what the demo draws and writes (cpu), real sizes of models with random weights beside diffusers and
    transformers (gpu), every kernel (kernels), or the first stage of training (train; --model demo on a CPU).
    """
    from ..device import quiet_libraries

    quiet_libraries()
    from ..bench.run import BenchRequest, measure, tables
    from ..views.tables import show

    request, began, rows = BenchRequest(out=out, **options), time.monotonic(), []
    for row in measure(request, lambda text: say(f"[{time.monotonic() - began:4.0f} s] {text}")):
        rows.append(row)
        if as_json:
            click.echo(json.dumps(row))
    if not as_json:
        show(tables(rows))
    say(f"The report is in {out}")
