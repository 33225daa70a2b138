"""mgp5 compare and votes: people judge two systems of mgp5 eval side by side, and their votes are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .flags import SEED

AGREED = (("agreement", 100, 0), ("alpha", 1, 2))  # what is told, its scale, digits


@click.command()
@click.argument("first", metavar="DIR/SYSTEM")
@click.argument("second", metavar="DIR/SYSTEM")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the page and its key.")
@click.option(
    "--task",
    "kinds",
    type=click.Choice(["continue", "story", "dialogue", "illustrate", "narrate", "caption"]),
    multiple=True,
    help="Of questions; repeatable.  [default: the first three, as far as both have replied]",
)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Questions, chosen by --seed.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of questions, and of who stands where.")
def compare(first: str, second: str, out: Path, **flags: Any) -> None:
    """Make a page on which people judge two systems of mgp5 eval side by side, as in the papers' human evaluation.

    DIR is the --out of an eval, SYSTEM the model or a baseline in it. Raters get compare.html alone: it names no
    system, needs no network, and saves their votes as a file. key.json says who is who, and mgp5 votes needs it.
    """
    from ..device import quiet_libraries

    quiet_libraries()
    from ..evaluation.pairs import KEY, PAGE, Replied, compare

    key = compare(Replied(first), Replied(second), out, **flags)
    failed = "".join(f", {count} left out where {name} has failed" for name, count in key["left_out"].items())
    click.echo(f"{len(key['questions'])} of {key['of']} questions{failed}", err=True)
    click.echo(f"for raters: {out / PAGE}; for you: {out / KEY}", err=True)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--key", type=click.Path(path_type=Path), required=True, help="key.json, beside the page.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def votes(files: tuple[Path, ...], key: Path, as_json: bool) -> None:
    """Count votes that raters have saved from a page of mgp5 compare: win rates by criterion, and how raters agree.

    Shares are of all votes, ties too, as in the papers. In brackets: 95 % intervals.
    """
    from ..evaluation.votes import read_key, read_votes, win_rates

    known = read_key(key)
    found = win_rates(*read_votes(files, known), known)
    if as_json:
        click.echo(json.dumps(found))
        return
    _show(found)


def _show(found: dict[str, Any]) -> None:
    from ..evaluation.votes import CRITERIA
    from ..views.tables import show, table

    systems = found["systems"]
    short = {label: Path(name).name for label, name in systems.items()}
    names = short if len(set(short.values())) == len(short) else systems
    columns = [
        "criterion",
        *(f"{name} better, %" for name in names.values()),
        "tie, %",
        "votes",
        "agreement, %",
        "alpha",
    ]
    rows = []
    for name, row in found["criteria"].items():
        shares = (row[label] for label in (*systems, "tie"))
        cells = [f"{100 * one['share']:.1f} ({100 * one['low']:.1f} to {100 * one['high']:.1f})" for one in shares]
        agreed = ["" if row[what] is None else f"{scale * row[what]:.{digits}f}" for what, scale, digits in AGREED]
        rows.append([CRITERIA[name], *cells, str(row["votes"]), *agreed])
    show(table(" and ".join(systems.values()), columns, rows))
    notes = [f"raters: {found['raters']}; questions with a vote: {found['questions']} of {found['of']}"]
    if found["left"] is not None:
        notes.append(f"the left side was better in {100 * found['left']:.0f} % of the votes that were no ties")
    if found["replaced"]:
        notes.append(f"{found['replaced']} votes were replaced by later ones of the same rater on the same question")
    click.echo("\n".join(notes))
