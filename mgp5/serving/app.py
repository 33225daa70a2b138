"""The web app: OpenAI's chat completions and images, whose replies hold text and pictures in order."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from .. import __version__
from ..events import Event, Finished, ImageDone, ImageStep, TextChunk
from ..messages import Conversation, Image, Text
from ..options import Options
from . import openapi
from .engine import Job, Refused, ServingEngine
from .guard import Guard, error_body, error_response
from .limits import Limits
from .metrics import metrics
from .schema import ChatRequest, ImagesRequest, chat_options, conversation, image_options

if TYPE_CHECKING:
    from starlette.types import ASGIApp

T = TypeVar("T")
READERS = 2  # pictures of clients are decoded in so many threads


def make_app(
    engine: ServingEngine,
    name: str,
    limits: Limits,
    key: str | None = None,
    hosts: frozenset[str] | None = None,
    web: bool = False,
) -> ASGIApp:
    """The app of an engine that has not started: it starts and stops with the app.

    Args:
        name: of the model, as clients say it.
        key, hosts: see `Guard`.
        web: whether there is a page for browsers too, at `guard.PAGE`.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await to_thread.run_sync(engine.stop)

    pages = {"docs_url": None, "redoc_url": None, "separate_input_output_schemas": False}
    app = FastAPI(title="mgp5", version=__version__, description=openapi.ABOUT, lifespan=life, **pages)
    answers: Counter = Counter()
    app.state.desk = AppState(engine, name, limits, answers)
    json_only = {"methods": ["POST"], "dependencies": [Depends(_json_only)], "response_model": None}
    app.add_api_route("/v1/chat/completions", chat, responses=openapi.CHAT, **json_only)
    app.add_api_route("/v1/images/generations", images, responses=openapi.IMAGES, **json_only)
    app.add_api_route("/v1/models", models, responses=openapi.MODELS, response_model=None)
    app.add_api_route("/v1/models/{model:path}", one_model, responses=openapi.MODEL, response_model=None)
    app.add_api_route("/health", health, responses=openapi.HEALTH, response_model=None)
    app.add_api_route("/metrics", metrics, responses=openapi.METRICS, response_class=PlainTextResponse)
    openapi.describe(app, name, limits, key is not None)
    app.add_exception_handler(Refused, lambda _, error: error_response(error))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, lambda *_: error_response(Refused(500, "it failed", "internal_error")))
    if web:
        from .web.page import put_page

        put_page(app, app.state.desk)
    return Guard(app, limits, key, hosts, answers)


class AppState:
    """What all requests share."""

    def __init__(self, engine: ServingEngine, name: str, limits: Limits, answers: Counter) -> None:
        self.engine, self.name, self.limits, self.answers = engine, name, limits, answers
        self.readers = CapacityLimiter(READERS)
        self.created = int(time.time())

    def check(self, model: str) -> None:
        """Raise Refused for another model."""
        if model != self.name:
            raise Refused(404, f"there is no model of this name, expected {self.name}", "model_not_found", "model")

    async def run(self, talk: Conversation, options: list[Options], timeout: float | None) -> list[Running]:
        """Put replies to a conversation in the queue, all or none. Raises Refused when it is full."""
        deadline = time.monotonic() + min(timeout or self.limits.seconds, self.limits.seconds)
        running = [Running(self.engine, talk, own, deadline) for own in options]
        self.engine.submit(*(one.job for one in running))
        return running


class Running:
    """A job as seen from the web app's thread."""

    def __init__(self, engine: ServingEngine, talk: Conversation, options: Options, deadline: float) -> None:
        self.engine, self.loop = engine, asyncio.get_running_loop()
        self.queue: asyncio.Queue[Event | Refused] = asyncio.Queue()
        self.job = Job(talk, options, self._deliver, deadline)

    def _deliver(self, event: Event | Refused) -> None:
        with suppress(RuntimeError):  # the app ended before the engine
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """Events until Finished; leaving early cancels the job. Raises Refused when it failed."""
        try:
            while True:
                event = await self.queue.get()
                if isinstance(event, Refused):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.engine.cancel(self.job)

    async def finish(self) -> Finished:
        """The last event."""
        async for event in self.events():
            last = event
        return last


