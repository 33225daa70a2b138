"""The page itself: its look, its two tabs, and where it is put."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from fastapi.responses import RedirectResponse, Response

from ..guard import PAGE
from .chat_tab import ChatTab
from .doors import Doors
from .story_tab import StoryTab
from .visits import IDLE, MOST, Visits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..app import AppState

FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
INK = "#fbf7ef #f6efe2 #e9dfcd #d8cbb4 #a79d90 #75685a #5b5046 #463c33 #2e2823 #232129 #17161c"
CLAY = "#fdf3ea #f9e2c9 #f3c9a3 #eda070 #d97f4e #b4552d #9d4723 #7f3a1e #63301c #453a33 #2c211b"
ICON = (  # a speech bubble that holds a picture
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><path fill="#b4552d" d="M5 3h22a4 4 0 0 1 4 4v14a4 4 0'
    ' 0 1-4 4H14l-7 6v-6H5a4 4 0 0 1-4-4V7a4 4 0 0 1 4-4z"/><path fill="#fdf3ea" d="m5 21 7-9 5 6 3-4 7 7z"/>'
    '<circle fill="#fdf3ea" cx="22" cy="9" r="2.5"/></svg>'
)
STYLE = (Path(__file__).parent / "page.css").read_text()


def put_page(app: FastAPI, desk: AppState) -> None:
    """Put the page into the app, at PAGE. Files that it shows are in a folder that goes with the app."""
    holder = tempfile.TemporaryDirectory(prefix="mgp5-page-")
    folder = Path(holder.name).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # where gradio puts what is uploaded
    app.state.page_files = holder
    blocks = make_blocks(desk, Visits(folder))
    app.add_api_route("/", lambda: RedirectResponse(PAGE), include_in_schema=False)
    app.add_api_route("/favicon.ico", lambda: Response(ICON, media_type="image/svg+xml"), include_in_schema=False)
    gr.mount_gradio_app(
        app,
        blocks,
        PAGE.rstrip("/"),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=desk.limits.body_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=look(),
        css=STYLE,
    )
    app.add_middleware(Doors, folder=folder)


def make_blocks(desk: AppState, visits: Visits) -> gr.Blocks:
    """The page, which gradio's app serves."""
    name = f"{desk.name} · mgp5"
    with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(600, int(2 * IDLE)), fill_width=True) as blocks:
        gr.HTML("<header><h1>mgp5</h1><p>Words and pictures, in order</p></header>", padding=False)
        with gr.Tabs():
            with gr.Tab("Chat", id="chat"):
                ChatTab(desk, visits)
            with gr.Tab("Story", id="story"):
                StoryTab(desk, visits)
    blocks.state_session_capacity = MOST
    return blocks.queue(default_concurrency_limit=None, max_size=2 * (desk.engine.rows + desk.engine.waiting))


def look() -> gr.themes.Base:
    """Warm paper by day, dark by night, in the system's own type: nothing is fetched."""
    clay, ink = (gr.themes.Color(*shades.split()) for shades in (CLAY, INK))
    theme = gr.themes.Base(primary_hue=clay, secondary_hue=clay, neutral_hue=ink, font=FONT, font_mono=("monospace",))
    return theme.set(
        body_background_fill="#f6efe2",
        body_background_fill_dark="#17161c",
        block_background_fill="#fffdf8",
        block_background_fill_dark="#232129",
        block_border_width="1px",
        block_radius="1rem",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        input_background_fill="#fffdf8",
        input_background_fill_dark="#1d1b22",
    )
