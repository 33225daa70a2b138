"""The story: pictures dropped in get texts, texts get pictures, and the model goes on with scenes of its own."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from anyio import to_thread

from ...apps.recorder import Recorder, StoryScene, story_conversation
from ...apps.story import SceneInput, finished_scene, natural, scene_request
from ...errors import Mgp5Error
from ...views.html import write_html
from .forms import progress, read_options, settings, told
from .visits import Visit, Visits, replying

if TYPE_CHECKING:
    from ...options import Options
    from ..app import AppState

HINT = "Drop pictures in, or write scenes; then let the story go on."
CARDS = 24  # the longest story that the page shows
Plan = list[tuple[int, SceneInput | None]]  # number of a scene, what there is of it; None: the model's own
View = list[Any]


class StoryTab:
    """The tab and its events. What is made is the visit's `book`; it is shown on cards, whose texts can be edited."""

    def __init__(self, desk: AppState, visits: Visits) -> None:
        self.desk, self.visits = desk, visits
        with gr.Row(elem_id="tools"):
            with gr.Column(scale=2, min_width=280):
                drop = gr.File(
                    label="Pictures", file_count="multiple", file_types=["image"], height=148, elem_id="drop"
                )
            with gr.Column(scale=3, min_width=280):
                lines = gr.Textbox(label="Or scenes to draw, one per line", lines=3, max_lines=6, elem_id="lines")
                with gr.Row():
                    draw = gr.Button("Draw the lines", size="md", elem_id="draw")
                    narrate = gr.Button("Tell the pictures", size="md", elem_id="narrate")
        self.cards: list[tuple[gr.Group, gr.Image, gr.Textbox, gr.Button]] = []
        with gr.Row(elem_id="cards"):
            for number in range(1, CARDS + 1):
                self.cards.append(_card(number))
        self.work = gr.HTML(
            progress("Drop pictures in or write scenes; then let the story go on."), elem_id="book-work"
        )
        with gr.Row(elem_id="onward"):
            scenes = gr.Number(1, precision=0, minimum=1, maximum=8, label="Scenes", min_width=80, elem_id="scenes")
            onward = gr.Button("Go on", variant="primary", size="md", min_width=90, scale=2, elem_id="continue")
            stop = gr.Button("Stop", size="md", min_width=90, interactive=False, elem_id="stop")
        fields = settings(desk, policy=False)
        with gr.Row(elem_id="ending"):
            title = gr.Textbox(label="Title", max_lines=1, elem_id="title")
            page = gr.Button("Download as a page", size="md", elem_id="page")
            anew = gr.Button("Begin another", size="md", elem_id="anew")
        file = gr.DownloadButton(elem_id="page-file")  # pressed by a script when the file is there
        self.actions, self.stop_button = [draw, narrate, onward, page, anew], stop
        texts = [card[2] for card in self.cards]
        view = [self.work, stop, *self.actions, *(part for card in self.cards for part in card)]
        hidden = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        drop.upload(self.bring, [drop, *texts], [drop, *view], **hidden)
        narrate.click(self.narrate, [*fields, *texts], view, **hidden)
        draw.click(self.draw, [lines, *fields, *texts], [lines, *view], **hidden)
        onward.click(self.go_on, [scenes, *fields, *texts], view, **hidden)
        stop.click(self.stop, None, None, **hidden)
        anew.click(self.anew, None, view, **hidden)
        for number, card in enumerate(self.cards):
            card[3].click(self.remover(number), texts, view, **hidden)
        made = page.click(self.page, [title, *fields, *texts], [file, self.work], **hidden)
        made.success(None, None, None, js="() => document.querySelector('#page-file').click()", **hidden)

    async def bring(self, request: gr.Request, files: list[str], *texts: str) -> View:
        """Put pictures behind the story, in natural order of their names."""
        visit = self._edited(request, texts)
        with told():
            _room(visit, len(files))
            for file in sorted(map(Path, files), key=natural):
                image = await to_thread.run_sync(visit.bring, file, self.desk.limits)
                visit.book.append(StoryScene("given", "", image))
        return [None, *self._view(visit, progress(""))]

    async def narrate(self, request: gr.Request, *given: Any) -> AsyncIterator[View]:
        """Write the texts that pictures lack."""
        visit = self._edited(request, given[5:])
        plan = [(n, SceneInput(scene.image)) for n, scene in enumerate(visit.book) if scene.image and not scene.text]
        async for view in self._make(visit, plan, given[:5]):
            yield view

    async def draw(self, request: gr.Request, lines: str, *given: Any) -> AsyncIterator[View]:
        """Draw the lines of a text."""
        visit = self._edited(request, given[5:])
        wanted = [line.strip() for line in (lines or "").splitlines() if line.strip()]
        plan = [(len(visit.book) + n, SceneInput(text=line)) for n, line in enumerate(wanted)]
        async for view in self._make(visit, plan, given[:5]):
            yield [None if plan else gr.skip(), *view]

    async def go_on(self, request: gr.Request, scenes: int, *given: Any) -> AsyncIterator[View]:
        """Continue with scenes of the model's own."""
        visit = self._edited(request, given[5:])
        plan = [(len(visit.book) + n, None) for n in range(int(scenes))]
        async for view in self._make(visit, plan, given[:5]):
            yield view

    async def _make(self, visit: Visit, plan: Plan, fields: Sequence[Any]) -> AsyncIterator[View]:
        """Make scenes one after another; one that is not finished is taken back."""
        said = ""
        with told():
            visit.begin()
            options = read_options(self.desk, *fields)
            _room(visit, sum(number >= len(visit.book) for number, _ in plan))
            yield self._view(visit, progress(""), busy=True)
            for count, (number, part) in enumerate(plan, 1):
                where = f"scene {count} of {len(plan)} · "
                async with aclosing(self._scene(visit, number, part, options)) as drafts:
                    async for draft in drafts:
                        yield self._view(visit, progress("writing", draft, where), number, busy=True)
                if visit.stopped:
                    break
            said = "stopped" if visit.stopped else f"seed {options.seed}" if plan else "nothing to do"
        yield self._view(visit, progress(said))

    async def _scene(
        self, visit: Visit, number: int, part: SceneInput | None, options: Options
    ) -> AsyncIterator[Recorder]:
        """One scene of the book as it grows."""
        book, before = visit.book, visit.book[number : number + 1]
        asked = scene_request(book[:number], part, options, self.desk.engine.model.config.narrate_from)
        book[number:] = [finished_scene(part, Recorder().message), *book[number + 1 :]]
        done = False
        try:
            yield Recorder()
            async with aclosing(replying(self.desk, visit, *asked)) as drafts:
                async for draft in drafts:
                    book[number] = finished_scene(part, draft.message)
                    done = bool(draft.finished and draft.finished.reason != "interrupted")
                    yield draft
        finally:
            if not done:
                book[number : number + 1] = before

    async def stop(self, request: gr.Request) -> None:
        """End what is being made."""
        self.visits.of(request.session_hash).stop()

    async def anew(self, request: gr.Request) -> View:
        """Begin another story."""
        visit = self.visits.of(request.session_hash)
        visit.stop()
        visit.book = []
        return self._view(visit, progress(""))

    def remover(self, number: int) -> Any:
        """What takes a scene out."""

        async def remove(request: gr.Request, *texts: str) -> View:
            visit = self._edited(request, texts)
            if visit.running is None:
                del visit.book[number : number + 1]
            return self._view(visit, progress(""))

        return remove

    async def page(self, request: gr.Request, title: str, *given: Any) -> tuple[Any, str]:
        """The story as one file of HTML."""
        visit = self._edited(request, given[5:])
        with told():
            if not visit.book:
                raise Mgp5Error("there is no story yet", "drop pictures in, or let the story go on")
            options = asdict(read_options(self.desk, *given[:5]))
            path = Path(tempfile.mkdtemp(dir=visit.folder)) / "story.html"
            facts = {"title": (title or "").strip(), "model": self.desk.name, "options": options}
            await to_thread.run_sync(write_html, story_conversation(visit.book), facts, path)
            return str(path), progress("the page is in your downloads")
        raise gr.Error("there is no page", visible=False)

    def _edited(self, request: gr.Request, texts: Sequence[str]) -> Visit:
        """The visit, with the texts that its cards have now."""
        visit = self.visits.of(request.session_hash)
        if visit.running is None:
            for number, (scene, text) in enumerate(zip(visit.book, texts, strict=False)):
                if (text or "").strip() != scene.text:
                    own = "given" if scene.kind == "narrated" else scene.kind
                    visit.book[number] = replace(scene, kind=own, text=(text or "").strip())
        return visit

    def _view(self, visit: Visit, work: str, only: int | None = None, busy: bool = False) -> View:
        """All that the page shows, or of the cards one only."""
        cards: list[Any] = []
        for number in range(CARDS):
            if only in (None, number):
                scene = visit.book[number] if number < len(visit.book) else None
                image = scene and scene.image and visit.show(scene.image)
                text = gr.update(value=scene.text if scene else "", interactive=not busy)
                cards += [gr.update(visible=scene is not None), gr.update(value=image), text, gr.skip()]
            else:
                cards += [gr.skip()] * 4
        actions = [gr.update(interactive=not busy)] * len(self.actions)
        return [work, gr.update(interactive=busy), *actions, *cards]


def _card(number: int) -> tuple[gr.Group, gr.Image, gr.Textbox, gr.Button]:
    with gr.Group(visible=False, elem_classes="card") as card:
        image = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"], type="filepath", container=False)
        text = gr.Textbox(
            show_label=False, label=f"Text of scene {number}", placeholder="no text yet", lines=2, max_lines=8
        )
        remove = gr.Button("Take out", size="sm", elem_classes="quiet")
    return card, image, text, remove


def _room(visit: Visit, more: int) -> None:
    if len(visit.book) + more > CARDS:
        raise Mgp5Error(f"a story of this page has {CARDS} scenes at most", "take some out, or begin another")
