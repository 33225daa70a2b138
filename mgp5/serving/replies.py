"""Replies of the HTTP API as pydantic models, and the OpenAPI document with the bounds of one server."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from ..options import SAMPLERS
from .schema import ContentPart

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .request import Limits

ABOUT = """Interleaved text and images, in and out, in the form of OpenAI's API, with some more fields.

Every error has OpenAI's form. An unknown path gets 404, another method 405 with `Allow`. What is not HTTP gets 400 in
plain text; one connection too many gets 503 in plain text."""
REFS = "#/components/schemas/{model}"


class Reply(BaseModel):
    """A reply has these fields and no others; optional ones are left out where they are not set."""

    model_config = ConfigDict(extra="forbid")


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    images: int


class AssistantMessage(Reply):
    """The assistant's message: a string without images, else parts in order."""

    role: Literal["assistant"]
    content: str | list[ContentPart]


class Choice(Reply):
    index: Literal[0]
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None


class ReplyInfo(Reply):
    """Fields that a reply and each of its chunks share."""

    id: str
    created: int = Field(description="seconds since 1970")
    model: str
    seed: int = Field(description="seed of the reply: the same request with it gives the same reply")


class ChatReply(ReplyInfo):
    object: Literal["chat.completion"]
    choices: list[Choice]
    usage: Usage


class Delta(Reply):
    """What a chunk adds: the role first, then text, or a list of one image."""

    role: Literal["assistant"] = Field("assistant", description="in the first chunk")
    content: str | list[ContentPart] = ""


class Progress(Reply):
    image: int = Field(description="index of the image in this reply, from 0")
    step: int = Field(description="from 1 to total")
    total: int


class ChunkChoice(Reply):
    """What a chunk adds to the one reply."""

    index: Literal[0]
    delta: Delta
    finish_reason: Literal["stop", "length"] | None
    logprobs: None


class ChatChunk(ReplyInfo):
    """One event of a stream; `[DONE]` follows the last one."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice] = Field(description="empty in the chunk with `usage`")
    progress: Progress | None = None
    usage: Usage | None = Field(None, description="in a chunk of its own, where stream_options ask for it")


class DrawnImage(Reply):
    """A PNG file in base64."""

    b64_json: str
    seed: int


class ImagesUsage(Reply):
    input_tokens: int
    output_tokens: Literal[0]
    total_tokens: int
    images: int


class ImagesReply(Reply):
    created: int
    data: list[DrawnImage]
    usage: ImagesUsage


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["mgp5"]


class Models(Reply):
    object: Literal["list"]
    data: list[Model]


class Health(Reply):
    """Whether requests are served, how many run, and how many wait for a row."""

    status: Literal["ok", "failed"]
    running: int
    waiting: int


class ErrorDetail(Reply):
    """What is wrong, on one line."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorReply(Reply):
    """An error in the form of OpenAI's API; in a stream, the event before `[DONE]`."""

    error: ErrorDetail


CHUNK, ERROR = ({"$ref": REFS.format(model=name)} for name in ("ChatChunk", "ErrorReply"))
DATA = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [CHUNK, ERROR]}}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": "[DONE]"}, DATA]}}}
EVENTS = {200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}}  # FastAPI's `responses` of a stream
PLAIN = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` for the error statuses of a route and those that every route has."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply} for status in sorted({400, 408, 413, 421, 500, *statuses})
    }
    for status, header in ((401, "WWW-Authenticate"), (429, "Retry-After")):
        if status in found:
            found[status]["headers"] = {header: {"schema": {"type": "string"}}}
    return found


def complete_document(app: FastAPI, model: str, limits: Limits) -> None:
    """Complete the document at /openapi.json: events of a stream, the model's name, and the bounds of this server."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    schemas |= models_json_schema([(ChatChunk, "validation")], ref_template=REFS)[1]["$defs"]
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own: here they are 400, in OpenAI's form
        schemas.pop(unused, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    bounds = {"steps": limits.steps, "max_images": limits.images, "n": limits.images}
    for request in ("ChatRequest", "ImagesRequest"):
        fields = schemas[request]["properties"]
        for field in fields.keys() & {"model", "sampler", *bounds}:
            for kind in fields[field].get("anyOf", [fields[field]]):
                if kind.get("type") == "integer":
                    kind["maximum"] = min(bounds[field], kind["maximum"])
                elif kind.get("type") == "string":
                    kind["enum"] = [model] if field == "model" else sorted(SAMPLERS)


def addresses(app: FastAPI) -> dict[str, str]:
    """Return what the app answers: "GET /health" and the like, and what each does."""
    paths = app.openapi()["paths"]
    return {f"{m.upper()} {path}": op["description"] for path, found in paths.items() for m, op in found.items()}


def front_page(app: FastAPI, model: str) -> str:
    """Return the page of a server without a page for work: what is at which address."""
    lines = "".join(f"<dt><code>{at}</code><dd>{escape(does)}" for at, does in addresses(app).items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(model)} · mgp5</title>'
        f"<h1>mgp5 serves {escape(model)}</h1><p>It speaks OpenAI's API:</p><dl>{lines}</dl>"
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>. '
        "For people: <code>mgp5 serve --web</code> has a chat and stories at /ui/."
    )
