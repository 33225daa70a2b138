"""mgp5 eval: how good a model's replies are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Mgp5Error
from .flags import SEED, generation_options, notes, requests_of, without

if TYPE_CHECKING:
    from ..model import InterleavedModel


@click.command("eval")
@click.option(
    "--format",
    type=click.Choice(["cc3m", "vist", "mmdialog", "storyland"]),
    required=True,
    help="Of the data; storyland writes its own test split where no --data is given.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the data set.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder; it goes on there when given again."
)
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
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
@click.option("--limit", type=click.IntRange(1), help="Stories, dialogues or pictures.  [default: all; storyland: 100]")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NAME[=PATH]",
    help="Beside the model: t2i, t2i-tuned=DIR, two-stage, gill=RUN, text-only; repeatable.",
)
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Repeatable.  [default: all that can be]")
@click.option("--weights", multiple=True, metavar="NAME=PATH", help="Of a metric, see doctor; repeatable.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Replies at a time.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of all replies.")
@without("seed", "show")
@generation_options
def evaluate(**flags: Any) -> None:
    """Measure what a model replies, as the papers do, on CC3M, VIST, MMDialog or Storyland.

    --out gets replies as they come, report.json and report.html. In several processes, one on each GPU:

      torchrun --nproc-per-node 8 --no-python mgp5 eval ...
    """
    from ..device import quiet_libraries

    if flags["format"] != "storyland" and flags["data"] is None:
        raise Mgp5Error(f"--format {flags['format']} without --data", "name the folder of the data set", usage=True)
    model, options = requests_of(flags)
    quiet_libraries()
    from ..apps.open_model import open_model
    from ..evaluation.run import run

    def load(name: str, device: str) -> InterleavedModel:
        return open_model(replace(model, model=name, device=device), notes(flags))

    run(flags, options, load)
