"""Bodies of requests in the form of OpenAI's API, with some more fields; the conversation and options they ask for."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..errors import Mgp5Error
from ..messages import Conversation, Image, Message, Part, Role, Text
from ..options import Options, reply_options
from .images import read_image_url
from .loop import Refused

if TYPE_CHECKING:
    from ..heads import Head
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


LARGEST = 2  # sides of a drawn image, in native ones: beyond it, what is drawn is drawn several times
SIZE = "([1-9][0-9]{0,4})x([1-9][0-9]{0,4})"
Words = Annotated[str, AfterValidator(_encodable)]
INTEGER = BeforeValidator(_integer)
Seed = Annotated[int, Field(ge=0, lt=2**53), INTEGER]  # above, a client that reads numbers as floats would change it
Count = Annotated[int, Field(ge=0, le=2**31), INTEGER]


ANY = None  # in a table of neutral values: no value of this field changes a reply
EVERYWHERE = dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"), ANY)
OF_CHAT = dict.fromkeys(
    ("reasoning_effort", "verbosity", "parallel_tool_calls", "prediction", "prompt_cache_retention"), ANY
) | {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs", "min_p"), (0,)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("tools", "functions"), ([],)),
    **{"n": (1,), "best_of": (1,), "top_k": (0, -1), "logprobs": (False,), "logit_bias": ({},)},
    "response_format": ({"type": "text"},),
}
OF_IMAGES = {
    **dict.fromkeys(("style", "moderation", "output_compression"), ANY),
    **{"quality": ("auto", "standard"), "background": ("auto", "opaque"), "stream": (False,), "partial_images": (0,)},
}
OF_MESSAGES = {"name": ANY, "annotations": ANY, "tool_calls": ([],)}
OF_PARTS = {"cache_control": ANY, "detail": ANY, "format": ANY, "annotations": ANY}
NEUTRAL: dict[str, tuple[Any, ...] | None] = EVERYWHERE | OF_CHAT | OF_IMAGES | OF_MESSAGES | OF_PARTS


def _asks_for_nothing(values: tuple[Any, ...] | None, value: Any) -> bool:
    return (
        value is None
        or values is ANY
        or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
    )


def _with_neutral(schema: dict[str, Any], body: type[Body]) -> None:
    """Let a JSON schema allow what `Body` passes over."""
    kinds = {name: {} if values is ANY else {"enum": [None, *values]} for name, values in body.neutral.items()}
    schema["properties"] |= kinds
    schema["additionalProperties"] = {"type": "null"}


class Body(BaseModel):
    """Base of request bodies, whose types are strict.

    Fields that ask for nothing are passed over: those of `neutral` at their values, and any at null. Others that are
    not known are refused, as they would change the reply.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_with_neutral)
    neutral: ClassVar[dict[str, tuple[Any, ...] | None]] = {}

    @model_validator(mode="before")
    @classmethod
    def _pass_over(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {n: v for n, v in values.items() if not _asks_for_nothing(cls.neutral.get(n, ()), v)}


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


class ChatMessage(Body):
    """A message of a conversation; one without content is passed over."""

    neutral = OF_MESSAGES
    role: Literal["system", "developer", "user", "assistant"]
    content: Words | list[ContentPart] | None = None


class StreamOptions(Body):
    """Options of a streamed reply."""

    neutral: ClassVar = {"include_obfuscation": ANY}
    include_usage: bool | None = False


class DrawRequest(Body):
    """Fields that say how images are drawn; all but `model` and `size` are not OpenAI's."""

    model: str | None = Field(None, description="the one that is served")
    size: str | None = Field(
        None, description='"WIDTHxHEIGHT" in pixels, or "auto"', json_schema_extra={"pattern": f"^({SIZE}|auto)$"}
    )
    seed: Seed | None = None
    steps: Annotated[int, Field(ge=1, le=1000), INTEGER] | None = Field(None, description="20, or the most allowed")
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    sampler: str | None = Field(None, description="dpm++ where it is not given")
    timeout: Annotated[float, Field(gt=0)] | None = Field(None, description="seconds, waiting included", examples=[60])


class ChatRequest(DrawRequest):
    """Body of /v1/chat/completions."""

    neutral = EVERYWHERE | OF_CHAT
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1)] | None = None
    image: Literal["auto", "always", "never"] | None = None
    image_seed: Seed | None = None
    max_images: Count | None = None
    max_tokens: Count | None = Field(None, description="cut to the most that this server writes")
    max_completion_tokens: Count | None = Field(None, description="the same; of both, the smaller one holds")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="0.9 where it is not given")
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop: Words | Annotated[list[Words], Field(max_length=16)] | None = Field(
        None, description="ends the text before it"
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class ImagesRequest(DrawRequest):
    """Body of /v1/images/generations."""

    neutral = EVERYWHERE | OF_IMAGES
    prompt: Annotated[Words, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=1000), INTEGER] | None = 1
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None


def explain(errors: Sequence[dict[str, Any]], body: Any) -> Refused:
    """Return what is wrong with a body in words, without what was sent; `errors` are those of pydantic."""
    paths = [_path(error, body) for error in errors]
    path = max(paths, key=len)  # the member of a union that was meant is the one that fits furthest
    words = " or ".join(dict.fromkeys(_words(error) for error, at in zip(errors, paths, strict=True) if at == path))
    name, words = ".".join(path), words.replace(" or expected ", " or ")
    return _refused(f"{name}: {words}"[:300] if name else f"the body: {words}", name[:100] or None)


