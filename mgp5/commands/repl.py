"""Run a chat on a terminal: lines and /commands in, events to a view, everything kept in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..apps.chat import Chat
from ..errors import Mgp5Error
from ..events import Event
from ..views.files import StoryFolder, free_folder
from .flags import say

HELP = """\
/image FILE   show a picture with your next message
/undo         take back your last message and its reply
/retry        another reply to your last message
/seed N       seed of the next reply; those after it count up
/save DIR     put the conversation, its pictures and a page into a folder
/help         this list
/quit         end (so does Ctrl-D); Ctrl-C stops a reply and keeps what it has said
"""


class Repl:
    """Run a chat. A folder is made after the first reply with an image if there is none, so that no image is lost.

    Args:
        chat: the conversation.
        make_view: makes the view of one reply, a context manager that is called with every event.
    """

    def __init__(self, chat: Chat, make_view: Callable[[], Any]) -> None:
        self.chat, self._make_view = chat, make_view

    def say_all(self, messages: Iterable[str]) -> None:
        """Send one message after the other. Raises Mgp5Error and KeyboardInterrupt, with everything kept."""
        for message in messages:
            self._show(self.chat.say(message))

    def run(self) -> None:
        """Read lines until /quit or the end of input; an error is printed and the conversation goes on."""
        say("Write a message, or /help. Ctrl-D ends.")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                say("")
                return
            except KeyboardInterrupt:
                say("\n(/quit or Ctrl-D ends)")
                continue
            try:
                if line == "/quit":
                    return
                if line:
                    self._line(line)
            except Mgp5Error as error:
                say(f"mgp5: {error}")
            except KeyboardInterrupt:
                say("\n(stopped; what was said is kept)")

    def _line(self, line: str) -> None:
        """Do what one line says: a message, or a /command. Raises Mgp5Error."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if not word.startswith("/"):
            self._show(self.chat.say(line))
        elif word == "/help":
            say(HELP.rstrip())
        elif word == "/image" and rest:
            self.chat.attach(Path(rest).expanduser())
            say(f"{rest} goes with your next message")
        elif word == "/undo":
            say(f"took back: {self.chat.undo()}")
        elif word == "/retry":
            self._show(self.chat.retry())
        elif word == "/seed" and rest.isascii() and rest.isdigit() and len(rest) < 19:
            self.chat.seed(int(rest))
            say(f"the next reply takes seed {rest}")
        elif word == "/save" and rest:
            self.chat.move(StoryFolder.create(Path(rest).expanduser()))
            say(f"saved in {rest}")
        else:
            raise Mgp5Error(f"{line!r} is no command", "see /help")

    def _show(self, events: Iterator[Event]) -> None:
        """Show the events of a reply; afterwards, or after an interruption, see that its images have a folder."""
        try:
            with self._make_view() as view, contextlib.closing(events):
                for event in events:
                    view(event)
        finally:
            if self.chat.folder is None and self.chat.conversation.images:
                self.chat.move(StoryFolder.create(free_folder("chat")))
                say(f"pictures and conversation are kept in {self.chat.folder.path}")
