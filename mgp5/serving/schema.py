"""Bodies of requests in the form of OpenAI's API, with some more fields; the conversation and options they ask for."""

from __future__ import annotations

import random
import re
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import Mgp5Error
from ..messages import Conversation, Image, Message, Text
from ..options import Options, reply_options
from .images import read_image_url
from .loop import Refused

if TYPE_CHECKING:
    from ..model import InterleavedModel
    from .request import Limits


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a character (a lone surrogate)") from None
    return text


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # in JSON, 2.0 is the same as 2


SIZE = "([1-9][0-9]{0,4})x([1-9][0-9]{0,4})"
Words = Annotated[str, AfterValidator(_encodable)]
INTEGER = BeforeValidator(_integer)
Seed = Annotated[int, Field(ge=0, lt=2**53), INTEGER]  # above, a client that reads numbers as floats would change it
Count = Annotated[int, Field(ge=0, le=2**31), INTEGER]


class Body(BaseModel):
    """Base of request bodies: types are strict, and unknown fields are refused instead of passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A piece of text."""

    type: Literal["text"]
    text: Words


class ImageUrl(Body):
    """Where an image is: a data URL, or an http or https address where the server fetches them."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Body):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None


class StreamOptions(Body):
    """Options of a streamed reply."""

    include_usage: bool = False


class DrawRequest(Body):
    """Fields that say how images are drawn; all but `model`, `size` and `user` are not OpenAI's."""

    model: str
    user: str | None = None
    size: str | None = Field(
        None, description='"WIDTHxHEIGHT" in pixels, or "auto"', json_schema_extra={"pattern": f"^({SIZE}|auto)$"}
    )
    seed: Seed | None = None
    steps: Annotated[int, Field(ge=1, le=1000), INTEGER] | None = Field(None, description="20, or the most allowed")
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    sampler: str = "dpm++"
    timeout: Annotated[float, Field(gt=0)] | None = Field(None, description="seconds, waiting included", examples=[60])


class ChatRequest(DrawRequest):
    """Body of /v1/chat/completions."""

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
    n: Annotated[int, Field(ge=1, le=1), INTEGER] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class ImagesRequest(DrawRequest):
    """Body of /v1/images/generations."""

    prompt: Annotated[Words, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=1000), INTEGER] | None = 1
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None


def chat_options(body: ChatRequest, limits: Limits, model: InterleavedModel) -> Options:
    """Return the options of a reply.

    Raises Refused if fields contradict each other, are above the limits, or no image can be drawn with them.
    """
    draw = {"text": "never", "image": "always"}.get("+".join(dict.fromkeys(body.modalities or [])), "auto")
    if body.image and draw != "auto" and body.image != draw:
        raise _refused(f"image is {body.image}, but modalities are {', '.join(body.modalities or [])}", "image")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise _refused("max_tokens and max_completion_tokens are both given, expected one", "max_tokens")
    tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if tokens is None:
        tokens = 0 if draw == "always" else min(256, limits.tokens)  # 0: the reply is an image alone
    images = limits.images if body.max_images is None else body.max_images
    _check_bound("max_tokens", tokens, limits.tokens)
    _check_bound("max_images", images, limits.images)
    values = body.model_dump(include={"image_seed", "temperature", "top_p", "repetition_penalty"})
    values |= {"max_tokens": tokens, "max_images": images, "image": body.image or draw}
    return _options(body, limits, model, **values)


def image_options(body: ImagesRequest, limits: Limits, model: InterleavedModel) -> list[Options]:
    """Return the options of each image; their seeds count up. Raises Refused as `chat_options` does."""
    _check_bound("n", body.n or 1, limits.images)
    first = _options(body, limits, model, max_tokens=0, max_images=1, image="always")
    return [replace(first, image_seed=first.seed + number) for number in range(body.n or 1)]


def _options(body: DrawRequest, limits: Limits, model: InterleavedModel, **text: Any) -> Options:
    """Return options of text and images; what cannot be drawn is refused here, not in the middle of a reply."""
    image = body.model_dump(include={"steps", "guidance"}, exclude_none=True) | _size(body.size, limits)
    if "sampler" in body.model_fields_set:
        image["sampler"] = body.sampler
    kind = model.head.spec.image_options
    if "steps" in {field.name for field in fields(kind)}:
        image.setdefault("steps", min(20, limits.steps))
    _check_bound("steps", image.get("steps", 0), limits.steps)
    seed = random.SystemRandom().randrange(2**31) if body.seed is None else body.seed
    try:
        options = reply_options(kind, seed=seed, **image, **text)
        model.head.check(options.image)
    except Mgp5Error as error:
        raise _refused(str(error), None) from None
    return options


def _size(size: str | None, limits: Limits) -> dict[str, int]:
    """Return width and height in pixels, where they are given."""
    if size in (None, "auto"):
        return {}
    if not (match := re.fullmatch(SIZE, size)):
        raise _refused('size is not "WIDTHxHEIGHT" in pixels, nor "auto"', "size")
    width, height = map(int, match.groups())
    _check_bound("size", max(width, height), limits.side)
    return {"width": width, "height": height}


def conversation(messages: list[ChatMessage], limits: Limits) -> Conversation:
    """Return the conversation of a body; images are decoded, which takes a while. Raises Refused."""
    if messages[-1].role != "user":
        raise _refused(f"the last message is of role {messages[-1].role}, expected user", "messages")
    contents = [[TextPart(type="text", text=m.content)] if isinstance(m.content, str) else m.content for m in messages]
    images = sum(isinstance(part, ImagePart) for content in contents for part in content)
    check_size(len(messages), images, limits)
    try:
        return Conversation(
            tuple(
                Message(
                    "system" if message.role == "developer" else message.role, tuple(_part(p, limits) for p in parts)
                )
                for message, parts in zip(messages, contents, strict=True)
            )
        )
    except Mgp5Error as error:
        raise _refused(str(error), "messages") from None


def _part(part: TextPart | ImagePart, limits: Limits) -> Text | Image:
    return Text(part.text) if isinstance(part, TextPart) else read_image_url(part.image_url.url, limits)


def check_size(messages: int, images: int, limits: Limits) -> None:
    """Raise Refused for a conversation with more messages or images than the limits allow."""
    _check_bound("messages", messages, limits.messages)
    _check_bound("images in messages", images, limits.context_images)


def _check_bound(name: str, value: int, most: int) -> None:
    if value > most:
        raise _refused(f"{name}: {value}, and this server allows {most} at most", name)


def _refused(message: str, param: str | None) -> Refused:
    return Refused(400, message, "invalid_value", param)
