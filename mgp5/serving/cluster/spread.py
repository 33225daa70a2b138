"""Answer the lines of a batch by workers of a cluster; what a dead worker was asked, others are asked again."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from ...apps.batch import Answer, Reply, answer
from ...apps.open_model import open_model
from ...apps.story import Ask
from ...errors import Mgp5Error
from ...messages import Conversation, Image, Part
from ...options import ModelRequest

LOST = RayActorError, ObjectLostError, OutOfMemoryError  # the worker or its machine went, with what it held
DEATHS = 3  # workers that an ask may cost, and starts that a worker may fail


class Worker:
    """A process with a model, which `ready` opens, so that an error reaches the driver."""

    def __init__(self, request: ModelRequest) -> None:
        self.request = request

    def ready(self) -> None:
        """Open the model. Raises Mgp5Error."""
        self.model = open_model(self.request)

    def answer(self, asks: Sequence[Ask]) -> list[Reply]:
        """See `mgp5.apps.batch.answer`."""
        return answer(self.model, asks)


@contextmanager
def spread(workers: int, needs: dict[str, Any], request: ModelRequest) -> Iterator[Answer]:
    """Start workers and yield an `Answer` that shares its asks among them; they end with the block.

    A worker that dies is started again, and what it was asked is asked again, each alone. Replies do not depend on
    who gives them. `needs` are the resources of each worker, see `resources`; `request` is the model that each opens,
    and must mean the same on all machines, see `absolute`.
    """
    actor = ray.remote(Worker).options(max_restarts=-1, scheduling_strategy="SPREAD", **needs)
    crew = [actor.remote(request) for _ in range(workers)]
    try:
        yield _Crew(crew)
    finally:
        for worker in crew:
            ray.kill(worker)


class _Crew:
    """An `Answer` by several workers."""

    def __init__(self, workers: list[Any]) -> None:
        self._count, self._idle, self._failed_starts = len(workers), [], Counter()
        self._busy = {worker.ready.remote(): (worker, []) for worker in workers}  # and indices of what it was asked

    def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        """Reply to all asks. Raises Mgp5Error when no worker can be had any more, or none can open the model."""
        size = ceil(len(asks) / self._count)
        shares = deque(list(range(i, min(i + size, len(asks)))) for i in range(0, len(asks), size))
        replies: dict[int, Reply] = {}
        deaths: Counter[int] = Counter()
        while len(replies) < len(asks):
            while self._idle and shares:
                worker, share = self._idle.pop(), shares.popleft()
                self._busy[worker.answer.remote([_without_files(asks[i]) for i in share])] = worker, share
            if not self._busy:
                raise Mgp5Error("no worker of the cluster starts", "install the same mgp5 on all of its machines")
            (ref,), _ = ray.wait(list(self._busy))
            worker, share = self._busy.pop(ref)
            try:
                replies |= dict(zip(share, ray.get(ref) or (), strict=True))
                self._idle.append(worker)
            except RayTaskError as error:
                raise error.cause or error from None
            except LOST as error:
                deaths.update(share)
                self._failed_starts[worker] = 0 if share else self._failed_starts[worker] + 1
                if self._failed_starts[worker] < DEATHS:
                    self._busy[worker.ready.remote()] = worker, []
                why = str(error).strip().partition("\n")[0]
                for i in share:
                    if deaths[i] < DEATHS:
                        shares.append([i])
                    else:
                        replies[i] = Mgp5Error(f"{DEATHS} workers died over it ({why})", "shorten or remove this line")
        return [replies[i] for i in range(len(asks))]


def _without_files(ask: Ask) -> Ask:
    """Return an ask whose images hold their data: another machine may not have the files."""

    def part(one: Part) -> Part:
        if not isinstance(one, Image) or one.path is None or one.pixels is not None:
            return one
        return replace(one, path=None, data=one.path.read_bytes())

    conversation, options = ask
    return Conversation(tuple(replace(m, content=tuple(map(part, m.content))) for m in conversation.messages)), options
