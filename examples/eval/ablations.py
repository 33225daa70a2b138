"""Train what the papers ablate on Storyland, every row with the same updates and seeds, and compare (S seeds).

The folder gets data/ (Storyland), runs/NAME/seed-0/STAGE (runs of `mgp5 train`, each with its evaluations in measured/)
and ablations.json, which grows while it runs. Given again, it goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click

from mgp5.config import ModelConfig
from mgp5.evaluation.request import EvaluateRequest
from mgp5.evaluation.run import evaluate
from mgp5.files import read_json, replacing, write_json
from mgp5.hub import read_config, resolve
from mgp5.loading import CONFIG
from mgp5.options import ModelRequest, parse_settings, reply_options
from mgp5.storyland.write import write
from mgp5.training.checkpoints import checkpoints
from mgp5.training.run import TrainRequest, train_stage

METRICS = ("attributes", "Frechet distance, judge")
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0)  # of guidance
PAIRS, STORIES = 2000, 400  # to train on
FORMATS: dict[str, str] = {"pretrain": "cc3m", "finetune": "vist"}
SETTINGS: dict[str, tuple[str, ...]] = {  # of all rows; stories train only what is measured of them
    "pretrain": ("batch=16", "warmup=20", "save_every=50"),
    "finetune": ("batch=8", "warmup=10", "save_every=25", 'data.tasks=["illustrate"]'),
}
STUDENT = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles by degrees of freedom
WORSE, BETTER = [-1, 1], [1, -1]  # signs of the difference in attributes and in Frechet distance
NEW, OLD = "MiniGPT-5", "MiniGPT-5 of 2023"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        pretrain, finetune: settings beside those of all rows; pretrain None leaves the stage out, and finetuning then
            takes its updates too. Rows with the same settings share their trainings.
        guidance: scale at which it draws; None is the baseline's.
        stages, against: after which it is measured, and the row it is compared with.
        papers: signs of the papers' difference to that row: of CLIP-I or coherence, and of FID; see `source`.
    """

    name: str
    pretrain: tuple[str, ...] | None = ()
    finetune: tuple[str, ...] = ()
    vokens: int = 8
    guidance: float | None = None
    context: str = "full"
    stages: tuple[str, ...] = ("pretrain", "finetune")
    against: str = "baseline"
    papers: list[int] | None = None
    source: str = ""

    def training(self, stage: str) -> tuple[Any, ...]:
        """Return what tells its training up to a stage from others."""
        return self.vokens, self.pretrain, self.finetune if stage == "finetune" else None


