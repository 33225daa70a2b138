"""Numbers of a running server in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from .loop import ServingLoop


class Metrics:
    """A Prometheus collector of one server; its numbers are read when they are asked for."""

    def __init__(self, loop: ServingLoop) -> None:
        self.loop = loop
        self.answers: Counter[tuple[str, int]] = Counter()  # number of answers sent, by path and status
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)  # memory, processor time and open files, where /proc is

    def collect(self) -> Iterator[Metric]:
        """Yield the counters of the serving loop, the numbers of its requests, and answers."""
        for name, value in sorted(dict(self.loop.counts).items()):
            yield CounterMetricFamily(f"mgp5_{name}", f"{name.replace('_', ' ').capitalize()}.", value)
        yield GaugeMetricFamily("mgp5_running", "Requests that run.", self.loop.running)
        yield GaugeMetricFamily("mgp5_waiting", "Requests that wait for a row.", self.loop.waiting)
        answers = CounterMetricFamily("mgp5_answers", "Answers sent.", labels=("path", "status"))
        for (path, status), count in sorted(self.answers.items()):
            answers.add_metric((path, str(status)), count)
        yield answers

    def text(self) -> bytes:
        """Return all numbers in the text format, version 0.0.4."""
        return generate_latest(self.registry)
