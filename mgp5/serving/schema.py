"""What the bodies of all requests share: fields, values that are passed over, errors in words; options from them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..errors import Mgp5Error
from ..heads import Head
from ..model import InterleavedModel
from ..options import DrawMode, ImageOptions, Options, reply_options
from .loop import Refused
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
Size = Annotated[str, Field(json_schema_extra={"pattern": f"^({SIZE}|auto)$"})]
Words = Annotated[str, AfterValidator(_encodable)]
INTEGER = BeforeValidator(_integer)
Seed = Annotated[int, Field(ge=0, lt=2**53), INTEGER]  # above, a client that reads numbers as floats would change it
Count = Annotated[int, Field(ge=0, le=2**31), INTEGER]


ANY = None  # in a table of neutral values: no value of this field changes a reply
EVERYWHERE = dict.fromkeys(
    ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), ANY
)
NEUTRAL: dict[str, tuple[Any, ...] | None] = {}  # of all bodies
OTHER_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}  # as other programs call these fields
# Fields that are options of the head's images: a head has some of them.
OF_HEADS = frozenset({"steps", "guidance", "sampler", "code_temperature", "code_top_p", "code_top_k"})
REASONS = {  # why a field that others have is refused
    "negative_prompt": "pictures are drawn from what the language model says, so there is no text to steer away from",
    "mask": "the next scene is drawn as a whole",
}


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
    known = schema["properties"]
    known |= {other: known[name] for name, other in OTHER_NAMES.items() if name in known}
    schema["additionalProperties"] = {"type": "null"}


class Body(BaseModel):
    """Base of request bodies, whose types are strict.

    Fields that ask for nothing are passed over: those of `neutral` at their values, and any at null. Others that are
    not known are refused, as they would change the reply. What some clients nest in `extra_body` counts as if it
    were not nested, and OTHER_NAMES as the names they stand for.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_with_neutral)
    neutral: ClassVar[dict[str, tuple[Any, ...] | None]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        NEUTRAL.update(cls.neutral)

    @model_validator(mode="before")
    @classmethod
    def _pass_over(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if isinstance(values.get("extra_body"), dict):
            values = {**values["extra_body"], **{n: v for n, v in values.items() if n != "extra_body"}}
        values = {n: v for n, v in values.items() if not _asks_for_nothing(cls.neutral.get(n, ()), v)}
        for name, other in OTHER_NAMES.items():
            if name in cls.model_fields and other in values:
                values.setdefault(name, values.pop(other))
        return values


class StreamOptions(Body):
    """Options of a streamed reply."""

    neutral: ClassVar = {"include_obfuscation": ANY}
    include_usage: bool | None = False


class DrawRequest(Body):
    """Fields that say how images are drawn; all but `model` and `size` are not OpenAI's."""

    neutral = EVERYWHERE | {"negative_prompt": ("",)}
    model: str | None = Field(None, description="the one that is served")
    size: Size | None = Field(None, description='"WIDTHxHEIGHT" in pixels, or "auto"')
    seed: Seed | None = None
    steps: Annotated[int, Field(ge=1, le=1000), INTEGER] | None = Field(None, description="20, or the most allowed")
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    sampler: str | None = Field(None, description="dpm++ where it is not given")
    code_temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="of an image's codes")
    code_top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    code_top_k: Count | None = Field(None, description="the likeliest codes; 0: all")
    timeout: Annotated[float, Field(gt=0)] | None = Field(None, description="seconds, waiting included", examples=[60])


class ReplyRequest(DrawRequest):
    """Fields of requests for replies of text and images."""

    image: Literal["auto", "always", "never"] | None = None
    image_seed: Seed | None = None
    max_images: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="0.9 where it is not given")
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop: Words | Annotated[list[Words], Field(max_length=16)] | None = Field(
        None, description="ends the text before it"
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None


def explain(errors: Sequence[dict[str, Any]], body: Any) -> Refused:
    """Return what is wrong with a body in words, without what was sent; `errors` are those of pydantic."""
    paths = [_path(error, body) for error in errors]
    path = max(paths, key=len)  # the member of a union that was meant is the one that fits furthest
    words = " or ".join(dict.fromkeys(_words(error) for error, at in zip(errors, paths, strict=True) if at == path))
    name, words = ".".join(path), words.replace(" or expected ", " or ")
    return refused(f"{name}: {words}"[:300] if name else f"the body: {words}", name[:100] or None)


def _path(error: dict[str, Any], value: Any) -> list[str]:
    """Return where in a body an error is: names and numbers that lead there, without pydantic's names of types."""
    path: list[str] = []
    steps, missing = error["loc"], error["loc"][-1:] if error["type"] == "missing" else ()
    for step, after in zip(steps[: len(steps) - len(missing)], (*steps[1:], None), strict=False):
        if isinstance(value, dict) and value.get("type") == step and after in value:
            continue  # it says which part of a union was meant, and is a field's name too
        if isinstance(value, dict) and step not in value and OTHER_NAMES.get(step) in value:
            step = OTHER_NAMES[step]
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
        case "extra_forbidden" if reason := REASONS.get(error["loc"][-1]):
            return f"not supported, leave it out: {reason}"
        case "extra_forbidden" if values := NEUTRAL.get(error["loc"][-1]):
            return f"not supported here, expected {' or '.join(map(json.dumps, values))}, or leave it out"
        case "extra_forbidden":
            return "not a field of this request, leave it out"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "expected an object"
        case "union_tag_not_found":
            return "expected a part with a type"
        case "union_tag_invalid":
            return f"expected a part of type {error['ctx']['expected_tags']}"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)


