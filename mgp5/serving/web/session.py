"""What an open page keeps, its replies as they grow, and what both tabs share: settings, progress and failures."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from anyio import to_thread
from pydantic import ValidationError

from ...apps.recorder import Recorder, StoryScene
from ...errors import Mgp5Error
from ...events import Finished, ImageDone
from ...messages import Conversation, Image, Message
from ...views.files import write_png
from ..images import read_image_bytes
from ..loop import Refused
from ..schema import ChatRequest, chat_options

if TYPE_CHECKING:
    from ...options import Options
    from ..app import AppState, ReplyStream
    from ..limits import Limits

SHOWN_SIDE = 1024  # longest side of an uploaded image as the page shows it, in pixels
UPDATE_SECONDS = 0.1  # shortest time between two updates of a page
INTERRUPTED = Finished(Message("assistant", ()), "interrupted")
DRAW_MODES = [("when it fits", "auto"), ("always", "always"), ("never", "never")]
HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}  # keywords of every event


@dataclass
class PageSession:
    """What one open page keeps: the value of a `gr.State`, which gradio makes and forgets.

    Attributes:
        folder: of all pages' images; names of files in it cannot be guessed.
        scenes: of the story.
        replies: number of replies of the chat so far; each takes seeds of its own.
        running: the reply to the story that is being made.
        stopped: whether the visitor has stopped the story.
        files: image and file of each image that was shown, by the image's id.
    """

    folder: Path
    scenes: list[StoryScene] = field(default_factory=list)
    replies: int = 0
    running: ReplyStream | None = None
    stopped: bool = False
    files: dict[int, tuple[Image, Path]] = field(default_factory=dict)

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
            self.running.queue.put_nowait(INTERRUPTED)


async def growing_reply(
    state: AppState, session: PageSession, talk: Conversation, options: Options
) -> AsyncIterator[Recorder]:
    """Yield a reply as it grows, the last time whole; closing the iterator cancels the reply. Raises Refused."""
    (session.running,) = state.submit(talk, [options], None)
    recorder, shown = Recorder(), 0.0
    try:
        async with aclosing(session.running.events()) as events:
            async for event in events:
                if isinstance(event, ImageDone):
                    await to_thread.run_sync(session.file, event.image)  # encodes it
                recorder(event)
                if recorder.finished or isinstance(event, ImageDone) or time.monotonic() - shown > UPDATE_SECONDS:
                    yield recorder
                    shown = time.monotonic()
    finally:
        session.running = None


def read_upload(path: str, limits: Limits) -> Image:
    """Return the image of an uploaded file. Raises Mgp5Error when it is none, or too large."""
    try:
        return read_image_bytes(Path(path).read_bytes(), limits)
    except OSError:
        raise Mgp5Error("an image has not arrived", "drop it in again") from None


def settings(state: AppState) -> dict[str, Any]:
    """Return the fields of a reply's options by name: those that the model's head has. They are not shown yet."""
    limits, model, hidden = state.limits, state.loop.model, {"render": False}
    steps, temperature = min(20, limits.steps), model.config.temperature
    components = {
        "seed": gr.Number(None, label="Seed", placeholder="another each time", precision=0, minimum=0, **hidden),
        "temperature": gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0: no chance", **hidden),
        "steps": gr.Slider(1, limits.steps, steps, step=1, label="Steps", info="of a picture", **hidden),
        "guidance": gr.Slider(
            0, 20, model.config.guidance, step=0.5, label="Guidance", info="how close to the text", **hidden
        ),
        "image": gr.Radio(DRAW_MODES, value="auto", label="Pictures", **hidden),
    }
    known = {"seed", "temperature", "image", *(option.name for option in fields(model.head.spec.image_options))}
    return {name: component for name, component in components.items() if name in known}


def read_options(state: AppState, values: dict[str, Any]) -> Options:
    """Return the options that the fields of `settings` ask for. Raises Refused for those above the server's limits."""
    try:
        body = ChatRequest(model=state.name, messages=[{"role": "user", "content": ""}], **values)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(400, f"{first['loc'][-1]}: {first['msg']}", "invalid_value") from None
    return chat_options(body, state.limits, state.loop.model)


def progress_line(text: str, recorder: Recorder | None = None, before: str = "") -> str:
    """Return a line of HTML on what is being done, with a bar where an image is drawn."""
    bar = ""
    if recorder and recorder.step:
        done, total = recorder.step.step, recorder.step.total
        text = f"drawing, step {done} of {total}"
        bar = f'<progress max="{total}" value="{done}"></progress>'
    return f'<div class="work" role="status"><span>{escape(before + text)}</span>{bar}</div>'
