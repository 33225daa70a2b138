"""Time several ways of doing the same work, and measure what the machine can do at most.

A row of a report is one way at one size; its times are the median, and the 20th and 80th percentile.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer, timer

from ..errors import Mgp5Error
from ..files import GiB

Row = dict[str, Any]
Phases = tuple[Callable[[], Any], ...]  # done one after the other, they are the work; each is timed for itself


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows of a suite share."""

    device: torch.device
    dtype: torch.dtype
    steps: int = 1  # images, replies or updates that are timed for each row
    backends: tuple[str, ...] = ()  # engines of ours
    exported: Path | None = None  # the folder that `onnx` runs
    minutes: float = float("inf")  # rows that have not begun by then are left out
    startup: dict[str, float] = field(default_factory=dict)  # way -> seconds until its first run is done
    tell: Callable[[str], None] = lambda text: None  # is called with each thing that is measured
    began: float = field(default_factory=time.monotonic)

    def has_time(self, way: str = "") -> bool:
        """Return whether there is time left, and enough for the startup of a way."""
        return self.began + 60 * self.minutes - time.monotonic() > self.startup.get(way, 0)


@dataclass
class Timing:
    """What was measured of one way: seconds of each phase of each run, of the first run, and peak memory in bytes."""

    runs: list[tuple[float, ...]] = field(default_factory=list)
    first: float = 0.0
    peak: int | None = None
    skipped: str = ""

    def row(self, phase: int = 0, per: int = 1) -> Row:
        """Return columns of a row: milliseconds of a phase, which has `per` parts in a run; or why there are none."""
        if self.skipped:
            return {"skipped": self.skipped}
        columns = percentiles([1000 * run[phase] / per for run in self.runs]) | {"unit": "ms"}
        columns["first_s"] = round(self.first, 2)
        return columns | ({} if self.peak is None else {"peak_gib": round(self.peak / GiB, 2)})

    def median(self, phase: int) -> float:
        """Return the median of a phase in seconds."""
        return float(torch.tensor([run[phase] for run in self.runs]).quantile(0.5))


def interleave(bench: Bench, size: str, ways: dict[str, Callable[[], Phases]], weights: int) -> dict[str, Timing]:
    """Prepare every way and run it once, then run all by turns, so that a slower minute of the machine meets all.

    A way that fails says why, and the others go on. `weights` are bytes that each needs besides what its first run
    allocates.
    """
    timings, runs = {name: Timing() for name in ways}, {}
    for name, prepare in ways.items():
        bench.tell(f"{size}: {name}")
        if not bench.has_time(name):
            timings[name].skipped = "out of time"
            continue
        began = time.monotonic()
        try:
            runs[name] = _first_run(prepare, timings[name], bench.device, weights)
        except Exception as error:  # of any library or compiler: it is what the row says
            timings[name].skipped = reason(error)
        bench.startup[name] = time.monotonic() - began
        release_memory()
    for turn in range(bench.steps):
        for name in [name for name in runs if turn == 0 or bench.has_time()]:
            try:
                timings[name].runs.append(tuple(map(timed, runs[name])))
            except Exception as error:  # as above
                timings[name].skipped = reason(error)
                del runs[name]
    return timings


def _first_run(prepare: Callable[[], Phases], timing: Timing, device: torch.device, weights: int) -> Phases:
    """Prepare a way and run it once, which compiles and allocates; note seconds and, on a GPU, memory."""
    phases = prepare()
    if device.type != "cuda":
        timing.first = sum(map(timed, phases))
        return phases
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    timing.first = sum(map(timed, phases))
    timing.peak = torch.cuda.max_memory_allocated(device) - before + weights
    return phases


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds until the work is done, on its device too."""
    began = timer()  # PyTorch's: it waits for the GPU
    work()
    return timer() - began


def release_memory() -> None:
    """Free the memory that no object holds any more."""
    gc.collect()
    with suppress(RuntimeError):  # a GPU that is lost fails in every row to come, which say so
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """Return in one line why a way could not be measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    line = error.message if isinstance(error, Mgp5Error) else f"{type(error).__name__}: {error}"
    return " ".join(line.split())[:160]


def percentiles(values: Sequence[float]) -> Row:
    """Return median, 20th and 80th percentile, as columns of a row."""
    marks = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist()
    return dict(zip(("median", "p20", "p80"), (digits(mark) for mark in marks), strict=True))


def digits(value: float, count: int = 4) -> float:
    """Return a value rounded to so many digits that count."""
    return float(f"{value:.{count}g}")


class Limits(NamedTuple):
    """What the machine does at most: TFLOP/s of a large matrix product, GB/s of a large copy (read and written)."""

    matmul: float
    copy: float


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the limits of a device."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = Timer("torch.mm(left, right)", globals={"left": left, "right": right}).blocked_autorange().median
    return Limits(2 * side**3 / seconds / 1e12, copy_bandwidth(device))


def copy_bandwidth(device: torch.device) -> float:
    """Measure the GB/s, read and written, of a copy that is too large for any cache."""
    source = torch.ones((2**30 if device.type == "cuda" else 2**27) // 4, device=device)
    call = {"source": source, "target": torch.empty_like(source)}
    return 2 * source.nbytes / Timer("target.copy_(source)", globals=call).blocked_autorange().median / 1e9
