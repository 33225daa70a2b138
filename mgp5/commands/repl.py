"""Run a chat on a terminal: lines and /commands in, events to a view, everything kept in a folder."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..apps.chat import Chat
from ..errors import Mgp5Error, told
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
NEEDED = {"/image": "the path of a picture, FILE", "/seed": "a whole number, N", "/save": "the path of a folder, DIR"}


class Repl:
    """Run a chat. A folder is made after the first reply with an image if there is none, so that no image is lost.

    Args:
        chat: the conversation.
        make_view: makes the view of one reply, a context manager that is called with every event.
    """

    def __init__(self, chat: Chat, make_view: Callable[[], Any]) -> None:
        self.chat, self._make_view = chat, make_view

    def say_all(self, messages: Iterable[str]) -> int:
        """Send one message after the other; return how many failed. Raises KeyboardInterrupt."""
        return sum(not self._try(self._say, message) for message in messages)

    def read_all(self, lines: Iterable[str]) -> int:
        """Do what lines say until /quit, as `run` does; return how many failed. Raises KeyboardInterrupt."""
        lines = itertools.takewhile(lambda line: line != "/quit", lines)
        return sum(not self._try(self._line, line) for line in lines if line)

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
            except UnicodeDecodeError as error:
                say(f"mgp5: the line {error.object!r} is not UTF-8: write it in UTF-8")
                continue
            if line == "/quit":
                return
            try:
                if line:
                    self._try(self._line, line)
            except KeyboardInterrupt:
                say("\n(stopped; what was said is kept)")

    def _try(self, do: Callable[[str], None], line: str) -> bool:
        """Do something with a line, and return whether that went well; an error, which is printed, costs this line."""
        try:
            do(line)
        except BrokenPipeError:
            raise
        except Exception as error:  # whatever it is, the next line may do
            say(f"mgp5: {told(error)}")
            return False
        return True

    def _say(self, message: str) -> None:
        self._show(self.chat.say(message))

    def _line(self, line: str) -> None:
        """Do what one line says: a message, or a /command. Raises Mgp5Error."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if not word.startswith("/"):
            self._say(line)
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
        elif word in NEEDED:
            raise Mgp5Error(f"{line!r} lacks {NEEDED[word]}", f"write {word} {NEEDED[word].split()[-1]}")
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
