"""One reply while it is generated: what it waits for, and what it does with what it gets.

Letters: k tokens of a row, D LLM width, E embedding width, H and W pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import Mgp5Error
from ..events import Event, Finished, ImageDone, ImageStep, Note, TextChunk
from ..heads import DrawContext, Drawn, Embeds, Forced, Prefix, Preview, Request, Response, Sample, Step, rng
from ..heads.batch import from_pixels
from ..messages import Conversation, Image, Message, Text
from ..options import Options
from ..prompts import role_markers, with_system
from .session import Key, Session, full
from .token_sampling import SamplingParams

if TYPE_CHECKING:
    from ..model import InterleavedModel


@dataclass
class ReplyText:
    """The reply so far: its parts, and the tokens of the text part that is being written."""

    parts: list[Text | Image] = field(default_factory=list)  # finished ones, in order
    ids: list[int] = field(default_factory=list)  # tokens of the part that is being written
    shown: str = ""  # its text, as far as it was given out
    held: str = ""  # the rest of it, which may begin one of the stops
    stops: tuple[str, ...] = ()  # texts that end the reply, and are no part of it
    stopped: bool = False  # by one of them
    num_tokens: int = 0  # of text in the whole reply

    @property
    def num_images(self) -> int:
        """Return the number of finished images."""
        return sum(isinstance(part, Image) for part in self.parts)

    @property
    def text(self) -> str:
        """Return all text so far, joined by blanks."""
        return " ".join([p.text for p in self.parts if isinstance(p, Text)] + ([self.shown] if self.shown else []))

    def add(self, tokenizer: Any, token: int) -> str:
        """Add one token; return the text that it completes ("" inside a character, or what may begin a stop)."""
        self.ids.append(token)
        self.num_tokens += 1
        text = tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        if text.endswith("\ufffd"):
            return ""
        found = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        self.stopped = bool(found)
        longest = 0 if found else max((_overlap(text, stop) for stop in self.stops), default=0)
        end = min(found, default=len(text) - longest)
        new, self.shown, self.held = text[len(self.shown) : end], text[:end], text[end:] if longest else ""
        return new

    def close(self) -> str:
        """End the text part; return the rest of its text, which was held back."""
        held, text = self.held, (self.shown + self.held).strip()
        if text:
            self.parts.append(Text(text))
        self.ids, self.shown, self.held = [], "", ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class NextToken:
    """Sample the next token; the one that was sampled before it, if there is one, is read first."""


class ActiveRequest:
    """A reply: text that is decoded token by token, and images that the head draws between.

    The scheduler serves what it `need`s, calls the method that takes the result, and delivers the `events` of that.
    """

    def __init__(
        self,
        model: InterleavedModel,
        conversation: Conversation,
        options: Options,
        session: Session | None = None,
        previews: int = 0,  # of each image, see `ImageStep.preview`
        left_out: int | None = None,  # turns that are left out, as more are where it does not fit; None: an error
    ) -> None:
        self.model, self.head = model, model.head
        self.conversation, self.session = with_system(conversation, model.config.system), session
        self.options, self.previews, self.left_out = complete(model, options), previews, left_out
        self.need: NextToken | Forced | Embeds | Step | None = None  # None before the start and after the end
        self.events: list[Event | Exception] = []  # not delivered yet
        self.writer = ReplyText()
        self.token: int | None = None  # sampled, not read yet
        self.drawing: Generator[Request, Response, Tensor | Drawn] | None = None
        self.sample: Sample | None = None  # that the drawing waits for
        self.sampled: list[tuple[int, Tensor]] = []  # tokens of it, and the states (1, 1, D) that predict them
        self.committing = False  # whether the need is the head's commit of an image
        self.slots: list[Key] = []  # keys of the last image's positions

    @property
    def row(self) -> int:
        """Return the row of the decoder, -1 before there is one."""
        return self.session.row if self.session else -1

    @property
    def same_mask(self) -> float:
        """Return how many tokens may be decoded before the set of allowed ones changes."""
        if self.sample is None:
            return math.inf
        start, allowed = len(self.sampled), self.sample.allowed
        changes = (i - start for i in range(start, self.sample.count) if allowed[i] is not allowed[start])
        return next(changes, math.inf)

    def start(self, session: Session) -> None:
        """Read the conversation, and begin with the text."""
        self.session, self.started = session, time.monotonic()
        options = self.options
        if options.draw != "never" and options.max_images > 0:
            self.head.check(options.image)
        shown = self.conversation.recent(self.model.config.history)
        if self.left_out is not None:
            shown, hidden = session.recent(self.conversation, options.max_tokens)
            self.events += [Note(full(hidden + self.left_out))] if hidden + self.left_out else []
        session.read(shown, reply=self.head.spec.positions)
        self.writer.stops = (*role_markers(self.model.backbone), *options.stop)
        random = rng(options.seed, 0, "text")
        self.params = SamplingParams(options.temperature, options.top_p, options.repetition_penalty, random)
        self._set_text_sampling()
        self._continue_text()

    def take(self, token: int, state: Tensor) -> None:
        """Take a sampled token, of the text or of an image, and the state (1, 1, D) that predicts it."""
        self.session.decoder.rows[self.row].sampling.used()
        if self.sample is None:
            self._take_text(token)
        else:
            self._take_sampled(token, state)

    def run(self) -> tuple[Tensor, list[Key]]:
        """Return embeddings (1, k, E) and keys of what is to be read; a token that was not read yet goes first."""
        if isinstance(self.need, Forced):
            return self.session.embed(self.need.ids if self.token is None else (self.token, *self.need.ids))
        embeds, keys = self.need.embeds, self.slots if self.committing else [(-1, "embeds")] * self.need.embeds.shape[1]
        if self.token is not None:
            first, own = self.session.embed((self.token,))
            embeds, keys = torch.cat([first, embeds], dim=1), own + keys
        return embeds, keys

    def take_run(self, hidden: Tensor, keys: list[Key], output: Any = None) -> None:
        """Take the states (1, k, D) after a run was read, and what `Forced.then` made of them."""
        self.session.append(hidden, keys)
        ids = self.need.ids if isinstance(self.need, Forced) else ()
        if self.token is not None:
            hidden, self.token = hidden[:, 1:], None
        if self.committing:
            self.committing = False
            self._continue_text()
        elif self.drawing is None:  # the last text token before an image that must come
            self._begin_image()
        else:
            self._draw(Response(hidden=hidden, ids=ids, output=output))

    def take_output(self, output: Any) -> None:
        """Take the output of a Step; an exception ends the reply."""
        if isinstance(output, Exception):
            raise output
        self._draw(Response(output=output))

    def close(self) -> None:
        """Give the reply up."""
        self.need = None
        if self.drawing is not None:
            self.drawing.close()

    # --- text ---

    @property
    def _wants_image(self) -> bool:
        return self.options.draw == "always" and self.writer.num_images == 0 and self.options.max_images > 0

    @property
    def _full(self) -> bool:
        return self.writer.num_tokens >= self.options.max_tokens

    def _set_text_sampling(self) -> None:
        """Ban all special tokens of the head but the trigger, and that too when there must be no more images."""
        last = self.options.draw == "never" or self.writer.num_images >= self.options.max_images
        banned = [*self.head.ids[0 if last else 1 :], self.model.backbone.image_token_id]
        self.session.decoder.set_sampling(self.row, self.params, banned=banned)

    def _continue_text(self) -> None:
        """Wait for the next token, unless the context or the text is full."""
        limit = self.model.backbone.context_length - self.head.spec.positions
        if self.session.length + (self.token is not None) >= limit:
            self._finish("length")
        elif not (self._full and self._wants_image):
            self.need = NextToken()
        elif self.token is None:
            self._begin_image()
        else:
            self.need = Forced(())  # reads the last token, whose state predicts the trigger

    def _take_text(self, token: int) -> None:
        stops = self.model.backbone.stop_ids
        self.token = None  # the one before has been read
        if token == self.head.ids[0] or (self._wants_image and token in stops):
            self._begin_image()  # an image that must come, comes where text would end
        elif token in stops:
            self._finish("stop")
        elif self._full:
            self._finish("length")
        else:
            self.params.generated_ids.add(token)
            if chunk := self.writer.add(self.model.backbone.tokenizer, token):
                self.events.append(TextChunk(chunk))
            if not self.writer.stopped:
                self.token = token
                self._continue_text()
            elif self._wants_image:
                self._begin_image()
            else:
                self._finish("stop")

    def _end_text(self) -> None:
        if held := self.writer.close():
            self.events.append(TextChunk(held))

    def _finish(self, reason: str) -> None:
        self._end_text()
        self.need = None
        metadata = {
            "seed": self.options.seed,
            "tokens": self.writer.num_tokens,
            "prefilled": self.session.prefilled,
            "prefilled_images": self.session.prefilled_images,
            "seconds": round(time.monotonic() - self.started, 3),
        }
        self.events.append(Finished(Message("assistant", tuple(self.writer.parts)), reason, metadata))

    # --- images ---

    @property
    def _image_seed(self) -> int:
        """Return the seed of the reply's first image."""
        return self.options.seed if self.options.image_seed is None else self.options.image_seed

    def _begin_image(self) -> None:
        self._end_text()
        session, random = self.session, partial(rng, self._image_seed, self.writer.num_images)
        context = DrawContext(session.state, self.options.image, random, self.previews, tuple(session.pyramids))
        self.drawing = self.head.draw(context)
        self._draw(None)

    def _draw(self, response: Response | None) -> None:
        """Go on with the head's drawing until it waits for the LLM or a step."""
        while True:
            try:
                request = self.drawing.send(response)
            except StopIteration as done:
                self._end_image(done.value)
                return
            response = None
            if isinstance(request, Preview):
                preview = None if request.pixels is None else to_image(request.pixels)
                self.events.append(ImageStep(self.writer.num_images, request.step, request.total, preview))
            elif isinstance(request, Prefix):
                response = Response(hidden=self.session.states)
            elif isinstance(request, Sample):
                self.sample, self.sampled, self.need = request, [], NextToken()
                self._set_allowed(
                    SamplingParams(request.temperature, request.top_p, 1.0, request.rng, top_k=request.top_k)
                )
                return
            else:
                self.need = request
                return

    def _set_allowed(self, params: SamplingParams) -> None:
        self.session.decoder.set_sampling(self.row, params, allowed=self.sample.allowed[len(self.sampled)])

    def _take_sampled(self, token: int, state: Tensor) -> None:
        self.sampled.append((token, state))
        self.token = token
        allowed, count = self.sample.allowed, len(self.sampled)
        if count == self.sample.count:
            ids, states = zip(*self.sampled, strict=True)
            self.sample = None
            self._draw(Response(hidden=torch.cat(states, dim=1), ids=ids))
        elif allowed[count] is not allowed[count - 1]:
            self._set_allowed(self.session.decoder.rows[self.row].sampling)

    def _end_image(self, drawn: Tensor | Drawn) -> None:
        index, drawn = self.writer.num_images, drawn if isinstance(drawn, Drawn) else Drawn(drawn)
        image = to_image(drawn.pixels, self._metadata(self._image_seed + index))
        if drawn.context is not None:
            self.slots = self.session.add(image, drawn.context)
        self.events.append(ImageDone(index, image))
        self.writer.parts.append(image)
        self.drawing = None
        self._set_text_sampling()
        if self.options.max_tokens == 0:
            self._finish("stop")
        elif (commit := self.head.commit(drawn)) is None:
            self._continue_text()
        else:
            self.need, self.committing = commit, True

    def _metadata(self, seed: int) -> dict[str, Any]:
        """Return what is needed to make an image again, and what it shows."""
        messages = self.conversation.messages
        prompt = self.writer.text or (messages[-1].words if messages else "")
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


class NotFinite(Mgp5Error):
    """A picture came out as NaN: a fault of the weights or of the machine, not of what was asked."""


def to_image(pixels: Tensor, metadata: dict[str, Any] | None = None) -> Image:
    """Return pixels (3, H, W) in [-1, 1] as an image. Raises NotFinite where one is NaN or infinite."""
    if not pixels.isfinite().all():
        hint = "try other --steps, --guidance or --backend eager; cards that compute in float16 may need --device cpu"
        raise NotFinite("a picture came out as numbers that are not finite (NaN)", hint)
    return Image(pixels=from_pixels(pixels), meta=metadata or {})
