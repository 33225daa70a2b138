"""Conversations of text and images in order, as plain values (no torch here)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .errors import Mgp5Error
from .files import digest
from .images import check_size, read_image, upright

if TYPE_CHECKING:
    import PIL.Image

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str
    words: str | None = field(
        default=None, compare=False
    )  # of the user's in it, where a task's template is around them


@dataclass(frozen=True)
class Image:
    """An image: a file that is read when needed, the bytes of a file (of a member of a tar shard, say), or pixels."""

    path: Path | None = None
    pixels: PIL.Image.Image | None = field(default=None, compare=False, repr=False)  # in any mode
    data: bytes | None = field(default=None, repr=False)
    caption: str = ""  # for the caption loss of the pretraining stage
    meta: dict[str, Any] = field(default_factory=dict, compare=False)  # of a generated image: seed, prompt, options

    def load(self, least: int | None = None) -> PIL.Image.Image:
        """Return the image in RGB, upright; a large JPEG may be halved while its sides have at least `least` pixels.
        Raises Mgp5Error when it cannot be read, or is too large or too thin."""
        if self.pixels is not None:
            check_size(self.pixels.size, "an image in memory")
            return upright(self.pixels)
        if self.data is not None:
            return read_image(BytesIO(self.data), "an image in memory", least=least)
        if self.path is None:
            raise Mgp5Error("an image has neither a file nor pixels", "give it a path")
        return read_image(self.path, least=least)

    def digest(self) -> str:
        """Return a hash of the pixels where it has any, else of the file's bytes, or raise Mgp5Error."""
        if self.pixels is not None:
            contents = self.pixels.tobytes() + repr((self.pixels.mode, self.pixels.size)).encode()
        else:
            try:
                contents = self.data if self.data is not None or self.path is None else self.path.read_bytes()
            except OSError as error:
                raise Mgp5Error(f"{self.path} cannot be read ({error.strerror})", "check the file") from None
        return digest(contents or b"")


Part = Text | Image


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: its role, and its parts in order."""

    role: Role
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All text of the message, joined by blanks."""
        return " ".join(part.text for part in self.content if isinstance(part, Text) and part.text)

    @property
    def words(self) -> str:
        """What the user said: all text, or the words in the template of a task that it ends with."""
        last = next((part.words for part in reversed(self.content) if isinstance(part, Text)), None)
        return self.text if last is None else last

    @property
    def images(self) -> tuple[Image, ...]:
        """All images of the message, in order."""
        return tuple(part for part in self.content if isinstance(part, Image))


@dataclass(frozen=True)
class Conversation:
    """Messages in order. In a training sample the last message is the target, and all before it are the context."""

    messages: tuple[Message, ...] = ()
    bare: bool = False  # whether prompts are the texts alone, without the chat template

    def add(self, role: Role, *parts: Part | str) -> Conversation:
        """Return a conversation with one more message; strings become Text."""
        content = tuple(Text(part) if isinstance(part, str) else part for part in parts)
        return replace(self, messages=(*self.messages, Message(role, content)))

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of all messages, in order."""
        return tuple(image for message in self.messages for image in message.images)

    @property
    def head(self) -> tuple[Message, ...]:
        """The system's message, if there is one."""
        return self.messages[:1] if self.messages and self.messages[0].role == "system" else ()

    @property
    def turns(self) -> int:
        """The number of messages of the user."""
        return sum(message.role == "user" for message in self.messages)

    def tails(self) -> Iterator[Conversation]:
        """Yield the conversation, then with more and more of its oldest turns left out; system and last user stay."""
        yield self
        for start, message in enumerate(self.messages):
            if message.role == "user" and start > len(self.head):
                yield Conversation((*self.head, *self.messages[start:]))

    def recent(self, history: int | None) -> Conversation:
        """Return the conversation with its last `history` messages before the reply, and the system's; None: all."""
        head = self.head
        rest = self.messages[len(head) :]
        return self if history is None else Conversation((*head, *rest[max(0, len(rest) - max(1, history)) :]))

    def to_chat(self, paths: Iterator[str] | None = None) -> list[dict[str, Any]]:
        """Return the messages in the Hugging Face chat format, with these `paths` of images instead of their own."""
        chat = []
        for message in self.messages:
            content: list[dict[str, Any]] = []
            for part in message.content:
                if isinstance(part, Text):
                    content.append({"type": "text", "text": part.text})
                else:
                    path = next(paths) if paths is not None else str(part.path)
                    content.append({"type": "image", "path": path} | ({"meta": part.meta} if part.meta else {}))
            chat.append({"role": message.role, "content": content})
        return chat

    @classmethod
    def from_chat(cls, chat: Iterable[dict[str, Any]], folder: Path) -> Conversation:
        """Return the conversation of messages in the Hugging Face chat format; no image is opened.
        Image paths are relative to `folder`. Raises Mgp5Error for a role, part or path that is not understood."""
        messages = []
        for index, raw in enumerate(chat):
            if not isinstance(raw, dict) or raw.get("role") not in ("system", "user", "assistant"):
                raise Mgp5Error(f"message {index} has no role of system, user or assistant", "repair the file")
            content = raw.get("content", [])
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(parts, list | tuple):
                raise Mgp5Error(f"message {index} has the content {content!r:.40}", "expected a text or a list")
            messages.append(Message(raw["role"], tuple(_part(part, index, folder) for part in parts)))
        return cls(tuple(messages))


def _part(raw: Any, index: int, folder: Path) -> Part:
    """Return a part of message `index`. Raises Mgp5Error."""
    values = raw if isinstance(raw, dict) else {}
    if values.get("type") == "text" and isinstance(values.get("text"), str):
        return Text(values["text"])
    path, caption, meta = values.get("path"), values.get("caption", ""), values.get("meta", {})
    if values.get("type") == "image" and isinstance(path, str) and isinstance(caption, str) and isinstance(meta, dict):
        return Image(path=inside(folder, path), caption=caption, meta=meta)
    hint = 'expected {"type": "text", "text": ...} or {"type": "image", "path": ...}'
    raise Mgp5Error(f"message {index} has the part {raw!r:.60}", hint)


class Skipped(NamedTuple):
    """A sample, or a part of one, that was left out: the kind of problem, and where and why."""

    kind: str
    where: str


def inside(folder: Path, name: str) -> Path:
    """Return `folder/name`. Raises Mgp5Error when the name is absolute or leaves the folder, also through a link."""
    pure = PurePosixPath(name.replace("\\", "/"))
    path = folder / pure
    if "\0" in name or pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise Mgp5Error(f"the path {name!r} leaves its folder {folder}", "use a path inside the folder")
    return path
