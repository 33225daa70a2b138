"""Conversations -> streams of events: text as it comes, denoising steps, finished images, the reply."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import Mgp5Error
from ..events import Event, Finished, ImageDone, TextChunk
from ..heads import Context, Embeds, Forced, Prefix, Reply, Request, Sample
from ..messages import Conversation, Image, Message, Text
from ..options import DiffusionOptions, Options
from .decoder import Decoder
from .scheduler import Need, Paint, Script, Speak, serve
from .session import Session
from .token_sampling import SamplingParams

if TYPE_CHECKING:
    from ..model import InterleavedModel


@dataclass
class _Writing:
    """The reply so far: its parts, and the tokens of the text part being written."""

    parts: list[Text | Image] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    said: set[int] = field(default_factory=set)  # all text tokens of the reply
    shown: str = ""
    num_tokens: int = 0

    @property
    def num_images(self) -> int:
        return sum(isinstance(part, Image) for part in self.parts)

    @property
    def text(self) -> str:
        return " ".join([p.text for p in self.parts if isinstance(p, Text)] + ([self.shown] if self.shown else []))

    def add(self, tokenizer: Any, token: int) -> str:
        """Take one token; returns the text that it completes ("" inside a character of several bytes)."""
        self.ids.append(token)
        self.said.add(token)
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
    model: InterleavedModel, conversation: Conversation, options: Options | None = None, session: Session | None = None
) -> Iterator[Event]:
    """The assistant's next turn as events; the last one is Finished and carries the message.

    Args:
        model: from `mgp5.load`.
        conversation: ends with the user's turn.
        options: see Options.
        session: pass the same one again on the next turn, and only what is new is read.

    Raises:
        Mgp5Error: the conversation does not fit the model's context, or a picture cannot be read.
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
    """The next turn of several conversations at once: (index of the conversation, event).

    Tokens are decoded together, and pictures are drawn together as soon as no text can be written without them. Each
    conversation gets what `generate` gives it alone: the same tokens, pictures but for rounding.

    Args:
        options: for all, or one for each.
        sessions: one for each, on rows of one decoder; None makes them.
        images_at_once: the most pictures in one denoising.

    Raises:
        Mgp5Error: as `generate`, for any of them; then all end.
    """
    each = options if isinstance(options, Sequence) else [options or Options()] * len(conversations)
    if sessions is None:
        decoder = Decoder(model.backbone, len(conversations))
        sessions = [Session(model.backbone, decoder=decoder, row=row) for row in range(len(conversations))]
    if len({id(session.decoder) for session in sessions}) > 1:
        raise Mgp5Error("sessions on several decoders", "make them on rows of one: Session(..., decoder=..., row=...)")
    scripts = [
        reply(model, session, conversation, own)
        for conversation, own, session in zip(conversations, each, sessions, strict=True)
    ]
    return serve(model, scripts, sessions, images_at_once)


def complete(model: InterleavedModel, options: Options) -> Options:
    """Fill in the model's own temperature and guidance where the options leave them open."""
    if options.temperature is None:
        options = replace(options, temperature=model.config.temperature)
    if isinstance(options.image, DiffusionOptions) and options.image.guidance is None:
        options = replace(options, image=replace(options.image, guidance=model.config.guidance))
    return options


