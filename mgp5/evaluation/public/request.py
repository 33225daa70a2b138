"""What to evaluate on a public benchmark, as one value; what is wrong with it is told before any weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...errors import Mgp5Error, raise_all
from ..request import Evaluation, check_common
from . import BENCHMARKS
from .cases import Benchmark


@dataclass(frozen=True, kw_only=True)
class PublicRequest(Evaluation):
    """A model to evaluate on a public benchmark, whose format is of `BENCHMARKS`. Raises Mgp5Error with all that is
    wrong with it.

    Attributes:
        rounds: how often a model is asked to go on; 0: as often as the true answer has steps.
        judge: a folder or hub id of a vision-language model, an address of OpenAI's form, "default" for the
            benchmark's own, or "" for none.
        judge_model: what to ask for at an address.
        against: answers of others in the benchmark's layout, which the judge compares with the model's.
    """

    rounds: int = 1
    judge: str = ""
    judge_model: str = ""
    against: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.data is None:
            problems.append(f"--format {self.format} without --data: name the benchmark's folder, or its table")
        if self.rounds < 0 or min(self.limit or 1, self.batch) < 1:
            problems.append(f"limit is {self.limit}, batch {self.batch} and rounds {self.rounds}, expected 1 or more")
        if self.against and not self.judge:
            problems.append("--against without --judge: name who compares the answers")
        problems += [f"no answers at {path}: check --against" for path in self.against if not path.exists()]
        raise_all(problems, (lambda: self.judge_name, lambda: check_common(self.model, self.weights)))

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark of the format."""
        return BENCHMARKS[self.format]

    @cached_property
    def judge_name(self) -> str:
        """Who judges. Raises Mgp5Error (wrong usage) for the default of a benchmark that has none."""
        if self.judge != "default":
            return self.judge
        if not self.benchmark.judge:
            hint = "give --judge a vision-language model, or an address"
            raise Mgp5Error(f"{self.format} has no published judge", hint, usage=True)
        return self.benchmark.judge

    @property
    def name(self) -> str:
        """What the model is called in the benchmark's layout."""
        return Path(self.model.model).name.replace("+", "-")
