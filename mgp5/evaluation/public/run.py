"""What `mgp5 eval` does on a public benchmark: replies, kept as they come; answers in its own layout; scores; a report.

config.json                what is evaluated: a folder goes on with the same only
replies/model-RANK.jsonl   a line for each case that a process has finished
pictures/model/            images of replies, PNG
answers/                   the replies as the benchmark's own scripts read them
judged.jsonl               what a judge has said, word for word: the same is not asked twice
report.json  report.html   see `score`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ...apps.batch import answer
from ...apps.open_model import Tell, open_model, silent
from ...data.files import pick
from ...files import read_json
from ...messages import Message, Text
from ...model import InterleavedModel
from ...options import Options
from ...prompts import TASK_PROMPTS
from ...training.checkpoints import SETTINGS
from ...training.distributed import on_main
from ..request import trained
from ..run import Replied, claim, claimed, kept, read_replies, started, weights_hash, write_messages
from .cases import Case, Turn, load, steps
from .request import PublicRequest
from .score import score

NEXT = Turn((Text(TASK_PROMPTS["continue"][0]),))  # asks a model to go on


def evaluate(
    request: PublicRequest, tell: Tell = silent, progress: Callable[[Replied], None] = lambda replied: None
) -> dict[str, Any]:
    """Evaluate a model, and return what report.json holds; as `evaluation.run.evaluate`, also in several processes."""
    with claimed(request.out):
        cases, problems = load(request.benchmark, request.data, request.limit)
        parts, state = trained(request.model.model), started(request.model.device)
        settings = _settings(request, on_main(state, lambda: weights_hash(parts)))
        on_main(state, lambda: claim(request.out, settings, {"model": ""}))
        done = read_replies(request.out, "model")
        state.wait_for_everyone()  # nobody writes before all have seen what is there
        todo = [case for case in cases if case.key not in done]
        model = cache(lambda: open_model(replace(request.model, device=str(state.device)), tell, request.batch))
        numbers = {case.key: number for number, case in enumerate(cases)}

        def reply(batch: Sequence[Case]) -> Iterator[dict[str, Any]]:
            for case, made in zip(batch, reply_to(model(), batch, request.options, request.rounds), strict=True):
                stem = f"pictures/model/{numbers[case.key]:06d}"
                failed = isinstance(made, str)
                yield {"error": made} if failed else {"replies": write_messages(request.out, stem, made)}

        batches = [todo[start : start + request.batch] for start in range(0, len(todo), request.batch)]
        for replied in kept(request.out, "model", state, batches, reply):
            progress(replied)
        state.wait_for_everyone()
        model.cache_clear()  # a judge needs the memory
        if state.is_main_process:
            rows = read_replies(request.out, "model")
            score(request, cases, problems, rows, read_json(request.out / SETTINGS), state.device, progress)
        state.wait_for_everyone()
    return read_json(request.out / "report.json")


def _settings(request: PublicRequest, weights: str) -> dict[str, Any]:
    """Return what replies depend on, as JSON gives it back."""
    settings = {name: getattr(request, name) for name in ("format", "limit", "rounds")}
    settings |= {"model": request.model.model, "data": str(Path(request.data).resolve()), "weights": weights}
    settings |= {"quantize": request.model.quantize, "options": request.options.flat()}
    return json.loads(json.dumps(settings))


def reply_to(
    model: InterleavedModel, cases: Sequence[Case], options: Options, rounds: int = 1
) -> list[list[Message] | str]:
    """Return a reply for each turn of cases, in which earlier replies are history; for one that fails, the reason.

    In each of `rounds` after the first, a model is asked to go on with a reply to the last turn; 0 makes as many as the
    true reply has steps.
    """
    longer = [_longer(case, rounds) for case in cases]
    replies: list[list[Message]] = [[] for _ in cases]
    failed: dict[int, str] = {}
    for turn in range(max(len(case.turns) for case in longer)):
        active = [i for i, case in enumerate(longer) if turn < len(case.turns) and i not in failed]
        asks = []
        for i in active:
            seed = pick(2**31, options.seed, cases[i].key, turn)
            changed = {"seed": seed, "image_seed": None} | dict(longer[i].turns[turn].options)
            asks.append((longer[i].asked(replies[i]), options.updated(changed)))
        for i, reply in zip(active, answer(model, asks) if asks else (), strict=True):
            if isinstance(reply, Message):
                replies[i].append(reply)
            else:
                failed[i] = str(reply)
    return [failed.get(i) or _joined(replies[i], len(case.turns)) for i, case in enumerate(cases)]


def _longer(case: Case, rounds: int) -> Case:
    more = (rounds or max(1, len(steps(case.turns[-1].true)))) - 1
    return replace(case, turns=(*case.turns, *[NEXT._replace(options=case.turns[-1].options)] * more))


def _joined(replies: Sequence[Message], turns: int) -> list[Message]:
    """Return a reply for each turn of a case, the last with what a model has gone on with."""
    last = tuple(part for reply in replies[turns - 1 :] for part in reply.content)
    return [*replies[: turns - 1], Message("assistant", last)]
