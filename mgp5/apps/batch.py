"""Answer the lines of a file, several at a time. Killed at any moment, the same request goes on where it was.

Each line is a JSON object. A conversation, which gets its next reply, is in the Hugging Face chat format; a story is
what the user gives of its scenes, and how many scenes the model adds:

    {"messages": [{"role": "user", "content": "a red fox"}]}
    {"story": [{"path": "a.png", "text": "A day."}, {"path": "b.png"}, {"text": "It snows."}], "scenes": 2}

Both take "title", and "options" of generation. Paths are relative to the file and may not leave its folder.
The folder of a batch holds:

    batch.json        what results depend on: a batch goes on with the same only
    000001/           of line 1: story.json, images, story.html
    results.jsonl     a row for each line that is done, written last: a line without one is done again
    failures.jsonl    why lines failed in the last call; the next one tries them again
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..data.files import parse
from ..errors import Mgp5Error, raise_all, told
from ..events import Finished
from ..messages import Conversation, Image, Message, inside
from ..options import ModelRequest, Options, unexpected
from ..prompts import Context, with_system
from ..views.files import StoryFolder
from ..views.html import write_html
from .inputs import SceneInput, read_image
from .open_model import Tell, narrate_from, open_model, silent, system_text, world
from .recorder import StoryScene, story_conversation
from .story import Ask, finished_scene, recorded_options, scene_request
from .world import remarks

if TYPE_CHECKING:
    from ..model import InterleavedModel

SEEDS = 10_000  # between the seeds of two lines; scenes of a story count up by 100, images by one
SETTINGS, RESULTS, FAILURES = "batch.json", "results.jsonl", "failures.jsonl"
EXPECTED = 'expected {"messages": [...]} or {"story": [...]}, with scenes, title, options'
TYPES = {"messages": list, "story": list, "scenes": int, "title": str, "options": dict}

Reply = Message | Mgp5Error  # of what cannot be answered, why
Answer = Callable[[Sequence[Ask]], Sequence[Reply]]  # one reply for each ask, in order


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """Lines to answer. Raises Mgp5Error with all that is wrong."""

    file: Path  # one JSON object per line; - for stdin
    out: Path  # folder of the batch, new or to go on with
    scenes: int = 1  # that a story gets whose line does not say
    at_once: int = 8  # lines that each model works on together
    model: ModelRequest = field(default_factory=ModelRequest)
    options: Options = field(default_factory=Options)  # the seed of line n is SEEDS * (n - 1) higher
    keep_seed: bool = False  # a batch that goes on takes the seed with which it was begun

    def __post_init__(self) -> None:
        rules = {"scenes": (self.scenes >= 0, "0 or more"), "at_once": (self.at_once >= 1, "1 or more")}
        raise_all(unexpected(self, **rules))


class Batch:
    """A batch at work in its folder, which is claimed until `close`.

    Attributes:
        total: number of lines that are not blank.
        done: hash of each line that is done, by its number.
        failures: why lines failed, by their numbers.
        notes: what the model has never met of a line, by its number; see `world.remarks`.
    """

    def __init__(self, request: BatchRequest) -> None:
        """Read the lines and claim the folder. Raises Mgp5Error if that fails, or the folder holds something else."""
        from ..hub import resolve

        resolve(request.model.model)  # a wrong name is reported before a folder is made
        self.failures: dict[int, str] = {}
        self.notes: dict[int, str] = {}
        self._world = world(request.model)
        self._lines, self._root = _read_lines(request.file)
        self.total, self._claim = sum(map(bool, self._lines)), files.Claim(request.out)
        try:
            self.request = _begin(request)
            self._file = (request.out / RESULTS).open("a+b")
            self.done = self._read_done()
        except BaseException:
            self._claim.close()
            raise

    def close(self) -> None:
        """Let others write into the folder."""
        self._file.close()
        self._claim.close()

    def run(self, answer: Answer, workers: int = 1) -> Iterator[dict[str, Any]]:
        """Work on all lines that are not done, in rounds: each line at work asks, all are answered, replies recorded.

        Yields the row of each line that is done, as in results.jsonl.

        Args:
            answer: `local_answer(request)`, or one that shares the asks of a round among workers.
            workers: how many models `answer` has.
        """
        todo, at_work = self._todo(), list[Line]()
        try:
            while at_work := [*at_work, *islice(todo, self.request.at_once * workers - len(at_work))]:
                asking = [line for line in at_work if line.ask]
                replies = answer([line.ask for line in asking]) if asking else ()
                for line, reply in zip(asking, replies, strict=True):
                    if isinstance(reply, Mgp5Error):
                        self.failures[line.number] = str(reply)
                        at_work.remove(line)
                    else:
                        line.go_on(reply)
                yield from (self._write(line) for line in at_work if not line.ask)
                at_work = [line for line in at_work if line.ask]
        finally:
            rows = [json.dumps({"line": n, "error": self.failures[n]}) + "\n" for n in sorted(self.failures)]
            files.write_text(self.request.out / FAILURES, "".join(rows))

    def _read_done(self) -> dict[int, str]:
        """Return the hash of each line that is done. Raises Mgp5Error if such a line has changed."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._file.truncate(len(whole))  # a kill has cut off the last row
        done = {row["line"]: row["key"] for row in map(json.loads, whole.splitlines())}
        for number, line in enumerate(self._lines, 1):
            if done.get(number, _key(line)) != _key(line):
                raise Mgp5Error(f"line {number} has changed since it was done", "choose another --out", usage=True)
        return done

    def _todo(self) -> Iterator[Line]:
        """Yield the lines that are not done; note why one cannot be read."""
        for number, text in enumerate(self._lines, 1):
            if text and number not in self.done:
                try:
                    line = self._read(number, text)
                except Exception as error:  # whatever it is, it costs this line
                    self.failures[number] = told(error)
                else:
                    yield line

    def _read(self, number: int, text: bytes) -> Line:
        """Read one line and the images that it names. Raises Mgp5Error if anything is wrong with them."""
        row, request = _checked(text), self.request
        options = replace(request.options, seed=request.options.seed + SEEDS * (number - 1))
        title, options = row.get("title", ""), options.updated(row.get("options", {}))
        if "story" in row:
            inputs = [_scene_input(part, self._root) for part in row["story"]]
            self._remark(number, " ".join(part.text for part in inputs), [part.image for part in inputs if part.image])
            inputs += [SceneInput()] * row.get("scenes", request.scenes)
            return Line(number, title, options, _story(inputs, options, narrate_from(request.model)))
        conversation = Conversation.from_chat(row["messages"], self._root)
        if conversation.messages[-1].role != "user":
            raise Mgp5Error("the last message is not the user's", "end it with a message to reply to")
        for image in conversation.images:
            image.load()
        last = conversation.messages[-1]
        self._remark(number, last.text, last.images)
        conversation = with_system(conversation, system_text(request.model))
        return Line(number, title, options, _chat(conversation, options))

    def _remark(self, number: int, text: str, images: Sequence[Image]) -> None:
        for note in remarks(self._world, text, images):
            self.notes[number] = note.text

    def _write(self, line: Line) -> dict[str, Any]:
        """Write what a line has become, then its row; return the row."""
        name, model, seed = f"{line.number:06d}", self.request.model, line.options.seed
        with contextlib.suppress(FileNotFoundError):
            files.remove_folder(self.request.out / name)  # of a run that was killed before the row was written
        with files.replacing(self.request.out / name) as part, contextlib.closing(StoryFolder.create(part)) as folder:
            options = recorded_options(model, line.options)
            folder.save(line.conversation, model=model.model, seed=seed, options=options, title=line.title)
            write_html(*folder.load(), part / "story.html")
        text = " ".join(m.text for m in line.conversation.messages if m.role == "assistant" and m.text)
        key = _key(self._lines[line.number - 1])
        row = {"line": line.number, "key": key, "folder": name, "seed": seed, "text": text}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        return row


