"""One loop for many replies, offline and served: text is decoded together, images are drawn together, step by step.

Every reply is an ActiveRequest that waits for one thing at a time. `Scheduler.step` does one thing for all that wait
for it. The offline batch is the served one with everything queued at once.

r rows read together, k tokens of a row, n tokens decoded per sync, D width of the LLM.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..events import Event
from ..heads import Embeds, Forced, Step
from ..messages import Conversation
from ..options import Options
from .decoder import Decoder
from .request import ActiveRequest, Decode, Pick
from .session import Session

if TYPE_CHECKING:
    from ..model import InterleavedModel

Said = tuple[ActiveRequest, Event | Exception]


class Scheduler:
    """Serves replies in the order they were submitted, `rows` at a time.

    A reply's tokens are those that it has alone, and its images the same but for rounding, whatever runs beside it:
    each has a session, generators of random numbers and steps of its own.

    Args:
        model: in evaluation mode.
        rows: of the decoder.
        decoder: with at least so many rows; None makes one.
        text_steps: how many steps of text come before a step of images; None: images wait until no text can be written
            without them, so that they go on together.
        images_at_once: the most images in one call of the head.
        workers: calls of the head at a time, each of a share of the images. For a CPU: of small models, threads of
            their own use its cores better than threads within an operation. Text goes on beside them.

    Attributes:
        queue: submitted, waiting for a row.
        active: by row.
        counts: of what was done.
    """

    def __init__(
        self,
        model: InterleavedModel,
        rows: int,
        *,
        decoder: Decoder | None = None,
        text_steps: int | None = None,
        images_at_once: int = 8,
        workers: int = 1,
    ) -> None:
        self.model, self.rows, self.text_steps = model, rows, text_steps
        self.images_at_once, self.workers = images_at_once, workers
        self.decoder = decoder or Decoder(model.backbone, rows)
        self.queue: deque[ActiveRequest] = deque()
        self.active: dict[int, ActiveRequest] = {}
        self.counts: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.queue or self.active)

    def submit(self, conversation: Conversation, options: Options, session: Session | None = None) -> ActiveRequest:
        """Queue a reply.

        Args:
            session: on a row of the decoder, which then is the reply's; None gives it a free row and a new session.
        """
        request = ActiveRequest(self.model, conversation, options, session)
        self.queue.append(request)
        return request

    def cancel(self, request: ActiveRequest) -> None:
        """Forget a reply; it says nothing more."""
        if request in self.queue:
            self.queue.remove(request)
        elif self.active.get(request.row) is request:
            del self.active[request.row]
        request.close()

    @torch.inference_mode()
    def step(self) -> Iterator[Said]:
        """Do some text, then one step of images; yields what replies say, and errors of those that failed."""
        steps = 0
        while self.text_steps is None or steps < (self.text_steps if self.workers == 1 else 1):
            wrote = yield from self._text_step()
            if not wrote:
                break
            steps += 1
        yield from self._image_step()

    def _text_step(self) -> Iterator[Said]:
        """Let the LLM do one thing for as many replies as wait for it; returns whether any did."""
        yield from self._join()
        picks = {row: request for row, request in self.active.items() if isinstance(request.need, Pick)}
        runs = {row: request for row, request in self.active.items() if isinstance(request.need, Forced | Embeds)}
        decodes = {row: request for row, request in self.active.items() if isinstance(request.need, Decode)}
        if picks:
            yield from self._pick(picks)
        elif runs:
            yield from self._read(runs)
        elif decodes:
            yield from self._decode(decodes)
        else:
            return False
        self.counts["text_steps"] += 1
        return True

    def _join(self) -> Iterator[Said]:
        """Give free rows to the replies that have waited longest, and read their conversations."""
        for request in list(self.queue):
            if request.closed:  # by whoever got an event of another
                continue
            free = [row for row in range(self.rows) if row not in self.active]
            row = request.session.row if request.session else next(iter(free), None)
            if row is None or row in self.active:
                break
            self.queue.remove(request)
            session = request.session or Session(self.model, decoder=self.decoder, row=row)
            self.active[row] = request
            yield from self._go_on(request, lambda request=request, session=session: request.start(session))

    def _pick(self, requests: dict[int, ActiveRequest]) -> Iterator[Said]:
        """Sample a token from states that are known."""
        states = {row: request.session.state[0, 0] for row, request in requests.items()}
        for row, token in self.decoder.pick(states).items():
            request = requests[row]
            state = request.session.state
            yield from self._go_on(request, lambda r=request, t=token, s=state: r.take(t, s))

    def _read(self, requests: dict[int, ActiveRequest]) -> Iterator[Said]:
        """Read tokens or embeddings in one forward, of all rows that read as many as the first."""
        runs = {row: request.run() for row, request in sorted(requests.items())}
        length = len(next(iter(runs.values()))[1])
        rows = [row for row, (_, keys) in runs.items() if len(keys) == length]
        hidden = self.decoder.feed(rows, torch.cat([runs[row][0] for row in rows]))  # (r, k, D)
        for row, states in zip(rows, hidden.split(1), strict=True):
            request, keys = requests[row], runs[row][1]
            yield from self._go_on(request, lambda r=request, s=states, k=keys: r.take_run(s, k))

    def _decode(self, requests: dict[int, ActiveRequest]) -> Iterator[Said]:
        """Decode some tokens of each row; those behind the end of its text are dropped."""
        room = self.model.backbone.context_length - max(r.session.length for r in requests.values())
        count = min([self.decoder.tokens_per_sync, room, *(request.same_mask for request in requests.values())])
        decoded = self.decoder.steps({row: request.need.token for row, request in requests.items()}, max(1, count))
        for row, (tokens, states) in decoded.items():
            yield from self._take(requests[row], tokens, states)

    def _take(self, request: ActiveRequest, tokens: list[int], states: Tensor) -> Iterator[Said]:
        """Give a reply its tokens (n) and the states (n, D) that predict them, until it wants something else."""
        for token, state in zip(tokens, states, strict=True):
            if not isinstance(request.need, Decode):
                self.decoder.cut(request.row, request.session.length)
                return
            state = state[None, None]
            request.session.append(state, [(request.need.token, "")])
            yield from self._go_on(request, lambda r=request, t=token, s=state: r.take(t, s))

    def _image_step(self) -> Iterator[Said]:
        """Advance all images by one step: one call for each key, in shares for several workers."""
        groups: dict[Any, list[ActiveRequest]] = {}
        for request in self.active.values():
            if isinstance(request.need, Step):
                groups.setdefault(request.need.key, []).append(request)
        if not groups:
            return
        shares = -(-self.workers // len(groups))
        calls = [part for group in groups.values() for part in self._shared(group, shares)]
        outputs = [self._start(call) for call in calls]
        if self._pool:
            while not all(output.done() for output in outputs):
                wrote = yield from self._text_step()
                if not wrote:
                    break
        for call, output in zip(calls, outputs, strict=True):
            try:
                made = output.result() if self._pool else output()
            except Exception as error:  # whatever a head or a driver raises ends these replies, not the others
                made = [error] * len(call)
            name = call[0].need.key[0]
            self.counts[f"{name}_calls"] += 1
            for request, one in zip(call, made, strict=True):
                if self.active.get(request.row) is request:
                    self.counts[f"{name}_steps"] += 1
                    yield from self._go_on(request, lambda r=request, o=one: r.take_output(o))

    def _shared(self, group: list[ActiveRequest], shares: int) -> list[list[ActiveRequest]]:
        shares = max(min(shares, len(group)), -(-len(group) // self.images_at_once))
        size = -(-len(group) // shares)
        return [group[start : start + size] for start in range(0, len(group), size)]

    def _start(self, call: Sequence[ActiveRequest]) -> Future | Callable[[], list[Any]]:
        key, inputs = call[0].need.key, [request.need.inputs for request in call]
        if not self._pool:
            return lambda: self.model.head.step(key, inputs)
        return self._pool.submit(torch.inference_mode()(self.model.head.step), key, inputs)  # the mode is of a thread

    def _go_on(self, request: ActiveRequest, take: Callable[[], Iterator[Event]]) -> Iterator[Said]:
        """Let a reply take what it waited for; yields what it says until it waits for something else."""
        try:
            for event in take():
                yield request, event
                if request.closed:  # by whoever got the event
                    return
        except Exception as error:  # of this reply alone: the others go on
            self.cancel(request)
            yield request, error
            return
        if request.need is None and self.active.get(request.row) is request:
            del self.active[request.row]
