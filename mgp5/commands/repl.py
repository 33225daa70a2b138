"""The chat's prompt: lines and /commands in, events to a view, everything kept in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ..apps.chat import HELP, Chat
from ..errors import Mgp5Error
from ..events import Event
from ..views.files import STORY, StoryFolder, free_folder
from ..views.html import write_html


class Repl:
    """Runs a chat. A folder is made at the first picture if none was asked for, so that no picture is lost.

    Args:
        talk: the conversation.
        folder: where it is kept, or None.
        view: makes a view for a folder; used once per reply.
        facts: model and options, for story.json.
    """

    def __init__(
        self,
        talk: Chat,
        folder: StoryFolder | None,
        view: Callable[[StoryFolder | None], Any],
        facts: Mapping[str, Any],
    ) -> None:
        self.talk, self.folder, self._view, self._facts = talk, folder, view, facts

    def say_all(self, messages: Iterable[str]) -> None:
        """Say one message after the other (scripts). Raises Mgp5Error and KeyboardInterrupt with everything kept."""
        for message in messages:
            self._show(self.talk.say(message))

    def run(self) -> None:
        """Read lines until /quit or the end of input; errors are told and the conversation goes on."""
        click.echo("Write a message, or /help. Ctrl-D ends.", err=True)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                click.echo("\n(/quit or Ctrl-D ends)", err=True)
                continue
            try:
                if line == "/quit":
                    return
                if line:
                    self._line(line)
            except Mgp5Error as error:
                click.echo(f"mgp5: {error}", err=True)
            except KeyboardInterrupt:
                click.echo("\n(stopped; what was said is kept)", err=True)

    def _line(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if not word.startswith("/"):
            self._show(self.talk.say(line))
        elif word == "/help":
            click.echo(HELP, err=True, nl=False)
        elif word == "/image" and rest:
            self.talk.show(Path(rest).expanduser())
            click.echo(f"{rest} goes with your next message", err=True)
        elif word == "/undo":
            click.echo(f"took back: {self.talk.undo()}", err=True)
            self._save()
        elif word == "/retry":
            self._show(self.talk.retry())
        elif word == "/seed" and rest.isascii() and rest.isdigit() and len(rest) < 19:
            self.talk.seed(int(rest))
            click.echo(f"the next reply takes seed {rest}", err=True)
        elif word == "/save" and rest:
            self.folder = StoryFolder.create(Path(rest).expanduser())
            self._save()
            click.echo(f"saved in {self.folder.path}", err=True)
        else:
            raise Mgp5Error(f"{line!r} is no command", "see /help")

    def _show(self, events: Iterator[Event]) -> None:
        try:
            with self._view(self.folder) as view:
                for event in events:
                    view(event)
        finally:
            # Closing the generator ends an interrupted reply and keeps what it has said.
            events.close()
            self._save()

    def _save(self) -> None:
        talk = self.talk.conversation
        if self.folder is None and talk.images:
            self.folder = StoryFolder.create(free_folder("chat"))
            click.echo(f"pictures and conversation are kept in {self.folder.path}", err=True)
        said = any(message.role != "system" for message in talk.messages)
        if self.folder is None or not (said or (self.folder.path / STORY).exists()):
            return
        self.folder.save(talk, seed=self.talk.options.seed, **self._facts)
        write_html(*self.folder.load(), self.folder.path / "story.html", kind="chat")