def _begin(request: BatchRequest) -> BatchRequest:
    """Write the settings of a batch; return the request with the seed that the batch in the folder was begun with."""
    out = request.out
    others = {path.name for path in out.glob("*")} - {RESULTS, f".{SETTINGS}.part", ".lock"}
    if others and SETTINGS not in others:
        raise Mgp5Error(f"--out {out} is not empty and holds no batch", "choose another --out", usage=True)
    old = files.read_json(out / SETTINGS, "choose another --out") if others else {}
    if request.keep_seed and isinstance(old.get("options"), dict):
        request = replace(request, options=request.options.updated({"seed": old["options"].get("seed")}))
    settings = {"scenes": request.scenes, "options": json.loads(json.dumps(request.options.flat()))}
    settings |= {"model": request.model.model, "quantize": request.model.quantize}
    if changed := [name for name in settings | old if others and old.get(name) != settings.get(name)]:
        found = f"--out {out} is a batch with another {', '.join(changed)}"
        raise Mgp5Error(found, "go on with the same, or choose another --out", usage=True)
    files.write_json(out / SETTINGS, settings)
    return request


def local_answer(request: BatchRequest, tell: Tell = silent) -> Answer:
    """Return an `Answer` by one model in this process, which is opened when the first line needs it."""
    model = cache(lambda: open_model(request.model, tell, request.at_once))
    return lambda asks: answer(model(), asks)


