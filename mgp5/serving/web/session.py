"""What an open page keeps, its replies as they grow, and what both tabs share: settings, progress and failures."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from anyio import to_thread
from pydantic import ValidationError

from ...apps.recorder import Recorder, StoryScene
from ...errors import Mgp5Error
from ...events import Finished, ImageDone, Note
from ...messages import Conversation, Image, Message
from ...options import Options
from ...views.files import write_png
from ..api.chat import ChatRequest, chat_options
from ..images import read_image_bytes
from ..request import Limits
from ..schema import explain
from ..state import AppState, ReplyStream

SHOWN_SIDE = 1024  # longest side of an uploaded image as the page shows it, in pixels
UPDATE_SECONDS = 0.1  # between two updates of a page
DRAW_MODES = [("when it fits", "auto"), ("always", "always"), ("never", "never")]
HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}  # keywords of every event


@dataclass
class PageSession:
    """What one open page keeps: the value of a `gr.State`, which gradio makes and forgets."""

    folder: Path  # of all pages' images; names of files in it cannot be guessed
    scenes: list[StoryScene] = field(default_factory=list)  # of the story
    anew: int = 0  # scenes that were made once more; each takes seeds of its own
    talk: list[dict[str, Any]] = field(default_factory=list)  # the chat, as gr.Chatbot shows it
    replies: int = 0  # of the chat so far; each takes seeds of its own
    running: ReplyStream | None = None  # the reply that is being made
    stopped: bool = False  # the visitor has stopped the story
    files: dict[int, tuple[Image, Path]] = field(default_factory=dict)  # image and file by the image's id

    def file(self, image: Image) -> str:
        """Return the file of an image that a browser may fetch; a drawn image tells in it how it was made."""
        if id(image) not in self.files:
            path, pixels = self.folder / f"{uuid.uuid4().hex}.png", image.load()
            if not image.meta:
                pixels.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
            write_png(Image(pixels=pixels, meta=image.meta), path)
            self.files[id(image)] = (image, path)  # keeps the image, so that its id is not used again
        return str(self.files[id(image)][1])

    def stop(self) -> None:
        """End the reply to the story that is being made, and what was to follow it."""
        self.stopped = True
        if self.running:
            self.running.queue.put_nowait(Finished(Message("assistant", ()), "interrupted"))


class GrowingReply(Recorder):
    """A reply that is being made, as far as it was read; `close` cancels it.
    The model is not shown the oldest turns where all do not fit its context; `left_out` are left out already."""

    def __init__(
        self, state: AppState, session: PageSession, talk: Conversation, options: Options, left_out: int = 0
    ) -> None:
        super().__init__()
        self.notes: list[Note] = []
        (self.stream,), self.session = state.submit(talk, [options], None, left_out=left_out), session
        session.running = self.stream

    async def grow(self) -> None:
        """Read events for UPDATE_SECONDS, or up to an image or the end. Raises Refused when the reply failed."""
        event, until = None, time.monotonic() + UPDATE_SECONDS
        while not isinstance(event, ImageDone | Finished) and time.monotonic() < until:
            event = await self.stream.next()
            if isinstance(event, Note):
                self.notes.append(event)
            if isinstance(event, ImageDone):
                await to_thread.run_sync(self.session.file, event.image)  # encodes it
            self(event)

    def close(self) -> None:
        self.stream.close()
        self.session.running = None


def read_upload(path: str, limits: Limits) -> Image:
    """Return the image of an uploaded file. Raises Mgp5Error when it is none, or too large."""
    try:
        return read_image_bytes(Path(path).read_bytes(), limits)
    except OSError:
        raise Mgp5Error("an image has not arrived", "drop it in again") from None


def settings(state: AppState) -> dict[str, Any]:
    """Return the fields of a reply's options by name: those that the model's head has. They are not shown yet."""
    most, model, hidden = state.limits.steps, state.loop.model, {"render": False}
    steps, heat, guidance = min(20, most), model.config.temperature, model.config.guidance
    components = {
        # a text, as gradio makes 0 of a number that is empty
        "seed": gr.Textbox(label="Seed", placeholder="another each time", max_lines=1, info="a whole number", **hidden),
        "temperature": gr.Slider(0, 2, heat, step=0.05, label="Temperature", info="low: likely words", **hidden),
        "steps": gr.Slider(1, most, steps, step=1, label="Steps", info="more: finer pictures, slower", **hidden),
        "guidance": gr.Slider(0, 20, guidance, step=0.5, label="Guidance", info="high: closer to the text", **hidden),
        "image": gr.Radio(DRAW_MODES, value="auto", label="Pictures", **hidden),
    }
    known = {"seed", "temperature", "image", *(option.name for option in fields(model.head.spec.image_options))}
    return {name: component for name, component in components.items() if name in known}


def read_options(state: AppState, values: dict[str, Any]) -> Options:
    """Return the options that the fields of `settings` ask for. Raises Refused for those above the server's limits."""
    if "seed" in values:
        seed = (values["seed"] or "").strip()
        values = values | {"seed": int(seed) if seed.isdecimal() else seed or None}
    try:
        body = ChatRequest(model=state.name, messages=[{"role": "user", "content": ""}], **values)
    except ValidationError as error:
        raise explain(error.errors(), values) from None
    return chat_options(body, state.limits, state.loop.model)


def progress_line(text: str, reply: Recorder | None = None, before: str = "") -> str:
    """Return a line of HTML on what is being done, with a bar where an image is drawn."""
    bar = ""
    if reply and reply.step:
        done, total = reply.step.step, reply.step.total
        text = f"drawing, step {done} of {total}"
        bar = f'<progress max="{total}" value="{done}"></progress>'
    return f'<div class="work" role="status"><span>{escape(before + text)}</span>{bar}</div>'
