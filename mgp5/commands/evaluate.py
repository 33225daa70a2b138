"""mgp5 eval: how good a model's replies are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .flags import COUNT, PATH, SEED, fill, generation_options, notes, progress, requests_of, say, without

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ..evaluation.run import Replied


PUBLIC = ("opening", "interleavedbench", "mmie", "isg", "comm", "weave")  # formats of `evaluation.public`
# Flags of one kind of format.
PAPERS_ONLY = {"split": "--split", "tasks": "--task", "contexts": "--context", "baselines": "--baseline"}
PAPERS_ONLY |= {"metrics": "--metric"}
PUBLIC_ONLY = {"judge": "--judge", "judge_model": "--judge-model", "against": "--against", "rounds": "--rounds"}


@click.command("eval")
@click.option(
    "--format",
    type=click.Choice(["cc3m", "vist", "mmdialog", "storyland", *PUBLIC]),
    required=True,
    help="Of the data; storyland writes its own test split where no --data is given.",
)
@click.option("--data", type=PATH, help="Folder of the data set; of a public benchmark also its table.")
@click.option("--out", type=PATH, required=True, help="Folder; it goes on there when given again.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help="first, illustrate, narrate, continue, last, story, subject, caption, dialogue, and of Storyland details, "
    "which no text tells; repeatable.  [default: all but details]",
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
@click.option(
    "--judge",
    metavar="NAME|ADDRESS",
    default="",
    help="Of a public benchmark: a vision-language model, https://HOST/v1, or default, the benchmark's own.",
)
@click.option("--judge-model", metavar="NAME", default="", help="What to ask for at --judge ADDRESS.")
@click.option(
    "--against",
    type=PATH,
    multiple=True,
    metavar="ANSWERS",
    help="Of others, in a public benchmark's layout; the judge compares; repeatable.",
)
@click.option(
    "--rounds",
    type=click.IntRange(0),
    default=1,
    help="How often a public benchmark asks to go on; 0: for each step of the true answer.",
)
@click.option("--weights", multiple=True, metavar="NAME=PATH", help="Of a metric, see doctor; repeatable.")
@click.option("--batch", type=COUNT, default=8, help="Replies at a time.")
@click.option("--seed", type=SEED, default=0, help="Of all replies.")
@without("seed", "show")
@generation_options
def eval_command(**flags: Any) -> None:
    """Measure what a model replies: as the papers do on CC3M, VIST, MMDialog or Storyland, or on a public benchmark.

    --out gets replies as they come, report.json and report.html; of a public benchmark also its answers/, for the
    benchmark's own scripts. In several processes, one on each GPU:

      torchrun --nproc-per-node 8 --no-python mgp5 eval ...
    """
    from ..device import quiet_libraries

    quiet_libraries()
    public = flags["format"] in PUBLIC
    _refuse_misplaced(PAPERS_ONLY if public else PUBLIC_ONLY, flags)
    if public:
        from ..evaluation.public.request import PublicRequest as Request
        from ..evaluation.public.run import evaluate
    else:
        from ..evaluation.request import EvaluateRequest as Request
        from ..evaluation.run import evaluate

    model, options = requests_of(flags)
    weights = {name: Path(path).expanduser() for name, _, path in (item.partition("=") for item in flags["weights"])}
    request = fill(Request, flags, weights=weights, model=model, options=options)
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


def _refuse_misplaced(others: dict[str, str], flags: dict[str, Any]) -> None:
    """Raise Mgp5Error (wrong usage) where flags of the other kind of format were given."""
    from ..errors import Mgp5Error

    source = click.get_current_context().get_parameter_source
    if given := [flag for name, flag in others.items() if source(name) is not ParameterSource.DEFAULT]:
        found = f"--format {flags['format']} with {', '.join(given)}"
        raise Mgp5Error(found, "leave it out: it is of other formats", usage=True)


def _show(report: dict[str, Any], out: Path, as_json: bool) -> None:
    """Print the numbers of a report, a column for each system, and where its page is."""
    from ..views.tables import show, table

    if as_json:
        shown = {name: report[name] for name in ("tables", "bytes") if name in report}
        return click.echo(json.dumps({"report": str(out / "report.json")} | shown))
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
    for note in report.get("notes", ()):
        say(note)
    say(f"Numbers with intervals, charts and samples are in {out / 'report.html'}")