async def chat(body: ChatRequest, request: Request) -> Response:
    """A reply in text and pictures, whole or streamed."""
    desk: AppState = request.app.state.desk
    desk.check(body.model)
    options = chat_options(body, desk.limits, desk.engine.model)
    talk = await to_thread.run_sync(conversation, body.messages, desk.limits, limiter=desk.readers)
    (running,) = await desk.run(talk, [options], body.timeout)
    facts = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": desk.name}
    facts["seed"] = options.seed
    if body.stream:
        events = running.events()
        first = await _unless_gone(request, anext(events), running)  # what is refused has its status
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(_stream(first, events, facts, usage), media_type="text/event-stream")
    done = await _unless_gone(request, running.finish(), running)
    parts = [await _part(part) for part in done.message.content]
    plain = body.modalities == ["text"]
    message = {"role": "assistant", "content": done.message.text if plain else parts}
    choice = {"index": 0, "message": message, "finish_reason": done.reason, "logprobs": None}
    return JSONResponse(facts | {"object": "chat.completion", "choices": [choice], "usage": _usage(done)})


async def images(body: ImagesRequest, request: Request) -> Response:
    """Pictures of a prompt."""
    desk: AppState = request.app.state.desk
    desk.check(body.model)
    options = image_options(body, desk.limits, desk.engine.model)
    running = await desk.run(Conversation().add("user", body.prompt), options, body.timeout)
    done = await _unless_gone(request, asyncio.gather(*(one.finish() for one in running)), *running)
    found = [(image, own.image_seed) for one, own in zip(done, options, strict=True) for image in one.message.images]
    data = [{"b64_json": await _base64(image), "seed": seed} for image, seed in found]
    read = sum(one.meta["prefilled"] for one in done)
    usage = {"input_tokens": read, "output_tokens": 0, "total_tokens": read, "images": len(data)}
    return JSONResponse({"created": int(time.time()), "data": data, "usage": usage})


async def models(request: Request) -> dict[str, Any]:
    """What is served."""
    return {"object": "list", "data": [_model(request.app.state.desk)]}


async def one_model(model: str, request: Request) -> dict[str, Any]:
    """The same by its name."""
    request.app.state.desk.check(model)
    return _model(request.app.state.desk)


async def health(request: Request) -> Response:
    """Whether requests are served."""
    engine = request.app.state.desk.engine
    state = {"status": "ok" if engine.alive else "failed", "running": len(engine.seats), "waiting": len(engine.queue)}
    return JSONResponse(state, 200 if engine.alive else 503)


def _model(desk: AppState) -> dict[str, Any]:
    return {"id": desk.name, "object": "model", "created": desk.created, "owned_by": "mgp5"}


async def _stream(first: Event, events: AsyncIterator[Event], facts: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Server-sent events: text as it comes, steps of the denoising, each picture when it is done, [DONE]."""

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event(facts | {"object": "chat.completion.chunk", "choices": [choice]} | more)

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for event in _with_first(first, events):
            match event:
                case TextChunk():
                    yield chunk({"content": event.text})
                case ImageStep():
                    yield chunk({}, progress={"image": event.image, "step": event.step, "total": event.total})
                case ImageDone():
                    yield chunk({"content": [await _part(event.image)]})
                case Finished():
                    yield chunk({}, event.reason)
                    if usage:
                        closing = {"object": "chat.completion.chunk", "choices": [], "usage": _usage(event)}
                        yield _event(facts | closing)
    except Refused as refused:
        yield _event({"error": error_body(refused)})
    yield "data: [DONE]\n\n"


async def _with_first(first: Event, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    try:
        yield first
        async for event in events:
            yield event
    finally:
        await events.aclose()  # cancels a job whose client left


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _unless_gone(request: Request, work: Awaitable[T], *running: Running) -> T:
    """Wait for work; when the client leaves, its jobs are cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client left", "client_left")
        return task.result()
    except BaseException:
        for one in running:
            one.engine.cancel(one.job)
        raise
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _usage(done: Finished) -> dict[str, int]:
    read, written = done.meta["prefilled"], done.meta["tokens"]
    counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return counts | {"images": len(done.message.images)}


async def _part(part: Text | Image) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{await _base64(part)}"}}


async def _base64(image: Image) -> str:
    return await to_thread.run_sync(_png, image)


def _png(image: Image) -> str:
    buffer = BytesIO()
    image.load().save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _json_only(request: Request) -> None:
    """Raise Refused for another kind of body: web pages send those anywhere, and JSON only where they may."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the content type is not application/json", "wrong_content_type")


def _invalid(_: Request, error: Exception) -> Response:
    """The first thing wrong with a body: where, and what was expected, without what was sent."""
    first = error.errors()[0]
    path = ".".join(str(step) for step in first["loc"][1:])
    where = f"{path}: " if path and first["type"] != "json_invalid" else ""
    return error_response(Refused(400, f"{where}{first['msg']}"[:300], "invalid_value", path[:100] or None))


def _http_error(_: Request, error: Exception) -> Response:
    answer = error_response(Refused(error.status_code, str(error.detail), "invalid_request"))
    answer.headers.update(error.headers or {})  # Allow, of 405
    return answer
