"""The page for browsers: a chat and a story, by gradio."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from fastapi.responses import FileResponse, RedirectResponse

from ..request import WEB_PATH
from .chat import add_chat
from .routes import RouteFilter
from .session import PageSession
from .story import StoryTab

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..app import AppState

PAGES = 200  # pages that are remembered, the ones used last
CACHE_SECONDS = 6 * 3600  # for which gradio keeps files
FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")


def add_page(app: FastAPI, state: AppState) -> None:
    """Add the page to the app, at WEB_PATH. Files that it shows are in a folder that is deleted with the app."""
    app.state.page_files = holder = tempfile.TemporaryDirectory(prefix="mgp5-page-")
    folder, sources = Path(holder.name).resolve(), Path(__file__).parent
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # where gradio puts uploads
    app.add_api_route("/", lambda: RedirectResponse(WEB_PATH), include_in_schema=False)
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


def make_blocks(state: AppState, folder: Path) -> gr.Blocks:
    """Return the page; its images are kept in a folder."""
    title, keep = f"{state.name} · mgp5", (600, CACHE_SECONDS)
    with gr.Blocks(title=title, delete_cache=keep, fill_width=True) as blocks:
        session = gr.State(PageSession(folder))
        gr.HTML("<header><h1>mgp5</h1><p>Words and pictures, in order</p></header>", padding=False)
        with gr.Tabs():
            with gr.Tab("Chat", id="chat"):
                add_chat(state, session)
            with gr.Tab("Story", id="story"):
                StoryTab(state, session)
    blocks.state_session_capacity = PAGES
    return blocks.queue(default_concurrency_limit=None, max_size=2 * (state.request.rows + state.request.waiting))
