"""One loop for many replies, offline and served: text is decoded together, images are drawn together, step by step.

Every reply is an ActiveRequest that waits for one thing at a time. `Scheduler.step` does one thing for all that wait
for it. The offline batch is the served one with everything queued at once.

Letters: r rows read together, k tokens of a row, n tokens decoded per sync, D LLM width.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..events import Event
from ..heads import Embeds, Forced, Step
from ..messages import Conversation
from ..options import Options
from .decoder import Decoder
from .request import ActiveRequest, NextToken
from .session import Session

if TYPE_CHECKING:
    from ..model import InterleavedModel

Delivery = tuple[ActiveRequest, Event | Exception]


class Scheduler:
    """Serves replies in the order they were submitted, `rows` at a time.

    A reply's tokens are those that it has alone, and its images the same but for rounding, whatever runs beside it:
    each has a session, generators of random numbers and steps of its own.

    Several workers are for small models on a CPU, whose cores threads of their own use better than threads within an
    operation. Text goes on beside them.
    """

    def __init__(
        self,
        model: InterleavedModel,
        rows: int,
        *,
        decoder: Decoder | None = None,  # with at least so many rows
        text_steps: int | None = None,  # before each step of images; None: until no text can be written without images
        images_at_once: int = 8,  # the most images in one call of the head
        workers: int = 1,  # calls of the head at a time, each of a share of the images
    ) -> None:
        self.model, self.rows, self.images_at_once, self.workers = model, rows, images_at_once, workers
        self.text_steps = math.inf if text_steps is None else text_steps if workers == 1 else 1
        self.decoder = decoder or Decoder(model.backbone, rows)
        self.queue: deque[ActiveRequest] = deque()  # submitted, waiting for a row
        self.active: dict[int, ActiveRequest] = {}  # by row
        self.counts: Counter[str] = Counter()  # of what was done
        self._deliveries: deque[Delivery] = deque()
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None

    @property
    def busy(self) -> bool:
        """Return whether anything is left to do."""
        return bool(self.queue or self.active)

    def submit(
        self,
        conversation: Conversation,
        options: Options,
        session: Session | None = None,
        previews: int = 0,
        left_out: int | None = None,
    ) -> ActiveRequest:
        """Queue a reply; None as session, which is on a row of the decoder, gives it a free row and a new one."""
        request = ActiveRequest(self.model, conversation, options, session, previews, left_out)
        self.queue.append(request)
        return request

    def cancel(self, request: ActiveRequest) -> None:
        """Forget a reply; nothing more of it is delivered."""
        if request in self.queue:
            self.queue.remove(request)
        elif self.active.get(request.row) is request:
            del self.active[request.row]
        request.close()
        self._deliveries = deque(delivery for delivery in self._deliveries if delivery[0] is not request)

    @torch.inference_mode()
    def step(self) -> Iterator[Delivery]:
        """Do some text, then one step of images; yield events of replies, and errors of those that failed."""
        steps = 0
        while steps < self.text_steps and (yield from self._text_step()):
            steps += 1
        yield from self._image_step()

    def _text_step(self) -> Generator[Delivery, None, bool]:
        """Let the LLM do one thing for as many replies as wait for it; return whether any did."""
        self._join()
        writing = {row: request for row, request in self.active.items() if isinstance(request.need, NextToken)}
        picks = {row: request for row, request in writing.items() if request.token is None}
        runs = {row: request for row, request in self.active.items() if isinstance(request.need, Forced | Embeds)}
        if picks:
            self._pick(picks)
        elif runs:
            self._read(runs)
        elif writing:
            self._decode(writing)
        self.counts["text_steps"] += bool(writing or runs)
        yield from self._deliver()
        return bool(writing or runs)

    def _join(self) -> None:
        """Give free rows to the replies that have waited longest, and read their conversations."""
        for request in list(self.queue):
            free = (row for row in range(self.rows) if row not in self.active)
            row = request.session.row if request.session else next(free, None)
            if row is None or row in self.active:
                break
            self.queue.remove(request)
            self.active[row] = request
            session = request.session or Session(self.model, decoder=self.decoder, row=row)
            self._advance(request, request.start, session)

    def _pick(self, requests: dict[int, ActiveRequest]) -> None:
        """Sample a token from states that are known."""
        states = {row: request.session.state for row, request in requests.items()}
        for row, token in self.decoder.pick({row: state[0, 0] for row, state in states.items()}).items():
            self._advance(requests[row], requests[row].take, token, states[row])

    def _read(self, requests: dict[int, ActiveRequest]) -> None:
        """Read tokens or embeddings in one forward, of all rows that read as many as the first, for the same end."""
        runs = {row: request.run() for row, request in sorted(requests.items())}
        ends = {row: (len(keys), getattr(requests[row].need, "then", None)) for row, (_, keys) in runs.items()}
        first = next(iter(runs))
        rows = [row for row in runs if ends[row] == ends[first]]
        embeds, outputs = torch.cat([runs[row][0] for row in rows]), [None] * len(rows)
        if isinstance(requests[first].need, Forced):
            before = torch.cat([requests[row].session.state for row in rows])
            hidden, outputs = self.decoder.run(rows, embeds, before, requests[first].need)  # (r, k, D)
        else:  # of shapes that seldom come again
            hidden = self.decoder.feed(rows, embeds)
        for row, states, output in zip(rows, hidden.split(1), outputs, strict=True):
            self._advance(requests[row], requests[row].take_run, states, runs[row][1], output)

    def _decode(self, requests: dict[int, ActiveRequest]) -> None:
        """Decode some tokens of each row; those behind the end of its text are dropped."""
        room = self.model.backbone.context_length - max(r.session.length for r in requests.values())
        count = min([self.decoder.tokens_per_sync, room, *(request.same_mask for request in requests.values())])
        decoded = self.decoder.steps({row: request.token for row, request in requests.items()}, max(1, count))
        for row, (tokens, states) in decoded.items():
            self._take(requests[row], tokens, states)

    def _take(self, request: ActiveRequest, tokens: list[int], states: Tensor) -> None:
        """Give a reply its tokens (n) and the states (n, D) that predict them, until it wants something else."""
        for token, state in zip(tokens, states[:, None, None], strict=True):
            if not isinstance(request.need, NextToken) or request.token is None:
                self.decoder.cut(request.row, request.session.length)
                return
            request.session.append(state, [(request.token, "")])
            self._advance(request, request.take, token, state)

    def _image_step(self) -> Iterator[Delivery]:
        """Advance all images by one step: one call for each key, in shares for several workers."""
        groups: dict[Any, list[ActiveRequest]] = {}
        for request in self.active.values():
            if isinstance(request.need, Step):
                groups.setdefault(request.need.key, []).append(request)
        step = torch.inference_mode()(self.model.head.step)  # the mode is one of the thread
        calls = [
            (key[0], share, partial(step, key, [request.need.inputs for request in share]))
            for key, group in groups.items()
            for share in self._shares(group, -(-self.workers // len(groups)))
        ]
        if self._pool:
            futures = [self._pool.submit(run) for _, _, run in calls]
            calls = [(*call[:2], future.result) for call, future in zip(calls, futures, strict=True)]
            while not all(future.done() for future in futures) and (yield from self._text_step()):
                pass
        for name, share, run in calls:
            try:
                outputs = run()
            except Exception as error:  # whatever a head or a driver raises ends these replies, not the others
                outputs = [error] * len(share)
            self.counts[f"{name}_calls"] += 1
            for request, output in zip(share, outputs, strict=True):
                if self.active.get(request.row) is request:
                    self.counts[f"{name}_steps"] += 1
                    self._advance(request, request.take_output, output)
            yield from self._deliver()

    def _shares(self, group: list[ActiveRequest], count: int) -> list[list[ActiveRequest]]:
        """Split images with equal keys into `count` shares of at most `images_at_once`."""
        count = max(min(count, len(group)), -(-len(group) // self.images_at_once))
        size = -(-len(group) // count)
        return [group[start : start + size] for start in range(0, len(group), size)]

    def _advance(self, request: ActiveRequest, take: Callable[..., None], *result: Any) -> None:
        """Let a reply take what it waited for."""
        try:
            take(*result)
        except Exception as error:  # of this reply alone: the others go on
            request.close()
            request.events.append(error)
        self._deliveries.extend((request, event) for event in request.events)
        request.events.clear()
        if request.need is None:
            del self.active[request.row]

    def _deliver(self) -> Iterator[Delivery]:
        while self._deliveries:
            yield self._deliveries.popleft()
