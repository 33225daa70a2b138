"""`mgp5 bench`: how fast this machine draws, writes and trains, in how much memory, and what got slower."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..device import machine, pick_device, versions
from ..errors import Mgp5Error
from ..files import read_json, write_json
from ..hub import resolve
from .decoding import condition_rows, decode_rows, image_rows
from .drawing import draw_rows, drawing_kind
from .kernels import kernel_rows
from .peers import Work, compile_beforehand
from .shell import reply_rows, server_rows
from .timing import Bench, Limits, Row, digits, limits, reason, release_memory
from .training import train_rows

# Suite -> the options that it takes, with their defaults; None: see there.
INFERENCE = {"model": None, "steps": 15, "minutes": 5.0, "backends": ("eager",), "exported": None}
SUITES: dict[str, dict[str, Any]] = {
    "cpu": INFERENCE,
    "gpu": INFERENCE | {"steps": 5, "minutes": 10.0, "backends": ("eager", "triton", "compile")},
    "kernels": {},
    "train": {"model": None, "head": "minigpt5", "steps": 3, "batch": None, "minutes": 10.0},
}
SD, SD_768, SD_3 = "llava-1.5-7b+sd-2.1-base", "llava-1.5-7b+sd-2.1", "qwen2.5-vl-7b+sd-3"
# The most telling first: what time does not suffice for is left out.
GPU = (
    Work("condition", SD),
    Work("guided step", SD, 512),
    Work("decode", SD),
    Work("reply", "demo"),
    Work("guided step", SD_768, 768),
    Work("decode", SD, counts=(4, 8)),
    Work("server", "demo"),
    Work("guided step", SD, 512, counts=(4, 8)),
    Work("condition", SD_3),
    Work("guided step", SD_3, 1024),
    Work("guided step", SD_768, 768, counts=(4, 8)),
    Work("decode", SD_3, counts=(1, 4, 8)),
    Work("condition", "demo"),
    Work("guided step", "demo"),
    Work("decode", "demo"),
)
STEPS = {"cpu": 20, "gpu": 50}  # of an image
TOLERANCE = 0.1  # part by which a row may be slower than that of a reference, unless either says otherwise
COMPARED = ("median", "vae_ms", "image_ms")


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What `mgp5 bench` is asked for; None, or no backend, is the default of the suite. Raises Mgp5Error with all that
    is wrong, in one line."""

    suite: str  # "cpu", "gpu", "kernels" or "train"
    out: Path  # a new JSON file for the report
    model: str | None = None  # as `hub.resolve` takes it; instead of the models of the suite
    head: str | None = None  # that is trained
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
        names = ("model", "head", "steps", "batch", "minutes", "backends", "exported")
        return {name: value for name in names if (value := getattr(self, name)) not in (None, ())}


def measure(request: BenchRequest, tell: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """Run a suite: yield its rows as they come, each when the report holds it; `tell` gets each thing that is measured.

    The report is `request.out`: {"machine": {...}, "tolerance": part, "rows": [{...}, ...]}.
    """
    device, dtype = pick_device(request.device)
    options = SUITES[request.suite] | request.options
    model, batch, head = (options.pop(name, None) for name in ("model", "batch", "head"))
    bench = Bench(device=device, dtype=dtype, tell=tell, **options)
    rows: list[Row] = []
    for row in _suite(request.suite, bench, model, batch, head):
        rows.append(row)
        now = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "threads": torch.get_num_threads()}
        write_json(request.out, {"machine": now | machine() | versions(), "tolerance": TOLERANCE, "rows": rows})
        yield row


