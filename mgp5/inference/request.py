"""One reply while it is generated: what it waits for, and what it does with what it gets.

k tokens of a row, D width of the LLM, E of embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..events import Event, Finished, ImageDone, ImageStep, TextChunk
from ..heads import DrawContext, Embeds, Forced, Prefix, Preview, Request, Response, Sample, Step, rng
from ..messages import Conversation, Image, Message, Text
from ..options import Options
from .session import Key, Session
from .token_sampling import SamplingParams

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


@dataclass(frozen=True)
class Pick:
    """Sample the next token from the state that is known: all tokens are read."""


@dataclass(frozen=True)
class Decode:
    """Read a token that was sampled, and sample the next."""

    token: int


Need = Pick | Decode | Forced | Embeds | Step


class ActiveRequest:
    """A reply: text that is decoded token by token, and images that the head draws between.

    Args:
        model: LLM and head.
        conversation: ends with the user's turn.
        options: how to reply.
        session: its conversation so far; None gets one from the scheduler.

    Attributes:
        need: what it waits for; None once it has ended.
        closed: whether it was given up.
    """

    def __init__(
        self, model: InterleavedModel, conversation: Conversation, options: Options, session: Session | None = None
    ) -> None:
        self.model, self.head, self.conversation = model, model.head, conversation
        self.options, self.session = complete(model, options), session
        self.need: Need | None = None
        self.closed = False
        self.writer = ReplyText()
        self.token: int | None = None  # sampled, not read yet
        self.drawing: Generator[Request, Response, Tensor] | None = None
        self.sample: Sample | None = None  # that the drawing waits for
        self.sampled: list[tuple[int, Tensor]] = []  # tokens of it, and the states (1, 1, D) that predict them
        self.committing = False  # whether the need is the head's commit of an image

    @property
    def row(self) -> int:
        """Row of the decoder, -1 before it has one."""
        return self.session.row if self.session else -1

    @property
    def same_mask(self) -> int:
        """How many tokens may be decoded before the set of allowed ones changes."""
        if self.sample is None:
            return 1 << 30
        at, allowed = len(self.sampled), self.sample.allowed
        changes = (i for i in range(at, self.sample.count) if allowed[i] is not allowed[at])
        return next(changes, at + (1 << 30)) - at

    def start(self, session: Session) -> Iterator[Event]:
        """Read the conversation, and begin with the text."""
        self.session, self.started = session, time.monotonic()
        if self.options.draw != "never" and self.options.max_images > 0:
            self.head.check(self.options.image)
        session.read(self.conversation, reply=self.head.spec.positions)
        options = self.options
        self.params = SamplingParams(
            options.temperature, options.top_p, options.repetition_penalty, rng(options.seed, 0, "text")
        )
        self._set_text_sampling()
        yield from self._continue_text()

    def take(self, token: int, state: Tensor) -> Iterator[Event]:
        """Take a sampled token, of the text or of an image.

        Args:
            state: (1, 1, D) that predicts it.
        """
        self.session.decoder.rows[self.row].sampling.used()
        if self.sample is not None:
            yield from self._take_sampled(token, state)
        else:
            yield from self._take_text(token)

    def run(self) -> tuple[Tensor, list[Key]]:
        """Return embeddings (1, k, E) and keys of what is to be read; a token that was not read yet goes first."""
        if isinstance(self.need, Forced):
            ids = self.need.ids if self.token is None else (self.token, *self.need.ids)
            return self.session.embed(ids)
        embeds, keys = self.need.embeds, [(-1, "embeds")] * self.need.embeds.shape[1]
        if self.token is not None:
            first, own = self.session.embed((self.token,))
            embeds, keys = torch.cat([first, embeds], dim=1), own + keys
        return embeds, keys

    def take_run(self, hidden: Tensor, keys: list[Key]) -> Iterator[Event]:
        """Take the states (1, k, D) after a run was read."""
        self.session.append(hidden, keys)
        ids = self.need.ids if isinstance(self.need, Forced) else ()
        if self.token is not None:
            hidden, self.token = hidden[:, 1:], None
        if self.committing:
            self.committing = False
            yield from self._continue_text()
        elif self.drawing is None:  # the last text token before an image that must come
            yield from self._begin_image()
        else:
            yield from self._draw(Response(hidden=hidden, ids=ids))

    def take_output(self, output: Any) -> Iterator[Event]:
        """Take the output of a Step; an exception ends the reply."""
        if isinstance(output, Exception):
            raise output
        yield from self._draw(Response(output=output))

    def close(self) -> None:
        """Give the reply up; it says nothing more."""
        self.need, self.closed = None, True
        if self.drawing is not None:
            self.drawing.close()

    # --- text ---

    @property
    def _wants_image(self) -> bool:
        options = self.options
        return options.draw == "always" and self.writer.num_images == 0 and options.max_images > 0

    @property
    def _full(self) -> bool:
        return self.writer.num_tokens >= self.options.max_tokens

    def _set_text_sampling(self) -> None:
        """Text holds no special token of the head but the trigger, nor that when there must be no more images."""
        last = self.options.draw == "never" or self.writer.num_images >= self.options.max_images
        banned = [*self.head.ids[0 if last else 1 :], self.model.backbone.image_token_id]
        self.session.decoder.set_sampling(self.row, self.params, banned=banned)

    def _continue_text(self) -> Iterator[Event]:
        """Wait for the next token, unless the context or the text is full."""
        limit = self.model.backbone.context_length - self.head.spec.positions
        if self.session.length + (self.token is not None) >= limit:
            yield from self._finish("length")
        elif self._full and self._wants_image:
            if self.token is None:
                yield from self._begin_image()
            else:
                self.need = Forced(())  # reads the last token, whose state predicts the trigger
        else:
            self.need = Pick() if self.token is None else Decode(self.token)

    def _take_text(self, token: int) -> Iterator[Event]:
        stops = self.model.backbone.stop_ids
        self.token = None  # that before it has been read
        if token == self.head.ids[0] or (self._wants_image and token in stops):
            yield from self._begin_image()  # an image that must come, comes where text would end
        elif token in stops:
            yield from self._finish("stop")
        elif self._full:
            yield from self._finish("length")
        else:
            self.params.generated_ids.add(token)
            if chunk := self.writer.add(self.model.backbone.tokenizer, token):
                yield TextChunk(chunk)
            self.token = token
            yield from self._continue_text()

    def _finish(self, reason: str) -> Iterator[Event]:
        self.writer.close()
        self.need = None
        metadata = {
            "seed": self.options.seed,
            "tokens": self.writer.num_tokens,
            "prefilled": self.session.prefilled,
            "seconds": round(time.monotonic() - self.started, 3),
        }
        yield Finished(Message("assistant", tuple(self.writer.parts)), reason, metadata)

    # --- images ---

    @property
    def _image_seed(self) -> int:
        """Seed of the reply's first image."""
        return self.options.seed if self.options.image_seed is None else self.options.image_seed

    def _begin_image(self) -> Iterator[Event]:
        self.writer.close()
        random = partial(rng, self._image_seed, self.writer.num_images)
        context = DrawContext(state=self.session.state, options=self.options.image, rng=random)
        self.drawing = self.head.draw(context)
        yield from self._draw(None)

    def _draw(self, response: Response | None) -> Iterator[Event]:
        """Go on with the head's drawing until it waits for the LLM or a step."""
        while True:
            try:
                request = self.drawing.send(response)
            except StopIteration as done:
                yield from self._end_image(done.value)
                return
            response = None
            if isinstance(request, Preview):
                yield ImageStep(self.writer.num_images, request.step, request.total, request.latents)
            elif isinstance(request, Prefix):
                response = Response(hidden=self.session.states)
            elif isinstance(request, Sample):
                self.sample, self.sampled = request, []
                params = SamplingParams(request.temperature, request.top_p, 1.0, request.rng)
                self._set_allowed(params)
                self.need = Pick() if self.token is None else Decode(self.token)
                return
            else:
                self.need = request
                return

    def _set_allowed(self, params: SamplingParams) -> None:
        allowed = self.sample.allowed[len(self.sampled)]
        self.session.decoder.set_sampling(self.row, params, allowed=allowed)

    def _take_sampled(self, token: int, state: Tensor) -> Iterator[Event]:
        self.sampled.append((token, state))
        self.token = token
        sample, count = self.sample, len(self.sampled)
        if count < sample.count:
            if sample.allowed[count] is not sample.allowed[count - 1]:
                self._set_allowed(self.session.decoder.rows[self.row].sampling)
            self.need = Decode(token)
            return
        ids, states = zip(*self.sampled, strict=True)
        self.sample = None
        yield from self._draw(Response(hidden=torch.cat(states, dim=1), ids=ids))

    def _end_image(self, pixels: Tensor) -> Iterator[Event]:
        index = self.writer.num_images
        image = to_image(pixels, self._metadata(self._image_seed + index))
        yield ImageDone(index, image)
        self.writer.parts.append(image)
        self.drawing = None
        self._set_text_sampling()
        if self.options.max_tokens == 0:
            yield from self._finish("stop")
            return
        commit = self.head.commit(pixels)
        if commit is None:
            yield from self._continue_text()
        else:
            self.need, self.committing = commit, True

    def _metadata(self, seed: int) -> dict[str, Any]:
        """Return what is needed to make an image again, and what it shows."""
        messages = self.conversation.messages
        prompt = self.writer.text or (messages[-1].text if messages else "")
        kept = {k: v for k, v in self.options.flat().items() if k not in ("image_seed", "max_images", "seed")}
        metadata = {"prompt": prompt, "seed": seed, "text_seed": self.options.seed}
        return metadata | {k: v for k, v in kept.items() if v is not None}


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
