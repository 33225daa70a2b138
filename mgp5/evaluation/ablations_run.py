"""What `mgp5 ablate` does: every training that its rows need, once; pictures of each, judged; the table (B pictures).

config.json                          what is ablated: a folder goes on with the same only
data/  cache/                        Storyland, and what the frozen parts make of it
runs/NAME/seed-0/pretrain, finetune  runs of `mgp5 train`, named after the first row that has them
  measured/full-3.json, .jpg         by context and guidance: what was drawn by it
ablations.json  ablations.html       of all that is measured so far
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import click

from ..config import ModelConfig, Stage
from ..data import load_data
from ..errors import Mgp5Error
from ..files import lock, read_json, replacing, write_json
from ..hub import Parts, read_config, resolve
from ..loading import CONFIG
from ..options import parse_settings
from ..storyland.write import write as write_storyland
from ..training import checkpoints as runs
from ..training import make_cache as caching
from ..training import run as training
from .ablations import Row, needed, rows
from .ablations_measure import Drawn, measure
from .ablations_page import report
from .ablations_pool import processes
from .run import weights

PAIRS, STORIES = 2000, 400  # to train on, where no data is given
FORMATS: dict[Stage, str] = {"pretrain": "cc3m", "finetune": "vist"}
# Of all rows; stories train only what is measured of them.
SETTINGS: dict[Stage, tuple[str, ...]] = {
    "pretrain": ("batch=16", "warmup=20", "save_every=50"),
    "finetune": ("batch=8", "warmup=10", "save_every=25", 'data.tasks=["illustrate"]'),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all trainings share.

    Attributes:
        data: Storyland's train split.
        model: the frozen parts that all begin from, "MLLM+GENERATOR".
        guidance: the scale of rows that have no own.
        updates: of each stage.
        samples: test captions, and test stories, that are drawn.
        steps: of denoising.
    """

    out: Path
    data: Path
    model: str
    guidance: float
    updates: dict[Stage, int]
    samples: int
    steps: int
    device: str
    backend: str


@dataclass
class Run:
    """A training, and what is drawn by it. Its folder is named after the first row that has it."""

    stage: Stage
    row: Row
    updates: int
    before: Run | None
    drawn: set[Drawn] = field(default_factory=set)

    def folder(self, out: Path, seed: int) -> Path:
        return out / "runs" / self.row.name.replace(" ", "-") / f"seed-{seed}" / self.stage


def run(flags: dict[str, Any]) -> dict[str, Any]:
    """Train, draw and measure what is missing; returns what ablations.json holds.

    Raises Mgp5Error: no such row or model, an --out that holds something else, a process that has died.
    """
    parts, out = resolve(flags["model"]), flags["out"]
    known = read_config(parts.trained / CONFIG) if parts.trained else {}
    mllm, diffusion = (os.path.abspath(p) if os.path.isdir(p) else p for p in (parts.mllm, parts.diffusion))
    plan = Plan(
        out=out,
        data=flags["data"] or out / "data" / "train",
        model=f"{mllm}+{diffusion}",
        guidance=float(known.get("guidance", ModelConfig.guidance)),
        updates={stage: flags[f"{stage}_steps"] for stage in FORMATS},
        **{name: flags[name] for name in ("samples", "steps", "device", "backend")},
    )
    table = rows(plan.guidance)
    found = runs_of(table, needed(table, flags["rows"]), plan)
    for format in FORMATS.values() if flags["data"] else ():
        load_data(format, plan.data / format)  # before --out is claimed for it
    with _claimed(plan, weights(Parts("", mllm, diffusion, None)), flags["data"]):
        _write_data(plan, flags["data"] is None)
        _work(plan, table, found, flags["seeds"], flags["jobs"])
        return report(plan, table, found, flags["seeds"])


def runs_of(table: Mapping[str, Row], chosen: Sequence[Row], plan: Plan) -> dict[tuple, Run]:
    """The trainings that rows need, by what tells them apart; those before them come first."""
    found: dict[tuple, Run] = {}

    def add(row: Row, stage: Stage) -> Run:
        key = row.training(stage)
        if key not in found:
            first = next(other for other in table.values() if other.training(stage) == key)
            before = add(row, "pretrain") if stage == "finetune" and row.pretrain is not None else None
            updates = plan.updates[stage] if before or stage == "pretrain" else sum(plan.updates.values())
            found[key] = Run(stage, first, updates, before)
        return found[key]

    for row in chosen:
        for stage in row.stages:
            add(row, stage).drawn.add((row.context, row.guidance or plan.guidance))
    return found