def rows(guidance: float) -> dict[str, Row]:
    """Return all rows by name; `guidance` is the scale at which the baseline draws."""
    last: dict[str, Any] = {"stages": ("finetune",)}
    fresh = ("encoder_layers=2", "decoder_layers=3")  # those of the preset's first stage
    without_cfg = ("guidance_dropout=0.0",)
    designs = [
        ("without CFG", without_cfg, without_cfg, WORSE, "5: CLIP-I 0.60, 0.61; FID 33.73, 31.47"),
        ("without L_CAP", ("caption_weight=0.0",), (), WORSE, "5: CLIP-I 0.54, 0.61; FID 40.24, 31.47"),
        ("without L_LDM", ("ldm_weight=0.0",), ("ldm_weight=0.0",), WORSE, "5: CLIP-I 0.58, 0.61; FID 34.65, 31.47"),
        ("fixed queries", ("train_queries=false",), (), [-1, -1], "7: CLIP-I 0.60, 0.61; FID 30.56, 31.47"),
        ("decoder-only mapper", ("kind=decoder-only",), (), WORSE, "7: CLIP-I 0.58, 0.61; FID 34.88, 31.47"),
    ]
    contexts = [
        ("no context", "none", WORSE, "CLIP-I 0.61, 0.70; FID (of 2023) 61.44, 59.48"),
        ("text context", "text", WORSE, "CLIP-I 0.64, 0.70; FID (of 2023) 61.34, 59.48"),
        ("image context", "image", [-1, -1], "CLIP-I 0.69, 0.70; FID (of 2023) 59.09, 59.48"),
    ]
    prefix = f"{NEW}, table 1: CLIP-I 0.65, 0.66; FID per story 381.55, 366.62"
    pretraining = f"{OLD}, table 1: CLIP-I 0.58, 0.70; FID 76.51, 59.48"
    vokens = f"{OLD}, figure 7: better with every further voken, most from 1 to 4"
    scale = f"{OLD}, figure 6: better with a larger scale; above 10 coherence stays, quality declines"
    scales: dict[str, Any] = {"stages": ("pretrain",), "source": scale}
    less = [scale for scale in SCALES if scale != guidance]
    table = [
        Row(name="baseline"),
        *(Row(name=n, pretrain=p, finetune=f, papers=s, source=f"{NEW}, table {t}") for n, p, f, s, t in designs),
        Row(name="without CFG, guidance 1", pretrain=without_cfg, guidance=1.0, stages=("pretrain",)),
        Row(name="prefix tuning", finetune=("lora=none", "prefix.tokens=5"), papers=WORSE, source=prefix, **last),
        Row(name="without pretraining", pretrain=None, finetune=fresh, papers=WORSE, source=pretraining, **last),
        *(Row(name=f"{n} voken{'s' * (n > 1)}", vokens=n, papers=WORSE, source=vokens) for n in (1, 2, 4)),
        Row(name="16 vokens", vokens=16, papers=BETTER, source=vokens),
        *(Row(name=f"guidance {g:g}", guidance=g, papers=WORSE if g < guidance else BETTER, **scales) for g in less),
        Row(name="guidance 15", guidance=15.0, against="guidance 10", papers=[0, 1], **scales),
        *(Row(name=n, context=c, papers=s, source=f"{NEW}, table 6: {t}", **last) for n, c, s, t in contexts),
    ]
    return {row.name: row for row in table}


def chosen_rows(table: Mapping[str, Row], names: Sequence[str]) -> list[Row]:
    """Return rows of these names (none: all), those they are compared with, and the baseline."""
    wanted = {"baseline", *(names or table)}
    wanted |= {table[name].against for name in wanted if name in table}
    return [row for name, row in table.items() if name in wanted]


@dataclass
class Ablations:
    """All trainings and evaluations in one folder.

    Attributes:
        model: the frozen parts that all begin from, "MLLM+GENERATOR".
        guidance: scale of rows that have none of their own.
        updates, samples, steps: of each stage, test captions and stories, denoising steps.
    """

    out: Path
    model: str
    guidance: float
    updates: dict[str, int]
    samples: int = 48
    steps: int = 20
    caches: tuple[Path, ...] = ()
    backend: str = "auto"

    def train(self, row: Row, stage: str, seed: int) -> Path:
        """Train a row up to a stage, from its last checkpoint on; return the folder of the run."""
        same = (other for other in rows(self.guidance).values() if other.training(stage) == row.training(stage))
        name = next(other.name for other in same if stage == "finetune" or other.pretrain is not None)
        folder = self.out / "runs" / name.replace(" ", "-") / f"seed-{seed}" / stage
        model, updates = self.model, self.updates[stage]
        if stage == "finetune" and row.pretrain is not None:
            model = str(self.train(row, "pretrain", seed))
        elif stage == "finetune":
            updates = sum(self.updates.values())
        done = checkpoints(folder)
        if done and int(done[-1].name.removeprefix("step-")) >= updates:
            return folder
        if not done:
            shutil.rmtree(folder, ignore_errors=True)
        settings = (*SETTINGS[stage], *((row.pretrain if stage == "pretrain" else row.finetune) or ()), f"seed={seed}")
        request = TrainRequest(
            stage=stage,
            data=((FORMATS[stage], self.out / "data/train" / FORMATS[stage]),),
            out=folder,
            model=model,
            preset="demo",
            overrides=parse_settings(settings),
            max_steps=updates,
            vokens=row.vokens,
            caches=self.caches,
            resume=bool(done),
        )
        list(train_stage(request))  # one event for each update
        return folder

    def measure(self, row: Row, stage: str, seed: int) -> list[float]:
        """Return the METRICS of a row after a stage: test captions after pretraining, last images after finetuning."""
        folder, guidance = self.train(row, stage, seed), row.guidance or self.guidance
        task, contexts = ("caption", ()) if stage == "pretrain" else ("last", (row.context,))
        request = EvaluateRequest(
            format=FORMATS[stage],
            data=self.out / "data/test" / FORMATS[stage],
            out=folder / "measured" / f"{row.context}-{guidance:g}",
            tasks=(task,),
            contexts=contexts,
            metrics=METRICS,
            model=ModelRequest(model=str(folder), backend=self.backend),
            options=reply_options(steps=self.steps, guidance=guidance),
        )
        report = request.out / "report.json"
        (systems,) = (read_json(report) if report.exists() else evaluate(request))["tables"].values()
        return [systems["model"]["metrics"][name]["value"] for name in METRICS]


