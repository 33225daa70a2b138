"""A conversation with the model: turns, undo, retry, and what the typed commands do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Mgp5Error
from ..events import Event, Finished, ImageDone, TextChunk
from ..messages import Conversation, Image, Message, Part, Text
from ..prompts import CHAT_SYSTEM

if TYPE_CHECKING:
    from ..inference.session import Session
    from ..model import InterleavedModel
    from ..options import Options

HELP = """\
/image FILE   show a picture with your next message
/undo         take back your last message and its reply
/retry        another reply to your last message
/seed N       seed of the next reply; those after it count up
/save DIR     put the conversation, its pictures and a page into a folder
/help         this list
/quit         end (so does Ctrl-D); Ctrl-C stops a reply and keeps what it has said
"""


@dataclass
class Chat:
    """A conversation and the LLM's memory of it.

    Attributes:
        conversation: all turns so far, with the system text first.
        pending: pictures that go with the next message.
    """

    model: InterleavedModel
    options: Options
    conversation: Conversation = field(default_factory=lambda: Conversation().add("system", CHAT_SYSTEM))
    pending: list[Image] = field(default_factory=list)
    _session: Session | None = None
    _number: int = 0  # replies since the seed was set; each takes seeds of its own

    def __post_init__(self) -> None:
        self._number = sum(message.role == "user" for message in self.conversation.messages)

    def show(self, path: Path) -> None:
        """Queue a picture for the next message."""
        self.pending.append(read_picture(path))

    def say(self, text: str) -> Iterator[Event]:
        """Send a message with the queued pictures; yields the reply's events.

        If the message cannot be answered (it does not fit the context, say) it is taken back and nothing is lost; a
        reply that is interrupted is kept as far as it came.
        """
        content: list[Part] = [*self.pending, *([Text(text)] if text else [])]
        if not content:
            raise Mgp5Error("the message is empty", "write something, or show a picture with /image FILE")
        before, pending = self.conversation, self.pending
        self.conversation, self.pending = Conversation((*before.messages, Message("user", tuple(content)))), []
        try:
            yield from self._reply()
        except Mgp5Error:
            self.conversation, self.pending = before, pending
            raise

    def retry(self) -> Iterator[Event]:
        """Another reply to the last message; the old one stays if there cannot be another."""
        self._last_user()
        before = self.conversation
        if before.messages[-1].role == "assistant":
            self.conversation = Conversation(before.messages[:-1])
        try:
            yield from self._reply()
        except Mgp5Error:
            self.conversation = before
            raise

    def undo(self) -> str:
        """Take back the last message and its reply; returns its text."""
        last = self._last_user()
        text = self.conversation.messages[last].text
        self.conversation = Conversation(self.conversation.messages[:last])
        return text

    def seed(self, seed: int) -> None:
        """Seed of the next reply and, counting up, of those after it."""
        self.options = replace(self.options, seed=seed, image_seed=None)
        self._number = 0

    def _last_user(self) -> int:
        roles = [message.role for message in self.conversation.messages]
        if "user" not in roles:
            raise Mgp5Error("nothing was said yet", "write a message first")
        return len(roles) - 1 - roles[::-1].index("user")

    def _reply(self) -> Iterator[Event]:
        from ..inference.reply import generate
        from ..inference.session import Session

        self._session = self._session or Session(self.model.backbone)
        shift = 100 * self._number
        self._number += 1
        image_seed = None if self.options.image_seed is None else self.options.image_seed + shift
        options = replace(self.options, seed=self.options.seed + shift, image_seed=image_seed)
        parts: list[Part] = []
        try:
            for event in generate(self.model, self.conversation, options, self._session):
                if isinstance(event, TextChunk):
                    _append(parts, event.text)
                elif isinstance(event, ImageDone):
                    parts.append(event.image)
                elif isinstance(event, Finished):
                    parts = list(event.message.content)
                yield event
        except KeyboardInterrupt:
            self._session = None  # it may have been cut inside a forward, with cache and tokens at odds
            raise
        finally:
            if parts:
                self.conversation = self.conversation.add("assistant", *parts)


def read_picture(path: Path) -> Image:
    """A picture for a message; it is opened now, so that a broken one is told now."""
    image = Image(path=path)
    image.load()
    return image


def _append(parts: list[Part], text: str) -> None:
    if parts and isinstance(parts[-1], Text):
        parts[-1] = Text(parts[-1].text + text)
    else:
        parts.append(Text(text.lstrip()))
