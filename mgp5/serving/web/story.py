"""The story tab: uploaded images get texts, texts get images, and the model goes on with scenes of its own."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from anyio import to_thread

from ...apps.inputs import SceneInput, natural
from ...apps.recorder import StoryScene, story_conversation
from ...apps.story import finished_scene, scene_request, with_seeds
from ...apps.world import remarks
from ...errors import Mgp5Error
from ...files import text_lines
from ...messages import Image, Message
from ...options import Options
from ...views.html import write_html
from ..loop import Refused
from ..state import AppState
from .session import HIDDEN, GrowingReply, PageSession, progress_line, read_options, read_upload, settings

HINT = "Drop pictures in or write scenes; then let the story go on."
CARDS = 24  # the longest story that the page shows
Task = Literal["narrate", "draw", "continue", "redraw", "retell"]
View = list[Any]  # values of all that the tab shows: line, Stop, other buttons, and three parts of each card


class StoryTab:
    """The tab and its events: the session's scenes stand on cards, whose texts can be edited."""

    def __init__(self, state: AppState, session: gr.State) -> None:
        self.state = state
        with gr.Row(elem_id="tools"):
            with gr.Column(scale=2, min_width=280):
                kinds = {"file_count": "multiple", "file_types": ["image"]}
                drop = gr.File(label="Pictures", height=148, elem_id="drop", **kinds)
            with gr.Column(scale=3, min_width=280):
                lines = gr.Textbox(label="Or write scenes to draw, one per line", lines=3, max_lines=6, elem_id="lines")
                with gr.Row():
                    draw = gr.Button("Draw these lines", elem_id="draw")
                    narrate = gr.Button("Write texts for the pictures", elem_id="narrate")
        with gr.Row(elem_id="cards"):
            cards = [_card(number) for number in range(1, CARDS + 1)]
        work = gr.HTML(progress_line(HINT), elem_id="book-work")
        with gr.Row(elem_id="onward"):
            count = gr.Number(1, precision=0, minimum=1, maximum=8, label="New scenes", min_width=80, elem_id="scenes")
            go_on = gr.Button("Continue the story", variant="primary", min_width=90, scale=2, elem_id="continue")
            stop = gr.Button("Stop", min_width=90, interactive=False, elem_id="stop")
        with gr.Accordion("Settings", open=False):
            options = settings(state)
            del options["image"]  # whether to draw follows from the scene
            for option in options.values():
                option.render()
        with gr.Row(elem_id="ending"):
            title = gr.Textbox(label="Title", max_lines=1, elem_id="title")
            page = gr.Button("Download as a page", elem_id="page")
            anew = gr.Button("New story", elem_id="anew")
        file = gr.DownloadButton(elem_id="page-file")  # a script presses it when the file is there
        self.options, self.actions = tuple(options), (draw, narrate, go_on, page, anew)
        texts = [text for _, _, text, *_ in cards]
        self.shown = view = [work, stop, *self.actions, *(part for card in cards for part in card[:3])]
        given = [session, lines, count, *options.values(), *texts]
        drop.upload(self.add_images, [session, drop, *texts], [drop, *view], **HIDDEN)
        for button, task in ((narrate, "narrate"), (draw, "draw"), (go_on, "continue")):
            button.click(partial(self.make, task, 0), given, [lines, *view], **HIDDEN)
        stop.click(PageSession.stop, session, None, **HIDDEN)
        anew.click(self.remove, session, view, **HIDDEN)
        for number, (_, _, text, redraw, retell, up, remove) in enumerate(cards):
            text.blur(_edit, [session, *texts], None, **HIDDEN)
            redraw.click(partial(self.make, "redraw", number), given, [lines, *view], **HIDDEN)
            retell.click(partial(self.make, "retell", number), given, [lines, *view], **HIDDEN)
            up.click(partial(self.move_up, number), [session, *texts], view, **HIDDEN)
            remove.click(partial(self.remove, number=number), [session, *texts], view, **HIDDEN)
        made = page.click(self.write_page, [session, title, *options.values(), *texts], [file, work], **HIDDEN)
        made.success(None, None, None, js="() => document.querySelector('#page-file').click()", **HIDDEN)

    async def add_images(self, session: PageSession, files: list[str], *texts: str) -> View:
        """Put uploaded images behind the story, in natural order of their names."""
        _edit(session, *texts)
        images: list[Image] = []
        with failures_shown():
            _check_room(len(session.scenes) + len(files))
            for file in sorted(map(Path, files), key=natural):
                image = await to_thread.run_sync(read_upload, str(file), self.state.limits)
                session.scenes.append(StoryScene("given", "", image))
                images.append(image)
        return [None, *self.view(session, progress_line(await self._remarks("", images)))]

    async def make(
        self, task: Task, number: int, session: PageSession, lines: str, count: int, *given: Any
    ) -> AsyncIterator[View]:
        """Make scenes one after another, or scene `number` anew; one that is not finished is dropped."""
        _edit(session, *given[len(self.options) :])
        said = ""
        with failures_shown():
            if session.running:
                raise Mgp5Error("this page makes a scene already", "wait for it, or stop it")
            session.stopped, scenes = False, session.scenes
            options, plan = self._options(given), _plan(task, number, scenes, lines, count)
            if task in ("redraw", "retell"):
                session.anew += 1
                options = with_seeds(options, CARDS * session.anew)
            _check_room(max([number + 1 for number, _ in plan], default=0))
            yield [None if task == "draw" and plan else gr.skip(), *self.view(session, busy=True)]
            for done, (number, part) in enumerate(plan, 1):
                asked = scene_request(scenes[:number], part, options, self.state.loop.model.config.narrate_from)
                with closing(GrowingReply(self.state, session, *asked)) as reply:
                    while not reply.finished:
                        await reply.grow()
                        growing = {number: _made(part, reply.message, scenes[number : number + 1])}
                        line = progress_line("writing", reply, f"scene {done} of {len(plan)} · ")
                        yield [gr.skip(), *self.view(session, line, growing, busy=True)]
                if session.stopped:
                    break
                scenes[number : number + 1] = growing.values()
            said = "stopped" if session.stopped else f"seed {options.seed}" if plan else "nothing to do"
            said += await self._remarks(" ".join(part.text for _, part in plan), (), " · ")
        yield [gr.skip(), *self.view(session, progress_line(said))]

    async def remove(self, session: PageSession, *texts: str, number: int | None = None) -> View:
        """Take out a scene; None: all of them, and what is being made."""
        _edit(session, *texts)
        if number is None:
            session.stop()
            session.scenes = []
        elif session.running is None:
            del session.scenes[number : number + 1]
        return self.view(session)

    async def move_up(self, number: int, session: PageSession, *texts: str) -> View:
        """Let a scene change places with the one before it."""
        _edit(session, *texts)
        scenes = session.scenes
        if session.running is None and 0 < number < len(scenes):
            scenes[number - 1 : number + 1] = scenes[number], scenes[number - 1]
        return self.view(session)

    async def write_page(self, session: PageSession, title: str, *given: Any) -> tuple[Any, str]:
        """Write the story as one HTML file."""
        _edit(session, *given[len(self.options) :])
        with failures_shown():
            if not session.scenes:
                raise Mgp5Error("there is no story yet", "drop pictures in, or let the story go on")
            (folder := session.folder / uuid.uuid4().hex).mkdir()
            options = self._options(given).flat()
            metadata = {"title": (title or "").strip(), "model": self.state.name, "options": options}
            await to_thread.run_sync(write_html, story_conversation(session.scenes), metadata, folder / "story.html")
            return str(folder / "story.html"), progress_line("the page is in your downloads")
        raise gr.Error("there is no page", visible=False)  # so that no script looks for the file

    async def _remarks(self, text: str, images: Sequence[Image], before: str = "") -> str:
        """Return what the model has never met of a text and images."""
        given = self.state.loop.model.config.world, text, images
        notes = await to_thread.run_sync(remarks, *given, limiter=self.state.image_threads)
        return "".join(before + note.text for note in notes)

    def _options(self, given: Sequence[Any]) -> Options:
        return read_options(self.state, dict(zip(self.options, given, strict=False)))

    def view(
        self,
        session: PageSession,
        line: str = progress_line(""),
        growing: dict[int, StoryScene] | None = None,
        busy: bool = False,
    ) -> View:
        """Return all that the tab shows; cards other than those of growing scenes, if any, stay as they are."""
        scenes, cards = growing or dict(enumerate(session.scenes)), []
        for number in range(CARDS):
            if growing and number not in growing:
                cards += [gr.skip()] * 3
            else:
                scene = scenes.get(number, StoryScene("given"))
                file, text = (
                    scene.image and session.file(scene.image),
                    gr.update(value=scene.text, interactive=not busy),
                )
                cards += [gr.update(visible=number in scenes), gr.update(value=file), text]
        return [line, gr.update(interactive=busy), *[gr.update(interactive=not busy)] * len(self.actions), *cards]


