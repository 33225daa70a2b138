"""Show events on the terminal: text streams to stdout with images inside it, everything else goes to stderr."""

from __future__ import annotations

import re
import sys
from functools import cached_property, partial
from typing import TYPE_CHECKING, TextIO

from ..errors import counted
from ..events import Event, Finished, ImageDone, ImageStep, Note, SceneStart, TextChunk
from .inline import Images, Painter, painter

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

HEADINGS = {
    "given": "yours",
    "narrated": "your picture, narrated",
    "illustrated": "your text, illustrated",
    "continued": "continued by the model",
}
ENDINGS = {"length": "the reply reached its length limit", "interrupted": "interrupted"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model must not steer the terminal


class TerminalView:
    """Show events to people. Use it as a context manager and call it with every event.

    Of images "auto" takes the best protocol that the terminal has, "blocks" coloured half blocks. Where they are not
    shown, as when stdout is no terminal, their paths are printed on stderr. The streams are those of `sys` by default.
    """

    def __init__(self, images: Images = "auto", *, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self._images = images
        self._stdout, self._stderr = stdout or sys.stdout, stderr or sys.stderr
        self._line_open = False  # text was written that no line break has ended yet
        self._fresh = True  # no text came since the last event of another kind
        self._in_story = False
        self._progress: Progress | None = None
        self._drawing = -1  # index of the image that the progress bar shows

    def __enter__(self) -> TerminalView:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stop_progress()
        if not isinstance(error, BrokenPipeError):
            self._end_line()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if not isinstance(event, ImageStep):
            self._stop_progress()
        if not isinstance(event, TextChunk):
            self._end_line()
            self._fresh = True
        match event:
            case SceneStart():
                self._heading(event)
            case Note():
                self._note(event.text)
            case TextChunk():
                self._text(event.text)
            case ImageStep():
                self._step(event)
            case ImageDone():
                self._image(event)
            case Finished():
                self._finish(event)

    @cached_property
    def _console(self) -> Console:
        from rich.console import Console

        return Console(file=self._stderr, highlight=False, markup=False, emoji=False)

    @cached_property
    def _painter(self) -> Painter | None:
        return painter(self._images, self._stdout)

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", soft_wrap=True)

    def _text(self, text: str) -> None:
        """Print a piece of text; on a terminal without control characters."""
        text = text.lstrip() if self._fresh else text
        if not text:
            return
        self._fresh = False
        if self._stdout.isatty():
            text = CONTROL.sub("", text)
        encoding = getattr(self._stdout, "encoding", None) or "utf-8"
        self._stdout.write(text.encode(encoding, "replace").decode(encoding))
        self._stdout.flush()
        self._line_open = not text.endswith("\n")

    def _end_line(self) -> None:
        if self._line_open:
            self._stdout.write("\n")
            self._stdout.flush()
            self._line_open = False

    def _heading(self, event: SceneStart) -> None:
        if self._in_story and self._stderr.isatty():
            self._console.print()
        self._in_story = True
        self._note(f"Scene {event.scene + 1} of {event.total} · {HEADINGS[event.kind]}")

    def _step(self, event: ImageStep) -> None:
        """Show the progress of an image, on a terminal."""
        if not self._stderr.isatty():
            return
        if self._progress is None or self._drawing != event.image:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._stop_progress()
            columns = TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(True)
            options = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
            self._progress = Progress(*columns, console=self._console, **options)
            self._progress.add_task(f"drawing picture {event.image + 1}", total=event.total)
            self._progress.start()
            self._drawing = event.image
        self._progress.update(self._progress.task_ids[0], completed=event.step)

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _image(self, event: ImageDone) -> None:
        """Show an image, or else print where it is."""
        if self._painter is not None:
            self._painter(event.image.load())
            return
        seed, path = event.image.meta.get("seed"), event.image.path
        note = f"picture {event.index + 1}" if path is None else f"picture: {path}"
        self._note(note if seed is None else f"{note} (seed {seed})")

    def _finish(self, event: Finished) -> None:
        """Print why a reply ended early; outside of stories also its seed, tokens and seconds."""
        words = [ENDINGS[event.reason]] if event.reason in ENDINGS else []
        if not self._in_story:  # which would print it after every scene
            forms = {"seed": "seed {}".format, "tokens": partial(counted, noun="token"), "seconds": "{:.1f} s".format}
            values = {key: event.meta.get(key) for key in forms}
            words += [forms[key](value) for key, value in values.items() if isinstance(value, int | float)]
        if words:
            self._note(" · ".join(words))
