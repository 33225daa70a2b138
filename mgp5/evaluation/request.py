"""What to evaluate, as one value; all that is wrong with it is reported before any weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..device import check_launched, pick_device
from ..errors import Mgp5Error, raise_all
from ..hub import Parts, resolve
from ..options import ModelRequest, Options
from . import tasks
from .measure import METRICS
from .systems import Entry, entries
from .weights import WEIGHTS, missing

STORIES = 100  # of Storyland, where no number is given


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What any evaluation is asked for.

    Attributes:
        data: folder of the data set; of a public benchmark its folder, or its table.
        out: folder for replies and report; an evaluation in it goes on if it is the same.
        limit: takes only the first stories, dialogues or images, or lines of a benchmark.
        weights: paths of weights by the names of `weights.WEIGHTS`; others are looked for.
        batch: replies at a time.
    """

    format: str
    out: Path
    data: Path | None = None
    limit: int | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)
    batch: int = 8
    model: ModelRequest = field(default_factory=ModelRequest)
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Evaluation):
    """A model to evaluate on a data set. Raises Mgp5Error with all that is wrong with it.

    Attributes:
        format, tasks, contexts: see `tasks.load`; without `data`, Storyland is written into `out`.
        limit: None takes all, 100 of Storyland.
        baselines: NAME or NAME=PATH of `systems.BASELINES`, that reply beside the model.
        metrics: names of `measure.METRICS`; empty takes all that can be computed here.
    """

    split: str = "test"
    tasks: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.data is None and self.format != "storyland":
            problems.append(f"--format {self.format} without --data: name the folder of the data set")
        if min(self.limit or 1, self.batch) < 1:
            problems.append(f"limit is {self.limit} and batch {self.batch}, expected 1 or more")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            problems.append(f"no metric {', '.join(map(repr, unknown))}: there are {'; '.join(METRICS)}")
        checks: list[Callable[[], Any]] = [
            lambda: tasks.check(self.format, self.tasks, self.contexts),
            lambda: self.systems,
            lambda: check_common(self.model, self.weights),
        ]
        checks += [] if problems else [lambda: self.left_out]
        raise_all(problems, checks)

    @cached_property
    def systems(self) -> list[Entry]:
        """Who replies: the model first."""
        return entries(self.baselines, self.format)

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Metrics that were asked for and cannot be computed here, each with the reason."""
        reasons = {name: missing(METRICS[name].needs, self.weights) for name in self.metrics or METRICS}
        return {name: reason for name, reason in reasons.items() if reason}

    @property
    def measured(self) -> list[str]:
        """Metrics that are to be computed."""
        return [name for name in self.metrics or METRICS if name not in self.left_out]

    @property
    def num_groups(self) -> int | None:
        """How many stories, dialogues or images are taken; None: all."""
        return self.limit or (STORIES if self.format == "storyland" else None)


def trained(name: str) -> Parts:
    """Return the parts of a model. Raises Mgp5Error for one in which nothing was trained."""
    parts = resolve(name)
    if parts.trained is None:
        raise Mgp5Error(f"{name} has no trained head", f"train one: mgp5 train --stage pretrain --model {name}")
    return parts


def check_common(model: ModelRequest, weights: Mapping[str, Path]) -> None:
    """Check the model, its device and the names of weights of any evaluation; raise Mgp5Error with all problems."""
    unknown = [name for name in weights if name not in WEIGHTS]
    problems = [f"no weights {', '.join(unknown)}: give NAME=PATH, NAME one of {', '.join(WEIGHTS)}"] if unknown else []
    checks = (lambda: pick_device(model.device), lambda: check_launched(model.device), lambda: trained(model.model))
    raise_all(problems, checks)
