"""A batch's lines, spread over workers of a cluster; what a dead worker held goes to others."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from ...apps.batch import Answered, Ask, Crew, Job, Take, answer
from ...errors import Mgp5Error
from ...messages import Conversation, Image, Message, Part

if TYPE_CHECKING:
    from ...model import InterleavedModel
    from ...prompts import Context

LOST = RayActorError, ObjectLostError, OutOfMemoryError  # the worker or its machine went, with what it held
DEATHS = 3  # workers that a line may cost, and starts that a worker may fail


class Worker:
    """A process with a model.

    Args:
        load: makes the model; called by `ready`, so that what goes wrong is told.
    """

    def __init__(self, load: Callable[[], InterleavedModel]) -> None:
        self.load = load

    def ready(self) -> Context:
        """Load the model; tells what its questions show of the history."""
        self.model = self.load()
        return self.model.config.narrate_from

    def answer(self, asks: Sequence[Ask]) -> list[Message | Mgp5Error]:
        """See `mgp5.apps.batch.answer`."""
        return answer(self.model, asks)


def spread(workers: int, needs: dict[str, Any], load: Callable[[], InterleavedModel]) -> Crew:
    """So many workers, each of which takes a share of what is to be answered.

    A worker that dies is started again, and what it was asked is asked again, each alone. Replies do not depend on who
    gives them.

    Args:
        needs: resources of each, see `resources`.
        load: makes the model, in the worker.
    """

    def work(take: Take) -> Answered:
        actor = ray.remote(Worker).options(max_restarts=-1, scheduling_strategy="SPREAD", **needs)
        crew = [actor.remote(load) for _ in range(workers)]
        try:
            yield from _work(crew, take)
        finally:
            for worker in crew:
                ray.kill(worker)

    return work


def _work(crew: list[Any], take: Take) -> Answered:
    busy = {worker.ready.remote(): (worker, []) for worker in crew}
    idle, again, deaths, context = [], deque[Job](), Counter(), None
    while busy and (not idle or any(jobs for _, jobs in busy.values())):  # who still starts is not waited for
        (ref,), _ = ray.wait(list(busy))
        worker, jobs = busy.pop(ref)
        try:
            said = ray.get(ref)
        except RayTaskError as error:
            raise error.cause or error from None
        except LOST as error:
            deaths.update(jobs or [worker])
            again += [job for job in jobs if deaths[job] < DEATHS]
            if deaths[worker] < DEATHS:
                busy[worker.ready.remote()] = worker, []
            if hopeless := [job for job in jobs if deaths[job] == DEATHS]:
                yield hopeless, [Mgp5Error(f"{DEATHS} workers died over it ({_first_line(error)})")] * len(hopeless)
        else:
            idle.append(worker)
            if jobs:
                yield jobs, said
            else:
                context, deaths[worker] = said, 0
        while idle and (jobs := [again.popleft()] if again else take(context, len(crew))):
            worker, asks = idle.pop(), [(_whole(talk), options) for talk, options in (job.asked for job in jobs)]
            busy[worker.answer.remote(asks)] = worker, jobs
    if not idle:
        raise Mgp5Error("no worker of the cluster starts", "is the same mgp5 installed on its machines?")


def _whole(talk: Conversation) -> Conversation:
    """A conversation whose pictures need no files."""

    def part(one: Part) -> Part:
        if not isinstance(one, Image) or one.path is None or one.pixels is not None:
            return one
        return replace(one, path=None, data=one.path.read_bytes())

    return Conversation(tuple(replace(m, content=tuple(map(part, m.content))) for m in talk.messages))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
