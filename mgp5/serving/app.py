"""The web app: OpenAI's chat completions and images, with replies that hold text and images in order."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Annotated, Any

import torch
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, ProcessCollector, generate_latest
from starlette.exceptions import HTTPException

from .. import __version__
from ..apps.open_model import Tell, silent
from ..events import Event, Finished, ImageDone, ImageStep, TextChunk
from ..messages import Conversation, Image, Text
from ..options import Options
from . import replies
from .loop import Job, Refused, ServingLoop
from .middleware import AccessMiddleware, error_body, error_response
from .request import WEB_PATH
from .schema import ChatRequest, ImagesRequest, chat_options, conversation, explain, image_options

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from ..model import InterleavedModel
    from .request import ServeRequest

IMAGE_THREADS = 2  # threads that decode images of clients


def make_app(
    loop: ServingLoop,
    request: ServeRequest,
    key: str | None = None,
    add_page: Callable[[FastAPI, AppState], None] | None = None,
    log: Tell = silent,
) -> ASGIApp:
    """Return the app of a serving loop, which starts and stops with the app.

    Args:
        key: API key that clients have to send; None asks for none.
        add_page: adds a page for browsers to the app, such as `web.page.add_page`.
        log: takes a line for each request, see `AccessMiddleware`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop.start()
        yield
        await to_thread.run_sync(loop.stop)

    pages = {"docs_url": None, "redoc_url": None, "separate_input_output_schemas": False}
    app = FastAPI(title="mgp5", version=__version__, description=replies.ABOUT, lifespan=lifespan, **pages)
    app.state.serving = state = AppState(loop, request)
    keyed = [] if key is None else [Security(HTTPBearer(scheme_name="key", auto_error=False))]  # for the document
    app.include_router(keyed_routes, dependencies=keyed)
    app.include_router(open_routes)
    replies.complete_document(app, request.model_name, request.limits)
    app.add_exception_handler(Refused, lambda _, error: error_response(error))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, lambda *_: error_response(Refused(500, "it failed", "internal_error")))
    if add_page:
        add_page(app, state)
    return AccessMiddleware(app, request.limits, key, request.hosts(key), state.answers, log)