def reply(model: InterleavedModel, session: Session, conversation: Conversation, options: Options) -> Script:
    """One reply, from reading the conversation to Finished, for a loop of `batch` to run."""
    options = complete(model, options)
    head, stops, limit = model.head, model.backbone.stop_ids, model.backbone.context_length - len(model.head.ids)
    started, writing, reason, token = time.monotonic(), _Writing(), "stop", None
    session.read(conversation, reply=len(head.ids))
    generator = torch.Generator().manual_seed(options.seed)
    voice = SamplingParams(options.temperature, options.top_p, options.repetition_penalty, generator, writing.said)
    session.decoder.speak(session.row, voice, _banned(model, writing, options))
    while True:
        if session.length + (token is not None) >= limit:
            reason = "length"
            break
        wants = options.draw == "always" and writing.num_images == 0 and options.max_images > 0
        full = writing.num_tokens >= options.max_tokens
        if full and wants:
            if token is not None:
                yield Forced((token,))
            token = head.ids[0]
        else:
            token = yield Speak(token)
        if token == head.ids[0] or (wants and token in stops):  # an image that must come, comes where text would end
            writing.close()
            image = yield from _draw(model, session, writing, options, conversation)
            writing.parts.append(image)
            session.decoder.speak(session.row, voice, _banned(model, writing, options))
            token = None
            if options.max_tokens == 0:
                break
        elif token in stops:
            break
        elif full:
            reason = "length"
            break
        elif chunk := writing.add(model.backbone.tokenizer, token):
            yield TextChunk(chunk)
    writing.close()
    meta = {"seed": options.seed, "tokens": writing.num_tokens, "prefilled": session.prefilled}
    meta["seconds"] = round(time.monotonic() - started, 3)
    yield Finished(Message("assistant", tuple(writing.parts)), reason, meta)


def _banned(model: InterleavedModel, writing: _Writing, options: Options) -> list[int]:
    """What text must not hold: vokens but the trigger, that too where there must be no more images, image slots."""
    last = options.draw == "never" or writing.num_images >= options.max_images
    return [*model.head.ids[0 if last else 1 :], model.backbone.image_token_id]


def _draw(
    model: InterleavedModel, session: Session, writing: _Writing, options: Options, conversation: Conversation
) -> Generator[Event | Need, Any, Image]:
    """Serve the head's requests to the LLM, have the picture drawn, and say ImageDone."""
    request_loop = model.head.condition(Context(session.state))
    reply, condition = None, None
    while condition is None:
        try:
            request = request_loop.send(reply)
        except StopIteration as done:
            condition = done.value
        else:
            reply = yield from _serve(model, session, request, options)
    index = writing.num_images
    seed = (options.seed if options.image_seed is None else options.image_seed) + index
    pixels = yield Paint(condition, options, index, seed)
    image = Image(pixels=to_picture(pixels), meta=_facts(conversation, writing, options, seed))
    yield ImageDone(index, image)
    return image


def _serve(
    model: InterleavedModel, session: Session, request: Request, options: Options
) -> Generator[Forced | Embeds, Tensor, Reply]:
    """Do for a head what it asks of the LLM."""
    if isinstance(request, Forced):
        return Reply((yield request), request.ids)
    if isinstance(request, Embeds):
        return Reply((yield request))
    if isinstance(request, Sample):
        voice = SamplingParams(options.temperature, options.top_p, 1.0, torch.Generator().manual_seed(options.seed))
        ids, states = [], []
        for step in range(request.count):
            allowed = model.head.allowed(step)
            logits = model.backbone.logits(session.state)[0, :, list(allowed)].float()  # (1, number allowed)
            ids.append(allowed[voice.choose(logits)])
            states.append((yield Forced((ids[-1],))))
        return Reply(torch.cat(states, dim=1), tuple(ids))
    if isinstance(request, Prefix):
        return Reply(session.states)
    raise TypeError(f"a head asked for {type(request).__name__}")


def to_picture(pixels: Tensor) -> Any:
    """Pixels (3, H, W) in [-1, 1] -> PIL image."""
    from PIL import Image as pil

    return pil.fromarray(pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def _facts(conversation: Conversation, writing: _Writing, options: Options, seed: int) -> dict[str, Any]:
    """What is needed to make the picture again, and what it shows."""
    prompt = writing.text or (conversation.messages[-1].text if conversation.messages else "")
    kept = options.flat()
    for name in ("image_seed", "max_images", "seed"):
        kept.pop(name)
    return {"prompt": prompt, "seed": seed, "text_seed": options.seed} | {
        k: v for k, v in kept.items() if v is not None
    }
