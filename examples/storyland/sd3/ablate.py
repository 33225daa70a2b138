"""Compare recipes of the mapper for Stable Diffusion 3: short pretrainings of the demo's LLM with sd3/train.py's model.

Letters: B pictures, L rows and D width of a condition, whose last row holds the pooled vector.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from clip import captions
from fit import device, step_generator
from renders import renders, right, scores
from sd3.train import DEMO, paint
from torch import Tensor
from unet import moments, sheet

from mgp5.config import TrainConfig
from mgp5.heads.batch import Batch
from mgp5.heads.losses import caption_loss
from mgp5.heads.minigpt5 import predicting_states
from mgp5.loading import build
from mgp5.messages import Conversation, Image
from mgp5.model import InterleavedModel
from mgp5.prompts import IGNORE, example
from mgp5.storyland.judge import load_judge
from mgp5.training.presets import preset

BATCH = 32
PAINTED = 8  # pictures of a row of the sheet
LATER = 3e-4  # learning rate of the second of two phases; the preset's is 1e-3


@dataclass(frozen=True)
class Recipe:
    """A row of the table: what differs from ours."""

    name: str
    inner: int = 128  # W of the mapper's transformer; 0: D, without a projection
    ldm_only: bool = False
    alone: float = 0.0  # share of the updates with the caption loss alone, before both
    blind: bool = False  # the pooled vector is zero
    plain: bool = False  # one mean over all rows: the pooled vector is no term of its own


RECIPES = {
    "ours": Recipe("ours"),
    "ldm": Recipe("no caption loss", ldm_only=True),
    "blind": Recipe("no pooled query, pooled vector zero", blind=True),
    "wide": Recipe("transformer of width D, no projection", inner=0),
    "plain": Recipe("one mean over all rows", plain=True),
    "captions": Recipe("caption loss alone first", alone=0.82),
}


class Pairs:
    """Captioned renders, tokenized once, their latents from sd3/train.py's cache."""

    def __init__(self, work: Path, split: str, count: int, model: InterleavedModel) -> None:
        pictures, self.rows = renders(work, split, count)
        self.moments = moments(work, model.head.generator.vae, pictures)
        self.captions = captions(self.rows, -1)
        talks = (Conversation().add("user", text).add("assistant", Image(caption=text)) for text in self.captions)
        trigger, layout = model.head.spec.new_tokens[0], model.head.layout({}, preset("pretrain", "demo"))
        self.examples = [example(model.backbone, talk, trigger, [layout]) for talk in talks]
        self.trigger = model.head.ids[0]

    def batch(self, chosen: np.ndarray) -> Batch:
        """The samples of these indices."""
        kept = [self.examples[i] for i in chosen]
        length = max(len(sample.ids) for sample in kept)
        pads = [length - len(sample.ids) for sample in kept]
        return Batch(
            ids=torch.tensor([s.ids + [0] * pad for s, pad in zip(kept, pads, strict=True)]),
            mask=torch.tensor([[1] * len(s.ids) + [0] * pad for s, pad in zip(kept, pads, strict=True)]),
            labels=torch.tensor([s.labels + [IGNORE] * pad for s, pad in zip(kept, pads, strict=True)]),
            target_rows=tuple(range(len(kept))),
            target_starts=tuple(sample.ids.index(self.trigger) for sample in kept),
            targets={"moments": torch.from_numpy(self.moments[chosen]).float()},
            captions=tuple(self.captions[i] for i in chosen),
        ).to(device())


def new_model(work: Path, recipe: Recipe) -> InterleavedModel:
    """A fresh mapper between the demo's LLM and the tiny Stable Diffusion 3, changed as the recipe says."""
    torch.manual_seed(0)
    diffusion = str(work / "sd3" / "diffusion")
    model = build(str(DEMO.parent / "mllm"), diffusion, encoder_layers=2, decoder_layers=3, inner=recipe.inner)
    if recipe.blind:
        seen = torch.ones(model.head.generator.condition_shape[0], 1).index_fill(0, torch.tensor(-1), 0.0)
        model.head.mapper.register_forward_hook(lambda mapper, inputs, rows: rows * seen.to(rows))
    if recipe.plain:  # the loss looks here, the mapper has its own
        head = model.head.config
        model.head.config = replace(head, mapper=replace(head.mapper, pooled=0))
    return model


def phases(recipe: Recipe, updates: int) -> list[TrainConfig]:
    """The paper's losses in one phase, with the demo's rates; or in two, as the demo itself was trained."""
    base, first = preset("pretrain", "demo"), round(recipe.alone * updates)
    if recipe.ldm_only:
        base = replace(base, caption_weight=0.0)
    if not first:
        return [replace(base, steps=updates)]
    alone = replace(base, ldm_weight=0.0, caption_weight=1.0, steps=first)
    return [alone, replace(base, lr=LATER, rows_lr=LATER, steps=updates - first)]