@contextmanager
def failures_shown() -> Iterator[None]:
    """Show what a visitor can act on; it ends the block."""
    try:
        yield
    except (Mgp5Error, Refused) as error:
        gr.Warning(escape(str(error)), title="That did not work")


def _plan(task: Task, number: int, scenes: list[StoryScene], lines: str, count: int) -> list[tuple[int, SceneInput]]:
    """Return the number of each scene to make, and what there is of it. Raises Mgp5Error where there is nothing."""
    if task in ("redraw", "retell"):
        scene = scenes[number]
        part = SceneInput(text=scene.text) if task == "redraw" else SceneInput(scene.image)
        if part.kind == "continued":
            raise Mgp5Error(f"scene {number + 1} has no {'text' if task == 'redraw' else 'picture'}", "give it one")
        return [(number, part)]
    if task == "narrate":
        return [(n, SceneInput(scene.image)) for n, scene in enumerate(scenes) if scene.image and not scene.text]
    if task == "draw":
        texts = text_lines(lines or "")
        return [(number, SceneInput(text=text)) for number, text in enumerate(texts, len(scenes))]
    return [(len(scenes) + number, SceneInput()) for number in range(int(count))]


def _made(part: SceneInput, reply: Message, before: list[StoryScene]) -> StoryScene:
    """Return a scene with what the model replied; if it made the other part before, both are the model's."""
    scene = finished_scene(part, reply)
    kinds = {one.kind for one in before if one.text and one.image} - {"given", scene.kind}
    return replace(scene, kind="continued") if kinds else scene


def _card(number: int) -> tuple[Any, ...]:
    """Return the parts of a card: itself, its image and text, and its buttons."""
    with gr.Group(visible=False, elem_classes="card") as card:
        image = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"], type="filepath", container=False)
        label = {"show_label": False, "label": f"Text of scene {number}", "placeholder": "no text yet"}
        text = gr.Textbox(lines=2, max_lines=8, **label)
        with gr.Row(elem_classes="onecard"):
            labels = ("Redraw", "Retell", "Move up", "Remove")
            buttons = [gr.Button(label, size="sm", min_width=0, elem_classes="quiet") for label in labels]
    return card, image, text, *buttons


def _edit(session: PageSession, *texts: str) -> None:
    """Take over the texts that the cards have now."""
    for number, (scene, text) in enumerate(zip(session.scenes, texts, strict=False)):
        if session.running is None and (text or "").strip() != scene.text:
            edited = "given" if scene.kind == "narrated" else scene.kind
            session.scenes[number] = replace(scene, kind=edited, text=(text or "").strip())


def _check_room(scenes: int) -> None:
    if scenes > CARDS:
        raise Mgp5Error(f"a story of this page has {CARDS} scenes at most", "remove some, or begin a new story")
