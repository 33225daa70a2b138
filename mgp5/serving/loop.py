"""The server's thread: one scheduler for all requests, which join and leave it at any step."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jinja2 import TemplateError
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..errors import Mgp5Error
from ..events import Event, Finished, TextChunk
from ..inference.request import ActiveRequest, NotFinite
from ..inference.scheduler import Scheduler
from ..messages import Conversation
from ..model import InterleavedModel
from ..options import Options

TEXT_STEPS = 8  # steps of text between two of images, at most: text is cheap, and others wait for it


class Refused(Exception):
    """Why a request has no reply: its status, a one-line message and OpenAI's code for it."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, " ".join(message.split()), code, param


STOPPED = Refused(503, "the server stops", "server_stopping")
LATE = Refused(504, "the request took longer than it may: ask for less, or later", "timeout")


@dataclass(eq=False)
class Job:
    """A request for one reply."""

    conversation: Conversation  # ends with the user's turn
    options: Options
    deliver: Callable[[Event | Refused], None]  # takes events up to Finished, or what went wrong, in the loop's thread
    deadline: float  # by `time.monotonic`
    previews: int = 0  # of each image, see `ImageStep.preview`
    left_out: int | None = None  # see `ActiveRequest`
    cancelled: bool = False
    silent: bool = True  # nothing was delivered yet
    since: float = field(default_factory=time.monotonic)


class ServingLoop:
    """Serves jobs in the order they came; everything that touches the model happens in one thread.

    Args:
        model: in evaluation mode.
        rows: number of jobs that run at a time.
        limit: number of jobs that wait for a row, at most.
        workers: see `inference.scheduler.Scheduler`.

    Attributes:
        counts: of what was done, for /metrics.
    """

    def __init__(self, model: InterleavedModel, rows: int = 8, limit: int = 64, workers: int = 1) -> None:
        self.model, self.rows, self.limit, self.workers = model, rows, limit, workers
        self.counts: Counter[str] = Counter()
        self._new: deque[Job] = deque()  # not handed to the scheduler yet
        self._jobs: dict[ActiveRequest, Job] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mgp5-serving", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; jobs that run or wait are refused."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are served."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """The number of jobs that have a row."""
        return sum(request.row >= 0 for request in list(self._jobs))

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a row."""
        return len(self._new) + len(self._jobs) - self.running

    def collect(self) -> Iterator[Metric]:
        """Yield the counts and the number of jobs as metrics: a loop is a collector of prometheus_client."""
        for name, value in sorted(dict(self.counts).items()):
            yield CounterMetricFamily(f"mgp5_{name}", f"{name.replace('_', ' ').capitalize()}.", value)
        yield GaugeMetricFamily("mgp5_running", "Requests that run.", self.running)
        yield GaugeMetricFamily("mgp5_waiting", "Requests that wait for a row.", self.waiting)

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all of them or none. Raises Refused: 429 when more than `limit` would wait, 503 after the end."""
        with self._wake:
            if self._stopping or not self.alive:
                raise STOPPED
            if len(self._new) + len(self._jobs) + len(jobs) > self.rows + self.limit:
                self.counts["refused"] += 1
                message = f"{self.rows} requests run and {self.limit} wait, the most this server takes: try later"
                raise Refused(429, message, "rate_limit_exceeded")
            self._new.extend(jobs)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Cancel a job; nothing more is delivered to it."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def _run(self) -> None:
        self._reset()
        while True:
            with self._wake:
                while not (self._stopping or self._new or self._jobs):
                    self._wake.wait()
            if self._stopping:
                break
            try:
                self._admit()
                for request, event in self.scheduler.step():
                    self._deliver(request, event)
                    self._admit()  # jobs join and leave between any two events
            except Exception as error:  # of a step of all: none can go on
                for request in list(self._jobs):
                    self._end(request, _unexpected(error))
                self._reset()
        for request in list(self._jobs):
            self._end(request, STOPPED)
        while self._new:
            self._new.popleft().deliver(STOPPED)

    def _reset(self) -> None:
        with torch.inference_mode():
            self.scheduler = Scheduler(
                self.model, self.rows, text_steps=TEXT_STEPS, images_at_once=self.rows, workers=self.workers
            )
        self.scheduler.counts = self.counts

    def _admit(self) -> None:
        """Hand new jobs to the scheduler, and end those that were cancelled or have run out of time."""
        with self._wake:
            while self._new:
                job = self._new.popleft()
                more = {"previews": job.previews, "left_out": job.left_out}
                self._jobs[self.scheduler.submit(job.conversation, job.options, **more)] = job
        now = time.monotonic()
        for request, job in list(self._jobs.items()):
            if job.cancelled or job.deadline < now:
                self._end(request, LATE)

    def _deliver(self, request: ActiveRequest, event: Event | Exception) -> None:
        if (job := self._jobs.get(request)) is None:  # it ended meanwhile
            return
        if isinstance(event, NotFinite):
            self._end(request, Refused(500, event.message, "internal_error"))
            return
        if isinstance(event, Mgp5Error | TemplateError):  # of the request: a prompt too long, turns out of order
            self._end(request, Refused(400, str(event), "invalid_value"))
            return
        if isinstance(event, Exception):
            self._end(request, _unexpected(event))
            return
        if job.silent and isinstance(event, TextChunk):
            self.counts["first_tokens"] += 1
            self.counts["first_token_seconds"] += time.monotonic() - job.since
        job.silent = False
        if isinstance(event, Finished):
            self.counts["tokens"] += event.meta["tokens"]
            self.counts["images"] += len(event.message.images)
            self.counts["finished"] += 1
            del self._jobs[request]
        if not job.cancelled:
            job.deliver(event)

    def _end(self, request: ActiveRequest, reason: Refused) -> None:
        job = self._jobs.pop(request)
        self.scheduler.cancel(request)
        self.counts["cancelled" if job.cancelled else "failed"] += 1
        if not job.cancelled:
            job.deliver(reason)


def _unexpected(error: Exception) -> Refused:
    """Return the refusal of a reply that failed for no fault of its request; it repeats nothing of it."""
    return Refused(500, f"the reply failed ({type(error).__name__})", "internal_error")
