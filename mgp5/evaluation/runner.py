"""Have systems reply to samples, and keep every reply on disk as it comes.

replies/NAME-RANK.jsonl    a line for each sample that a process has finished
pictures/NAME/             images of replies, PNG
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from ..apps.story import WINDOW
from ..data.files import pick
from ..errors import Mgp5Error
from ..messages import Conversation, Image, Message
from ..model import InterleavedModel
from ..prompts import Scene, continue_
from ..views.files import write_png
from .request import EvaluateRequest
from .systems import Entry, System, build
from .tasks import Data, Question, Sample

Reply = Message | str  # or why there is none


class Replied(NamedTuple):
    """A reply that was kept: how many samples of all that this process takes its system has finished, and its row."""

    system: str
    done: int
    total: int
    row: dict[str, Any]  # "key", "reply" or "error", "seconds"


def reply_by(
    entry: Entry,
    request: EvaluateRequest,
    data: Data,
    state: PartialState,
    model: Callable[[], InterleavedModel],
    load: Callable[[str], InterleavedModel],
    tell: Callable[[str], None],
) -> Iterator[Replied]:
    """Let a system reply to this process's share of the samples that have no reply yet; write and yield each reply.

    `model` gives the one that is evaluated, `load` another by its name or folder; `tell` takes a line when the system
    is left out.
    """
    done = read_replies(request.out, entry.name)
    state.wait_for_everyone()  # nobody writes before all have seen what is there
    todo = [sample for sample in data.samples if sample.key not in done and entry.takes(sample)]
    if not todo:
        return
    with state.main_process_first():  # it may export the model into the user's store
        shared = model()
    try:
        system = build(entry, shared, request.options, data.scenes, load)
    except Mgp5Error as error:
        if not entry.implied:
            raise
        tell(f"{entry.name} is left out: {error}")
        return
    groups = ([sample for sample in todo if sample.kind == kind] for kind in dict.fromkeys(one.kind for one in todo))
    batches = [group[i : i + request.batch] for group in groups for i in range(0, len(group), request.batch)]
    batches = batches[state.process_index :: state.num_processes]
    numbers = {sample.key: number for number, sample in enumerate(data.samples)}
    (request.out / "replies").mkdir(exist_ok=True)
    file, count = request.out / "replies" / f"{entry.name}-{state.process_index}.jsonl", 0
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" if file.stat().st_size else "")  # behind a line that a kill has cut off
        for batch in batches:
            start = time.monotonic()
            replies = answer(system, batch, request.options.seed)
            seconds = round((time.monotonic() - start) / len(batch), 3)
            for sample, reply in zip(batch, replies, strict=True):
                row = {"key": sample.key, "seconds": seconds}
                row |= _write_reply(request.out, f"pictures/{entry.name}/{numbers[sample.key]:06d}", reply)
                lines.write(f"{json.dumps(row)}\n")
                count += 1
                yield Replied(entry.name, count, sum(map(len, batches)), row)
            lines.flush()


def _write_reply(out: Path, stem: str, reply: Reply) -> dict[str, Any]:
    """Write the images of a reply to `stem`-NUMBER.png, and return what the row of the reply has of it."""
    if isinstance(reply, str):
        return {"error": reply}
    paths = [f"{stem}-{number}.png" for number in range(len(reply.images))]
    for image, path in zip(reply.images, paths, strict=True):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        write_png(image, out / path)
    # The PNG has the metadata of an image, the row leaves it out.
    content = tuple(replace(part, meta={}) if isinstance(part, Image) else part for part in reply.content)
    (message,) = Conversation((replace(reply, content=content),)).to_chat(iter(paths))
    return {"reply": message}


def answer(system: System, samples: Sequence[Sample], seed: int) -> list[Reply]:
    """Return the replies to samples of one kind; for a sample that cannot be answered, the reason."""
    try:
        return _answer(system, samples, seed)
    except Mgp5Error as error:
        if len(samples) == 1:
            return [str(error)]
    return [answer(system, [sample], seed)[0] for sample in samples]


def _answer(system: System, samples: Sequence[Sample], seed: int) -> list[Reply]:
    """Reply in rounds: a reply of a story is history for the next, and without an image the story ends."""
    loaded = [sample.load() for sample in samples]
    for image in (image for conversation in loaded for image in conversation.messages[-1].images):
        image.load()  # a sample whose true image is broken has failed: nothing could be compared with it
    history: list[list[Scene]] = [[sample.opening] if sample.opening else [] for sample in samples]
    parts: list[tuple] = [() for _ in samples]
    for number in range(max(sample.rounds for sample in samples)):
        active = [i for i, s in enumerate(samples) if number < s.rounds and (not s.opening or len(history[i]) > number)]
        questions = []
        for i in active:
            shown = continue_(history[i][-WINDOW:]) if history[i] else Conversation(loaded[i].messages[:-1])
            own_seed = pick(2**31, seed, samples[i].key, number)
            questions.append(Question(samples[i], shown, loaded[i].messages[-1], own_seed))
        for i, reply in zip(active, system(questions) if questions else [], strict=True):
            parts[i] += reply.content
            if samples[i].opening and reply.images:
                history[i].append((reply.text, reply.images[0]))
    return [Message("assistant", content) for content in parts]


def read_replies(out: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of all processes by the keys of their samples. A line that a kill has cut off does not count."""
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted((out / "replies").glob(f"{name}-[0-9]*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                continue
    return rows
