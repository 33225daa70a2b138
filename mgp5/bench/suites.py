"""What the suites of `mgp5 bench` share: what is asked for, ways to do the same work timed by turns, and the machine's
limits. A row is one way at one size; its times are the median, and the 20th and 80th percentile."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Mgp5Error
from ..files import GiB
from ..kernels.bench import copy_bandwidth, timed

if TYPE_CHECKING:
    from ..engines import Backend
    from ..hub import Parts

Row = dict[str, Any]
Run = Callable[[], tuple[float, ...]]  # does the work once, and waits for it: seconds of each of its phases


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a suite is asked for.

    Args:
        parts: of the model; None: the suite's own sizes.
        steps: images, replies or updates to time in each row.
        batch: samples of an update; None is the suite's.
        backends: engines that draw; none: the suite's.
        minutes: what has not begun by then is left out.
        tell: is told what is being measured.
    """

    parts: Parts | None
    device: str = "auto"
    steps: int = 1
    batch: int | None = None
    backends: tuple[Backend, ...] = ()
    minutes: float = float("inf")
    tell: Callable[[str], None] = lambda text: None


@dataclass
class Clock:
    """What is left of a suite's time, and how many seconds each way took to get started the last time."""

    minutes: float
    began: float = field(default_factory=time.monotonic)
    starts: dict[str, float] = field(default_factory=dict)

    def allows(self, way: str = "") -> bool:
        """Whether there is time, for a way to get started too."""
        left = self.began + 60 * self.minutes - time.monotonic()
        return left > self.starts.get(way, 0)


@dataclass
class Timed:
    """What was found of one way: seconds of each phase of each run, of the first run, and bytes at its peak."""

    runs: list[tuple[float, ...]] = field(default_factory=list)
    first: float = 0.0
    peak: int | None = None
    skipped: str = ""

    def row(self, phase: int = 0, per: int = 1) -> Row:
        """Columns of a row: milliseconds of a phase, of which there are `per` in a run; or why there are none."""
        if self.skipped:
            return {"skipped": self.skipped}
        columns = percentiles([1000 * run[phase] / per for run in self.runs]) | {"unit": "ms"}
        columns["first_s"] = round(self.first, 2)
        return columns | ({} if self.peak is None else {"peak_gib": round(self.peak / GiB, 2)})

    def median(self, phase: int) -> float:
        """Seconds of a phase."""
        return float(torch.tensor([run[phase] for run in self.runs]).quantile(0.5))


def by_turns(
    size: str,
    ways: dict[str, Callable[[], Run]],
    *,
    clock: Clock,
    setting: Setting,
    device: torch.device,
    weights: int,
) -> dict[str, Timed]:
    """Start every way and run it once, then run all by turns.

    Args:
        size: to be told.
        ways: name -> what makes ready, and gives what is timed. One that fails says why, and the others go on.
        weights: bytes that each way needs besides what its first run allocates.
    """
    found, runs = {name: Timed() for name in ways}, {}
    for name, start in ways.items():
        setting.tell(f"{size}: {name}")
        if not clock.allows(name):
            found[name].skipped = "out of time"
            continue
        began = time.monotonic()
        try:
            runs[name] = _first(start, found[name], device, weights)
        except Exception as error:
            found[name].skipped = reason(error)
        clock.starts[name] = time.monotonic() - began
        collect()
    for turn in range(setting.steps):
        for name in [name for name in runs if turn == 0 or clock.allows()]:
            try:
                found[name].runs.append(runs[name]())
            except Exception as error:
                found[name].skipped = reason(error)
                del runs[name]
    return found


def _first(start: Callable[[], Run], found: Timed, device: torch.device, weights: int) -> Run:
    """Make ready and run once, which compiles and allocates, with an eye on memory."""
    cuda = device.type == "cuda"
    run = start()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    began = time.perf_counter()
    run()
    found.first = time.perf_counter() - began
    found.peak = torch.cuda.max_memory_allocated(device) - before + weights if cuda else None
    return run


def collect() -> None:
    """Give back what nobody holds."""
    gc.collect()
    with suppress(RuntimeError):  # a GPU that is lost fails in every row to come, which say so
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """Why a way could not be measured, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    line = error.message if isinstance(error, Mgp5Error) else f"{type(error).__name__}: {error}"
    return " ".join(line.split())[:160]


def percentiles(values: Sequence[float]) -> Row:
    """Median, 20th and 80th percentile."""
    marks = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist()
    return {name: float(f"{mark:.4g}") for name, mark in zip(("median", "p20", "p80"), marks, strict=True)}


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best: TFLOP/s of a large product of matrices, GB/s of a large copy."""

    matmul: float
    copy: float

    def rows(self, dtype: torch.dtype) -> Iterator[Row]:
        """As rows of the report."""
        row = {"name": "limit", "size": f"{str(dtype).removeprefix('torch.')}; bytes read and written"}
        yield row | {"provider": "matmul", "tflop_per_s": float(f"{self.matmul:.3g}")}
        yield row | {"provider": "copy", "gb_per_s": float(f"{self.copy:.3g}")}


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure them."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    _, median, _ = timed(torch.mm, [(left, right)], device)  # microseconds
    return Limits(2 * side**3 / median / 1e6, copy_bandwidth(device))


def waiting(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device is done, and the result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result
