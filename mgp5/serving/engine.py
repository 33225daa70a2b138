"""The loop of a server, in a thread of its own: requests join and leave the decoding and the denoising at any step."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateError

from ..errors import Mgp5Error
from ..events import Event, Finished, ImageStep, TextChunk
from ..inference.decoder import Decoder
from ..inference.reply import reply
from ..inference.scheduler import Paint, Turn, read_on
from ..inference.session import Session
from ..messages import Conversation
from ..options import Options
from .painting import Canvas, StepBatch

if TYPE_CHECKING:
    from ..model import InterleavedModel

PIECES = 8  # of text between two denoising steps, at most: text is cheap, and others wait for it


class Refused(Exception):
    """Why a request has no reply: its status, a one-line message and OpenAI's code for it."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


STOPPED = Refused(503, "the server stops", "server_stopping")


@dataclass(eq=False)
class Job:
    """A request for one reply.

    Args:
        deliver: takes events, the last of them Finished, or what went wrong; called from the engine's thread.
        deadline: by `time.monotonic`.
    """

    conversation: Conversation
    options: Options
    deliver: Callable[[Event | Refused], None]
    deadline: float
    cancelled: bool = False
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Seat:
    """A job on a row of the decoder."""

    job: Job
    turn: Turn
    canvas: Canvas | None = None
    index: int = 0  # of the picture on the canvas
    silent: bool = True  # nothing was said yet


class ServingEngine:
    """Serves jobs in the order they came, `rows` at a time; up to `waiting` more wait.

    Everything that touches the model happens in one thread. A job's tokens are those it has alone and its pictures the
    same but for rounding, whatever runs beside it: each has a session, generators and denoising steps of its own.

    Args:
        model: from `mgp5.load`.
        rows: of the decoder.
        waiting: the most jobs that wait for a row.
        workers: see `StepBatch`.
    """

    def __init__(self, model: InterleavedModel, rows: int = 8, waiting: int = 64, workers: int = 1) -> None:
        self.model, self.rows, self.most_waiting = model, rows, waiting
        self.painter = StepBatch(model.head, workers)
        self.queue: deque[Job] = deque()
        self.seats: dict[int, Seat] = {}
        self.counts: Counter[str] = Counter()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mgp5-serving", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End now; jobs that run are refused."""
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
        """Return the number of requests that run."""
        return len(self.seats)

    @property
    def waiting(self) -> int:
        """Return the number of requests that wait for a row."""
        return len(self.queue)

    def submit(self, *jobs: Job) -> None:
        """Take jobs, all or none. Raises Refused: 429 when more than `waiting` would wait, 503 when none is served."""
        with self._wake:
            if self._stopping or not self.alive:
                raise STOPPED
            busy = len(self.queue) + len(self.seats) + len(jobs)
            if busy > self.rows + self.most_waiting:
                self.counts["refused"] += 1
                message = (
                    f"{self.rows} requests run and {self.most_waiting} wait, the most this server takes: try later"
                )
                raise Refused(429, message, "rate_limit_exceeded")
            self.queue.extend(jobs)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job; it gets nothing more."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def _run(self) -> None:
        with torch.inference_mode():
            self._reset()
            while True:
                with self._wake:
                    while not (self._stopping or self.queue or self.seats):
                        self._wake.wait()
                if self._stopping:
                    break
                try:
                    self._cycle()
                except Exception as error:  # of a step of all: none can go on
                    for seat in list(self.seats.values()):
                        self._end(seat, _unexpected(error))
                    self._reset()
        for seat in list(self.seats.values()):
            self._end(seat, STOPPED)
        while self.queue:
            self.queue.popleft().deliver(STOPPED)

    def _reset(self) -> None:
        self.decoder = Decoder(self.model.backbone, self.rows)

    def _cycle(self) -> None:
        """Some pieces of text, then one denoising step; where it has workers of its own, text goes on beside them."""
        for _ in range(PIECES if self.painter.workers == 1 else 1):
            if not self._speak():
                break
        self._paint()

    def _speak(self) -> bool:
        """One piece of text for all who wait for one; False: nobody does."""
        self._leave()
        self._join()
        for seat in list(self.seats.values()):
            self._go_on(seat)
        spoke = read_on(self.model, [seat.turn for seat in self.seats.values() if seat.canvas is None])
        self.counts["text_steps"] += spoke
        return spoke

    def _leave(self) -> None:
        """Let go of jobs that were cancelled or have run out of time, in the queue too."""
        late = Refused(504, "the request took longer than it may: ask for less, or later", "timeout")
        now = time.monotonic()
        for seat in list(self.seats.values()):
            if seat.job.cancelled or seat.job.deadline < now:
                self._end(seat, late)
        with self._wake:
            gone = [job for job in self.queue if job.cancelled or job.deadline < now]
            for job in gone:
                self.queue.remove(job)
        for job in gone:
            self._deliver(job, late)

    def _join(self) -> None:
        """Give free rows to the jobs that have waited longest."""
        with self._wake:
            for row in range(self.rows):
                if row not in self.seats and self.queue:
                    job, session = self.queue.popleft(), Session(self.model.backbone, decoder=self.decoder, row=row)
                    script = reply(self.model, session, job.conversation, job.options)
                    self.seats[row] = Seat(job, Turn(script, session))

    def _go_on(self, seat: Seat) -> None:
        """Run a job's script to where it needs something, and deliver what it says."""
        try:
            for event in seat.turn.run():
                self._say(seat, event)
            if isinstance(seat.turn.need, Paint) and seat.canvas is None and seat.turn.running:
                seat.canvas, seat.index = self.painter.begin(seat.turn.need), seat.turn.need.index
        except (Mgp5Error, TemplateError) as error:  # of the request: a prompt too long, turns out of order
            self._end(seat, Refused(400, " ".join(str(error).split()), "invalid_value"))
        except Exception as error:
            self._end(seat, _unexpected(error))

    def _say(self, seat: Seat, event: Event) -> None:
        if seat.silent and isinstance(event, TextChunk):
            self.counts["first_tokens"] += 1
            self.counts["first_token_seconds"] += time.monotonic() - seat.job.since
        seat.silent = False
        if isinstance(event, Finished):
            self.counts["tokens"] += event.meta["tokens"]
            self.counts["images"] += len(event.message.images)
            self.counts["finished"] += 1
            del self.seats[seat.turn.session.row]
        self._deliver(seat.job, event)

    def _paint(self) -> None:
        """Advance all pictures by one step; those that are done go back to their scripts."""
        drawing = [seat for seat in self.seats.values() if seat.canvas]
        calls = self.painter.step([seat.canvas for seat in drawing], self._speak)
        self.counts["denoising_calls"] += calls
        for seat in drawing:
            canvas = seat.canvas
            if seat not in self.seats.values():  # it ended meanwhile
                continue
            if canvas.pixels is None:
                self.counts["denoising_steps"] += 1
                self._deliver(seat.job, ImageStep(seat.index, canvas.step, len(canvas.table)))
            else:
                seat.canvas = None
                seat.turn.answer(canvas.pixels)

    def _end(self, seat: Seat, reason: Refused) -> None:
        seat.turn.script.close()
        self.seats.pop(seat.turn.session.row, None)
        self.counts["cancelled" if seat.job.cancelled else "failed"] += 1
        self._deliver(seat.job, reason)

    def _deliver(self, job: Job, event: Event | Refused) -> None:
        if not job.cancelled:
            job.deliver(event)


def _unexpected(error: Exception) -> Refused:
    """A reply that failed for no fault of its request; told without what the request said."""
    return Refused(500, f"the reply failed ({type(error).__name__})", "internal_error")
