"""What of gradio's app can be reached: the page, its own files, its queue and uploads. Nothing else is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders

from ..engine import Refused
from ..guard import PAGE, error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PARTS = ("", "config", "theme.css", "favicon.ico", "manifest.json")
FOLDERS = ("assets/", "static/")
API = "gradio_api/"
CALLS = {"GET": ("startup-events", "queue/data", "upload_progress"), "POST": ("queue/join", "upload", "cancel")}
FILE = f"{API}file="
# Nothing is fetched from elsewhere, whatever a reply says; gradio's page is made of inline scripts and styles.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'none'; object-src 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


class Doors:
    """An ASGI app before one that has gradio's at PAGE.

    Args:
        folder: of the files that pages may fetch and name: what was uploaded and drawn.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.folder = app, folder.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or not scope["path"].startswith(PAGE):
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update({"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"})
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._admit(scope)
            if scope["path"].endswith("queue/join"):
                receive = await self._read(receive)
        except Refused as refused:
            await error_response(refused)(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    def _admit(self, scope: Scope) -> None:
        """Raise Refused for what the page does not need, and for pages of other origins."""
        headers, path = dict(scope["headers"]), scope["path"].removeprefix(PAGE)
        origin = headers.get(b"origin", b"").partition(b"://")
        if origin[0] and origin[2] != headers.get(b"host"):
            raise Refused(403, "a page of another origin asks", "wrong_origin")
        if path.startswith(FILE):
            self._own(path.removeprefix(FILE))
        elif scope["method"] in ("GET", "HEAD") and (path in PARTS or path.startswith(FOLDERS)):
            return
        elif not path.startswith(API) or path.removeprefix(API) not in CALLS.get(scope["method"], ()):
            raise Refused(404, "there is nothing here", "not_found")

    async def _read(self, receive: Receive) -> Receive:
        """Check which files an event names. Raises Refused for any but uploaded and drawn ones."""
        first = await receive()  # whole: the guard has read it
        try:
            waiting: list[Any] = [json.loads(first.get("body", b""))]
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON", "invalid_value") from None
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict) and value.get("path") is not None:
                self._own(str(value["path"]))
            waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        messages = [first]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return again

    def _own(self, path: str) -> None:
        try:
            own = Path(path).resolve().is_relative_to(self.folder)
        except (OSError, ValueError):  # too long, a null byte
            own = False
        if not own:
            raise Refused(403, "the file is none of this page's", "not_found")
