"""What both tabs of the page share: settings, and how progress and failures look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr
from pydantic import ValidationError

from ...errors import Mgp5Error
from ..engine import Refused
from ..schema import ChatRequest, chat_options

if TYPE_CHECKING:
    from ...apps.recorder import Recorder
    from ...options import Options
    from ..app import AppState

POLICIES = [("when it fits", "auto"), ("always", "always"), ("never", "never")]


def settings(desk: AppState, policy: bool) -> list[Any]:
    """The fields of a reply's options, in the order that `read_options` takes them."""
    limits, config = desk.limits, desk.engine.model.config
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            steps = gr.Slider(1, limits.steps, min(20, limits.steps), step=1, label="Steps", info="of a picture")
            guidance = gr.Slider(0, 20, config.guidance, step=0.5, label="Guidance", info="how close to the text")
        with gr.Row():
            temperature = gr.Slider(0, 2, config.temperature, step=0.05, label="Temperature", info="0: no chance")
            seed = gr.Number(None, precision=0, minimum=0, label="Seed", info="empty: another each time")
        image = gr.Radio(POLICIES, value="auto", label="Pictures", visible=policy)
    return [seed, steps, guidance, temperature, image]


def read_options(desk: AppState, seed: Any, steps: Any, guidance: Any, temperature: Any, image: Any) -> Options:
    """Options within the server's limits. Raises Refused."""
    given = {"seed": seed, "steps": steps, "guidance": guidance, "temperature": temperature, "image": image}
    try:
        body = ChatRequest(model=desk.name, messages=[{"role": "user", "content": ""}], **given)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(400, f"{first['loc'][-1]}: {first['msg']}", "invalid_value") from None
    return chat_options(body, desk.limits, desk.engine.model)


@contextmanager
def told() -> Iterator[None]:
    """What a visitor can act on is shown, and ends the block."""
    try:
        yield
    except (Mgp5Error, Refused) as error:
        gr.Warning(escape(str(error)), title="That did not work")


def progress(text: str, draft: Recorder | None = None, where: str = "") -> str:
    """A line of HTML on what is being done, with a bar where a picture is drawn; where: before it."""
    bar = ""
    if draft and draft.step:
        done, total = draft.step.step, draft.step.total
        text = f"drawing, step {done} of {total}"
        bar = f'<progress max="{total}" value="{done}"></progress>'
    return f'<div class="work" role="status"><span>{escape(where + text)}</span>{bar}</div>'
