"""Counters of a server, as Prometheus reads them."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import PlainTextResponse

if TYPE_CHECKING:
    from .app import AppState


async def metrics(request: Request) -> PlainTextResponse:
    """Counters in Prometheus' text format."""
    desk: AppState = request.app.state.desk
    engine = desk.engine
    values = {f"mgp5_{name}_total": ("counter", value) for name, value in sorted(dict(engine.counts).items())}
    values |= {"mgp5_running": ("gauge", len(engine.seats)), "mgp5_waiting": ("gauge", len(engine.queue))}
    values["process_resident_memory_bytes"] = ("gauge", _memory())
    lines = [line for name, (kind, value) in values.items() for line in (f"# TYPE {name} {kind}", f"{name} {value}")]
    lines.append("# TYPE mgp5_answers_total counter")
    for (path, status), count in sorted(desk.answers.items()):
        lines.append(f'mgp5_answers_total{{path="{path}",status="{status}"}} {count}')
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def _memory() -> int:
    """Bytes of memory that this process has; where Linux does not tell, the most it ever had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