def text_options(
    body: ReplyRequest,
    draw: tuple[DrawMode, str],
    tokens: Sequence[int | None],
    limits: Limits,
    model: InterleavedModel,
) -> Options:
    """Return the options of a reply.

    Args:
        draw: when to draw, and the field that says so besides `image`.
        tokens: largest numbers of tokens; the smallest one holds, and 256 without any.

    Raises Refused if fields contradict each other, are above the limits, or no image can be drawn with them.
    """
    mode, source = draw
    if body.image and mode != "auto" and body.image != mode:
        raise refused(f"image is {body.image}, but {source} says {mode}", "image")
    images = limits.images if body.max_images is None else body.max_images
    check_bound("max_images", images, limits.images)
    values = body.model_dump(include={"image_seed", "temperature", "top_p", "repetition_penalty"}, exclude_none=True)
    most = min([count for count in tokens if count is not None] or [256])
    values |= {"max_tokens": min(most, limits.tokens), "max_images": images, "image": body.image or mode}
    if stop := tuple(filter(None, [body.stop] if isinstance(body.stop, str) else body.stop or ())):
        values["stop"] = stop
    return _options(body, limits, model, **values)


def image_options(body: DrawRequest, count: int, limits: Limits, model: InterleavedModel) -> list[Options]:
    """Return the options of each image; their seeds count up. Raises Refused as `text_options` does."""
    check_bound("n", count, limits.images)
    first = _options(body, limits, model, max_tokens=0, max_images=1, image="always")
    return [replace(first, image_seed=first.seed + number) for number in range(count)]


def _options(body: DrawRequest, limits: Limits, model: InterleavedModel, **text: Any) -> Options:
    """Return options of text and images; what cannot be drawn is refused here, not in the middle of a reply."""
    image, kind = body.model_dump(include=OF_HEADS, exclude_none=True), model.head.spec.image_options
    if unknown := sorted(image.keys() - (known := options_of(kind))):
        message = f"{', '.join(unknown)}: not an option of this model's pictures, expected {', '.join(sorted(known))}"
        raise refused(message, unknown[0])
    if "steps" in known:
        image.setdefault("steps", min(20, limits.steps))
    check_bound("steps", image.get("steps", 0), limits.steps)
    image |= _size(body.size, limits, model.head)
    seed = random.SystemRandom().randrange(2**31) if body.seed is None else body.seed
    try:
        options = reply_options(kind, seed=seed, **image, **text)
        model.head.check(options.image)
    except Mgp5Error as error:
        raise refused(str(error), None) from None
    return options


def options_of(kind: type[ImageOptions]) -> frozenset[str]:
    """Return those of OF_HEADS that a head with these options has."""
    return OF_HEADS & {field.name for field in fields(kind)}


def _size(size: str | None, limits: Limits, head: Head) -> dict[str, int]:
    """Return width and height in pixels, where they are given. Raises Refused for more than the head draws well."""
    if size in (None, "auto"):
        return {}
    if not (match := re.fullmatch(SIZE, size)):
        raise refused('size is not "WIDTHxHEIGHT" in pixels, nor "auto"', "size")
    width, height = map(int, match.groups())
    native = getattr(getattr(head, "generator", None), "native_size", limits.side)
    if "width" not in {field.name for field in fields(head.spec.image_options)}:
        if (width, height) != (native, native):
            raise refused(f"size is {size}, expected {native}x{native}: the model draws no other", "size")
        return {}
    if max(width, height) > (most := min(limits.side, LARGEST * native)):
        message = f"size is {size}, expected {native}x{native}, which this model draws best, or sides up to {most}"
        raise refused(message, "size")
    return {"width": width, "height": height}


def check_bound(name: str, value: int, most: int) -> None:
    """Raise Refused for a number above a limit."""
    if value > most:
        raise refused(f"{name}: {value}, and this server allows {most} at most", name)


def refused(message: str, param: str | None) -> Refused:
    """Return the refusal of a value."""
    return Refused(400, message, "invalid_value", param)
