"""/v1/images: images of a prompt, or of the scene that follows given images; whole, or streamed with partial images."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from email.message import Message as Header
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field, ValidationError, WithJsonSchema

from ...errors import Mgp5Error
from ...events import Event, Finished, ImageStep
from ...messages import Conversation, Image
from ...prompts import illustrate
from ..images import read_image_bytes
from ..loop import Refused
from ..replies import Reply, form_of, stream_of
from ..request import Limits
from ..schema import ANY, INTEGER, DrawRequest, Words, explain, image_options, refused
from ..state import (
    EXACT,
    GENERATE_ERRORS,
    TAKES_JSON,
    AppState,
    ReplyStream,
    State,
    base64_png,
    stream_response,
    unless_gone,
)
from ..turns import check_size

OF_IMAGES = {
    **dict.fromkeys(("store", "style", "moderation", "output_compression"), ANY),
    **{"quality": ("auto", "standard"), "background": ("auto", "opaque"), "input_fidelity": ("low",)},
}
FILES = {"anyOf": [{"type": "string", "format": "binary"}, {"type": "array", "items": {"format": "binary"}}]}
Partial = Annotated[int, Field(ge=0, le=3), INTEGER]  # how many unfinished images of each image a stream shows
routes = APIRouter()


class ImagesRequest(DrawRequest):
    """Body of /v1/images/generations."""

    neutral = DrawRequest.neutral | OF_IMAGES
    prompt: Annotated[Words, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=1000), INTEGER] | None = 1
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool | None = False
    partial_images: Partial | None = None


class EditsRequest(ImagesRequest):
    """Form of /v1/images/edits: the fields of /v1/images/generations, and the scenes so far as files, or as image[]."""

    image: Annotated[list[bytes], Field(min_length=1), WithJsonSchema(FILES)]


class DrawnImage(Reply):
    """A PNG file in base64."""

    b64_json: str
    seed: int


class InputTokens(Reply):
    text_tokens: int
    image_tokens: int


class ImagesUsage(Reply):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: Literal[0]
    total_tokens: int
    images: int


class ImagesReply(Reply):
    created: int
    data: list[DrawnImage]
    usage: ImagesUsage


class ImageEvent(DrawnImage):
    """One event of a stream: an unfinished image, or a finished one, which has its usage."""

    type: Literal[
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    index: int = Field(description="of the image among the n that were asked for")
    partial_image_index: int | None = None
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    usage: ImagesUsage | None = None


STREAM = stream_of(ImageEvent)


@routes.post("/v1/images/generations", response_model=ImagesReply, responses=GENERATE_ERRORS | STREAM, **TAKES_JSON)
async def images(body: ImagesRequest, request: Request, state: State) -> ImagesReply | Response:
    """Draw images of a prompt, whole or streamed."""
    state.check(body.model)
    return await _draw("image_generation", body, Conversation().add("user", body.prompt), request, state)


def _form_only(request: Request) -> None:
    """Raise Refused for another kind of body, and for the form of a web page, which may send it to any address."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refused(415, "the content type is not multipart/form-data", "wrong_content_type")
    if "origin" in request.headers:
        raise Refused(415, "forms of web pages are not taken", "wrong_content_type")


@routes.post(
    "/v1/images/edits",
    response_model=ImagesReply,
    responses=GENERATE_ERRORS | STREAM,
    dependencies=[Depends(_form_only)],
    openapi_extra=form_of(EditsRequest),
    **EXACT,
)
async def edits(request: Request, state: State) -> ImagesReply | Response:
    """Draw the scene of a prompt that follows the scenes of given images, whole or streamed."""
    fields = read_form(request.headers["content-type"], await request.body())
    try:
        body = EditsRequest.model_validate(fields)
    except ValidationError as error:
        raise explain(error.errors(), fields) from None
    state.check(body.model)
    talk = await state.in_thread(_next_scene, body, state.limits)
    return await _draw("image_edit", body, talk, request, state)


