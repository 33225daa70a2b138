"""Many conversations and stories from one file, several at a time; killed at any moment, it goes on where it was.

Each line of the file is an object. A conversation, which gets its next reply, is as in `data.jsonl`; a story is what is
given of its scenes, and how many the model adds:

    {"messages": [{"role": "user", "content": "a red fox"}]}
    {"story": [{"path": "a.png", "text": "A day."}, {"path": "b.png"}, {"text": "It snows."}], "scenes": 2}

Both take "title", and "options" of generation. Paths are relative to the file.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Mgp5Error
from ..events import Finished
from ..files import digest, lock, read_json, replacing, write_json, write_text
from ..messages import Conversation, Message, Text
from ..prompts import CHAT_SYSTEM
from ..views.files import StoryFolder
from ..views.html import write_html
from .batch_lines import EXPECTED, given_in, read_line
from .recorder import StoryScene, story_conversation
from .story import SceneInput, finished_scene, scene_request

if TYPE_CHECKING:
    from ..model import InterleavedModel
    from ..options import Options
    from ..prompts import Context

SEEDS = 10_000  # from a line to the next; scenes of its story count up by 100, pictures by one
SETTINGS, RESULTS, FAILURES = "batch.json", "results.jsonl", "failures.jsonl"

Ask = tuple[Conversation, "Options"]
Script = Generator[Ask, Message, Conversation]  # asks, is sent replies, returns the whole
Tell = Callable[[dict[str, Any]], None]  # takes the row of a line that is done


@dataclass(eq=False)
class Job:
    """A line at work."""

    line: int  # from 1
    key: str  # hash of the line
    title: str
    options: Options
    script: Script
    asked: Ask | None = None


Take = Callable[["Context", int], list[Job]]  # given the model's `narrate_from`, a share of what is to be answered
Answered = Iterator[tuple[list[Job], list[Message | Mgp5Error]]]
Crew = Callable[[Take], Answered]  # answers all that it can take


class Results:
    """The folder of a batch: one folder for each line that is done, and a row in results.jsonl.

    A row is written last and whole, so that what has none is not done. Held by one process at a time.

    Attributes:
        done: hash of each line that is done, by its number.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Begin a batch, or go on with it. Raises Mgp5Error if it has other settings, or is at work elsewhere."""
        self.out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
            others = {path.name for path in out.iterdir()} - {RESULTS, f".{SETTINGS}.part"}
            if others and SETTINGS not in others:
                raise Mgp5Error(f"--out {out} is not empty and holds no batch", "choose another --out", usage=True)
        except OSError as error:
            raise Mgp5Error(f"--out {out} cannot be written ({error.strerror})", "choose another --out") from None
        self._file = lock(out / RESULTS)
        settings = json.loads(json.dumps(settings))
        old = earlier(out) or settings
        if changed := [name for name in settings | old if old.get(name) != settings.get(name)]:
            found = f"--out {out} is a batch with another {', '.join(changed)}"
            raise Mgp5Error(found, "go on with the same, or choose another --out", usage=True)
        write_json(out / SETTINGS, settings)
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._file.truncate(len(whole))  # a row that a kill has cut off
        self.done = {row["line"]: row["key"] for row in map(json.loads, whole.splitlines())}

    def add(self, job: Job, conversation: Conversation, model: str, engine: Mapping[str, str]) -> dict[str, Any]:
        """Write what a line has become; returns its row."""
        name = f"{job.line:06d}"
        shutil.rmtree(self.out / name, ignore_errors=True)  # of a run that was killed before the row was written
        options = job.options
        facts = {key: value for key, value in options.flat().items() if value is not None and key != "seed"}
        with replacing(self.out / name) as part:
            folder = StoryFolder.create(part)
            folder.save(conversation, model=model, seed=options.seed, options=facts | engine, title=job.title)
            write_html(*folder.load(), part / "story.html")
        said = " ".join(m.text for m in conversation.messages if m.role == "assistant" and m.text)
        row = {"line": job.line, "key": job.key, "folder": name, "seed": options.seed, "text": said}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        return row

    def fail(self, failures: Mapping[int, str]) -> None:
        """Write which lines failed, and why."""
        rows = [json.dumps({"line": line, "error": failures[line]}) + "\n" for line in sorted(failures)]
        write_text(self.out / FAILURES, "".join(rows))

    def close(self) -> None:
        """Let others work here."""
        self._file.close()


def earlier(out: Path) -> dict[str, Any] | None:
    """The settings of a batch that was begun in a folder. Raises Mgp5Error when they cannot be read."""
    file = out / SETTINGS
    if not file.is_file():
        return None
    settings = read_json(file)
    if not isinstance(settings.get("options"), dict):
        raise Mgp5Error(f"{file} is not of a batch", "choose another --out", usage=True)
    return settings


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The lines of a file, and how they are worked on.

    Attributes:
        lines: as bytes; blank ones are passed over.
        root: folder that paths are relative to, and may not leave.
        model: its name, for the record, and
        engine: other flags that pictures depend on.
        options: of all lines; the seed of line n is SEEDS * (n - 1) higher, unless the line has its own.
        scenes: that a story gets whose line does not say how many.
        at_once: lines at work together.
    """

    lines: Sequence[bytes]
    root: Path
    model: str
    options: Options
    engine: Mapping[str, str]
    scenes: int = 1
    at_once: int = 8

    def run(self, results: Results, crew: Crew, tell: Tell) -> dict[int, str]:
        """Work on all lines that are not done, and tell the row of each; returns why lines failed, by their numbers.

        Args:
            crew: who answers: one model here (`alone`), or many workers (`mgp5.serving.cluster.spread`).

        Raises Mgp5Error when a line that is done has changed.
        """
        todo = self._todo(results)
        failures: dict[int, str] = {}
        ready: list[Job] = []

        def take(context: Context, workers: int) -> list[Job]:
            most = min(self.at_once, ceil((len(todo) + len(ready)) / workers))
            while todo and len(ready) < most:
                ready.extend(self._guarded(failures, todo[0][0], self._begin, *todo.popleft(), context, results, tell))
            taken, ready[:] = ready[:most], ready[most:]
            return taken

        try:
            for jobs, replies in crew(take) if todo else ():
                for job, reply in zip(jobs, replies, strict=True):
                    ready += self._guarded(failures, job.line, self._go_on, job, reply, results, tell)
        finally:
            results.fail(failures)
        return failures

    def _todo(self, results: Results) -> deque[tuple[int, str]]:
        """Number and hash of each line that is not done."""
        todo: deque[tuple[int, str]] = deque()
        for number, line in enumerate(self.lines, 1):
            key = digest(line.strip(), size=8)
            if results.done.get(number, key) != key:
                raise Mgp5Error(f"line {number} was another when it was done", "choose another --out", usage=True)
            if line.strip() and number not in results.done:
                todo.append((number, key))
        return todo

    def _guarded(self, failures: dict[int, str], line: int, step: Callable[..., Job | None], *args: Any) -> list[Job]:
        """The job if there is more to do for it; why its line cannot be done goes to `failures`."""
        try:
            job = step(*args)
        except Mgp5Error as error:
            failures[line] = str(error)
            return []
        return [] if job is None else [job]

    def _begin(self, number: int, key: str, context: Context, results: Results, tell: Tell) -> Job | None:
        try:
            row = read_line(self.lines[number - 1])
            options = replace(self.options, seed=self.options.seed + SEEDS * (number - 1))
            options = options.updated(row.get("options", {}))
            if "story" in row:
                given = [given_in(part, self.root) for part in row["story"]]
                script = _story(given, row.get("scenes", self.scenes), options, context)
            else:
                script = _reply(Conversation.from_chat(row["messages"], self.root), options)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # of values of the wrong types
            raise Mgp5Error(f"not understood ({error})", EXPECTED) from None
        return self._go_on(Job(number, key, row.get("title", ""), options, script), None, results, tell)

    def _go_on(self, job: Job, reply: Message | Mgp5Error | None, results: Results, tell: Tell) -> Job | None:
        if isinstance(reply, Mgp5Error):
            raise reply
        try:
            job.asked = job.script.send(reply)
        except StopIteration as done:
            tell(results.add(job, done.value, self.model, self.engine))
            return None
        return job


