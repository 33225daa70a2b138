"""`mgp5 bench`: how fast this machine draws, writes and trains, and in how much memory."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from .. import doctor
from ..device import pick_device
from ..errors import Mgp5Error
from ..files import write_json
from ..hub import Parts, resolve
from ..kernels.bench import rows as kernel_rows
from .chart import chart
from .decoding import condition_rows, decode_rows
from .drawing import draw_rows
from .starting import first_rows
from .suites import Clock, Row, Setting, collect, limits, reason
from .training import train_suite

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

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
GUESSES = {"compile": 120.0, "diffusers compiled": 180.0, "transformers static": 60.0}
Size = tuple[Parts, int | None, int]
FIGURES = {
    "p20": "p20",
    "p80": "p80",
    "first s": "first_s",
    "image ms": "image_ms",
    "updates/s": "updates_per_s",
    "tokens/s": "tokens_per_s",
    "TFLOP/s": "tflop_per_s",
    "of matmul": "share_of_matmul",
    "GB/s": "gb_per_s",
    "of copy": "share_of_copy",
    "peak GiB": "peak_gib",
    "estimate": "estimated_gib",
    "PSNR dB": "psnr",
    "error": "step_error",
}


def gpu_suite(setting: Setting) -> Iterator[Row]:
    """The papers' models and their successors with random weights, and the demo; or one model, one image and four."""
    own = [(setting.parts, None, images) for images in (1, 4)] if setting.parts else None
    sizes = own or [(resolve(name), *rest) for name, *rest in SIZES]
    clock = Clock(setting.minutes, starts=dict(GUESSES) if pick_device(setting.device)[0].type == "cuda" else {})
    backends = setting.backends or ("eager", "triton", "compile")
    yield from _inference(setting, clock, sizes, backends, steps=50, compiled=True)


def cpu_suite(setting: Setting) -> Iterator[Row]:
    """A guided image and a reply of the demo; and of `compile`, if it is asked for, how long a process waits for it."""
    parts = setting.parts or resolve("demo")
    sizes, clock = [(parts, None, 1)], Clock(setting.minutes)
    yield from _inference(setting, clock, sizes, setting.backends or ("eager",), steps=20, compiled=False)
    if "compile" in setting.backends:
        yield from _attempt("first image", parts, clock, first_rows(parts, 20, setting.tell))


def kernel_suite(setting: Setting) -> Iterator[Row]:
    """Every kernel at the shapes of SD 2.1 and SD 3."""
    for row in kernel_rows(*pick_device(setting.device)):
        setting.tell(f"{row['name']} {row['size']}: {row['provider']}")
        yield row


def _inference(
    setting: Setting, clock: Clock, sizes: list[Size], backends: tuple[Any, ...], **options: Any
) -> Iterator[Row]:
    """The machine's limits, then the rows of each size, and of its LLM when that comes up first."""
    device, dtype = pick_device(setting.device)
    torch._inductor.config.autotune_num_choices_displayed = 0  # else a page on stderr for every product
    torch._inductor.config.max_autotune_report_choices_stats = False
    setting.tell("matmul and copy")
    found = limits(device, dtype)
    yield from found.rows(dtype)
    common: dict[str, Any] = {"setting": setting, "clock": clock, "device": device, "dtype": dtype}
    measured = common | {"limits": found, "backends": backends}
    conditions: dict[str, float | None] = {}
    for parts, pixels, images in sizes:
        fresh = parts.mllm not in conditions
        if fresh:
            conditions[parts.mllm] = yield from _attempt("condition", parts, clock, condition_rows(parts, **common))
        drawn = draw_rows(parts, pixels, images, before=conditions[parts.mllm], **measured, **options)
        yield from _attempt("guided step", parts, clock, drawn)
        if fresh:
            yield from _attempt("decode", parts, clock, decode_rows(parts, **measured))


def _attempt(name: str, parts: Parts, clock: Clock, rows: Iterator[Row]) -> Generator[Row, None, Any]:
    """Rows of a model; where time is over or it cannot even be made, one that says so."""
    row = {"name": name, "size": parts.name, "provider": "all"}
    if not clock.allows():
        yield row | {"skipped": "out of time"}
        return None
    try:
        return (yield from rows)
    except Exception as error:
        yield row | {"skipped": reason(error)}
        return None
    finally:
        collect()