def _path(error: dict[str, Any], value: Any) -> list[str]:
    """Return where in a body an error is: names and numbers that lead there, without pydantic's names of types."""
    path: list[str] = []
    steps, missing = error["loc"], error["loc"][-1:] if error["type"] == "missing" else ()
    for step in steps[: len(steps) - len(missing)]:
        inside = isinstance(value, dict) and step in value
        if inside or (isinstance(value, list) and isinstance(step, int) and step < len(value)):
            path, value = [*path, str(step)], value[step]
    return [*path, *map(str, missing)]


def _words(error: dict[str, Any]) -> str:
    match error["type"]:
        case "json_invalid":
            return "not valid JSON"
        case "missing":
            return "missing"
        case "extra_forbidden" if values := NEUTRAL.get(error["loc"][-1]):
            return f"not supported here, expected {' or '.join(map(json.dumps, values))}, or leave it out"
        case "extra_forbidden":
            return "not a field of this request, leave it out"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "expected an object"
        case "union_tag_not_found":
            return "a part without type"
        case "union_tag_invalid":
            return f"a part of another type than {error['ctx']['expected_tags']}"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)


def chat_options(body: ChatRequest, limits: Limits, model: InterleavedModel) -> Options:
    """Return the options of a reply.

    Raises Refused if fields contradict each other, are above the limits, or no image can be drawn with them.
    """
    draw = {"text": "never", "image": "always"}.get("+".join(dict.fromkeys(body.modalities or [])), "auto")
    if body.image and draw != "auto" and body.image != draw:
        raise _refused(f"image is {body.image}, but modalities are {', '.join(body.modalities or [])}", "image")
    asked = [count for count in (body.max_tokens, body.max_completion_tokens) if count is not None]
    tokens = min(*(asked or [0 if draw == "always" else 256]), limits.tokens)  # 0: the reply is an image alone
    images = limits.images if body.max_images is None else body.max_images
    _check_bound("max_images", images, limits.images)
    values = body.model_dump(include={"image_seed", "temperature", "top_p", "repetition_penalty"}, exclude_none=True)
    values |= {"max_tokens": tokens, "max_images": images, "image": body.image or draw}
    if stop := tuple(filter(None, [body.stop] if isinstance(body.stop, str) else body.stop or ())):
        values["stop"] = stop
    return _options(body, limits, model, **values)


def image_options(body: ImagesRequest, limits: Limits, model: InterleavedModel) -> list[Options]:
    """Return the options of each image; their seeds count up. Raises Refused as `chat_options` does."""
    _check_bound("n", body.n or 1, limits.images)
    first = _options(body, limits, model, max_tokens=0, max_images=1, image="always")
    return [replace(first, image_seed=first.seed + number) for number in range(body.n or 1)]


def _options(body: DrawRequest, limits: Limits, model: InterleavedModel, **text: Any) -> Options:
    """Return options of text and images; what cannot be drawn is refused here, not in the middle of a reply."""
    image = body.model_dump(include={"steps", "guidance", "sampler"}, exclude_none=True)
    image |= _size(body.size, limits, model.head)
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


def _size(size: str | None, limits: Limits, head: Head) -> dict[str, int]:
    """Return width and height in pixels, where they are given. Raises Refused for more than the head draws well."""
    if size in (None, "auto"):
        return {}
    if not (match := re.fullmatch(SIZE, size)):
        raise _refused('size is not "WIDTHxHEIGHT" in pixels, nor "auto"', "size")
    width, height = map(int, match.groups())
    native = getattr(getattr(head, "generator", None), "native_size", limits.side)
    if max(width, height) > (most := min(limits.side, LARGEST * native)):
        message = f"size is {size}, expected {native}x{native}, which this model draws best, or sides up to {most}"
        raise _refused(message, "size")
    return {"width": width, "height": height}


def conversation(messages: list[ChatMessage], limits: Limits) -> Conversation:
    """Return the conversation of a body; images are decoded, which takes a while. Raises Refused."""
    last = messages[-1]
    if last.role != "user":
        raise _refused(f"the last message is of role {last.role}, expected user", "messages")
    if last.content in (None, []):
        raise _refused("the last message has no content, expected text or an image", "messages")
    images = sum(isinstance(part, ImagePart) for message in messages for part in message.content or ())
    check_size(len(messages), images, limits)
    try:
        turns = [("system" if m.role == "developer" else m.role, _parts(m.content, limits)) for m in messages]
        return Conversation(tuple(join_turns(turns)))
    except Mgp5Error as error:
        raise _refused(str(error), "messages") from None


def join_turns(turns: Iterable[tuple[Role, Sequence[Part]]]) -> list[Message]:
    """Return the messages of turns, neighbours of one role as one; turns without parts are left out."""
    joined: list[Message] = []
    for role, parts in turns:
        if parts:
            before = joined.pop().content if joined and joined[-1].role == role else ()
            joined.append(Message(role, (*before, *parts)))
    return joined


def _parts(content: str | list[TextPart | ImagePart] | None, limits: Limits) -> list[Part]:
    if isinstance(content, str):
        return [Text(content)]
    return [Text(part.text) if isinstance(part, TextPart) else _image(part, limits) for part in content or ()]


def _image(part: ImagePart, limits: Limits) -> Image:
    return read_image_url(part.image_url if isinstance(part.image_url, str) else part.image_url.url, limits)


def check_size(messages: int, images: int, limits: Limits) -> None:
    """Raise Refused for a conversation with more messages or images than the limits allow."""
    _check_bound("messages", messages, limits.messages)
    _check_bound("images in messages", images, limits.context_images)


def _check_bound(name: str, value: int, most: int) -> None:
    if value > most:
        raise _refused(f"{name}: {value}, and this server allows {most} at most", name)


def _refused(message: str, param: str | None) -> Refused:
    return Refused(400, message, "invalid_value", param)
