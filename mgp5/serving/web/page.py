"""The page for browsers: a chat and a story, by gradio, of whose app only what the page needs can be reached."""

from __future__ import annotations

import json
import os
import tempfile
from html import escape
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...storyland.world import ATTRIBUTES
from ..loop import Refused
from ..middleware import error_response, replay
from ..request import WEB_PATH
from ..state import AppState
from .chat import add_chat
from .session import HIDDEN, PageSession
from .story import StoryTab

PAGES = 200  # pages that are remembered, the ones used last
CACHE_SECONDS = 6 * 3600  # for which gradio keeps files
FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
ROUTES = ("", "config", "theme.css", "favicon.ico", "manifest.json")
API = "gradio_api/"
FOLDERS = ("assets/", "static/", f"{API}heartbeat/")  # gradio forgets a page whose heartbeat has ended
EVENTS = ("queue/join", "run/predict")  # their bodies may name files
CALLS = {"GET": ("startup-events", "queue/data", "upload_progress"), "POST": (*EVENTS, "upload", "cancel", "reset")}
FILE = f"{API}file="
# A secret of a browser's tab, which outlives a reload; by what there is on plain http too.
TICKET = """() => sessionStorage.mgp5 ??= Array.from(
    crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("")"""
# Nothing is fetched from another host, whatever a reply says; gradio's page is made of inline scripts and styles.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'none'; object-src 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


def add_page(app: FastAPI, state: AppState) -> None:
    """Add the page to the app, at WEB_PATH. Files that it shows are in a folder that is deleted with the app."""
    app.state.page_files = holder = tempfile.TemporaryDirectory(prefix="mgp5-page-")
    folder, sources = Path(holder.name).resolve(), Path(__file__).parent
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # where gradio puts uploads
    app.add_api_route("/favicon.ico", lambda: FileResponse(sources / "icon.svg"), include_in_schema=False)
    gr.mount_gradio_app(
        app,
        make_blocks(state, folder),
        WEB_PATH.rstrip("/"),
        root_path=WEB_PATH.rstrip("/"),  # in addresses of files; gradio loses it in events without its queue
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=state.limits.body_bytes,
        theme=gr.themes.Soft(primary_hue="orange", neutral_hue="stone", font=FONT, font_mono=("monospace",)),
        css_paths=sources / "page.css",
    )
    app.add_middleware(RouteFilter, folder=folder)


def _about(state: AppState) -> str:
    """Return what the model knows and draws, in words for visitors."""
    model = state.loop.model
    side = getattr(getattr(model.head, "generator", None), "native_size", None)
    size = f"pictures of {side} x {side} pixels" if side else "pictures"
    if model.config.world != "storyland":
        return f"{model.head.spec.name}: text and {size}"
    animals, places, things = (", ".join(ATTRIBUTES[name]) for name in ("species", "place", "prop"))
    return f"Knows a small world, in {size}: {animals}; {places}; {things.removeprefix('nothing, ')}"


def make_blocks(state: AppState, folder: Path) -> gr.Blocks:
    """Return the page; its images are kept in a folder."""
    title, keep = f"{state.name} · mgp5", (600, CACHE_SECONDS)
    with gr.Blocks(title=title, delete_cache=keep, fill_width=True) as blocks:
        session, ticket = gr.State(PageSession(folder)), gr.Textbox(visible=False)
        gr.HTML(f"<header><h1>{escape(state.name)}</h1><p>{escape(_about(state))}</p></header>", padding=False)
        with gr.Tabs():
            with gr.Tab("Chat", id="chat"):
                chat = add_chat(state, session)
            with gr.Tab("Story", id="story"):
                story = StoryTab(state, session)

        def restore(ticket: Any) -> list[Any]:
            """Return what a page shows that is loaded again; its ticket is a secret of the browser's tab."""
            kept = sessions.pop(str(ticket), None) or PageSession(folder)
            sessions[str(ticket)] = kept
            if len(sessions) > PAGES:
                del sessions[next(iter(sessions))]
            return [kept, *[kept.talk or gr.skip()] * len(chat), *story.view(kept)]

        sessions: dict[str, PageSession] = {}  # by ticket, the ones loaded last
        blocks.load(restore, ticket, [session, *chat, *story.shown], js=TICKET, **HIDDEN)
    blocks.state_session_capacity = PAGES
    return blocks.queue(default_concurrency_limit=None, max_size=2 * (state.request.rows + state.request.waiting))


class RouteFilter:
    """ASGI middleware before an app that has gradio's at WEB_PATH; pages may fetch and name files of one folder."""

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.folder = app, folder.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or not scope["path"].startswith(WEB_PATH):
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check_route(scope)
            if scope["path"].endswith(EVENTS):
                body = (await receive()).get("body", b"")  # whole: AccessMiddleware has read it
                self._check_files(body)
                receive = replay(body, receive)
        except Refused as refused:
            await error_response(refused)(scope, receive, with_headers)
        else:
            await self.app(scope, receive, with_headers)

    def _check_route(self, scope: Scope) -> None:
        """Raise Refused for what the page does not need, and for pages of other origins."""
        headers, path = dict(scope["headers"]), scope["path"].removeprefix(WEB_PATH)
        scheme, _, host = headers.get(b"origin", b"").partition(b"://")
        if scheme and host != headers.get(b"host"):
            raise Refused(403, "a page of another origin asks", "wrong_origin")
        if path.startswith(FILE):
            self._check_file(path.removeprefix(FILE))
        elif scope["method"] in ("GET", "HEAD") and (path in ROUTES or path.startswith(FOLDERS)):
            return
        elif not path.startswith(API) or path.removeprefix(API) not in CALLS.get(scope["method"], ()):
            raise Refused(404, "there is nothing at this address, expected the page at /ui/", "not_found")

    def _check_files(self, body: bytes) -> None:
        """Raise Refused for an event that names files other than uploaded and drawn ones."""

        def check(value: dict[str, Any]) -> dict[str, Any]:
            if value.get("path") is not None:
                self._check_file(str(value["path"]))
            return value

        try:
            json.loads(body, object_hook=check)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON", "invalid_value") from None

    def _check_file(self, path: str) -> None:
        try:
            inside = Path(path).resolve().is_relative_to(self.folder)
        except (OSError, ValueError):  # too long, a null byte
            inside = False
        if not inside:
            raise Refused(403, "the file is not one of this page's", "not_found")