def _next_scene(body: EditsRequest, limits: Limits) -> Conversation:
    check_size(1, len(body.image), limits)
    try:
        return illustrate([("", read_image_bytes(data, limits)) for data in body.image], body.prompt)
    except Mgp5Error as error:
        raise refused(str(error), "image") from None


def read_form(content_type: str, body: bytes) -> dict[str, Any]:
    """Return the fields of a form (RFC 7578): files as a list of bytes, texts that are numbers or truths as such.
    Raises Refused for what is no form."""
    header = Header()
    header["Content-Type"] = content_type
    boundary = header.get_boundary("")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("utf-8", "replace"))
    if not boundary or len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise Refused(400, "the body is not a form that ends with its boundary", "invalid_form")
    fields: dict[str, Any] = {}
    for piece in pieces[1:-1]:
        head, _, data = piece.partition(b"\r\n\r\n")
        part = Header()
        for line in head.decode("utf-8", "replace").split("\r\n"):
            if line.lower().startswith("content-disposition:"):
                part["Content-Disposition"] = line.partition(":")[2].strip()
        name = str(part.get_param("name", "", header="content-disposition")).removesuffix("[]")
        if part.get_filename() is not None or name == "image":
            fields.setdefault(name, []).append(data)
        else:
            fields[name] = _value(name, data)
    return fields


def _value(name: str, data: bytes) -> Any:
    text = data.decode("utf-8", "surrogateescape")
    if name == "prompt" or (name == "model" and text != "null"):  # texts even where they look like numbers
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if value is None or isinstance(value, bool | int | float) else text


async def _draw(
    kind: str, body: ImagesRequest, talk: Conversation, request: Request, state: AppState
) -> ImagesReply | Response:
    options = image_options(body, body.n or 1, state.limits, state.loop.model)
    previews = (body.partial_images or 0) if body.stream else 0
    streams = state.submit(talk, options, body.timeout, previews=previews)
    seeds = [one.image_seed for one in options]
    if body.stream:
        return await stream_response(request, streams, _events(kind, streams, seeds))
    done = await unless_gone(request, asyncio.gather(*(stream.finish() for stream in streams)), *streams)
    data = [
        {"b64_json": await base64_png(image), "seed": seed}
        for reply, seed in zip(done, seeds, strict=True)
        for image in reply.message.images
    ]
    return ImagesReply(created=int(time.time()), data=data, usage=_usage(*done))


async def _events(kind: str, streams: list[ReplyStream], seeds: list[int]) -> AsyncIterator[ImageEvent]:
    async def event(name: str, index: int, image: Image, **more: Any) -> ImageEvent:
        width, height = image.load().size
        values = {"b64_json": await base64_png(image), "seed": seeds[index], "size": f"{width}x{height}"}
        values |= {"quality": "auto", "background": "opaque", "output_format": "png", "created_at": int(time.time())}
        return ImageEvent(type=f"{kind}.{name}", index=index, **values, **more)

    shown = [0] * len(streams)
    async for index, found in _merged(streams):
        if isinstance(found, ImageStep) and found.preview:
            yield await event("partial_image", index, found.preview, partial_image_index=shown[index])
            shown[index] += 1
        elif isinstance(found, Finished):
            for image in found.message.images:
                yield await event("completed", index, image, usage=_usage(found))


async def _merged(streams: list[ReplyStream]) -> AsyncIterator[tuple[int, Event]]:
    """Yield the events of several replies as they come, each with the index of its reply."""
    waits = {asyncio.ensure_future(stream.next()): index for index, stream in enumerate(streams)}
    try:
        while waits:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, event = waits.pop(task), task.result()
                if not isinstance(event, Finished):
                    waits[asyncio.ensure_future(streams[index].next())] = index
                yield index, event
    finally:
        for task in waits:
            task.cancel()


def _usage(*done: Finished) -> ImagesUsage:
    tokens, shown = (sum(one.meta[name] for one in done) for name in ("prefilled", "prefilled_images"))
    return ImagesUsage(
        input_tokens=tokens,
        input_tokens_details=InputTokens(text_tokens=tokens - shown, image_tokens=shown),
        output_tokens=0,
        total_tokens=tokens,
        images=sum(len(one.message.images) for one in done),
    )