def pretrain(
    model: InterleavedModel, pairs: Pairs, configs: list[TrainConfig], log: Callable[[dict[str, Any]], None]
) -> None:
    """The phases one after the other, by AdamW with warm-up and linear decay in each."""
    model.prepare(configs[0])
    model.train()
    for part, config in enumerate(configs):
        optimizer = torch.optim.AdamW(model.parameter_groups(config))
        peaks = [group["lr"] for group in optimizer.param_groups]
        warmup = max(1, min(config.warmup, config.steps // 10))
        for step in range(config.steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min((step + 1) / warmup, (config.steps - step) / (config.steps - warmup), 1.0)
            generator = step_generator(step, 10 + part)
            chosen = torch.randint(len(pairs.rows), (BATCH,), generator=generator).numpy()
            losses = model(pairs.batch(chosen), config, generator)
            losses.total.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % 50 == 0:
                log({"phase": part, "step": step + 1} | {k: round(v.item(), 4) for k, v in losses.terms.items()})
    model.eval()


@torch.no_grad()
def measure(
    model: InterleavedModel, pairs: Pairs, condition: Tensor, empty: Tensor, guidance: float
) -> tuple[dict, Tensor]:
    """Scores of conditions (B, L, D) of the first B pairs, and their pictures (B, 3, 128, 128)."""
    rows, pooled, length = pairs.rows[: len(condition)], model.head.generator.pooled_width, len(condition)
    truth = model.head.generator.encode_text(pairs.captions[:length])
    z = model.head.generator.sample(torch.from_numpy(pairs.moments[:length])).to(device())
    ldm = [model.head.generator.loss(z, condition, step_generator(k, 12)).mean().item() for k in range(4)]
    both, packed = caption_loss(condition, truth, pooled), caption_loss(condition[:, :-1], truth[:, :-1])
    pictures = torch.cat([paint(model.head.generator, part, empty, guidance) for part in condition.split(32)])
    report = scores(right(load_judge().to(device()), pictures, rows))
    report |= {"ldm": sum(ldm) / len(ldm), "rows": packed.item(), "pooled": (both - packed).item()}
    return {name: round(value, 4) for name, value in report.items()}, pictures


@torch.no_grad()
def conditions(model: InterleavedModel, pairs: Pairs, count: int) -> Tensor:
    """What the mapper makes of the first captions: (B, L, D)."""
    batch = pairs.batch(np.arange(count))
    states = predicting_states(model.hidden(batch), batch.target_rows, batch.target_starts, model.head.num_vokens)
    return model.head.mapper(states)


def bounds(model: InterleavedModel, pairs: Pairs, count: int, guidance: float) -> dict[str, tuple[dict, Tensor]]:
    """Scores of the text encoders' own conditions, whole and in part, and of the empty text's."""
    truth, empty = (model.head.generator.encode_text(texts) for texts in (pairs.captions[:count], [""]))
    blind, only = truth.clone(), empty.repeat(count, 1, 1)
    blind[:, -1], only[:, -1] = 0.0, truth[:, -1]
    given = {"text encoders": truth, "without their pooled vector": blind, "only their pooled vector": only}
    given["nothing"] = empty.repeat(count, 1, 1)
    return {name: measure(model, pairs, condition, empty, guidance) for name, condition in given.items()}


def table(report: dict[str, dict]) -> str:
    """The report as Markdown."""
    names = ("mean", "all", "ldm", "rows", "pooled", "parameters", "minutes")
    lines = [f"| | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for name, row in report.items():
        lines.append(f"| {name} | " + " | ".join(str(row.get(key, "")) for key in names) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder that holds sd3/diffusion.")
@click.option("--recipe", "chosen", multiple=True, type=click.Choice([*RECIPES]), default=[*RECIPES])
@click.option("--updates", default=350)
@click.option("--pictures", default=96, help="Test pictures that are drawn and judged.")
@click.option("--guidance", default=3.0)
def main(work: Path, chosen: tuple[str, ...], updates: int, pictures: int, guidance: float) -> None:
    out = work / "sd3" / "ablation"
    out.mkdir(exist_ok=True)
    model = new_model(work, RECIPES["ours"]).to(device())
    train, test = Pairs(work, "train", 6000, model), Pairs(work, "test", 512, model)

    path = out / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}

    def keep(name: str, row: dict[str, Any], shown: Tensor) -> None:
        report[name] = row
        path.write_text(json.dumps(report, indent=2) + "\n")
        sheet(shown[:PAINTED], out / f"{name}.png")
        click.echo(f"{name}: {row}")

    if "text encoders" not in report:
        for name, (row, shown) in bounds(model, test, pictures, guidance).items():
            keep(name, row, shown)
    for key in chosen:
        recipe = RECIPES[key]
        model = new_model(work, recipe).to(device())
        started = time.monotonic()
        pretrain(model, train, phases(recipe, updates), lambda row: click.echo(json.dumps(row)))
        minutes = round((time.monotonic() - started) / 60, 1)
        condition, empty = conditions(model, test, pictures), model.head.unconditional(torch.zeros(1, device=device()))
        row, shown = measure(model, test, condition, empty.detach(), guidance)
        size = sum(p.numel() for p in model.head.mapper.parameters())
        keep(f"{recipe.name}, {updates} updates", row | {"minutes": minutes, "parameters": f"{size / 1e6:.1f}M"}, shown)
    click.echo(table(report))


if __name__ == "__main__":
    main()
