"""Hold a conversation with a model: messages and replies in turn, with undo and retry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Mgp5Error, counted
from ..events import Event
from ..messages import Conversation, Image, Message, Text
from ..options import ModelRequest, Options
from ..prompts import with_system
from ..views.files import STORY, StoryFolder, keep_images
from ..views.html import write_html
from .inputs import read_image
from .open_model import Tell, open_model, silent
from .recorder import Recorder
from .story import recorded_options, with_seeds
from .world import remarks

if TYPE_CHECKING:
    from ..inference.session import Session
    from ..model import InterleavedModel


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation to begin, or to go on with. Raises Mgp5Error if both folders are given."""

    images: tuple[Path, ...] = ()  # files of images for the first message
    out: Path | None = None  # new folder for the conversation
    resume: Path | None = None  # folder of an earlier conversation, which goes on there
    model: ModelRequest = field(default_factory=ModelRequest)
    options: Options = field(default_factory=Options)  # of every reply; seeds count up by `story.SEEDS`

    def __post_init__(self) -> None:
        if self.out and self.resume:
            hint = "--resume goes on in its own folder"
            raise Mgp5Error("--out and --resume were both given", hint, usage=True)


@dataclass
class Chat:
    """A conversation with an open model."""

    model: InterleavedModel
    options: Options
    conversation: Conversation = field(default_factory=Conversation)
    pending: list[Image] = field(default_factory=list)  # images that go with the next message
    folder: StoryFolder | None = None  # where it is saved after every reply
    record: dict[str, Any] = field(default_factory=dict)  # what story.json keeps beside the conversation
    tell: Tell = silent  # takes a line for the user
    _session: Session | None = None
    _hidden: int = 0  # turns that the model is not shown any more
    _number: int = 0  # replies since the seed was set; each takes seeds of its own

    def __post_init__(self) -> None:
        self.conversation = with_system(self.conversation, self.model.config.system)
        self._number = sum(message.role == "user" for message in self.conversation.messages)

    def attach(self, path: Path) -> None:
        """Read an image for the next message. Raises Mgp5Error when it cannot be read."""
        self.pending.append(read_image(path))

    def say(self, text: str) -> Iterator[Event]:
        """Send a message with the pending images; yields the events of the reply.
        A message that cannot be answered is taken back with an Mgp5Error; an interrupted reply is kept as it is."""
        content = (*self.pending, *([Text(text)] if text else []))
        if not content:
            raise Mgp5Error("the message is empty", "write something, or attach an image with /image FILE")
        yield from self._reply(Conversation((*self.conversation.messages, Message("user", content))), [])

    def retry(self) -> Iterator[Event]:
        """Replace the last reply by another one; it stays when there cannot be another (Mgp5Error)."""
        yield from self._reply(Conversation(self.conversation.messages[: self._last_user() + 1]), self.pending)

    def undo(self) -> str:
        """Remove the last message of the user and its reply; return its text. Raises Mgp5Error when there is none."""
        messages, last = self.conversation.messages, self._last_user()
        self.conversation = Conversation(messages[:last])
        self.save()
        return messages[last].text

    def seed(self, seed: int) -> None:
        """Set the seed of the next reply; those of the replies after it count up."""
        self.options = replace(self.options, seed=seed, image_seed=None)
        self._number = 0

    def save(self) -> None:
        """Write images, story.json and the page into the folder, if there is one and ever was something to save."""
        begun = any(message.role != "system" for message in self.conversation.messages)
        if self.folder and (begun or (self.folder.path / STORY).exists()):
            self.folder.save(self.conversation, seed=self.options.seed, **self.record)
            write_html(*self.folder.load(), self.folder.path / "story.html", kind="chat")

    def close(self) -> None:
        """Let others write into the folder."""
        if self.folder:
            self.folder.close()

    def move(self, folder: StoryFolder) -> None:
        """Save the conversation in another folder from now on."""
        self.close()
        self.folder = folder
        self.save()

    def _last_user(self) -> int:
        users = [index for index, message in enumerate(self.conversation.messages) if message.role == "user"]
        if not users:
            raise Mgp5Error("the conversation has no message of yours, expected one", "write a message first")
        return users[-1]

    def _reply(self, asked: Conversation, pending: list[Image]) -> Iterator[Event]:
        """Reply to `asked`, which becomes the conversation, with `pending` left for the next message."""
        from ..inference.reply import generate
        from ..inference.session import Session, full

        before = self.conversation, self.pending
        self.conversation, self.pending = asked, pending
        self._session = self._session or Session(self.model)
        options = with_seeds(self.options, self._number)
        self._number += 1
        recorder = Recorder()
        try:
            yield from remarks(self.model.config.world, asked.messages[-1].text, asked.messages[-1].images)
            shown, hidden = self._session.recent(asked, options.max_tokens)
            if hidden > self._hidden:
                self.tell(full(hidden))
            self._hidden = hidden
            events = generate(self.model, shown, options, self._session)
            for event in keep_images(events, self.folder) if self.folder else events:
                recorder(event)
                yield event
        except Exception:  # whatever a head or a driver raises costs this turn
            (self.conversation, self.pending), recorder, self._session = before, Recorder(), None
            raise
        except KeyboardInterrupt:
            self._session = None  # it may have been cut inside a forward, with cache and tokens at odds
            raise
        finally:
            if recorder.parts:
                self.conversation = Conversation((*self.conversation.messages, recorder.message))
            self.save()


def open_chat(request: ChatRequest, tell: Tell = silent) -> Chat:
    """Open the model and the folder of a chat; `tell` is that of `open_model`. Raises Mgp5Error if an image or
    conversation cannot be read, a folder is taken, or the model cannot be opened; an empty folder is removed then."""
    from ..hub import resolve

    pending = [read_image(path) for path in request.images]
    resolve(request.model.model)  # a wrong name is reported before a folder is made
    record = {"model": request.model.model, "options": recorded_options(request.model, request.options)}
    earlier, folder = {}, None
    if request.resume:
        folder = StoryFolder.open(request.resume, write=True)
    elif request.out:
        folder = StoryFolder.create(request.out)
    try:
        if request.resume:
            earlier["conversation"], metadata = folder.load()
            record["title"] = metadata["title"]
        model = open_model(request.model, tell)
        if model.config.history is not None:
            seen = counted(max(1, model.config.history), "message")
            tell(f"the model sees the last {seen} of a conversation, as it was trained")
    except BaseException:
        if folder:
            folder.close()
        raise
    return Chat(model, request.options, pending=pending, folder=folder, record=record, tell=tell, **earlier)
