"""Compile beforehand, in processes side by side and into the cache that is kept, what is slow to start.

diffusers with max-autotune takes minutes for one size: compiled one after the other, no budget holds it. What has not
finished in its share of the time keeps what it has compiled; the next run goes on from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..device import pick_device
from ..engines import keep_compiled
from ..hub import resolve
from . import decoding, drawing
from .timing import Bench

SHARE = 0.4  # of the minutes, at most
# Seconds that ways need to start on a GPU as long as they are not in the cache.
STARTUP = {"compile": 120.0, "diffusers compiled": 180.0, "transformers static": 60.0}


class Work(NamedTuple):
    """What is measured of a model: rows of one kind, at one size, for one or more images or replies at once."""

    kind: str  # "condition", "guided step", "image", "decode", "reply" or "server"
    model: str
    pixels: int | None = None
    counts: tuple[int, ...] = (1,)


def compiled_ways(bench: Bench, works: Iterable[Work]) -> Iterator[tuple[str, Work]]:
    """Yield each way that compiles, with a work of one count."""
    peers = {"guided step": "diffusers compiled", "decode": "transformers static"}
    for work in works:
        if work.kind in peers and bench.minutes > 0:
            ways = ["compile"] * ("compile" in bench.backends) + [peers[work.kind]] * (bench.device.type == "cuda")
            yield from ((way, work._replace(counts=(count,))) for count in work.counts for way in ways)


def compile_beforehand(bench: Bench, works: Iterable[Work], run: Callable[..., int] | None = None) -> None:
    """Compile all ways of works side by side, the first ones first, and tell what did not finish.

    The startup of a way is then not counted on, unless it is one that did not finish. `run` takes a command and
    seconds, and returns an exit status, that of a process by default.
    """
    jobs = list(compiled_ways(bench, works))
    if not jobs:
        return
    keep_compiled()
    end = time.monotonic() + 60 * SHARE * min(bench.minutes, 60.0)
    workers = max(1, min(6, (os.cpu_count() or 1) // 2))

    def compile_one(job: tuple[str, Work]) -> bool:
        way, work = job
        left = end - time.monotonic()
        command = [sys.executable, "-m", __name__, json.dumps([way, work, str(bench.device)])]
        return left > 0 and (run or _run)(command, left) == 0

    bench.tell(f"{len(jobs)} compilations beforehand, {workers} side by side")
    with ThreadPoolExecutor(workers) as pool:
        for (way, work), done in zip(jobs, pool.map(compile_one, jobs), strict=True):
            if not done:
                bench.startup[way] = STARTUP[way]
                bench.tell(f"not compiled beforehand: {way}, {work.kind} of {work.model}")


def _run(command: list[str], seconds: float) -> int:
    try:
        return subprocess.run(command, capture_output=True, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return 1


def compile_way(way: str, work: Work, device: str) -> None:
    """Do a work once in a way, which fills the cache of compiled code."""
    where, dtype = pick_device(device)
    bench = Bench(device=where, dtype=dtype, backends=("compile",))
    parts, (count,) = resolve(work.model), work.counts
    if work.kind == "decode":
        ways = decoding.ways(decoding.make_model(parts, bench), bench.backends, count)
    else:
        ways = drawing.ways(drawing.make_scene(bench, parts, work.pixels, count, steps=2), bench, compiled=True)
    for phase in ways[way]():
        phase()


if __name__ == "__main__":
    way, work, device = json.loads(sys.argv[1])
    compile_way(way, Work(*work), device)
