"""The chat: text and pictures in, text and pictures out as they come, in order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from anyio import to_thread

from ...apps.recorder import Recorder
from ...apps.story import SEEDS
from ...events import Finished
from ...messages import Conversation, Image, Message, Part, Text
from .forms import progress, read_options, settings, told
from .visits import Visit, Visits, check_size, replying

if TYPE_CHECKING:
    from ...options import Options
    from ..app import AppState

EXAMPLES = (
    "Draw a red fox in the snow.",
    "Tell me about a cat who finds a ball.",
    "Show me a bear by the sea at night.",
)
EMPTY = "<h2>What shall we look at?</h2><p>Ask for a picture, or drop one in and ask about it.</p>"
View = tuple[Any, Any, str]  # messages, the textbox, the line on what is being done


class ChatTab:
    """The tab and its events."""

    def __init__(self, desk: AppState, visits: Visits) -> None:
        self.desk, self.visits = desk, visits
        self.shown = gr.Chatbot(
            elem_id="talk",
            show_label=False,
            height="60svh",
            placeholder=EMPTY,
            examples=[{"text": text} for text in EXAMPLES],
            buttons=[],
            feedback_options=None,
            render_markdown=False,
            allow_tags=False,
        )
        self.work = gr.HTML(progress(""), elem_id="talk-work", padding=False)
        self.box = gr.MultimodalTextbox(
            elem_id="talk-box",
            show_label=False,
            placeholder="Write a message, or drop pictures here",
            file_count="multiple",
            file_types=["image"],
            sources=["upload"],
            max_plain_text_length=100_000,
        )
        fields, view = settings(desk, policy=True), [self.shown, self.box, self.work]
        hidden = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        self.box.submit(self.say, [self.box, *fields], view, **hidden)
        self.shown.example_select(self.example, fields, view, **hidden)
        self.shown.retry(self.retry, fields, view, **hidden)
        self.shown.undo(self.undo, None, view, **hidden)
        self.shown.clear(self.clear, None, view, **hidden)
        self.box.stop(self.stop, None, None, **hidden)

    async def say(self, request: gr.Request, box: dict[str, Any], *fields: Any) -> AsyncIterator[View]:
        """Send a message."""
        visit = self.visits.of(request.session_hash)
        with told():
            options = read_options(self.desk, *fields)
            files = [Path(file) for file in box["files"]]
            images = [await to_thread.run_sync(visit.bring, file, self.desk.limits) for file in files]
            text = (box["text"] or "").strip()
            if content := [*images, *([Text(text)] if text else [])]:
                talk = Conversation((*visit.talk.messages, Message("user", tuple(content))))
                async for view in self._reply(visit, talk, options):
                    yield view

    async def example(self, request: gr.Request, picked: gr.SelectData, *fields: Any) -> AsyncIterator[View]:
        """Send an example."""
        text = EXAMPLES[picked.index % len(EXAMPLES)]
        async for view in self.say(request, {"text": text, "files": []}, *fields):
            yield view

    async def retry(self, request: gr.Request, *fields: Any) -> AsyncIterator[View]:
        """Another reply to the last message."""
        visit = self.visits.of(request.session_hash)
        with told():
            talk = visit.talk
            if talk.messages[-1].role == "assistant":
                talk = Conversation(talk.messages[:-1])
            if talk.messages[-1].role == "user":
                async for view in self._reply(visit, talk, read_options(self.desk, *fields)):
                    yield view

    async def _reply(self, visit: Visit, talk: Conversation, options: Options) -> AsyncIterator[View]:
        """Reply to a conversation, which becomes the visit's; what cannot be answered is given back."""
        visit.begin()
        check_size(talk, self.desk.limits)
        before, visit.talk, draft = visit.talk, talk, Recorder()
        shift, visit.number = SEEDS * visit.number, visit.number + 1
        options = replace(options, seed=options.seed + shift)
        history, role = _messages(visit, talk), "assistant"
        yield history, gr.update(value=None, submit_btn=False, stop_btn=True), progress("reading")
        with told():
            async with aclosing(replying(self.desk, visit, talk, options)) as drafts:
                async for draft in drafts:
                    if visit.talk is talk:  # not cleared meanwhile
                        yield [*history, *_message(visit, role, draft.parts)], gr.skip(), progress("writing", draft)
        if visit.talk is not talk:
            return
        if draft.parts:
            visit.talk = talk.add(role, *draft.parts)
        box = {} if draft.finished else {"value": _asked(visit, talk.messages[-1])}
        if not draft.finished:
            visit.talk = before
        line = _how(draft.finished, options) if draft.finished else ""
        yield _messages(visit, visit.talk), gr.update(submit_btn=True, stop_btn=False, **box), progress(line)

    async def stop(self, request: gr.Request) -> None:
        """End the reply; what it has said stays."""
        self.visits.of(request.session_hash).stop()

    async def undo(self, request: gr.Request) -> View:
        """Take back the last message and its reply."""
        visit = self.visits.of(request.session_hash)
        visit.stop()
        roles = [message.role for message in visit.talk.messages]
        if "user" not in roles:
            return gr.skip(), gr.skip(), gr.skip()
        last = len(roles) - 1 - roles[::-1].index("user")
        asked, visit.talk = visit.talk.messages[last], Conversation(visit.talk.messages[:last])
        box = gr.update(value=_asked(visit, asked), submit_btn=True, stop_btn=False)
        return _messages(visit, visit.talk), box, progress("")

    async def clear(self, request: gr.Request) -> View:
        """Begin another conversation."""
        visit = self.visits.of(request.session_hash)
        visit.stop()
        visit.talk, visit.number = Visit(visit.folder).talk, 0
        return [], gr.update(value=None, submit_btn=True, stop_btn=False), progress("")


def _messages(visit: Visit, talk: Conversation) -> list[dict[str, Any]]:
    """A conversation as the page shows it."""
    turns = [message for message in talk.messages if message.role != "system"]
    return [shown for turn in turns for shown in _message(visit, turn.role, turn.content)]


def _message(visit: Visit, role: str, parts: list[Part] | tuple[Part, ...]) -> list[dict[str, Any]]:
    content = [_part(visit, part) for part in parts if isinstance(part, Image) or part.text.strip()]
    return [{"role": role, "content": content}] if content else []


def _part(visit: Visit, part: Part) -> dict[str, Any]:
    if isinstance(part, Image):
        return {"path": visit.show(part)}
    return {"type": "text", "text": escape(part.text, quote=False)}


def _asked(visit: Visit, message: Message) -> dict[str, Any]:
    """A message, back in the textbox."""
    return {"text": message.text, "files": [visit.show(image) for image in message.images]}


def _how(end: Finished, options: Options) -> str:
    if end.reason == "interrupted":
        return "stopped"
    cut = ", cut at its longest" if end.reason == "length" else ""
    return f"seed {options.seed} · {end.meta['seconds']:.1f} s{cut}"
