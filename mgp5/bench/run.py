"""`mgp5 bench`: how fast this machine draws, writes and trains, and in how much memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from ..device import machine, pick_device, versions
from ..errors import Mgp5Error
from ..files import write_json
from ..hub import Parts, resolve
from .decoding import condition_rows, decode_rows
from .drawing import draw_rows, first_image_rows
from .kernels import kernel_rows
from .timing import Bench, Row, digits, limits, reason, release_memory
from .training import train_rows

# Suite -> the options that it takes, with their defaults; None: see there.
INFERENCE = {"model": None, "steps": 15, "minutes": 5.0, "backends": ("eager",), "exported": None}
SUITES: dict[str, dict[str, Any]] = {
    "cpu": INFERENCE,
    "gpu": INFERENCE | {"steps": 5, "minutes": 8.0, "backends": ("eager", "triton", "compile")},
    "kernels": {},
    "train": {"model": None, "steps": 3, "batch": None},
}
# Model, pixels and images at a time, the most telling first: what time does not suffice for is left out.
SIZES = (
    ("llava-1.5-7b+sd-2.1-base", 512, 1),
    ("llava-1.5-7b+sd-2.1", 768, 1),
    ("demo", None, 1),
    ("qwen2.5-vl-7b+sd-3", 1024, 1),
    ("llava-1.5-7b+sd-2.1-base", 512, 4),
    ("llava-1.5-7b+sd-2.1", 768, 4),
)
# Seconds that ways which compile need to get started on a GPU, until the first of them was seen.
STARTUP = {"compile": 120.0, "diffusers compiled": 180.0, "transformers static": 60.0}


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What `mgp5 bench` is asked for; None, or no backend, is the default of the suite. Raises Mgp5Error with all that
    is wrong, in one line."""

    suite: str  # "cpu", "gpu", "kernels" or "train"
    out: Path  # a new JSON file for the report
    model: str | None = None  # as `hub.resolve` takes it; instead of the models of the suite
    device: str = "auto"
    steps: int | None = None  # images and replies, or updates, to time in each row, >= 1
    batch: int | None = None  # samples of an update, >= 1
    minutes: float | None = None  # rows that have not begun by then are left out
    backends: tuple[str, ...] = ()  # engines of ours to time
    exported: Path | None = None  # the folder of `mgp5 export` that the backend onnx runs

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise Mgp5Error(f"--suite {self.suite}", f"choose one of {', '.join(SUITES)}", usage=True)
        problems = [f"--out {self.out} exists already"] if self.out.exists() else []
        unknown = self.options.keys() - SUITES[self.suite].keys() - {"exported"}
        names = ["backend" if name == "backends" else name for name in sorted(unknown)]
        problems += [f"--suite {self.suite} takes no --{name}" for name in names]
        low = [name for name in ("steps", "batch") if self.options.get(name, 1) < 1]
        problems += [f"--{name} {self.options[name]}, expected 1 or more" for name in low]
        if ("onnx" in self.backends) != bool(self.exported):
            problems.append("--backend onnx and --exported DIR belong together: mgp5 export --onnx --split makes one")
        if problems:
            raise Mgp5Error("; ".join(problems), "leave out or change what is named", usage=True)
        if self.model:
            resolve(self.model)

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given."""
        names = ("model", "steps", "batch", "minutes", "backends", "exported")
        return {name: value for name in names if (value := getattr(self, name)) not in (None, ())}


def measure(request: BenchRequest, tell: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """Run a suite: yield its rows as they come, each when the report holds it; `tell` gets each thing that is measured.

    The report is `request.out`: {"machine": {...}, "rows": [{...}, ...]}.
    """
    device, dtype = pick_device(request.device)
    options = SUITES[request.suite] | request.options
    model, batch = options.pop("model", None), options.pop("batch", None)
    bench = Bench(device=device, dtype=dtype, tell=tell, **options)
    rows: list[Row] = []
    for row in _suite(request.suite, bench, model, batch):
        rows.append(row)
        now = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "threads": torch.get_num_threads()}
        write_json(request.out, {"machine": now | machine() | versions(), "rows": rows})
        yield row


def _suite(suite: str, bench: Bench, model: str | None, batch: int | None) -> Iterator[Row]:
    """Yield the rows of a suite.

    "cpu": a guided image and a reply of the demo; with the backend compile, also the first image of a process. "gpu":
    the papers' models and their successors with random weights, and the demo; or one model. "kernels": every kernel at
    the shapes of SD 2.1 and SD 3. "train": updates of the first stage of training.
    """
    on_gpu = bench.device.type == "cuda"
    if suite == "cpu":
        parts = resolve(model or "demo")
        yield from _inference(bench, [(parts, None, 1)], steps=20, compiled=False)
        if "compile" in bench.backends:
            yield from _attempt(bench, "first image", parts, first_image_rows(bench, parts, 20))
    elif suite == "gpu":
        bench.startup.update(STARTUP if on_gpu else {})
        sizes = [(model, None, images) for images in (1, 4)] if model else SIZES
        yield from _inference(bench, [(resolve(name), *rest) for name, *rest in sizes], steps=50, compiled=True)
    elif suite == "kernels":
        yield from kernel_rows(bench)
    else:
        yield from train_rows(bench, resolve(model or "llava-1.5-7b+sd-2.1-base"), batch or (48 if on_gpu else 8))


def _inference(bench: Bench, sizes: list[tuple[Parts, int | None, int]], **options: Any) -> Iterator[Row]:
    """Yield the limits of the machine, then the rows of each size, and of its LLM when that comes up first."""
    torch._inductor.config.autotune_num_choices_displayed = 0  # else a page on stderr for every product
    torch._inductor.config.max_autotune_report_choices_stats = False
    bench.tell("matmul and copy")
    most = limits(bench.device, bench.dtype)
    row = {"name": "limit", "size": f"{str(bench.dtype).removeprefix('torch.')}; bytes read and written"}
    yield row | {"provider": "matmul", "tflop_per_s": digits(most.matmul, 3)}
    yield row | {"provider": "copy", "gb_per_s": digits(most.copy, 3)}
    conditions: dict[str, float | None] = {}
    for parts, pixels, images in sizes:
        fresh = parts.mllm not in conditions
        if fresh:
            conditions[parts.mllm] = yield from _attempt(bench, "condition", parts, condition_rows(bench, parts))
        before = conditions[parts.mllm]
        drawn = draw_rows(bench, parts, pixels, images, limits=most, before=before, **options)
        yield from _attempt(bench, "guided step", parts, drawn)
        if fresh:
            yield from _attempt(bench, "decode", parts, decode_rows(bench, parts, limits=most))


def _attempt(bench: Bench, name: str, parts: Parts, rows: Iterator[Row]) -> Generator[Row, None, Any]:
    """Yield the rows of a model; where time is over or it cannot even be made, one that says so."""
    row = {"name": name, "size": parts.name, "provider": "all"}
    if not bench.has_time():
        yield row | {"skipped": "out of time"}
        return None
    try:
        return (yield from rows)
    except Exception as error:  # of any model or library: it is what the row says
        yield row | {"skipped": reason(error)}
        return None
    finally:
        release_memory()


def tables(rows: list[Row]) -> Group:
    """Return a table for each size, a line for each way; the share of a part of an update is a column as well."""
    views: list[Any] = []
    for (name, size), group in groupby(rows, key=lambda row: (row["name"], row["size"])):
        flat = [row | row.get("parts", {}) for row in group]
        done = [row for row in flat if "skipped" not in row]
        view = Table(title=f"{name}: {size}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        hidden = {"name", "size", "provider", "unit", "parts"}
        columns = [key for key in {key: 0 for row in done for key in row} if key not in hidden]
        view.add_column("", no_wrap=True)
        for column in columns:
            title = done[0].get("unit", column) if column == "median" else column.replace("_", " ")
            view.add_column(title, justify="right", min_width=max(map(len, title.split())), overflow="fold")
        for row in done:
            view.add_row(row["provider"], *(_cell(row.get(column)) for column in columns))
        views += [view] if done else [f"{name}: {size}"]
        views += [f"  {row['provider']} skipped: {row['skipped']}" for row in flat if "skipped" in row]
    return Group(*views)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
