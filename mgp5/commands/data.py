"""mgp5 data: what training reads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from .flags import COUNT, PATH, SEED, Group, progress, say, settings_option
from .train import data_of


@click.group(cls=Group)
def data() -> None:
    """Make data sets, and caches of them."""


@data.command()
@click.option("--model", required=True, help="Whose frozen parts: what train will be given, or has made.")
@click.option("--data", "sources", required=True, multiple=True, type=PATH, help="As of train; repeatable.")
@click.option("--format", "formats", multiple=True, help="As of train; one per --data.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="train")
@click.option("--out", type=PATH, required=True, help="Folder for the caches.")
@click.option("--kinds", default="latents,captions,features", help="What to cache, of these and codes.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16")
@click.option("--batch", type=COUNT, default=16, help="Samples at a time.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes that read pictures.")
@settings_option("overrides", "As data.NAME of train.")
@click.option("--device", default="auto")
def cache(sources: tuple[Path, ...], formats: tuple[str, ...], kinds: str, **flags: Any) -> None:
    """Compute once what the frozen parts make of a data set: train --cache DIR then does not.

    latents: of pictures to be drawn, by the VAE: 64 KB each (Stable Diffusion 2.1 at 512 pixels, fp16), 210 GB for
    CC3M. captions: by the text encoders: 158 KB each, 520 GB for CC3M. features: of pictures that are seen, by the
    vision tower: 4.7 MB each of LLaVA-1.5, so for small data only. codes: of all pictures by SEED's trained tokenizer,
    128 bytes each, instead of latents and features; or by VARGPT's VQ-VAE, of those to be drawn.

    A cache belongs to the weights and transforms that made it, and training with others refuses it. A run that was
    interrupted goes on where it was when it is given again.
    """
    import time

    from rich.filesize import decimal
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from ..device import quiet_libraries
    from ..training.make_cache import CacheRequest, make_cache

    quiet_libraries()
    request = CacheRequest(data=data_of(sources, formats), kinds=tuple(kinds.split(",")), **flags)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("samples"), TimeRemainingColumn()
    with progress(*columns, TextColumn("{task.description}")) as bar:
        task, start = bar.add_task("", total=None), time.monotonic()
        for done in make_cache(request, say):
            speed = done.items / (time.monotonic() - start)
            text = f"{speed:.1f} items/s  {decimal(done.bytes)} on disk"
            bar.update(task, completed=done.samples, total=done.total, description=text)


@data.command()
@click.option("--out", type=PATH, required=True)
@click.option("--split", type=click.Choice(["train", "test"]), default="train")
@click.option("--pairs", type=click.IntRange(0), default=1000)
@click.option("--stories", type=click.IntRange(0), default=200)
@click.option("--dialogs", type=click.IntRange(0), default=200)
@click.option("--details", type=click.IntRange(0), default=0, help="Pictures that must keep a kite of the one before.")
@click.option("--narrations", type=click.IntRange(0), default=0, help="Pictures that are told without a story.")
@click.option("--seed", type=SEED, default=0)
def storyland(out: Path, split: str, seed: int, **counts: int) -> None:
    """Write Storyland, a drawn picture-book world, in the file formats of CC3M, VIST and MMDialog."""
    from ..storyland.write import write

    with progress(transient=True) as bar:
        show = partial(bar.update, bar.add_task("drawing", total=None))
        write(out, split, **counts, seed=seed, progress=lambda done, total: show(completed=done, total=total))
    say(f"Wrote {out}")
