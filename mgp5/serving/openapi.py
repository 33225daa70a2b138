"""The API in OpenAPI's words, with the bounds of this server; replies are described, not checked as they go out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from ..generators.sampler import SAMPLERS
from .schema import Part

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .limits import Limits

ABOUT = """Interleaved text and pictures, in and out, as OpenAI's API has them, with fields beside it.

Every error has OpenAI's shape. A path that is not here gets 404, another method 405 with `Allow`. A client that is no
HTTP client gets 400 in plain text; one too many connections, 503 in plain text."""
REFS = "#/components/schemas/{model}"


class Answer(BaseModel):
    """Nothing else is in it."""

    model_config = ConfigDict(extra="forbid")


class Usage(Answer):
    """What a reply took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    images: int


class Spoken(Answer):
    """The assistant's turn: text where modalities are ["text"], else parts in order."""

    role: Literal["assistant"]
    content: str | list[Part]


class Choice(Answer):
    """The one reply."""

    index: Literal[0]
    message: Spoken
    finish_reason: Literal["stop", "length"]
    logprobs: None


class Facts(Answer):
    """What a reply and each of its chunks say."""

    id: str
    created: int = Field(description="seconds since 1970")
    model: str
    seed: int = Field(description="it was made with: the same request with it gives the same reply")


class ChatReply(Facts):
    """A whole reply."""

    object: Literal["chat.completion"]
    choices: list[Choice]
    usage: Usage


class Delta(Answer):
    """What is new: the role first, then text, or a list of one picture."""

    role: Literal["assistant"] = Field("assistant", description="in the first chunk")
    content: str | list[Part] = ""


class Progress(Answer):
    """Of the denoising."""

    image: int = Field(description="of this reply, from 0")
    step: int = Field(description="from 1 to total")
    total: int


class ChunkChoice(Answer):
    """The piece of the one reply."""

    index: Literal[0]
    delta: Delta
    finish_reason: Literal["stop", "length"] | None
    logprobs: None


class ChatChunk(Facts):
    """One event of a stream; the last one is followed by `[DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice] = Field(description="none in the chunk of `usage`")
    progress: Progress | None = None
    usage: Usage | None = Field(None, description="in a chunk of its own, where stream_options ask for it")


class Drawn(Answer):
    """A PNG file in base64."""

    b64_json: str
    seed: int


class DrawnUsage(Answer):
    """What pictures took."""

    input_tokens: int
    output_tokens: Literal[0]
    total_tokens: int
    images: int


class ImagesReply(Answer):
    """Pictures of a prompt."""

    created: int
    data: list[Drawn]
    usage: DrawnUsage


class Model(Answer):
    """What is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["mgp5"]


class Models(Answer):
    """The one model."""

    object: Literal["list"]
    data: list[Model]


class Health(Answer):
    """Whether requests are served, how many run, and how many wait for a row."""

    status: Literal["ok", "failed"]
    running: int
    waiting: int


class Problem(Answer):
    """What is wrong, on one line."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorReply(Answer):
    """An error as OpenAI's API tells it; in a stream, the event before `[DONE]`."""

    error: Problem


REASONS = {
    400: "The request is wrong, or asks for more than this server allows.",
    401: "The API key is missing or wrong.",
    404: "There is no model of this name.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The content type is not application/json.",
    421: "The Host header does not name this server.",
    429: "As many requests wait as may. Ask again after the seconds of Retry-After.",
    500: "It failed for no fault of the request.",
    503: "The server stops, or its loop has failed.",
    504: "The reply took longer than it may.",
}
HEADERS = {401: "WWW-Authenticate", 429: "Retry-After"}
CHUNK, ERROR = ({"$ref": REFS.format(model=name)} for name in ("ChatChunk", "ErrorReply"))
DATA = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [CHUNK, ERROR]}}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": "[DONE]"}, DATA]}}}


def responses(reply: type[Answer] | None, *own: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route: its reply, and errors: `own` ones and those of every route."""
    found: dict[int | str, dict[str, Any]] = {200: {"model": reply} if reply else {}}
    if stream:
        found[200]["content"] = {"text/event-stream": {"itemSchema": EVENT}}
    for status in sorted({400, 401, 408, 413, 421, 500, *own}):
        found[status] = {"description": REASONS[status], "content": {"application/json": {"schema": ERROR}}}
        if name := HEADERS.get(status):
            found[status]["headers"] = {name: {"schema": {"type": "string"}}}
    return found


CHAT = responses(ChatReply, 404, 415, 429, 503, 504, stream=True)
IMAGES = responses(ImagesReply, 404, 415, 429, 503, 504)
MODELS, MODEL, METRICS = responses(Models), responses(Model, 404), responses(None)
HEALTH = responses(Health) | {503: {"model": Health, "description": REASONS[503]}}


def describe(app: FastAPI, name: str, limits: Limits, key: bool) -> None:
    """Let an app tell of itself at /openapi.json.

    Args:
        name: of the model.
        limits: that stand in the schemas of requests.
        key: whether clients must show one.
    """
    told = app.openapi()
    schemas = told["components"]["schemas"]
    unnamed = [(kind, "validation") for kind in (ChatChunk, ErrorReply)]  # by any route's model
    schemas |= models_json_schema(unnamed, ref_template=REFS)[1]["$defs"]
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own: ours are 400, in OpenAI's shape
        schemas.pop(unused, None)
    for path, operations in told["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if not key or path == "/health":
                operation["responses"].pop("401", None)
            else:
                operation["security"] = [{"key": []}]
    if key:
        told["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    bounds = {"steps": limits.steps, "max_tokens": limits.tokens, "max_completion_tokens": limits.tokens}
    bounds |= {"max_images": limits.images, "n": limits.images}
    for request in ("ChatRequest", "ImagesRequest"):
        fields = schemas[request]["properties"]
        fields["model"]["enum"], fields["sampler"]["enum"] = [name], sorted(SAMPLERS)
        for field, most in bounds.items():
            for kind in fields.get(field, {}).get("anyOf", [fields.get(field, {})]):
                if kind.get("type") == "integer":
                    kind["maximum"] = min(most, kind["maximum"])
