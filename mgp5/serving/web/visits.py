"""What each open page has said and made, and replies on their way to it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from anyio import to_thread

from ...apps.recorder import Recorder, StoryScene
from ...errors import Mgp5Error
from ...events import Finished, ImageDone
from ...messages import Conversation, Image, Message
from ...prompts import CHAT_SYSTEM
from ...views.files import write_png
from ..engine import Refused
from ..pictures import decoded

if TYPE_CHECKING:
    from ...options import Options
    from ..app import AppState, Running
    from ..limits import Limits

MOST, IDLE = 200, 3 * 3600.0  # pages that are remembered, and seconds for which one is that does nothing
SHOWN = 1024  # longest side of a picture dropped in, as the page shows it
PACE = 0.1  # seconds between two updates of a page, at least
STOPPED = Finished(Message("assistant", ()), "interrupted")


@dataclass
class Visit:
    """One open page.

    Attributes:
        folder: of the pictures that it shows; nobody else's files are there.
        number: replies of the chat so far; each takes seeds of its own.
        running: the reply that is being made.
    """

    folder: Path
    talk: Conversation = field(default_factory=lambda: Conversation().add("system", CHAT_SYSTEM))
    book: list[StoryScene] = field(default_factory=list)
    number: int = 0
    running: Running | None = None
    stopped: bool = False
    seen: float = field(default_factory=time.monotonic)
    _files: dict[int, tuple[Image, Path]] = field(default_factory=dict)

    def bring(self, path: Path, limits: Limits) -> Image:
        """A picture that was dropped in. Raises Mgp5Error."""
        try:
            image = decoded(path.read_bytes(), limits)
        except OSError:
            raise Mgp5Error("a picture has not arrived", "drop it in again") from None
        self.show(image)
        return image

    def show(self, image: Image) -> str:
        """The file of a picture that a browser may fetch; a drawn one tells in it how it was made."""
        if id(image) not in self._files:
            path, picture = self.folder / f"picture-{len(self._files) + 1}.png", image.load()
            if not image.meta:
                picture.thumbnail((SHOWN, SHOWN))
            write_png(Image(pixels=picture, meta=image.meta), path)
            self._files[id(image)] = (image, path)  # holds the picture, so that its id is not used again
        return str(self._files[id(image)][1])

    def begin(self) -> None:
        """Before something is made: one thing at a time. Raises Mgp5Error."""
        if self.running:
            raise Mgp5Error("this page is at work", "wait, or stop it")
        self.stopped = False

    def stop(self) -> None:
        """End what is being made, and what was to follow it."""
        self.stopped = True
        if self.running:
            self.running.queue.put_nowait(STOPPED)


class Visits:
    """All open pages, by the name that a page gives itself, which nobody else knows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._all: dict[str, Visit] = {}

    def of(self, name: str) -> Visit:
        """The page of this name, a new one where there is none; forgets those idle for long, and the oldest of many."""
        now = time.monotonic()
        visit = self._all.pop(name, None)
        old = [key for key, other in self._all.items() if now - other.seen > IDLE and other.running is None]
        for key in old or list(self._all)[: max(0, len(self._all) - MOST + 1)]:
            gone = self._all.pop(key)
            gone.stop()
            shutil.rmtree(gone.folder, ignore_errors=True)
        visit = visit or Visit(Path(tempfile.mkdtemp(dir=self.folder)))
        self._all[name], visit.seen = visit, now  # the last of all: seen last
        return visit


async def replying(desk: AppState, visit: Visit, talk: Conversation, options: Options) -> AsyncIterator[Recorder]:
    """A reply as it grows, the last time whole; leaving early cancels it. Raises Refused."""
    (visit.running,) = await desk.run(talk, [options], None)
    draft, shown = Recorder(), 0.0
    try:
        async with aclosing(visit.running.events()) as events:
            async for event in events:
                if isinstance(event, ImageDone):
                    await to_thread.run_sync(visit.show, event.image)  # encoded here, not in the thread of all requests
                draft(event)
                if draft.finished or isinstance(event, ImageDone) or time.monotonic() - shown > PACE:
                    yield draft
                    shown = time.monotonic()
    finally:
        visit.running = None


def check_size(talk: Conversation, limits: Limits) -> None:
    """Raise Refused for a conversation above the limits."""
    for name, found, most in (
        ("messages", len(talk.messages), limits.messages),
        ("pictures", len(talk.images), limits.pictures),
    ):
        if found > most:
            raise Refused(400, f"{found} {name} in a conversation, and this server allows {most}: begin another", "")
