"""The web app: OpenAI's chat completions and images, with replies that hold text and images in order."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from .. import __version__
from ..events import Event, Finished, ImageDone, ImageStep, TextChunk
from ..messages import Conversation, Image, Text
from ..options import Options
from . import replies
from .loop import Job, Refused, ServingLoop
from .metrics import CONTENT_TYPE, Metrics
from .middleware import AccessMiddleware, error_body, error_response
from .schema import ChatRequest, ImagesRequest, chat_options, conversation, image_options

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from ..model import InterleavedModel
    from .request import ServeRequest

T = TypeVar("T")
IMAGE_THREADS = 2  # threads that decode images of clients


def make_app(
    loop: ServingLoop,
    request: ServeRequest,
    key: str | None = None,
    add_page: Callable[[FastAPI, AppState], None] | None = None,
) -> ASGIApp:
    """Return the app of a serving loop; the loop starts and stops with the app.

    Args:
        loop: it has not started.
        request: names the model, the limits and the hosts.
        key: API key that clients have to send; None asks for none.
        add_page: adds a page for browsers to the app, such as `web.page.add_page`.
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
    errors = partial(replies.errors, key is not None)
    generates = {"methods": ["POST"], "dependencies": [Depends(_json_only), *keyed]}
    for path, route, model, responses, more in (
        ("/v1/chat/completions", chat, replies.ChatReply, errors(*replies.GENERATES) | replies.EVENTS, generates),
        ("/v1/images/generations", images, replies.ImagesReply, errors(*replies.GENERATES), generates),
        ("/v1/models", models, replies.Models, errors(), {"dependencies": keyed}),
        ("/v1/models/{model:path}", one_model, replies.Model, errors(404), {"dependencies": keyed}),
        ("/health", health, replies.Health, replies.errors(False) | replies.FAILED, {}),
        ("/metrics", metrics, None, errors() | replies.PLAIN, {"dependencies": keyed, "response_class": Response}),
    ):
        more = {"response_model": model, "response_model_exclude_unset": True, "responses": responses, **more}
        app.add_api_route(path, route, **more)
    replies.complete_document(app, request.model_name, request.limits)
    app.add_exception_handler(Refused, lambda _, error: error_response(error))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, lambda *_: error_response(Refused(500, "it failed", "internal_error")))
    if add_page:
        add_page(app, state)
    return AccessMiddleware(app, request.limits, key, request.hosts(key), state.metrics.answers)


