"""Bodies of requests as OpenAI's API has them, with fields of ours; what they mean as a conversation and options."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import Mgp5Error
from ..messages import Conversation, Message, Text
from ..options import Options, reply_options
from .engine import Refused
from .pictures import read_picture

if TYPE_CHECKING:
    from ..model import InterleavedModel
    from .limits import Limits


def _unbroken(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a character (a lone surrogate)") from None
    return text


def _whole(given: Any) -> Any:
    return int(given) if isinstance(given, float) and given.is_integer() else given  # JSON has no other 2 than 2.0


SIZE = "([1-9][0-9]{0,4})x([1-9][0-9]{0,4})"
Words = Annotated[str, AfterValidator(_unbroken)]
WHOLE = BeforeValidator(_whole)
Seed = Annotated[int, Field(ge=0, lt=2**53), WHOLE]  # above, readers of JSON that know floats alone would change it
Count = Annotated[int, Field(ge=0, le=2**31), WHOLE]


class Body(BaseModel):
    """Types are held strictly, and what is not known is refused: nothing that was asked for is passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A piece of text."""

    type: Literal["text"]
    text: Words


class ImageUrl(Body):
    """Where a picture is: a data URL, or an http address where the server fetches them."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Body):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Body):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None


class StreamOptions(Body):
    """Of a streamed reply."""

    include_usage: bool = False


class Drawing(Body):
    """How images are drawn; all but `size` and `user` are ours."""

    model: str
    user: str | None = None
    size: str | None = Field(
        None, description='"WIDTHxHEIGHT" in pixels, or "auto"', json_schema_extra={"pattern": f"^({SIZE}|auto)$"}
    )
    seed: Seed | None = None
    steps: Annotated[int, Field(ge=1, le=1000), WHOLE] | None = Field(None, description="20, or what is allowed")
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    sampler: str = "dpm++"
    timeout: Annotated[float, Field(gt=0)] | None = Field(None, description="seconds, waiting included", examples=[60])


class ChatRequest(Drawing):
    """Of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1)] | None = None
    image: Literal["auto", "always", "never"] | None = None
    image_seed: Seed | None = None
    max_images: Count | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    n: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class ImagesRequest(Drawing):
    """Of /v1/images/generations."""

    prompt: Annotated[Words, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=1000), WHOLE] | None = 1
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None


def chat_options(body: ChatRequest, limits: Limits, model: InterleavedModel) -> Options:
    """How to reply. Raises Refused for what contradicts itself or is above the limits."""
    wanted = {"text": "never", "image": "always"}.get("+".join(dict.fromkeys(body.modalities or [])), "auto")
    if body.image and wanted != "auto" and body.image != wanted:
        raise _refused(f"image is {body.image}, but modalities are {', '.join(body.modalities or [])}", "image")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise _refused("max_tokens and max_completion_tokens are both given, expected one", "max_tokens")
    given = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    tokens = min(256, limits.tokens) if given is None else given
    if wanted == "always" and not given:
        tokens = 0  # an image alone
    images = limits.images if body.max_images is None else body.max_images
    _bounded("max_tokens", tokens, limits.tokens)
    _bounded("max_images", images, limits.images)
    return _options(
        body,
        limits,
        model,
        image_seed=body.image_seed,
        temperature=body.temperature,
        top_p=body.top_p,
        repetition_penalty=body.repetition_penalty,
        max_tokens=tokens,
        max_images=images,
        image=body.image or wanted,
    )


def image_options(body: ImagesRequest, limits: Limits, model: InterleavedModel) -> list[Options]:
    """How to draw each image, with seeds that count up. Raises as `chat_options`."""
    _bounded("n", body.n or 1, limits.images)
    first = _options(body, limits, model, max_tokens=0, max_images=1, image="always")
    return [first.__class__(**vars(first) | {"image_seed": first.seed + i}) for i in range(body.n or 1)]


def conversation(messages: list[ChatMessage], limits: Limits) -> Conversation:
    """What was said. Reads pictures, so it takes a while. Raises Refused."""
    _bounded("messages", len(messages), limits.messages)
    if messages[-1].role != "user":
        raise _refused(f"the last message is of role {messages[-1].role}, expected user", "messages")
    urls = [part for m in messages if not isinstance(m.content, str) for part in m.content if part.type == "image_url"]
    _bounded("images in messages", len(urls), limits.pictures)
    return Conversation(tuple(Message(_role(message), _content(message, limits)) for message in messages))


def _role(message: ChatMessage) -> Any:
    return "system" if message.role == "developer" else message.role


def _content(message: ChatMessage, limits: Limits) -> tuple:
    if isinstance(message.content, str):
        return (Text(message.content),)
    try:
        return tuple(
            Text(part.text) if isinstance(part, TextPart) else read_picture(part.image_url.url, limits)
            for part in message.content
        )
    except Mgp5Error as error:
        raise _refused(str(error), "messages") from None


def _options(body: Drawing, limits: Limits, model: InterleavedModel, **more: Any) -> Options:
    """What both kinds of request share; told now if it cannot be drawn, not in the middle of a reply."""
    steps = min(20, limits.steps) if body.steps is None else body.steps
    _bounded("steps", steps, limits.steps)
    width, height = _size(body.size, limits)
    seed = random.SystemRandom().randrange(2**31) if body.seed is None else body.seed
    drawing = {"steps": steps, "guidance": body.guidance, "sampler": body.sampler}
    try:
        options = reply_options(seed=seed, height=height, width=width, **drawing, **more)
        model.head.num_steps(options)
        if width and height:
            model.diffusion.latent_shape(height, width)
    except Mgp5Error as error:
        raise _refused(str(error), None) from None
    return options


def _size(size: str | None, limits: Limits) -> tuple[int | None, int | None]:
    if size in (None, "auto"):
        return None, None
    if not (found := re.fullmatch(SIZE, size)):
        raise _refused('size is not "WIDTHxHEIGHT" in pixels, nor "auto"', "size")
    width, height = map(int, found.groups())
    _bounded("size", max(width, height), limits.side)
    return width, height


def _bounded(name: str, found: int, most: int) -> None:
    if found > most:
        raise _refused(f"{name}: {found}, and this server allows {most} at most", name)


def _refused(message: str, param: str | None) -> Refused:
    return Refused(400, message, "invalid_value", param)
