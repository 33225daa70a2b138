"""Generate replies: conversations in, streams of events out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import Mgp5Error
from ..events import Event
from ..messages import Conversation
from ..model import InterleavedModel
from ..options import Options
from .scheduler import Scheduler
from .session import Session


def generate(
    model: InterleavedModel,
    conversation: Conversation,
    options: Options | None = None,
    session: Session | None = None,
) -> Iterator[Event]:
    """Generate the assistant's next turn as events; the last one is Finished and carries the message.

    The conversation ends with the user's turn; one without a system message begins with the model's own. Pass the same
    session again on the next turn, and only what is new is read. Raises Mgp5Error if the conversation does not fit the
    model's context, or an image cannot be read.
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

    Tokens are decoded together, and images are drawn together, at most `images_at_once` in one call of the head, as
    soon as no text can be written without them. Each conversation gets what `generate` gives it alone: the same tokens,
    images but for rounding. Options are for all or one for each; sessions are on rows of one decoder. Raises Mgp5Error
    as `generate` for any of them; then all end.
    """
    if not isinstance(options, Sequence):
        options = [options or Options(image=model.head.spec.image_options())] * len(conversations)
    if sessions and len({id(session.decoder) for session in sessions}) > 1:
        raise Mgp5Error("sessions on several decoders", "make them on rows of one: Session(..., decoder=..., row=...)")
    decoder = sessions[0].decoder if sessions else None
    scheduler = Scheduler(model, len(conversations), decoder=decoder, images_at_once=images_at_once)
    sessions = sessions or [None] * len(conversations)
    requests = [scheduler.submit(*each) for each in zip(conversations, options, sessions, strict=True)]
    while scheduler.busy:
        for request, event in scheduler.step():
            if isinstance(event, Exception):
                raise event
            yield requests.index(request), event
