"""mgp5 models, pull and rm: named models on this machine."""

from __future__ import annotations

import json
import sys

import click

from ..errors import Mgp5Error
from .flags import say


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object per model on stdout.")
def models(as_json: bool) -> None:
    """List named models: whether they generate or are to train with, size, licence, whether they are on this disk.

    A multimodal LLM and a diffusion model make a model to train: LLM+MODEL, for instance llava-1.5-7b+sd-2.1-base.
    """
    from ..apps.library import TO_TRAIN, catalogue, on_disk
    from ..views.tables import show, table

    rows = catalogue()
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    cells = [
        [r["name"], r["made_of"], f"{r['size']:.2f}", on_disk(r), r["licence"], ", ".join(r["from"])] for r in rows
    ]
    show(table("named models", ["name", "what", "GB", "on this disk", "licence", "from, mirrors"], cells))
    ready = ", ".join(r["name"] for r in rows if r["generates"])
    click.echo(f"Ready to generate: {ready}. Each of the others is {TO_TRAIN}")


@click.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch a model from the hub: NAME of mgp5 models, LLM+MODEL, or the folder of a model that names its parts.

    Only what is read is fetched, of the commit that is pinned, and checked against the hub's checksums. Given again,
    it goes on where it was.
    """
    import huggingface_hub.utils

    from ..apps.library import pull as run

    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    run(name, say)


@click.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Free the disk of a model that was fetched from the hub. Folders of your own are not touched."""
    from ..apps.library import GB, free, held

    found = held(name)
    if not found:
        raise Mgp5Error(f"nothing of {name} is in the hub's cache", "mgp5 models lists what is there")
    for place, revision in found:
        say(f"{place} {revision.commit_hash[:8]}: {revision.size_on_disk / GB:.2f} GB")
    if yes or click.confirm("Delete?", abort=True, err=True):
        free([revision for _, revision in found])
