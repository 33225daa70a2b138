"""mgp5 ablate: the papers' ablations, trained and measured on Storyland."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder; it goes on there when given again."
)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Made by data storyland, to train on.  [default: written]"
)
@click.option("--model", default="demo", show_default=True, help="Whose LLM and generator; the rest begins anew.")
@click.option("--rows", multiple=True, metavar="NAME", help="Of the table; repeatable.  [default: all]")
@click.option("--seeds", type=click.IntRange(1, 10), default=3, show_default=True, help="Trainings of each row.")
@click.option(
    "--pretrain-steps", type=click.IntRange(1), default=240, show_default=True, help="Updates of 16 captions."
)
@click.option("--finetune-steps", type=click.IntRange(1), default=60, show_default=True, help="Updates of 8 stories.")
@click.option("--samples", type=click.IntRange(2), default=48, show_default=True, help="Test captions, and stories.")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Denoising steps per image.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Trainings at a time.")
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--backend",
    type=click.Choice(["auto", "eager", "onnx"]),
    default="auto",
    show_default=True,
    help="What draws.",
)
@click.option("--json", "as_json", is_flag=True, help="Print ablations.json instead of the table.")
def ablate(as_json: bool, **flags: Any) -> None:
    """Train what the papers ablate on Storyland, every row with the same updates and seeds, and compare.

    --out gets ablations.json and ablations.html, which grow while it runs: the table, which way the papers' numbers go,
    and whether ours agree.
    """
    from ..device import quiet_libraries

    quiet_libraries()
    import json

    from ..evaluation.ablations_page import show_table
    from ..evaluation.ablations_run import run

    facts = run(flags)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        show_table(facts)
    click.echo(f"The table is in {flags['out'] / 'ablations.html'}", err=True)
