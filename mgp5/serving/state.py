"""What all requests share: the app's state, a reply's events on their way from the loop, answers as streams."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from io import BytesIO
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry, Counter, ProcessCollector

from ..events import Event, Finished, TextChunk
from ..messages import Conversation, Image, Message
from ..options import Options
from .loop import Job, Refused, ServingLoop
from .replies import Model, Reply, error_body, errors
from .request import ServeRequest

IMAGE_THREADS = 2  # threads that decode images of clients


class AppState:
    """What all requests share."""

    def __init__(self, loop: ServingLoop, request: ServeRequest) -> None:
        self.loop, self.request, self.limits, self.name = loop, request, request.limits, request.model_name
        self.metrics = CollectorRegistry()
        self.metrics.register(loop)
        ProcessCollector(registry=self.metrics)  # memory, processor time and open files, where there is a /proc
        self.answers = Counter("mgp5_answers", "Answers sent.", ("path", "status"), registry=self.metrics)
        self.image_threads = CapacityLimiter(IMAGE_THREADS)
        self.kept = KeptConversations(self.limits.responses, self.limits.response_bytes)
        self.description = Model(id=self.name, object="model", created=int(time.time()), owned_by="mgp5")

    def check(self, model: str | None) -> None:
        """Raise Refused for another model."""
        if model not in (None, self.name):
            raise Refused(404, f"there is no model of this name, expected {self.name}", "model_not_found", "model")

    async def in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        """Return what a function returns that decodes images of clients."""
        return await to_thread.run_sync(work, *args, limiter=self.image_threads)

    def submit(
        self, talk: Conversation, options: list[Options], timeout: float | None, **more: int | None
    ) -> list[ReplyStream]:
        """Queue one reply to a conversation for each of `options`, all of them or none; `timeout` is in seconds.
        `more` are `previews` and `left_out` of `Job`. Raises Refused if the queue is full, or the server stops."""
        deadline = time.monotonic() + min(timeout or self.limits.seconds, self.limits.seconds)
        streams = [ReplyStream(self.loop, talk, one, deadline, **more) for one in options]
        self.loop.submit(*streams)
        return streams


class KeptConversations:
    """The latest conversations by the id of their last reply: at most `count`, and `size` bytes of pixels and text.
    Their images are in memory. Conversations that go on share theirs, and count them all the same."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size, self.held = count, size, 0
        self._kept: OrderedDict[str, tuple[tuple[Message, ...], dict[str, str], int]] = OrderedDict()

    def put(self, name: str, messages: tuple[Message, ...], files: dict[str, str]) -> None:
        """Keep a conversation; the ones that were not asked for the longest are forgotten for it.
        `files` are the images of its last reply by their ids, in base64."""
        size = sum(map(len, (*files.values(), *(message.text for message in messages))))
        size += sum(3 * math.prod(image.pixels.size) for message in messages for image in message.images)
        self._kept[name] = messages, files, size
        self.held += size
        while self._kept and (len(self._kept) > self.count or self.held > self.size):
            self.held -= self._kept.popitem(last=False)[1][-1]

    def get(self, name: str) -> tuple[Message, ...]:
        """Return a conversation. Raises Refused for one that is not kept, or not any more."""
        if name not in self._kept:
            message = f"no such response is kept; this server keeps the last {self.count}: send the conversation itself"
            raise Refused(404, message, "previous_response_not_found", "previous_response_id")
        self._kept.move_to_end(name)
        return self._kept[name][0]

    def file(self, name: str | None) -> str:
        """Return an image of a kept reply, in base64. Raises Refused as `get` does."""
        found = next((files[name] for _, files, _ in self._kept.values() if name in files), None)
        if found is None:
            raise Refused(404, "no image of this id is kept: send its result", "item_not_found", "input")
        return found


class ReplyStream(Job):
    """The events of one reply, handed from the serving loop's thread to the thread of the web app."""

    def __init__(self, loop: ServingLoop, talk: Conversation, options: Options, deadline: float, **more: Any) -> None:
        super().__init__(talk, options, self._put, deadline, **more)
        self.loop, self.asyncio_loop = loop, asyncio.get_running_loop()
        self.queue: asyncio.Queue[Event | Refused] = asyncio.Queue()
        self._first: Event | None = None

    def _put(self, event: Event | Refused) -> None:
        with suppress(RuntimeError):  # the app ended before the serving loop
            self.asyncio_loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def begin(self) -> None:
        """Wait for the first event, which stays the next one. Raises Refused when the reply failed before it."""
        self._first = await self.next()

    async def next(self) -> Event:
        """Return the next event; Finished is the last one. Raises Refused when the reply failed."""
        event, self._first = self._first or await self.queue.get(), None
        if isinstance(event, Refused):
            raise event
        return event

    async def events(self) -> AsyncIterator[Event]:
        """Yield all events; texts are those of the finished message: without blanks at their ends.
        Raises Refused when the reply failed."""
        event, blanks = None, ""
        while not isinstance(event, Finished):
            event = await self.next()
            if isinstance(event, TextChunk):
                text = blanks + event.text
                blanks = text[len(text.rstrip()) :]
                if text.rstrip():
                    yield TextChunk(text.rstrip())
                continue
            blanks = ""
            yield event

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


State = Annotated[AppState, Depends(_state)]
EXACT = {"response_model_exclude_unset": True}  # keywords of routes that generate
TAKES_JSON = EXACT | {"dependencies": [Depends(_json_only)]}
GENERATE_ERRORS = errors(401, 404, 415, 429, 503, 504)


async def stream_response(
    request: Request,
    streams: list[ReplyStream],
    values: AsyncIterator[Reply],
    failed: Callable[[Refused], Reply] = error_body,
    end: str = "",
) -> StreamingResponse:
    """Return values that are made of replies as server-sent events; a value with a `type` is an event of this name.

    Args:
        failed: makes the last value of a reply that failed under way; before its first event, Refused is raised.
        end: follows the last value.
    """
    await unless_gone(request, streams[0].begin(), *streams)

    async def lines() -> AsyncIterator[str]:
        try:
            async for value in values:
                yield _line(value)
        except Refused as refused:
            yield _line(failed(refused))
        finally:
            for stream in streams:
                stream.close()  # that of a client that left
        yield end

    return StreamingResponse(lines(), media_type="text/event-stream")


def _line(value: Reply) -> str:
    name = f"event: {value.type}\n" if hasattr(value, "type") else ""
    return f"{name}data: {value.model_dump_json(exclude_unset=True)}\n\n"


async def unless_gone(request: Request, work: Awaitable, *streams: ReplyStream) -> Any:
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


async def base64_png(image: Image) -> str:
    """Return the PNG file of an image in base64."""

    def encode() -> str:
        buffer = BytesIO()
        image.load().save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    return await to_thread.run_sync(encode)