def make_loop(request: ServeRequest, model: InterleavedModel, cores: int) -> ServingLoop:
    """Return the loop of a server that has so many cores; it does not run yet."""
    workers = max(1, cores // torch.get_num_threads()) if model.device.type == "cpu" else 1
    return ServingLoop(model, request.rows, request.waiting, workers)


class AppState:
    """What all requests share.

    Attributes:
        name: name of the model as clients say it.
        image_threads: limits how many threads decode images of clients.
        created: when the app was made, in seconds since 1970.
    """

    def __init__(self, loop: ServingLoop, request: ServeRequest) -> None:
        self.loop, self.request, self.limits, self.name = loop, request, request.limits, request.model_name
        self.metrics = Metrics(loop)
        self.image_threads = CapacityLimiter(IMAGE_THREADS)
        self.created = int(time.time())

    def check(self, model: str) -> None:
        """Raise Refused for another model."""
        if model != self.name:
            raise Refused(404, f"there is no model of this name, expected {self.name}", "model_not_found", "model")

    def submit(self, talk: Conversation, options: list[Options], timeout: float | None) -> list[ReplyStream]:
        """Put one reply to a conversation for each of `options` into the queue, all of them or none.

        Args:
            timeout: seconds; the server's limit is the longest.

        Raises:
            Refused: the queue is full, or the server stops.
        """
        deadline = time.monotonic() + min(timeout or self.limits.seconds, self.limits.seconds)
        streams = [ReplyStream(self.loop, talk, one, deadline) for one in options]
        self.loop.submit(*(stream.job for stream in streams))
        return streams


class ReplyStream:
    """The events of one reply, handed from the serving loop's thread to the thread of the web app."""

    def __init__(self, loop: ServingLoop, talk: Conversation, options: Options, deadline: float) -> None:
        self.loop, self.asyncio_loop = loop, asyncio.get_running_loop()
        self.queue: asyncio.Queue[Event | Refused] = asyncio.Queue()
        self.job = Job(talk, options, self._deliver, deadline)

    def _deliver(self, event: Event | Refused) -> None:
        with suppress(RuntimeError):  # the app ended before the serving loop
            self.asyncio_loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """Yield events until Finished; closing the iterator early cancels the reply. Raises Refused when it failed."""
        try:
            while True:
                event = await self.queue.get()
                if isinstance(event, Refused):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.loop.cancel(self.job)

    async def finish(self) -> Finished:
        """Return the last event. Raises Refused when the reply failed."""
        async for event in self.events():
            last = event
        return last


async def chat(body: ChatRequest, request: Request) -> replies.ChatReply | Response:
    """Reply to a conversation in text and images, whole or streamed."""
    state: AppState = request.app.state.serving
    state.check(body.model)
    options = chat_options(body, state.limits, state.loop.model)
    talk = await to_thread.run_sync(conversation, body.messages, state.limits, limiter=state.image_threads)
    (reply,) = state.submit(talk, [options], body.timeout)
    info = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": state.name}
    info["seed"] = options.seed
    if body.stream:
        events = reply.events()
        first = await _unless_gone(request, anext(events), reply)  # a refused request gets its own status
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(_stream(first, events, info, usage), media_type="text/event-stream")
    done = await _unless_gone(request, reply.finish(), reply)
    content = done.message.text if body.modalities == ["text"] else [await _part(part) for part in done.message.content]
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": done.reason, "logprobs": None}
    return replies.ChatReply(**info, object="chat.completion", choices=[choice], usage=_usage(done))


async def images(body: ImagesRequest, request: Request) -> replies.ImagesReply:
    """Draw images of a prompt."""
    state: AppState = request.app.state.serving
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


async def models(request: Request) -> replies.Models:
    """List the one model."""
    return replies.Models(object="list", data=[_model(request.app.state.serving)])


async def one_model(model: str, request: Request) -> replies.Model:
    """Describe the model of this name."""
    request.app.state.serving.check(model)
    return _model(request.app.state.serving)


async def health(request: Request, response: Response) -> replies.Health:
    """Tell whether requests are served."""
    loop = request.app.state.serving.loop
    response.status_code = 200 if loop.alive else 503
    return replies.Health(status="ok" if loop.alive else "failed", running=loop.running, waiting=loop.waiting)


async def metrics(request: Request) -> Response:
    """Tell the counters in Prometheus' text format."""
    return Response(request.app.state.serving.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _model(state: AppState) -> replies.Model:
    return replies.Model(id=state.name, object="model", created=state.created, owned_by="mgp5")


async def _stream(first: Event, events: AsyncIterator[Event], info: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events: text as it comes, denoising steps, each image when it is done, [DONE].

    Args:
        info: fields that all chunks have.
        usage: whether a last chunk has the usage.
    """

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event(replies.ChatChunk(**info, object="chat.completion.chunk", **{"choices": [choice], **more}))

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
                        yield chunk({}, choices=[], usage=_usage(event))
    except Refused as refused:
        yield _event(error_body(refused))
    yield "data: [DONE]\n\n"


async def _with_first(first: Event, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    try:
        yield first
        async for event in events:
            yield event
    finally:
        await events.aclose()  # cancels the reply of a client that left


def _event(value: replies.Reply) -> str:
    return f"data: {value.model_dump_json(exclude_unset=True)}\n\n"


async def _unless_gone(request: Request, work: Awaitable[T], *streams: ReplyStream) -> T:
    """Wait for `work`; when the client leaves, its replies are cancelled and Refused is raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client left", "client_left")
        return task.result()
    except BaseException:  # a cancelled request too leaves no reply behind
        for stream in streams:
            stream.loop.cancel(stream.job)
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
    """Raise Refused for another kind of body: a web page may send those to any address, JSON only where allowed."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the content type is not application/json", "wrong_content_type")


def _invalid(_: Request, error: Exception) -> Response:
    """Answer with the first thing wrong with a body: where, and what was expected, without what was sent."""
    first = error.errors()[0]
    path = ".".join(str(step) for step in first["loc"][1:])
    where = f"{path}: " if path and first["type"] != "json_invalid" else ""
    return error_response(Refused(400, f"{where}{first['msg']}"[:300], "invalid_value", path[:100] or None))


def _http_error(_: Request, error: Exception) -> Response:
    answer = error_response(Refused(error.status_code, str(error.detail), "invalid_request"))
    answer.headers.update(error.headers or {})  # Allow, of 405
    return answer
