"""Conversations -> streams of events: text as it comes, previews, finished images, the reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import Mgp5Error
from ..events import Event
from ..messages import Conversation, Image, Text
from ..options import Options
from .session import Session

if TYPE_CHECKING:
    from ..model import InterleavedModel


@dataclass
class ReplyText:
    """The reply so far: its parts, and the tokens of the text part that is being written.

    Attributes:
        parts: finished ones, in order.
        ids: tokens of the part that is being written.
        shown: its text, as far as it was given out.
        num_tokens: of text in the whole reply.
    """

    parts: list[Text | Image] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    shown: str = ""
    num_tokens: int = 0

    @property
    def num_images(self) -> int:
        """Number of finished images."""
        return sum(isinstance(part, Image) for part in self.parts)

    @property
    def text(self) -> str:
        """All text so far, joined by blanks."""
        return " ".join([p.text for p in self.parts if isinstance(p, Text)] + ([self.shown] if self.shown else []))

    def add(self, tokenizer: Any, token: int) -> str:
        """Add one token; return the text that it completes ("" inside a character of several bytes)."""
        self.ids.append(token)
        self.num_tokens += 1
        text = tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        if text.endswith("\ufffd"):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new

    def close(self) -> None:
        """End the text part."""
        if self.shown.strip():
            self.parts.append(Text(self.shown.strip()))
        self.ids, self.shown = [], ""


def generate(
    model: InterleavedModel,
    conversation: Conversation,
    options: Options | None = None,
    session: Session | None = None,
) -> Iterator[Event]:
    """Generate the assistant's next turn as events; the last one is Finished and carries the message.

    Args:
        model: from `mgp5.load`.
        conversation: ends with the user's turn.
        options: how to reply.
        session: pass the same one again on the next turn, and only what is new is read.

    Raises:
        Mgp5Error: the conversation does not fit the model's context, or an image cannot be read.
    """
    for _, event in generate_batch(model, [conversation], options, session and [session]):
        yield event


def generate_batch(
    model: InterleavedModel,
    conversations: Sequence[Conversation],
    options: Options | Sequence[Options] | None = None,
    sessions: Sequence[Session] | None = None,
    images_at_once: int = 8,
) -> Iterator[tuple[int, Event]]:
    """Generate the next turn of several conversations together: (index of the conversation, event).

    Tokens are decoded together, and images are drawn together as soon as no text can be written without them. Each
    conversation gets what `generate` gives it alone: the same tokens, images but for rounding.

    Args:
        options: for all, or one for each.
        sessions: one for each, on rows of one decoder; None makes them.
        images_at_once: the most images in one call of the head.

    Raises:
        Mgp5Error: as `generate`, for any of them; then all end.
    """
    from .scheduler import Scheduler

    each = options if isinstance(options, Sequence) else [options or Options()] * len(conversations)
    if sessions and len({id(session.decoder) for session in sessions}) > 1:
        raise Mgp5Error("sessions on several decoders", "make them on rows of one: Session(..., decoder=..., row=...)")
    decoder = sessions[0].decoder if sessions else None
    scheduler = Scheduler(model, len(conversations), decoder=decoder, images_at_once=images_at_once)
    requests = [
        scheduler.submit(conversation, one, session)
        for conversation, one, session in zip(conversations, each, sessions or [None] * len(conversations), strict=True)
    ]
    index = {id(request): number for number, request in enumerate(requests)}
    while scheduler.busy:
        for request, event in scheduler.step():
            if isinstance(event, Exception):
                raise event
            yield index[id(request)], event


def complete(model: InterleavedModel, options: Options) -> Options:
    """Return options with the model's own defaults where they leave something open."""
    if options.temperature is None:
        options = replace(options, temperature=model.config.temperature)
    open_fields = [f.name for f in fields(options.image) if getattr(options.image, f.name) is None]
    own = {name: getattr(model.config, name) for name in open_fields if hasattr(model.config, name)}
    return replace(options, image=replace(options.image, **own)) if own else options


def to_image(pixels: Tensor, metadata: dict[str, Any] | None = None) -> Image:
    """Return pixels (3, H, W) in [-1, 1] as an image."""
    return Image(pixels=to_picture(pixels), meta=metadata or {})


def to_picture(pixels: Tensor) -> Any:
    """Return pixels (3, H, W) in [-1, 1] as a PIL image."""
    from PIL import Image as pil

    return pil.fromarray(pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
