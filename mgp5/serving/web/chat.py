"""The chat tab: gradio's chat interface over the serving loop, with text and images in order both ways."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from html import escape, unescape
from typing import TYPE_CHECKING, Any

import gradio as gr
from anyio import to_thread

from ...apps.story import SEEDS
from ...errors import Mgp5Error
from ...messages import Conversation, Image, Message, Part, Text
from ...prompts import CHAT_SYSTEM
from ..loop import Refused
from ..schema import check_size
from .session import HIDDEN, PageSession, growing_reply, progress_line, read_options, read_upload, settings

if TYPE_CHECKING:
    from ...events import Finished
    from ...options import Options
    from ..app import AppState
    from ..limits import Limits

EXAMPLES = (
    "Draw a red fox in the snow.",
    "Tell me about a cat who finds a ball.",
    "Show me a bear by the sea at night.",
)
EMPTY = "<h2>What shall we look at?</h2><p>Ask for a picture, or drop one in and ask about it.</p>"
FAILED = "That did not work"  # title of an answer that tells why there is no reply
Reply = tuple[dict[str, Any], str]  # a message as gr.Chatbot takes it, and the line on what is being done


def add_chat(state: AppState, session: gr.State) -> None:
    """Add the chat to the page."""
    work = gr.HTML(progress_line(""), elem_id="talk-work", padding=False, render=False)

    options = settings(state)

    async def reply(message: Any, history: Any, session: PageSession, *values: Any) -> AsyncIterator[Reply]:
        turns = [*history, {"role": "user", "content": message}]
        async with aclosing(replies(state, session, turns, dict(zip(options, values, strict=True)))) as growing:
            async for one in growing:
                yield one

    chat = gr.ChatInterface(
        reply,
        multimodal=True,
        chatbot=gr.Chatbot(
            elem_id="talk",
            show_label=False,
            height="60svh",
            placeholder=EMPTY,
            buttons=[],
            feedback_options=None,
            render_markdown=False,
            allow_tags=False,
        ),
        textbox=gr.MultimodalTextbox(
            elem_id="talk-box",
            placeholder="Write a message, or drop pictures here",
            file_count="multiple",
            file_types=["image"],
            sources=["upload"],
            max_plain_text_length=100_000,
            stop_btn=True,
        ),
        additional_inputs=[session, *options.values()],
        additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
        additional_outputs=[work],
        examples=[[{"text": text, "files": []}] for text in EXAMPLES],
        cache_examples=False,
        api_visibility="private",
        show_progress="hidden",
        analytics_enabled=False,
    )
    chat.textbox.stop(lambda: progress_line("stopped"), None, work, **HIDDEN)
    work.render()


async def replies(
    state: AppState, session: PageSession, history: Sequence[dict[str, Any]], values: dict[str, Any]
) -> AsyncIterator[Reply]:
    """Yield the reply to the last message of a chat as it grows; a failure is told as an answer of its own kind."""
    try:
        options = read_options(state, values)
        talk = await to_thread.run_sync(read_talk, history, state.limits, limiter=state.image_threads)
        options = replace(options, seed=options.seed + SEEDS * session.replies)
        session.replies += 1
        async with aclosing(growing_reply(state, session, talk, options)) as growing:
            async for recorder in growing:
                line = _summary(recorder.finished, options) if recorder.finished else "writing"
                yield _shown(session, recorder.parts), progress_line(line, recorder)
    except (Mgp5Error, Refused) as error:
        yield {"role": "assistant", "content": escape(str(error)), "metadata": {"title": FAILED}}, progress_line("")


def read_talk(history: Sequence[dict[str, Any]], limits: Limits) -> Conversation:
    """Return the conversation that gradio's chat shows, the last message included.

    A message that had no reply goes with the answer that told so.

    Raises:
        Mgp5Error: an image cannot be read, or the last message is empty.
        Refused: the conversation is above the limits.
    """
    talk: list[Message] = [Message("system", (Text(CHAT_SYSTEM),))]
    for turn in history:
        role = "assistant" if turn["role"] == "assistant" else "user"
        if (turn.get("metadata") or {}).get("title") == FAILED:
            talk = talk[:-1]
        elif parts := tuple(_parts(turn["content"], role, limits)):
            before = talk.pop().content if talk[-1].role == role else ()
            talk.append(Message(role, (*before, *parts)))
    if talk[-1].role != "user":
        raise Mgp5Error("the message is empty", "write something, or drop a picture in")
    check_size(len(talk), sum(len(message.images) for message in talk), limits)
    return Conversation(tuple(talk))


def _parts(content: Any, role: str, limits: Limits) -> list[Part]:
    """Return the parts of a message: of gr.MultimodalTextbox ({"text", "files"}), or of gr.Chatbot's list."""
    if isinstance(content, dict) and "files" in content:
        content = [*({"file": file} for file in content["files"]), {"text": content["text"] or ""}]
    parts: list[Part] = []
    for part in [content] if isinstance(content, (str, dict)) else content:
        if isinstance(part, str) or part.get("text") is not None:
            text = (part if isinstance(part, str) else part["text"]).strip()
            parts += [Text(unescape(text) if role == "assistant" else text)] if text else []
        else:
            file = part.get("file", part)
            parts.append(read_upload(file["path"] if isinstance(file, dict) else file, limits))
    return parts


def _shown(session: PageSession, parts: Sequence[Part]) -> dict[str, Any]:
    content = [
        {"path": session.file(part)} if isinstance(part, Image) else escape(part.text, quote=False)
        for part in parts
        if isinstance(part, Image) or part.text.strip()
    ]
    return {"role": "assistant", "content": content}


def _summary(end: Finished, options: Options) -> str:
    cut = ", cut at its longest" if end.reason == "length" else ""
    return f"seed {options.seed} · {end.meta['seconds']:.1f} s{cut}"