def compare(chosen: Sequence[Row], values: Mapping[tuple[str, str], Sequence[Sequence[float]]]) -> list[dict]:
    """Return the table: means over seeds of METRICS, differences to the row compared with, and whether signs agree."""
    lines = []
    for row in chosen:
        line: dict[str, Any] = {"row": row.name, "against": row.against, "papers": row.papers, "source": row.source}
        for stage in row.stages:
            ours, other = values[row.name, stage], values[row.against, stage]
            means = [interval(column) for column in zip(*ours, strict=True)]
            gaps = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(ours, other, strict=True)]
            differences = [interval(column) for column in zip(*gaps, strict=True)]
            line[stage] = {"means": means, "differences": differences}
            if row.papers and stage == row.stages[0]:
                line["ours"] = [verdict(gap, sign) for gap, sign in zip(differences, row.papers, strict=True)]
        lines.append(line)
    return lines


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean over seeds (S,), and of two or more half its 95 % interval (Student's t)."""
    count = len(values)
    half = STUDENT[count - 1] * stdev(values) / count**0.5 if count > 1 else None
    return {"value": fmean(values), "half": half}


def verdict(difference: Mapping[str, float | None], sign: int) -> str:
    """Return whether a difference over seeds has the papers' sign."""
    if difference["half"] is None or abs(difference["value"]) <= difference["half"]:
        return "within chance"
    return "agrees" if sign * difference["value"] > 0 else "disagrees"


def run(work: Ablations, names: Sequence[str] = (), seeds: int = 3) -> Iterator[list[dict]]:
    """Train and measure rows; yield the table so far after each, and write it into ablations.json."""
    for split, (pairs, stories) in {"train": (PAIRS, STORIES), "test": (work.samples, work.samples)}.items():
        if not (folder := work.out / "data" / split).exists():
            with replacing(folder) as part:
                write(part, split, pairs, stories, 0, 0)
    chosen, values = chosen_rows(rows(work.guidance), names), {}
    for count, row in enumerate(chosen, 1):
        for stage in row.stages:
            values[row.name, stage] = [work.measure(row, stage, seed) for seed in range(seeds)]
        table = compare([one for one in chosen[:count] if (one.against, one.stages[-1]) in values], values)
        write_json(work.out / "ablations.json", table)
        yield table


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--model", default="demo", show_default=True, help="Whose LLM and generator; the rest begins anew.")
@click.option("--rows", "names", type=click.Choice([*rows(0.0)]), multiple=True, help="[default: all]")
@click.option("--seeds", type=click.IntRange(1, len(STUDENT)), default=3, show_default=True)
@click.option("--pretrain-steps", default=240, show_default=True, help="Updates of 16 captions.")
@click.option("--finetune-steps", default=60, show_default=True, help="Updates of 8 stories.")
@click.option("--samples", default=48, show_default=True, help="Test captions, and stories.")
@click.option("--cache", "caches", type=click.Path(path_type=Path), multiple=True, help="Of mgp5 data cache.")
def main(out: Path, model: str, names: Sequence[str], seeds: int, **options: Any) -> None:
    parts = resolve(model)
    guidance = read_config(parts.trained / CONFIG)["guidance"] if parts.trained else ModelConfig.guidance
    updates = {stage: options.pop(f"{stage}_steps") for stage in FORMATS}
    work = Ablations(out, f"{parts.mllm}+{parts.diffusion}", float(guidance), updates, **options)
    for table in run(work, names, seeds):
        click.echo(json.dumps(table[-1]))


if __name__ == "__main__":
    main()
