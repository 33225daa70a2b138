"""Conversation -> a stream of events: text as it comes, denoising steps, finished images, the reply.

V vocabulary, D width of the LLM, L and C of a condition.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .diffusion.sampler import SAMPLERS
from .errors import Mgp5Error
from .events import Event, Finished, ImageDone, ImageStep, TextChunk
from .heads import Context, Embeds, Forced, Prefix, Reply, Request, Sample
from .messages import Conversation, Image, Message, Text
from .session import Session

if TYPE_CHECKING:
    from .model import MiniGPT5


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to reply. Text and pictures have seeds of their own: another picture of the same text is one number away.

    Args:
        seed: of the text.
        image_seed: of the first image of the reply; image k takes image_seed + k. None: the text's seed.
        temperature: 0 takes the most likely token; None the model's own.
        top_p: nucleus sampling keeps the smallest set of tokens with this probability, in (0, 1].
        repetition_penalty: divides the logits of tokens already said (1 = off); never applied to vokens.
        max_tokens: of text in one reply; with 0 and image="always" the reply is an image alone.
        max_images: in one reply.
        image: "auto" lets the model decide, "always" adds an image if it made none, "never" forbids them.
        steps, guidance, sampler: of the denoising; guidance None takes the model's own, 1 turns it off.
        height, width: in pixels; None takes the diffusion model's native size.
    """

    seed: int = 0
    image_seed: int | None = None
    temperature: float | None = None
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    max_images: int = 8
    image: Literal["auto", "always", "never"] = "auto"
    steps: int = 20
    guidance: float | None = None
    sampler: str = "dpm++"
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, expected {expected}"
            for name, good, expected in (
                ("temperature", self.temperature is None or self.temperature >= 0, "0 or more"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
                ("max_tokens", self.max_tokens >= 0, "0 or more"),
                ("max_images", self.max_images >= 0, "0 or more"),
                ("image", self.image in ("auto", "always", "never"), "auto, always or never"),
                ("steps", 1 <= self.steps <= 1000, "1 to 1000"),
                ("sampler", self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
                ("guidance", self.guidance is None or self.guidance >= 0, "0 or more"),
            )
            if not good
        ]
        if problems:
            raise Mgp5Error("; ".join(problems), "change these options", usage=True)


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


@torch.inference_mode()
def generate(
    model: MiniGPT5, conversation: Conversation, options: Options | None = None, session: Session | None = None
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
    options = options or Options()
    own = {name: getattr(model.config, name) for name in ("guidance", "temperature") if getattr(options, name) is None}
    options = replace(options, **own)
    session = session or Session(model.backbone)
    head, tokenizer = model.head, model.backbone.tokenizer
    generator = torch.Generator().manual_seed(options.seed)
    started, writing, reason = time.monotonic(), _Writing(), "stop"
    session.read(conversation, reply=len(head.ids))
    while True:
        if session.length + len(head.ids) >= model.backbone.context_length:
            reason = "length"
            break
        token = _next_token(model, session, writing, options, generator)
        if token == head.ids[0]:
            writing.close()
            image = yield from _draw(model, session, writing, options, conversation)
            writing.parts.append(image)
            if options.max_tokens == 0:
                break
        elif token in model.backbone.stop_ids:
            break
        elif writing.num_tokens >= options.max_tokens:
            reason = "length"
            break
        else:
            if chunk := writing.add(tokenizer, token):
                yield TextChunk(chunk)
            session.feed((token,))
    writing.close()
    meta = {"seed": options.seed, "tokens": writing.num_tokens, "prefilled": session.prefilled}
    meta["seconds"] = round(time.monotonic() - started, 3)
    yield Finished(Message("assistant", tuple(writing.parts)), reason, meta)


def _next_token(
    model: MiniGPT5, session: Session, writing: _Writing, options: Options, generator: torch.Generator
) -> int:
    """Choose the next token; an image that must come is triggered where the text would end."""
    head, stops = model.head, model.backbone.stop_ids
    wants = options.image == "always" and writing.num_images == 0 and options.max_images > 0
    full = writing.num_tokens >= options.max_tokens
    if full and wants:
        return head.ids[0]
    logits = model.backbone.logits(session.state)[0, 0].float().cpu()  # (V,)
    banned = list(head.ids[1:])
    if options.image == "never" or writing.num_images >= options.max_images:
        banned.append(head.ids[0])
    banned.append(model.backbone.image_token_id)
    logits[banned] = -torch.inf
    logits = penalise(logits, writing.said, options.repetition_penalty)
    token = pick_token(logits, options.temperature, options.top_p, generator)
    return head.ids[0] if wants and token in stops else token


def penalise(logits: Tensor, said: set[int], penalty: float) -> Tensor:  # (V,)
    """Make tokens that were said less likely (Keskar et al., 2019: divide if positive, multiply if negative)."""
    if penalty != 1.0 and said:
        index = torch.tensor(sorted(said))
        values = logits[index]
        logits[index] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def pick_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Sample from logits (V,) with temperature and nucleus; the generator lives on the CPU."""
    if temperature == 0:
        return int(logits.argmax())
    values, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True, stable=True)
    values[values.cumsum(0) - values >= top_p] = 0  # the first token that reaches top_p stays
    return int(order[torch.multinomial(values, 1, generator=generator)])


def _draw(
    model: MiniGPT5, session: Session, writing: _Writing, options: Options, conversation: Conversation
) -> Generator[Event, None, Image]:
    """Serve the head's requests to the LLM, then denoise: yields ImageStep events and ImageDone."""
    context = Context(session.state)
    request_loop = model.head.condition(context)
    reply, condition = None, None
    while condition is None:
        try:
            request = request_loop.send(reply)
        except StopIteration as done:
            condition = done.value
        else:
            reply = serve(session, request, model, options)
    index = writing.num_images
    seed = (options.seed if options.image_seed is None else options.image_seed) + index
    generators = [torch.Generator().manual_seed(seed)]
    total, canvas = model.head.num_steps(options), None
    for step, canvas in enumerate(model.head.draw(condition, options, generators), start=1):
        yield ImageStep(index, step, total, canvas)
    image = Image(pixels=to_picture(model.head.finish(canvas)[0]), meta=_facts(conversation, writing, options, seed))
    yield ImageDone(index, image)
    return image


def serve(session: Session, request: Request, model: MiniGPT5, options: Options) -> Reply:
    """Do for a head what it asks of the LLM."""
    if isinstance(request, Forced):
        return Reply(session.feed(request.ids), request.ids)
    if isinstance(request, Embeds):
        return Reply(session.feed_embeds(request.embeds))
    if isinstance(request, Sample):
        generator = torch.Generator().manual_seed(options.seed)
        ids, states = [], []
        for step in range(request.count):
            allowed = torch.tensor(model.head.allowed(step))
            logits = model.backbone.logits(session.state)[0, 0].float().cpu()[allowed]
            ids.append(int(allowed[pick_token(logits, options.temperature, options.top_p, generator)]))
            states.append(session.feed((ids[-1],)))
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
    kept = asdict(options)
    for name in ("image_seed", "max_images", "seed"):
        kept.pop(name)
    return {"prompt": prompt, "seed": seed, "text_seed": options.seed} | {
        k: v for k, v in kept.items() if v is not None
    }