def alone(load: Callable[[], InterleavedModel]) -> Crew:
    """One model in this process."""

    def work(take: Take) -> Answered:
        model = load()
        while jobs := take(model.config.narrate_from, 1):
            yield jobs, answer(model, [job.asked for job in jobs])

    return work


def answer(model: InterleavedModel, asks: Sequence[Ask]) -> list[Message | Mgp5Error]:
    """Replies to all; of one that cannot be answered, why."""
    from ..inference.reply import generate_batch

    replies: dict[int, Message] = {}
    try:
        for index, event in generate_batch(model, [ask for ask, _ in asks], [options for _, options in asks]):
            if isinstance(event, Finished):
                replies[index] = event.message
    except Mgp5Error as error:  # one of them ends all: each for itself
        return [error] if len(asks) == 1 else [answer(model, [ask])[0] for ask in asks]
    return [replies[index] for index in range(len(asks))]


def _reply(conversation: Conversation, options: Options) -> Script:
    if not conversation.messages or conversation.messages[-1].role != "user":
        raise Mgp5Error("the last message is not the user's", "there is nothing to reply to")
    for image in conversation.images:
        image.load()
    if conversation.messages[0].role != "system":  # as a chat begins
        conversation = Conversation((Message("system", (Text(CHAT_SYSTEM),)), *conversation.messages))
    reply = yield conversation, options
    return conversation.add(reply.role, *reply.content)


def _story(inputs: Sequence[SceneInput], count: int, options: Options, narrate_from: Context) -> Script:
    scenes: list[StoryScene] = []
    for number in range(len(inputs) + count):
        part = inputs[number] if number < len(inputs) else None
        asked = scene_request(scenes, part, options, narrate_from)
        scenes.append(finished_scene(part, (yield asked) if asked else part.message))
    return story_conversation(scenes)


def read_lines(file: Path) -> tuple[list[bytes], Path]:
    """The lines of a file, - for stdin, and the folder that their paths are relative to. Raises Mgp5Error."""
    if str(file) == "-":
        return sys.stdin.buffer.read().splitlines(), Path()
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), file.parent
    except OSError as error:
        raise Mgp5Error(f"--batch {file} cannot be read ({error.strerror})", "check the path", usage=True) from None
