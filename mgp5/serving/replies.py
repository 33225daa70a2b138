"""Replies of the HTTP API as pydantic models, and the OpenAPI document with the bounds of one server."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from ..options import SAMPLERS
from .loop import Refused
from .schema import OF_HEADS, OTHER_NAMES

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .request import Limits

ABOUT = """Interleaved text and images, in and out, in the form of OpenAI's API, with some more fields.

Every error has OpenAI's form. An unknown path gets 404, another method 405 with `Allow`. What is not HTTP gets 400 in
plain text; one connection too many gets 503 in plain text."""
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
REFS = "#/components/schemas/{model}"


class Reply(BaseModel):
    """A reply has these fields and no others; optional ones are left out where they are not set."""

    model_config = ConfigDict(extra="forbid")


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


def error_body(refused: Refused) -> ErrorReply:
    """Return the body of an error, its texts on one line and without lone surrogates, which UTF-8 cannot hold."""
    usual = "invalid_request_error" if refused.status < 500 else "server_error"
    texts = refused.message, refused.param
    message, param = (text and " ".join(text.encode(errors="replace").decode().split()) for text in texts)
    kind = ERROR_TYPES.get(refused.status, usual)
    return ErrorReply(error={"message": message, "type": kind, "param": param, "code": refused.code})


DESCRIBED: list[type[BaseModel]] = [ErrorReply]  # models of streams and forms, which FastAPI does not know of


def stream_of(event: type[BaseModel], end: str = "") -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` of a stream of such events, and of `end`."""
    DESCRIBED.append(event)
    kinds = {"anyOf": [{"$ref": REFS.format(model=model.__name__)} for model in (event, ErrorReply)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": kinds}
    data = {"anyOf": [{"const": end}, data]} if end else data
    item = {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}}
    return {200: {"content": {"text/event-stream": {"itemSchema": item}}}}


def form_of(body: type[BaseModel]) -> dict[str, Any]:
    """Return FastAPI's `openapi_extra` of a route that takes a form with these fields."""
    DESCRIBED.append(body)
    content = {"multipart/form-data": {"schema": {"$ref": REFS.format(model=body.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


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


def complete_document(app: FastAPI, model: str, options: frozenset[str], limits: Limits) -> None:
    """Complete the document at /openapi.json: events of a stream, the model's name, those of OF_HEADS that it has, and
    the bounds of this server."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    schemas |= models_json_schema([(model, "validation") for model in DESCRIBED], ref_template=REFS)[1]["$defs"]
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own: here they are 400, in OpenAI's form
        schemas.pop(unused, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    bounds = {"max_images": limits.images, "n": limits.images}
    bounds |= dict.fromkeys(("steps", OTHER_NAMES["steps"]), limits.steps)
    for request in (name for name in schemas if name.endswith("Request")):
        fields = schemas[request]["properties"]
        for name in OF_HEADS - options:
            fields.pop(name, None), fields.pop(OTHER_NAMES.get(name), None)
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
