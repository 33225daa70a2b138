"""Messages that clients send, in the shapes of OpenAI's APIs, and the conversation that they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from ..errors import Mgp5Error
from ..messages import Conversation, Image, Message, Part, Role, Text
from .images import read_image_url
from .request import Limits
from .schema import ANY, Body, Count, Words, check_bound, refused

OF_MESSAGES = {"name": ANY, "annotations": ANY, "tool_calls": ([],)}
OF_PARTS = dict.fromkeys(
    ("cache_control", "prompt_cache_breakpoint", "detail", "format", "annotations", "logprobs", "index"), ANY
)


class TextPart(Body):
    """A piece of text."""

    neutral = OF_PARTS
    type: Literal["text", "input_text", "output_text"]
    text: Words


class ImageUrl(Body):
    """Where an image is: a data URL, or an http or https address where the server fetches them."""

    neutral = OF_PARTS
    url: str


class ImagePart(Body):
    """An image."""

    neutral = OF_PARTS
    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | str


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class PlacedImage(ImagePart):
    """An image of a reply that is sent back: it stands behind so many characters of the text, or at its end."""

    offset: Count | None = None


class ChatMessage(Body):
    """A message of a conversation; one without content is passed over."""

    neutral = OF_MESSAGES
    role: Literal["system", "developer", "user", "assistant"]
    content: Words | list[ContentPart | Words] | None = None  # strings: LangChain joins a stream to such a list
    images: list[PlacedImage] | None = Field(None, description="of a reply, as it came")

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Text and images in order."""
        if not isinstance(self.content, str):
            given = [_text_part(part) if isinstance(part, str) else part for part in self.content or ()]
            return [*given, *(self.images or ())]
        parts: list[TextPart | ImagePart] = []
        text, start = self.content, 0
        for image in sorted(self.images or (), key=lambda one: len(text) if one.offset is None else one.offset):
            end = len(text) if image.offset is None else image.offset
            parts += [_text_part(text[start:end].strip()), image]
            start = end
        parts.append(_text_part(text[start:].strip() if parts else text))
        return [part for part in parts if isinstance(part, ImagePart) or part.text or len(parts) == 1]


def _text_part(text: str) -> TextPart:
    return TextPart.model_construct(type="text", text=text)


def conversation(messages: Sequence[ChatMessage], limits: Limits, before: Sequence[Message] = ()) -> Conversation:
    """Return the conversation of a body; images are decoded, which takes a while. Raises Refused.

    Args:
        before: messages that go before those of the body.
    """
    last = messages[-1]
    if last.role != "user":
        raise refused(f"the last message is of role {last.role}, expected user", "messages")
    if not last.parts:
        raise refused("the last message has no content, expected text or an image", "messages")
    images = sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
    check_size(len(messages) + len(before), images + sum(len(message.images) for message in before), limits)
    try:
        turns = [("system" if m.role == "developer" else m.role, _read(m.parts, limits)) for m in messages]
        return Conversation(tuple(join_turns([*((m.role, m.content) for m in before), *turns])))
    except Mgp5Error as error:
        raise refused(str(error), "messages") from None


def join_turns(turns: Iterable[tuple[Role, Sequence[Part]]]) -> list[Message]:
    """Return the messages of turns, neighbours of one role as one; turns without parts are left out."""
    joined: list[Message] = []
    for role, parts in turns:
        if parts:
            before = joined.pop().content if joined and joined[-1].role == role else ()
            joined.append(Message(role, (*before, *parts)))
    return joined


def _read(parts: list[TextPart | ImagePart], limits: Limits) -> list[Part]:
    return [Text(part.text) if isinstance(part, TextPart) else _image(part, limits) for part in parts]


def _image(part: ImagePart, limits: Limits) -> Image:
    return read_image_url(part.image_url if isinstance(part.image_url, str) else part.image_url.url, limits)


def check_size(messages: int, images: int, limits: Limits) -> None:
    """Raise Refused for a conversation with more messages or images than the limits allow."""
    check_bound("messages", messages, limits.messages)
    check_bound("images in messages", images, limits.context_images)