# What measures, what of `Setting` is so unless the user says, and what the user may say.
SUITES: dict[str, tuple[Callable[[Setting], Iterator[Row]], dict[str, Any], tuple[str, ...]]] = {
    "cpu": (cpu_suite, {"steps": 15, "minutes": 5.0}, ("model", "steps", "minutes", "backends")),
    "gpu": (gpu_suite, {"steps": 5, "minutes": 8.0}, ("model", "steps", "minutes", "backends")),
    "kernels": (kernel_suite, {}, ()),
    "train": (train_suite, {"steps": 3}, ("model", "steps", "batch")),
}


def report(suite: str, out: Path, as_json: bool, *, model: str | None, device: str, **options: Any) -> None:
    """Run a suite, show its rows, write them as they come, and draw a chart of them beside the file.

    Args:
        out: a new file: {"machine": {...}, "rows": [{...}, ...]}.
        model: as `hub.resolve` takes it; None is the suite's.
        options: of `Setting`, None (or none) where the user said nothing.

    Raises:
        Mgp5Error: a file exists, there is no such model or device, or an option that the suite does not take.
    """
    from rich.console import Console

    picture = out.with_suffix(".png")
    if exists := [path for path in {out, picture} if path.exists() or path.suffix == ".png" == out.suffix]:
        raise Mgp5Error(f"--out {exists[0]} exists already", "choose another file", usage=True)
    measure, usual, takes = SUITES[suite]
    given = {name: value for name, value in {"model": model, **options}.items() if value not in (None, ())}
    if wrong := [name for name in given if name not in takes]:
        raise Mgp5Error(f"--suite {suite} takes no --{wrong[0].removesuffix('s')}", "leave it out", usage=True)
    given.pop("model", None)
    began = time.monotonic()
    setting = Setting(
        parts=resolve(model) if model else None,
        device=device,
        tell=lambda text: click.echo(f"[{time.monotonic() - began:4.0f} s] {text}", err=True),
        **(usual | given),
    )
    rows: list[Row] = []
    try:
        for row in measure(setting):
            rows.append(row)
            write_json(out, {"machine": machine(), "rows": rows})
            if as_json:
                click.echo(json.dumps(row))
    finally:
        if rows:  # also those before an interruption
            chart(machine(), rows, picture)
    if not as_json:
        Console(width=None if sys.stdout.isatty() else 140).print(tables(rows))
    click.echo(f"The report is in {out}, a chart of it in {picture}", err=True)


def machine() -> dict[str, Any]:
    """What was measured on."""
    now = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "threads": torch.get_num_threads()}
    return now | doctor.machine() | doctor.versions()


def tables(rows: list[Row]) -> Group:
    """Rows for the terminal: a table for each size, one of parts where they were timed, and what was skipped."""
    from rich.console import Group

    views: list[Any] = []
    for (name, size), group in groupby(rows, key=lambda row: (row["name"], row["size"])):
        own = list(group)
        done, skipped = ([row for row in own if ("skipped" in row) is left] for left in (False, True))
        unit = next((row["unit"] for row in done if "unit" in row), "")
        figures = {unit: "median"} | FIGURES
        figures = {title: key for title, key in figures.items() if any(row.get(key) is not None for row in done)}
        lines = [[row["provider"], *(_cell(key, row.get(key)) for key in figures.values())] for row in done]
        views += [f"{name}: {size}", *([_table([*figures], lines)] if done else [])]
        parts = list(dict.fromkeys(part for row in own for part in row.get("parts", {})))
        spent = [[row["provider"], *(f"{row['parts'].get(p, 0):.0%}" for p in parts)] for row in done]
        views += ["where the time goes", _table(parts, spent)] if parts else []
        views += [f"  {row['provider']} skipped: {row['skipped']}" for row in skipped]
    return Group(*views)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if key.startswith("share_") else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _table(columns: list[str], rows: list[list[str]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    view = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("way", no_wrap=True)
    for column in columns:
        view.add_column(column, justify="right", min_width=max(map(len, column.split())))
    for row in rows:
        view.add_row(*row)
    return view
