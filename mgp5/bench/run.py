"""`mgp5 bench`: how fast this machine draws, writes and trains, and in how much memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..device import machine as hardware
from ..device import pick_device, versions
from ..errors import Mgp5Error
from ..files import write_json
from ..hub import Parts, resolve
from .decoding import condition_rows, decode_rows
from .drawing import draw_rows, first_image_rows
from .kernels import kernel_rows
from .timing import Bench, Row, limits, reason, release_memory
from .training import train_rows

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
Size = tuple[Parts, int | None, int]


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What `mgp5 bench` is asked for; None, or no backend, is the default of the suite.

    Args:
        suite: "cpu", "gpu", "kernels" or "train".
        out: a new JSON file for the report.
        model: as `hub.resolve` takes it; instead of the models of the suite.
        steps: images and replies, or updates, to time in each row, >= 1.
        batch: samples of an update, >= 1.
        minutes: rows that have not begun by then are left out, >= 0.
        backends: engines of ours to time.
        exported: the folder of `mgp5 export` that the backend onnx runs.

    Raises:
        Mgp5Error: all that is wrong, in one line.
    """

    suite: str
    out: Path
    model: str | None = None
    device: str = "auto"
    steps: int | None = None
    batch: int | None = None
    minutes: float | None = None
    backends: tuple[str, ...] = ()
    exported: Path | None = None

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise Mgp5Error(f"--suite {self.suite}", f"choose one of {', '.join(SUITES)}", usage=True)
        problems = [f"--out {self.out} exists already"] if self.out.exists() else []
        options = {"model": self.model, "steps": self.steps, "batch": self.batch, "minutes": self.minutes}
        options["backend"] = self.backends or None
        unknown = [name for name, value in options.items() if value is not None and name not in SUITES[self.suite][2]]
        problems += [f"--suite {self.suite} takes no --{name}" for name in unknown]
        low = [name for name in ("steps", "batch") if options[name] is not None and options[name] < 1]
        problems += [f"--{name} {options[name]}, expected 1 or more" for name in low]
        if ("onnx" in self.backends) != bool(self.exported):
            problems.append("--backend onnx and --exported DIR belong together: mgp5 export --onnx --split makes one")
        if problems:
            raise Mgp5Error("; ".join(problems), "leave out or change what is named", usage=True)
        if self.model:
            resolve(self.model)

    def bench(self, tell: Callable[[str], None]) -> Bench:
        """Return what the rows share, with the defaults of the suite."""
        device, dtype = pick_device(self.device)
        given = {"steps": self.steps, "minutes": self.minutes, "backends": self.backends, "exported": self.exported}
        options = SUITES[self.suite][1] | {name: value for name, value in given.items() if value not in (None, ())}
        return Bench(device=device, dtype=dtype, tell=tell, **options)


def gpu_suite(bench: Bench, request: BenchRequest) -> Iterator[Row]:
    """Yield rows of the papers' models and their successors with random weights, and of the demo; or of one model."""
    if bench.device.type == "cuda":
        bench.startup.update(STARTUP)
    if request.model:
        sizes = [(resolve(request.model), None, images) for images in (1, 4)]
    else:
        sizes = [(resolve(name), *rest) for name, *rest in SIZES]
    yield from _inference(bench, sizes, steps=50, compiled=True)


def cpu_suite(bench: Bench, request: BenchRequest) -> Iterator[Row]:
    """Yield rows of a guided image and a reply of the demo; with `compile`, also of the first image of a process."""
    parts = resolve(request.model or "demo")
    yield from _inference(bench, [(parts, None, 1)], steps=20, compiled=False)
    if "compile" in bench.backends:
        yield from _attempt(bench, "first image", parts, first_image_rows(bench, parts, 20))


def kernel_suite(bench: Bench, request: BenchRequest) -> Iterator[Row]:
    """Yield rows of every kernel at the shapes of SD 2.1 and SD 3."""
    yield from kernel_rows(bench)


def train_suite(bench: Bench, request: BenchRequest) -> Iterator[Row]:
    """Yield rows of updates of the first stage of training."""
    parts = resolve(request.model or "llava-1.5-7b+sd-2.1-base")
    yield from train_rows(bench, parts, request.batch or (48 if bench.device.type == "cuda" else 8))


# Name -> what measures, what of `Bench` is so unless the request says, and the options that the suite takes.
SUITES: dict[str, tuple[Callable[[Bench, BenchRequest], Iterator[Row]], dict[str, Any], tuple[str, ...]]] = {
    "cpu": (
        cpu_suite,
        {"steps": 15, "minutes": 5.0, "backends": ("eager",)},
        ("model", "steps", "minutes", "backend"),
    ),
    "gpu": (
        gpu_suite,
        {"steps": 5, "minutes": 8.0, "backends": ("eager", "triton", "compile")},
        ("model", "steps", "minutes", "backend"),
    ),
    "kernels": (kernel_suite, {}, ()),
    "train": (train_suite, {"steps": 3}, ("model", "steps", "batch")),
}


def _inference(bench: Bench, sizes: list[Size], **options: Any) -> Iterator[Row]:
    """Yield the limits of the machine, then the rows of each size, and of its LLM when that comes up first."""
    torch._inductor.config.autotune_num_choices_displayed = 0  # else a page on stderr for every product
    torch._inductor.config.max_autotune_report_choices_stats = False
    bench.tell("matmul and copy")
    most = limits(bench.device, bench.dtype)
    row = {"name": "limit", "size": f"{str(bench.dtype).removeprefix('torch.')}; bytes read and written"}
    yield row | {"provider": "matmul", "tflop_per_s": float(f"{most.matmul:.3g}")}
    yield row | {"provider": "copy", "gb_per_s": float(f"{most.copy:.3g}")}
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


def measure(request: BenchRequest, tell: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """Run a suite: yield its rows as they come, each when the report holds it.

    The report is `request.out`: {"machine": {...}, "rows": [{...}, ...]}.

    Args:
        tell: is called with each thing that is measured.
    """
    rows: list[Row] = []
    for row in SUITES[request.suite][0](request.bench(tell), request):
        rows.append(row)
        write_json(request.out, {"machine": machine(), "rows": rows})
        yield row


def machine() -> dict[str, Any]:
    """Return the machine and the versions that were measured on."""
    now = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "threads": torch.get_num_threads()}
    return now | hardware() | versions()