def make_loop(request: ServeRequest, model: InterleavedModel, cores: int) -> ServingLoop:
    """Return the loop of a server that has so many cores; it does not run yet."""
    workers = max(1, cores // torch.get_num_threads()) if model.device.type == "cpu" else 1
    return ServingLoop(model, request.rows, request.waiting, workers)


class AppState:
    """What all requests share."""

    def __init__(self, loop: ServingLoop, request: ServeRequest) -> None:
        self.loop, self.request, self.limits, self.name = loop, request, request.limits, request.model_name
        self.metrics = CollectorRegistry()
        self.metrics.register(loop)
        ProcessCollector(registry=self.metrics)  # memory, processor time and open files, where there is a /proc
        self.answers = Counter("mgp5_answers", "Answers sent.", ("path", "status"), registry=self.metrics)
        self.image_threads = CapacityLimiter(IMAGE_THREADS)
        self.description = replies.Model(id=self.name, object="model", created=int(time.time()), owned_by="mgp5")

    def check(self, model: str | None) -> None:
        """Raise Refused for another model."""
        if model not in (None, self.name):
            raise Refused(404, f"there is no model of this name, expected {self.name}", "model_not_found", "model")

    def submit(self, talk: Conversation, options: list[Options], timeout: float | None) -> list[ReplyStream]:
        """Queue one reply to a conversation for each of `options`, all of them or none; `timeout` is in seconds.

        Raises Refused if the queue is full, or the server stops.
        """
        deadline = time.monotonic() + min(timeout or self.limits.seconds, self.limits.seconds)
        streams = [ReplyStream(self.loop, talk, one, deadline) for one in options]
        self.loop.submit(*streams)
        return streams


class ReplyStream(Job):
    """The events of one reply, handed from the serving loop's thread to the thread of the web app."""

    def __init__(self, loop: ServingLoop, talk: Conversation, options: Options, deadline: float) -> None:
        super().__init__(talk, options, self._put, deadline)
        self.loop, self.asyncio_loop = loop, asyncio.get_running_loop()
        self.queue: asyncio.Queue[Event | Refused] = asyncio.Queue()

    def _put(self, event: Event | Refused) -> None:
        with suppress(RuntimeError):  # the app ended before the serving loop
            self.asyncio_loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def next(self) -> Event:
        """Return the next event; Finished is the last one. Raises Refused when the reply failed."""
        event = await self.queue.get()
        if isinstance(event, Refused):
            raise event
        return event

    async def finish(self) -> Finished:
        """Return the last event. Raises Refused when the reply failed."""
        while not isinstance(event := await self.next(), Finished):
            pass
        return event

    def close(self) -> None:
        """Cancel the reply if it is not finished."""
        self.loop.cancel(self)


async def _state(request: Request) -> AppState:
    return request.app.state.serving


def _json_only(request: Request) -> None:
    """Raise Refused for another kind of body: a web page may send those to any address, JSON only where allowed."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the content type is not application/json", "wrong_content_type")


keyed_routes, open_routes = APIRouter(), APIRouter()
State = Annotated[AppState, Depends(_state)]
GENERATES = {"dependencies": [Depends(_json_only)], "response_model_exclude_unset": True}
GENERATE_ERRORS = replies.errors(401, 404, 415, 429, 503, 504)


@keyed_routes.post(
    "/v1/chat/completions", response_model=replies.ChatReply, responses=GENERATE_ERRORS | replies.EVENTS, **GENERATES
)
async def chat(body: ChatRequest, request: Request, state: State) -> replies.ChatReply | Response:
    """Reply to a conversation in text and images, whole or streamed."""
    state.check(body.model)
    options = chat_options(body, state.limits, state.loop.model)
    talk = await to_thread.run_sync(conversation, body.messages, state.limits, limiter=state.image_threads)
    (reply,) = state.submit(talk, [options], body.timeout)
    info = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": state.name}
    info["seed"] = options.seed
    if body.stream:
        first = await _unless_gone(request, reply.next(), reply)  # a refused request gets its own status
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(_stream(reply, first, info, usage), media_type="text/event-stream")
    done = await _unless_gone(request, reply.finish(), reply)
    parts = done.message.content
    content = [await _part(part) for part in parts] if done.message.images else done.message.text
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": done.reason, "logprobs": None}
    return replies.ChatReply(**info, object="chat.completion", choices=[choice], usage=_usage(done))


@keyed_routes.post("/v1/images/generations", responses=GENERATE_ERRORS, **GENERATES)
async def images(body: ImagesRequest, request: Request, state: State) -> replies.ImagesReply:
    """Draw images of a prompt."""
    state.check(body.model)
    options = image_options(body, state.limits, state.loop.model)
    streams = state.submit(Conversation().add("user", body.prompt), options, body.timeout)
    done = await _unless_gone(request, asyncio.gather(*(stream.finish() for stream in streams)), *streams)
    data = [
        {"b64_json": await _base64(image), "seed": one.image_seed}
        for reply, one in zip(done, options, strict=True)
        for image in reply.message.images
    ]
    tokens = sum(reply.meta["prefilled"] for reply in done)
    usage = {"input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens, "images": len(data)}
    return replies.ImagesReply(created=int(time.time()), data=data, usage=usage)


@keyed_routes.get("/v1/models", responses=replies.errors(401))
async def models(state: State) -> replies.Models:
    """List the one model."""
    return replies.Models(object="list", data=[state.description])


@keyed_routes.get("/v1/models/{model:path}", responses=replies.errors(401, 404))
async def one_model(model: str, state: State) -> replies.Model:
    """Describe the model of this name."""
    state.check(model)
    return state.description


@keyed_routes.get("/metrics", response_class=Response, responses=replies.errors(401) | replies.PLAIN)
async def metrics(state: State) -> Response:
    """Tell the counters in Prometheus' text format."""
    return Response(generate_latest(state.metrics), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


@open_routes.get("/health", responses=replies.errors() | {503: {"model": replies.Health}})
async def health(state: State, response: Response) -> replies.Health:
    """Tell whether requests are served."""
    loop = state.loop
    response.status_code = 200 if loop.alive else 503
    return replies.Health(status="ok" if loop.alive else "failed", running=loop.running, waiting=loop.waiting)


@open_routes.get("/", include_in_schema=False)
@open_routes.get("/docs", include_in_schema=False)
async def front(request: Request, state: State) -> Response:
    """Lead a visitor with a browser to the page, or tell what is at which address."""
    if state.request.web and request.url.path == "/":
        return RedirectResponse(WEB_PATH)
    return HTMLResponse(replies.front_page(request.app, state.name))


async def _stream(reply: ReplyStream, event: Event, info: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events: text as it comes, denoising steps, each image when it is done, [DONE].

    Args:
        event: the first one of the reply.
        info: fields that all chunks have.
        usage: whether a last chunk has the usage.
    """

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _line(replies.ChatChunk(**info, object="chat.completion.chunk", **{"choices": [choice], **more}))

    try:
        yield chunk({"role": "assistant", "content": ""})
        while not isinstance(event, Finished):
            match event:
                case TextChunk():
                    yield chunk({"content": event.text})
                case ImageStep():
                    yield chunk({}, progress={"image": event.image, "step": event.step, "total": event.total})
                case ImageDone():
                    yield chunk({"content": [await _part(event.image)]})
            event = await reply.next()
        yield chunk({}, event.reason)
        if usage:
            yield chunk({}, choices=[], usage=_usage(event))
    except Refused as refused:
        yield _line(error_body(refused))
    finally:
        reply.close()  # that of a client that left
    yield "data: [DONE]\n\n"


def _line(value: replies.Reply) -> str:
    return f"data: {value.model_dump_json(exclude_unset=True)}\n\n"


async def _unless_gone(request: Request, work: Awaitable, *streams: ReplyStream) -> Any:
    """Wait for `work`; when the client leaves, its replies are cancelled and Refused is raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client left", "client_left")
        return task.result()
    except BaseException:  # a cancelled request too leaves no reply behind
        for stream in streams:
            stream.close()
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
    def encode() -> str:
        buffer = BytesIO()
        image.load().save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    return await to_thread.run_sync(encode)


def _invalid(_: Request, error: Exception) -> Response:
    return error_response(explain([one | {"loc": one["loc"][1:]} for one in error.errors()], error.body))


def _http_error(request: Request, error: Exception) -> Response:
    headers, words = error.headers or {}, str(error.detail)
    if error.status_code == 404:
        words = f"there is nothing at this address, expected {', '.join(replies.addresses(request.app))}"
    elif "Allow" in headers:
        words = f"{request.method} is not answered at this address, expected {headers['Allow']}"
    answer = error_response(Refused(error.status_code, words, "invalid_request"))
    answer.headers.update(headers)
    return answer
