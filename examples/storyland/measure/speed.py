"""What the lossy shortcuts of the denoising cost and gain: each setting draws the same test pictures (B of them).

Pictures are judged by the judge of mgp5.storyland, and compared with those of 20 guided steps from the same conditions
and noise. The settings take turns, batch by batch. Milliseconds are of the processor: other work does not count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import click
import torch
from renders import scores
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mgp5.apps.open_model import load
from mgp5.evaluation import tasks
from mgp5.evaluation.systems import Model, Undrawn
from mgp5.evaluation.tasks import Question
from mgp5.heads import DrawContext, Forced, Request, Response
from mgp5.heads.minigpt5 import predicting_states
from mgp5.messages import Conversation
from mgp5.model import InterleavedModel
from mgp5.options import DiffusionOptions, Options
from mgp5.storyland.judge import load_judge, look
from mgp5.storyland.metrics import attributes_right
from mgp5.storyland.world import Scene
from mgp5.storyland.write import write

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"guidance_until": 0.5},
    {"guidance_until": 0.3},
    {"guidance_until": 0.0},
    {"reuse": 2},
    {"reuse": 3},
    {"reuse": 5},
    {"steps": 15},
    {"steps": 10},
    {"steps": 8},
    {"steps": 6},
    {"steps": 4},
    {"guidance_until": 0.5, "reuse": 2},
    {"steps": 10, "guidance_until": 0.5},
    {"steps": 10, "reuse": 2},
    {"steps": 10, "guidance_until": 0.5, "reuse": 2},
)


class Recorder(Undrawn):
    """A head that keeps conditions (1, L, C) instead of drawing."""

    def __init__(self, head: Any) -> None:
        super().__init__(head)
        self.kept: list[Tensor] = []

    def draw(self, context: DrawContext) -> Generator[Request, Response, Tensor]:
        response = yield Forced(self.ids)
        hidden = torch.cat([context.state, response.hidden], dim=1)
        self.kept.append(self.head.mapper(predicting_states(hidden, [0], [1], self.head.num_vokens)))
        return torch.zeros(3, 8, 8)


def conditions(model: InterleavedModel, stories: int) -> tuple[Tensor, list[Scene]]:  # (B, L, C)
    """What the model makes of the true history of each test picture and its sentence, and what the picture shows."""
    head = Recorder(model.head)
    reader = Model(SimpleNamespace(backbone=model.backbone, head=head, config=model.config), Options())
    with TemporaryDirectory() as place:
        folder = Path(place) / "storyland"
        write(folder, "test", 0, stories, 0, seed=0)
        data = tasks.load("storyland", folder, "test", tasks=("illustrate",))
        scenes = []
        for sample in track(data.samples, "reading", **_err()):
            *history, truth = sample.load().messages
            reader([Question(sample, Conversation(tuple(history)), truth, seed=0)])
            scenes.append(data.scenes[truth.images[0].path.resolve()])
    return torch.cat(head.kept), scenes


def seeds(start: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(start + k) for k in range(count)]


@torch.inference_mode()
def paint(model: InterleavedModel, given: Tensor, options: DiffusionOptions, first: int) -> tuple[Tensor, float]:
    """Pictures (B, 3, H, W) in [-1, 1] with seeds from `first` on, and the processor's milliseconds for each."""
    began = time.process_time()
    generators, unconditional = seeds(first, len(given)), model.head.unconditional(given)
    *_, latents = model.head.generator.draw(given, unconditional, generators=generators, **asdict(options))
    pictures = model.head.generator.decode(latents)
    return pictures.cpu(), 1000 * (time.process_time() - began) / len(given)


def psnr(pictures: Tensor, reference: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; infinite for the reference itself."""
    error = ((pictures - reference) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def measure(model: InterleavedModel, stories: int, batch: int) -> list[dict[str, Any]]:
    """One row for each of SETTINGS."""
    plain = DiffusionOptions(guidance=model.config.guidance)
    given, scenes = conditions(model, stories)
    ways = [replace(plain, **changes) for changes in SETTINGS]
    paint(model, given[:batch], plain, 0)  # what is prepared once
    pictures: list[list[Tensor]] = [[] for _ in ways]
    times: list[list[float]] = [[] for _ in ways]
    for start in track(range(0, len(given), batch), "drawing", **_err()):
        for way, made, taken in zip(ways, pictures, times, strict=True):
            drawn, ms = paint(model, given[start : start + batch], way, start)
            made.append(drawn)
            taken.append(ms)
    judge, rows = load_judge(), []
    for way, made, taken in zip(ways, pictures, times, strict=True):
        kept = {name: asdict(way)[name] for name in ("steps", "guidance_until", "reuse", "sampler", "guidance")}
        noise = {"ms": round(median(taken), 1), "psnr": round(psnr(torch.cat(made), torch.cat(pictures[0])), 2)}
        right = scores(attributes_right(look(judge, torch.cat(made))[0], scenes))
        rows.append(kept | noise | {"n": len(scenes), "right": right})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as Markdown."""
    names = (
        "steps",
        "--guidance-until",
        "--reuse",
        "ms an image",
        "times as fast",
        "attributes right",
        "all seven",
        "dB",
    )
    page = Table(*names, box=box.MARKDOWN, title=f"{rows[0]['n']} pictures")
    for column in page.columns:
        column.justify = "right"
    for row in rows:
        right, gain = row["right"], rows[0]["ms"] / row["ms"]
        shares = f"{100 * right['mean']:.1f} %", f"{100 * right['all']:.1f} %"
        given = f"{row['steps']}", f"{row['guidance_until']}", f"{row['reuse']}"
        page.add_row(*given, f"{row['ms']:.0f}", f"{gain:.2f}", *shares, f"{row['psnr']:.1f}")
    return page


def _err() -> dict[str, Any]:
    return {"console": Console(stderr=True), "transient": True}


@click.command()
@click.option("--model", "name", default="demo", help="Name or folder of the model.")
@click.option("--backend", default="eager", show_default=True, help="What draws.")
@click.option("--stories", default=50, help="Test stories, of four pictures each.")
@click.option("--batch", default=8, help="Pictures drawn together.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("speed.json"), show_default=True, help="The report."
)
def main(name: str, backend: Any, stories: int, batch: int, out: Path) -> None:
    rows = measure(load(name, backend=backend), stories, batch)
    # JSON has no infinity
    out.write_text(json.dumps([row | {"psnr": row["psnr"] if i else None} for i, row in enumerate(rows)], indent=2))
    Console(width=140).print(table(rows))


if __name__ == "__main__":
    main()
