"""The chat tab: gradio's chat interface over the serving loop, with text and images in order both ways."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from functools import partial
from html import escape, unescape
from typing import Any

import gradio as gr
from anyio import to_thread

from ...apps.story import with_seeds
from ...apps.world import remarks
from ...errors import Mgp5Error
from ...messages import Conversation, Image, Part, Role, Text
from ..loop import Refused
from ..request import Limits
from ..state import AppState
from ..turns import check_size, join_turns
from .session import HIDDEN, GrowingReply, PageSession, progress_line, read_options, read_upload, settings

EXAMPLES = (
    "Draw a red fox in the snow.",
    "Tell me about a cat who finds a ball.",
    "Show me a bear by the sea at night.",
)
EMPTY = "<h2>What shall we look at?</h2><p>Ask for a picture, or drop one in and ask about it.</p>"
FAILED = "That did not work"  # title of an answer that tells why there is no reply


def add_chat(state: AppState, session: gr.State) -> list[Any]:
    """Add the chat to the page; return what takes `PageSession.talk` when the page is loaded again."""
    options, work = settings(state), gr.HTML(progress_line(""), elem_id="talk-work", padding=False, render=False)
    chat = gr.ChatInterface(
        partial(reply, state, tuple(options)),
        multimodal=True,
        chatbot=gr.Chatbot(
            elem_id="talk",
            show_label=False,
            height="60svh",
            placeholder=EMPTY,
            buttons=[],
            render_markdown=False,
            allow_tags=False,
        ),
        textbox=gr.MultimodalTextbox(
            elem_id="talk-box",
            placeholder="Write a message, or drop pictures here",
            file_count="multiple",
            file_types=["image"],
            max_plain_text_length=100_000,
            stop_btn=True,
        ),
        additional_inputs=[session, *options.values()],
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        additional_outputs=[work],
        examples=[[{"text": text, "files": []}] for text in EXAMPLES],
        **HIDDEN,
    )
    chat.textbox.stop(lambda: progress_line("stopped"), None, work, **HIDDEN)
    work.render()
    chat.chatbot.undo(_undo, session, None, **HIDDEN)
    chat.chatbot.clear(lambda session: session.talk.clear(), session, None, **HIDDEN)
    return [chat.chatbot, chat.chatbot_state]


def _undo(session: PageSession) -> None:
    while session.talk and session.talk.pop()["role"] != "user":
        pass


async def reply(
    state: AppState, names: Sequence[str], message: Any, history: Any, session: PageSession, *values: Any
) -> AsyncIterator[tuple[dict[str, Any], str]]:
    """Yield the reply to a message as it grows, as gr.Chatbot takes it, and the line on what is being done.
    A failure is told as an answer of its own kind. `names` are those of the options whose values are given."""
    try:
        files = [{"type": "file", "file": one if isinstance(one, dict) else {"path": one}} for one in message["files"]]
        turns = [*history, {"role": "user", "content": [*files, {"type": "text", "text": message["text"] or ""}]}]
        options = read_options(state, dict(zip(names, values, strict=True)))
        talk, left_out = await to_thread.run_sync(read_talk, turns, state.limits, limiter=state.image_threads)
        given = state.loop.model.config.world, message["text"] or "", talk.messages[-1].images
        notes = await to_thread.run_sync(remarks, *given, limiter=state.image_threads)
        options = with_seeds(options, session.replies)
        session.replies += 1
        with closing(GrowingReply(state, session, talk, options, left_out)) as growing:
            while not growing.finished:
                await growing.grow()
                line = "writing"
                if end := growing.finished:
                    cut = ", cut at its longest" if end.reason == "length" else ""
                    told = "".join(f" · {note.text}" for note in (*notes, *growing.notes))
                    line = f"seed {options.seed} · {end.meta['seconds']:.1f} s{cut}{told}"
                shown = _shown(session, growing.parts)
                session.talk = [*turns, shown]
                yield shown, progress_line(line, growing)
    except (Mgp5Error, Refused) as error:
        yield {"role": "assistant", "content": escape(str(error)), "metadata": {"title": FAILED}}, progress_line("")


def read_talk(history: Sequence[dict[str, Any]], limits: Limits) -> tuple[Conversation, int]:
    """Return the conversation that gr.Chatbot shows, without its oldest turns where it is above the limits, and their
    number; a message that had no reply goes with the answer that told so.

    Raises Mgp5Error if an image cannot be read or the last message is empty, Refused if it is above the limits.
    """
    turns: list[tuple[Role, list[Part]]] = []
    for turn in history:
        if (turn.get("metadata") or {}).get("title") == FAILED:
            turns = turns[:-1]
        else:
            role = "assistant" if turn["role"] == "assistant" else "user"
            turns.append((role, _parts(turn["content"], role, limits)))
    talk = Conversation(tuple(join_turns(turns)))
    if not turns or not turns[-1][1]:
        raise Mgp5Error("the message is empty", "write something, or drop a picture in")
    for recent in talk.tails():
        size = len(recent.messages), len(recent.images)
        if size[0] <= limits.messages and size[1] <= limits.context_images:
            break
    check_size(*size, limits)
    return recent, talk.turns - recent.turns


def _parts(content: Sequence[dict[str, Any]], role: str, limits: Limits) -> list[Part]:
    parts: list[Part] = []
    for part in content:
        if part["type"] == "file":
            parts.append(read_upload(part["file"]["path"], limits))
        elif text := part["text"].strip():
            parts.append(Text(unescape(text) if role == "assistant" else text))  # `_shown` has escaped it
    return parts


def _shown(session: PageSession, parts: Sequence[Part]) -> dict[str, Any]:
    content = [
        {"type": "file", "file": {"path": session.file(part), "mime_type": "image/png"}}
        if isinstance(part, Image)
        else {"type": "text", "text": escape(part.text, quote=False)}
        for part in parts
        if isinstance(part, Image) or part.text.strip()
    ]
    return {"role": "assistant", "content": content}