def _work(plan: Plan, table: Mapping[str, Row], found: Mapping[tuple, Run], seeds: int, jobs: int) -> None:
    """Do all that is missing, a first stage and those that follow it in one process; the table grows with it."""
    chains: dict[int, list[Run]] = {}
    for one in found.values():
        chains.setdefault(id(one.before or one), []).append(one)
    todo = [(seed, chain) for seed in range(seeds) for chain in chains.values()]
    click.echo(f"{len(todo)} trainings with their pictures, {jobs} at a time; the page grows with each", err=True)
    with processes(jobs) as pool:
        pool.submit(_cache, plan).result()
        futures = {pool.submit(_chain, plan, chain, seed): (seed, chain) for seed, chain in todo}
        for number, future in enumerate(as_completed(futures), 1):
            future.result()
            seed, chain = futures[future]
            click.echo(f"{number} of {len(todo)}: {chain[0].row.name}, seed {seed}", err=True)
            report(plan, table, found, seeds)


def _cache(plan: Plan) -> None:
    """Compute once what the frozen parts make of the data."""
    flags = {"kinds": "latents,captions,features", "dtype": "fp32", "batch": 16, "workers": 0, "settings": ()}
    flags |= {"model": plan.model, "device": plan.device, "out": plan.out / "cache"}
    flags["formats"], flags["sources"] = zip(*_sources(plan, *FORMATS), strict=True)
    with redirect_stderr(StringIO()):
        caching.run(flags)


def _sources(plan: Plan, *stages: Stage) -> list[tuple[str, Path]]:
    return [(FORMATS[stage], plan.data / FORMATS[stage]) for stage in stages]


def _chain(plan: Plan, chain: Sequence[Run], seed: int) -> None:
    """Train, draw and measure what is missing of a seed's runs."""
    for one in chain:
        folder = one.folder(plan.out, seed)
        _train(plan, one, folder, seed)
        measure(plan, one.stage, folder, one.drawn)


def _train(plan: Plan, one: Run, folder: Path, seed: int) -> None:
    """One stage, from its last checkpoint on."""
    done = runs.checkpoints(folder)
    if done and int(done[-1].name[5:]) >= one.updates:
        return
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
    own = one.row.pretrain if one.stage == "pretrain" else one.row.finetune
    request = training.TrainRequest(
        stage=one.stage,
        data=tuple(_sources(plan, one.stage)),
        out=folder,
        model=str(one.before.folder(plan.out, seed)) if one.before else plan.model,
        preset="demo",
        overrides=parse_settings((*SETTINGS[one.stage], *own, f"seed={seed}")),
        max_steps=one.updates,
        vokens=one.row.vokens,
        device=plan.device,
        caches=(plan.out / "cache",),
        resume=bool(done),
    )
    for _ in training.train_stage(request, tell=lambda text: None):
        pass


def _write_data(plan: Plan, train: bool) -> None:
    """Storyland, each split once and whole: enough to test on, and where no data is given, to train on."""
    counts = {"test": (plan.samples, plan.samples)} | ({"train": (PAIRS, STORIES)} if train else {})
    for split, (pairs, stories) in counts.items():
        folder = plan.out / "data" / split
        if not folder.exists():
            with replacing(folder) as part:
                write_storyland(part, split, pairs, stories, 0, 0)


@contextmanager
def _claimed(plan: Plan, weights: str, data: Path | None) -> Iterator[None]:
    """Hold a folder, which is new or holds the same ablations, so that no other command works there."""
    settings = {**asdict(plan), "data": str(data.resolve()) if data else "written here", "weights": weights}
    settings = json.loads(json.dumps({name: value for name, value in settings.items() if name != "out"}, default=str))
    file = plan.out / runs.SETTINGS
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        if not file.exists() and any(plan.out.iterdir()):
            raise Mgp5Error(f"--out {plan.out} is not empty and holds no ablations", "choose another --out", usage=True)
        old = read_json(file) if file.exists() else settings
        if changed := [name for name in settings if old.get(name) != settings[name]]:
            found = f"--out {plan.out} holds ablations with another {', '.join(changed)}"
            raise Mgp5Error(found, "go on with the same, or choose another --out", usage=True)
        write_json(file, settings)
    except OSError as error:
        raise Mgp5Error(f"--out {plan.out} cannot be written ({error.strerror})", "choose another --out") from None
    with lock(plan.out / ".lock"):
        yield
