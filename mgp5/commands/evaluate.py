"""mgp5 eval: how good a model's replies are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .flags import COUNT, PATH, SEED, fill, generation_options, notes, progress, requests_of, say, without

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ..evaluation.run import Replied


@click.command("eval")
@click.option(
    "--format",
    type=click.Choice(["cc3m", "vist", "mmdialog", "storyland"]),
    required=True,
    help="Of the data; storyland writes its own test split where no --data is given.",
)
@click.option("--data", type=PATH, help="Folder of the data set.")
@click.option("--out", type=PATH, required=True, help="Folder; it goes on there when given again.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help="illustrate, narrate, continue, last, story, caption or dialogue; repeatable.  [default: all of the format]",
)
@click.option(
    "--context",
    "contexts",
    type=click.Choice(["full", "text", "image", "none"]),
    multiple=True,
    help="What questions show of a story; repeatable.  [default: full; of last: all]",
)
@click.option("--limit", type=COUNT, help="Stories, dialogues or pictures.  [default: all; storyland: 100]")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NAME[=PATH]",
    help="Beside the model: t2i, t2i-tuned=DIR, two-stage, gill=RUN, text-only; repeatable.",
)
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Repeatable.  [default: all that can be]")
@click.option("--weights", multiple=True, metavar="NAME=PATH", help="Of a metric, see doctor; repeatable.")
@click.option("--batch", type=COUNT, default=8, help="Replies at a time.")
@click.option("--seed", type=SEED, default=0, help="Of all replies.")
@without("seed", "show")
@generation_options
def eval_command(**flags: Any) -> None:
    """Measure what a model replies, as the papers do, on CC3M, VIST, MMDialog or Storyland.

    --out gets replies as they come, report.json and report.html. In several processes, one on each GPU:

      torchrun --nproc-per-node 8 --no-python mgp5 eval ...
    """
    from ..device import quiet_libraries

    quiet_libraries()
    from ..evaluation.request import EvaluateRequest
    from ..evaluation.run import evaluate

    model, options = requests_of(flags)
    weights = {name: Path(path).expanduser() for name, _, path in (item.partition("=") for item in flags["weights"])}
    request = fill(EvaluateRequest, flags, weights=weights, model=model, options=options)
    bars: dict[str, TaskID] = {}
    first = os.environ.get("RANK", "0") == "0"  # of several processes it speaks
    with progress(transient=True, disable=not first) as bar:

        def show(replied: Replied) -> None:
            if replied.system not in bars:
                bars[replied.system] = bar.add_task(replied.system, total=replied.total)
            bar.update(bars[replied.system], completed=replied.done)
            if flags["as_json"]:
                click.echo(json.dumps(replied.row))

        report = evaluate(request, notes(flags), show)
    if first:
        _show(report, request.out, flags["as_json"])


def _show(report: dict[str, Any], out: Path, as_json: bool) -> None:
    """Print the numbers of a report, a column for each system, and where its page is."""
    from ..views.tables import show, table

    if as_json:
        return click.echo(json.dumps({"report": str(out / "report.json"), "tables": report["tables"]}))
    systems = dict.fromkeys(name for found in report["tables"].values() for name in found)
    rows = []
    for title, found in report["tables"].items():
        metrics = {name: entry["metrics"] for name, entry in found.items()}
        cells = {"replies": {name: f"{entry['replies']:,}" for name, entry in found.items()}}
        if any(entry["failed"] for entry in found.values()):
            cells["failed"] = {name: f"{entry['failed']:,}" for name, entry in found.items()}
        for metric in dict.fromkeys(metric for each in metrics.values() for metric in each):
            cells[metric] = {name: f"{each[metric]['value']:.4g}" for name, each in metrics.items() if metric in each}
        lines = [[metric, *(each.get(name, "") for name in systems)] for metric, each in cells.items()]
        rows += [["" if number else title, *line] for number, line in enumerate(lines)]
    show(table("", ["task", "metric", *systems], rows))
    say(f"Numbers with intervals, charts and samples are in {out / 'report.html'}")