def _suite(suite: str, bench: Bench, model: str | None, batch: int | None, head: str | None) -> Iterator[Row]:
    """Yield the rows of a suite.

    "cpu": an image and a reply of the demo, and from the shell. "gpu": the papers' models and their successors with
    random weights, and the demo; or one model. "kernels": every kernel at the shapes of SD 2.1 and SD 3. "train":
    updates of a head's first stage of training.
    """
    if suite == "kernels":
        yield from kernel_rows(bench)
    elif suite == "train":
        on_gpu = bench.device.type == "cuda"
        yield from train_rows(bench, resolve(model or SD), batch or (48 if on_gpu else 12), head)
    elif suite == "gpu" and not model:
        yield from _inference(bench, GPU, STEPS[suite])
    else:
        counts = {"cpu": [(1,)], "gpu": [(1,), (4, 8)]}[suite]
        works = [Work("condition", model or "demo")]
        kinds = drawing_kind(resolve(model or "demo")), "decode"
        works += [Work(kind, model or "demo", None, each) for each in counts for kind in kinds]
        trained = resolve(model or "demo").trained is not None
        works += [Work("reply", model or "demo"), Work("server", model or "demo")][: trained * len(counts)]
        yield from _inference(bench, works, STEPS[suite])


def _inference(bench: Bench, works: list[Work] | tuple[Work, ...], steps: int) -> Iterator[Row]:
    """Yield the limits of the machine, then the rows of works, in this order."""
    torch._inductor.config.autotune_num_choices_displayed = 0  # else a page on stderr for every product
    torch._inductor.config.max_autotune_report_choices_stats = False
    compile_beforehand(bench, works)
    bench.tell("matmul and copy")
    most = limits(bench.device, bench.dtype)
    row = {"name": "limit", "size": f"{str(bench.dtype).removeprefix('torch.')}; bytes read and written"}
    yield row | {"provider": "matmul", "tflop_per_s": digits(most.matmul, 3)}
    yield row | {"provider": "copy", "gb_per_s": digits(most.copy, 3)}
    before: dict[str, float | None] = {}  # the LLM -> seconds between text and denoising
    for work in works:
        llm = resolve(work.model).mllm
        found = yield from _attempt(bench, work, _rows(bench, work, most, steps, before.get(llm)))
        if work.kind == "condition":
            before[llm] = found


def _rows(
    bench: Bench, work: Work, most: Limits, steps: int, before: float | None
) -> Generator[Row, None, float | None]:
    parts = resolve(work.model)
    if work.kind == "condition":
        return (yield from condition_rows(bench, parts))
    if work.kind == "guided step":
        options = {"limits": most, "steps": steps, "before": before, "compiled": steps == STEPS["gpu"]}
        for images in work.counts:
            yield from draw_rows(bench, parts, work.pixels, images, **options)
    elif work.kind == "image":
        yield from image_rows(bench, parts, work.counts)
    elif work.kind == "decode":
        yield from decode_rows(bench, parts, work.counts, limits=most)
    else:
        yield from {"reply": reply_rows, "server": server_rows}[work.kind](bench, parts)
    return None


def _attempt(bench: Bench, work: Work, rows: Iterator[Row]) -> Generator[Row, None, Any]:
    """Yield the rows of a work; where time is over or a model cannot even be made, one that says so."""
    row = {"name": work.kind, "size": resolve(work.model).name, "provider": "all"}
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


def read_reference(path: Path) -> dict[str, Any]:
    """Read a report to compare with. Raises Mgp5Error where it is missing or none."""
    found = read_json(path)
    if not isinstance(found.get("rows"), list):
        raise Mgp5Error(f"{path} is no report of mgp5 bench", "kernels/results has some", usage=True)
    return found


def slower(rows: list[Row], reference: dict[str, Any]) -> list[str]:
    """Return a line for each time that is longer than the reference's by more than its tolerance.

    The tolerance is that of the reference's row, else of the reference, else TOLERANCE. Rows are the same where name,
    size and provider are; what only one of both has is left out.
    """
    known = {(row["name"], row["size"], row["provider"]): row for row in reference["rows"]}
    lines = []
    for row in rows:
        other = known.get((row["name"], row["size"], row["provider"]), {})
        tolerance = other.get("tolerance", reference.get("tolerance", TOLERANCE))
        for column in COMPARED:
            now, then = row.get(column), other.get(column)
            if now is not None and then is not None and now > then * (1 + tolerance):
                unit = row.get("unit", "") if column == "median" else column
                told = f"{row['name']}, {row['size']}, {row['provider']}: {now:g} {unit}"
                lines.append(f"{told}, was {then:g} ({now / then - 1:+.0%}, tolerance {tolerance:.0%})")
    return lines
