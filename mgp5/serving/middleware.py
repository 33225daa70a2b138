"""Checks before the app: who may ask, how large a body is and how long it takes; errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import Callable
from urllib.parse import quote

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .loop import Refused
from .replies import error_body
from .request import WEB_PATH
from .state import AppState

ERROR_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
HEALTH_PATH = "/health"  # needs no key
V1 = tuple(f"/v1/{path}" for path in ("chat/completions", "responses", "images/generations", "images/edits", "models"))
COUNTED = *V1, HEALTH_PATH, "/metrics", WEB_PATH


def error_response(refused: Refused) -> JSONResponse:
    """Return an error as an answer in the form of OpenAI's API."""
    return JSONResponse(error_body(refused).model_dump(), refused.status, ERROR_HEADERS.get(refused.status))


class AccessMiddleware:
    """ASGI middleware that checks host and key, reads the whole body within the limits, counts and logs answers.

    Args:
        state: has the limits, the names that a Host header may have, so that no web page reaches a local server under
            another name, and the number of answers by path and status, which is counted up here.
        key: API key that clients have to send; None asks for none.
        log: takes one line for each request that was answered, without what it holds; of the page's many, for those
            that open it or ask it for something.
    """

    def __init__(self, app: ASGIApp, state: AppState, key: str | None, log: Callable[[str], None]) -> None:
        self.app, self.limits, self.answers, self.log = app, state.limits, state.answers, log
        self.hosts, self.key = state.request.hosts(key), None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        status, started = "no answer", time.monotonic()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                path = next((path for path in COUNTED if scope["path"].startswith(path)), "other")
                self.answers.labels(path, status).inc()
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_access(scope, headers)
            body = await self._read_body(headers, receive)
        except Refused as refused:
            response = error_response(refused)
            if refused.status == 401 and _is_page(scope):
                response.headers["WWW-Authenticate"] = 'Basic realm="mgp5: any name, the API key as password"'
            await response(scope, receive, counted)
        else:
            if scope["path"].startswith("/v1/"):
                scope["path"] = scope["path"].rstrip("/")  # as some proxies write it
            await self.app(scope, replay(body, receive), counted)
        finally:
            method, path, client = scope["method"], quote(scope["path"])[:100], (scope["client"] or ["-"])[0]
            if method != "GET" or not path.startswith(WEB_PATH) or path == WEB_PATH:
                seconds = time.monotonic() - started
                self.log(f"{time.strftime('%F %T')} {client} {method} {path} {status} {seconds:.2f} s")

    def _check_access(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise Refused for a wrong host or key."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        host = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if self.hosts is not None and host not in self.hosts:
            raise Refused(421, "the Host header does not name this server: ask for localhost", "wrong_host")
        if self.key is None or scope["path"] == HEALTH_PATH:
            return
        scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        key = credentials.strip() if scheme.lower() == b"bearer" else b""
        if scheme.lower() == b"basic" and _is_page(scope):
            try:
                key = base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                key = b""
        if not hmac.compare_digest(key, self.key):
            raise Refused(401, "the API key is missing or wrong: send Authorization: Bearer KEY", "invalid_api_key")

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Return the whole body. Raises Refused when it is too large or too slow.
        A body that is too large is read to its end and thrown away: a client that still sends would not read why."""
        size, most, seconds = (
            int(headers.get(b"content-length", b"0")),
            self.limits.body_bytes,
            self.limits.body_seconds,
        )
        large = Refused(413, f"the body has more than {most:,} bytes, the most this server reads", "body_too_large")
        if size > most and b"expect" in headers:  # the client has not sent it yet
            raise large
        parts, read, more = [], 0, True
        try:
            async with asyncio.timeout(seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the client left before its request was complete", "incomplete")
                    parts.append(message.get("body", b""))
                    read, more = read + len(parts[-1]), message.get("more_body", False)
                    if (size := max(size, read)) > most:
                        parts.clear()
        except TimeoutError:
            late = Refused(408, f"the body did not arrive within {seconds:g} seconds", "timeout")
            raise (large if size > most else late) from None
        if size > most:
            raise large
        return b"".join(parts)


def _is_page(scope: Scope) -> bool:
    return scope["path"] in ("/", "/docs", "/favicon.ico") or scope["path"].startswith(WEB_PATH)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body in one message, then what else comes: that the client left."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed


def hang_up_after(seconds: float) -> type[H11Protocol]:
    """Return an HTTP/1.1 protocol that closes connections that have not sent their first headers by then."""

    class ImpatientProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.loop.call_later(seconds, lambda: None if self.cycle else transport.close())

    return ImpatientProtocol