def answer(model: InterleavedModel, asks: Sequence[Ask]) -> list[Reply]:
    """Reply to all asks in one batch; where one of them fails, to each by itself."""
    from ..inference.reply import generate_batch

    replies: dict[int, Message] = {}
    try:
        for index, event in generate_batch(model, [ask for ask, _ in asks], [options for _, options in asks]):
            if isinstance(event, Finished):
                replies[index] = event.message
    except Exception as error:  # whatever a head or a driver raises costs this line
        return [Mgp5Error(told(error))] if len(asks) == 1 else [answer(model, [ask])[0] for ask in asks]
    return [replies[index] for index in range(len(asks))]


def _read_lines(file: Path) -> tuple[list[bytes], Path]:
    """Return the lines of a file, - for stdin, and the folder that their paths are relative to."""
    try:
        contents, root = (sys.stdin.buffer.read(), Path()) if str(file) == "-" else (file.read_bytes(), file.parent)
    except OSError as error:
        raise Mgp5Error(f"--batch {file} cannot be read ({error.strerror})", "check the path", usage=True) from None
    return [line.strip() for line in contents.removeprefix(b"\xef\xbb\xbf").splitlines()], root


def _key(line: bytes) -> str:
    return files.digest(line, 8)


Work = Generator[Ask, Message, Conversation]  # asks, is sent replies, and returns what the line has become


class Line:
    """A line at work; `ask` is what the model is asked next, None when the line is done and is a `conversation`."""

    def __init__(self, number: int, title: str, options: Options, work: Work) -> None:
        self.number, self.title, self.options, self._work = number, title, options, work
        self.go_on(None)

    def go_on(self, reply: Message | None) -> None:
        """Take the reply to what was asked."""
        try:
            self.ask: Ask | None = self._work.send(reply)
        except StopIteration as done:
            self.ask, self.conversation = None, done.value


def _chat(conversation: Conversation, options: Options) -> Work:
    """Let a conversation get one reply."""
    reply = yield conversation, options
    return Conversation((*conversation.messages, reply))


def _story(inputs: Sequence[SceneInput], options: Options, narrate_from: Context) -> Work:
    """Tell a story scene by scene, as `story.tell_story` does."""
    scenes: list[StoryScene] = []
    for part in inputs:
        asked = scene_request(scenes, part, options, narrate_from)
        scenes.append(finished_scene(part, (yield asked) if asked else None))
    return story_conversation(scenes)


def _checked(line: bytes) -> dict[str, Any]:
    """Return the object of a line, with fields of the right types."""
    try:
        row = parse(line)
    except (ValueError, RecursionError) as error:
        raise Mgp5Error(f"not JSON ({error})", EXPECTED) from None
    wrong = not isinstance(row, dict) or any(type(value) is not TYPES.get(name) for name, value in row.items())
    if wrong or ("messages" in row) == ("story" in row) or row.get("scenes", 0) < 0:
        raise Mgp5Error("not a conversation or a story", EXPECTED)
    if [] in (row.get("messages"), row.get("story")):
        raise Mgp5Error("an empty conversation or story", EXPECTED)
    return row


def _scene_input(part: Any, root: Path) -> SceneInput:
    """Return what the user gives of a scene, its image read."""
    fields = part if isinstance(part, dict) else {}
    texts = all(name in ("path", "text") and isinstance(value, str) for name, value in fields.items())
    if not texts or not any(map(str.strip, fields.values())):
        raise Mgp5Error(f"a scene is {json.dumps(part)[:80]}", 'expected {"path": ..., "text": ...}, one or both')
    image = read_image(inside(root, fields["path"])) if "path" in fields else None
    return SceneInput(image, fields.get("text", "").strip())
