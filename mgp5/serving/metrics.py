"""Numbers of a running server in Prometheus' text format."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from .loop import ServingLoop

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """A Prometheus collector of one server; its numbers are read when they are asked for.

    Attributes:
        answers: number of answers sent, by path and status.
    """

    def __init__(self, loop: ServingLoop) -> None:
        self.loop = loop
        self.answers: Counter[tuple[str, int]] = Counter()

    def collect(self) -> Iterator[Metric]:
        """Yield the counters of the serving loop, the numbers of its requests, memory, and answers."""
        for name, value in sorted(dict(self.loop.counts).items()):
            yield CounterMetricFamily(f"mgp5_{name}", f"{name.replace('_', ' ').capitalize()}.", value)
        yield GaugeMetricFamily("mgp5_running", "Requests that run.", self.loop.running)
        yield GaugeMetricFamily("mgp5_waiting", "Requests that wait for a row.", self.loop.waiting)
        yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory size in bytes.", _memory())
        answers = CounterMetricFamily("mgp5_answers", "Answers sent.", labels=("path", "status"))
        for (path, status), count in sorted(self.answers.items()):
            answers.add_metric((path, str(status)), count)
        yield answers

    def text(self) -> bytes:
        """Return all numbers in the text format, version 0.0.4."""
        return generate_latest(self)


def _memory() -> int:
    """Return the bytes of memory that this process holds; its peak where /proc does not exist."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
