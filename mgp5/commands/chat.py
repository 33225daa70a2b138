"""mgp5 chat: talk with a model."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Any

import click

from .flags import PATH, fill, generation_options, notes, requests_of, view_of


@click.command()
@click.option("--image", "images", type=PATH, multiple=True, help="Picture for the first message.")
@click.option("--message", "messages", multiple=True, help="Say this and exit; may be given several times.")
@click.option("--out", type=PATH, help="Folder for the conversation.")
@click.option("--resume", type=PATH, help="Go on with the conversation in this folder.")
@generation_options
def chat(messages: tuple[str, ...], **flags: Any) -> None:
    """Talk with the model; it answers in text and images."""
    from ..apps.chat import ChatRequest, open_chat
    from .repl import Repl

    model, options = requests_of(flags)
    say = notes(flags)
    chat = open_chat(fill(ChatRequest, flags, model=model, options=options), say)
    if flags["seed"] is None:
        say(f"seed {options.seed}")
    with closing(chat):
        repl, failed = Repl(chat, lambda: view_of(flags)), 0
        if messages:
            failed = repl.say_all(messages)
        elif sys.stdin.isatty():
            repl.run()
        else:
            lines = (line.decode("utf-8", "surrogateescape") for line in sys.stdin.buffer)
            failed = repl.read_all(
                line.removeprefix("\ufeff").strip() for line in lines
            )  # a byte-order mark is no text
    if chat.folder and chat.folder.path.exists():
        say(f"The conversation is in {chat.folder.path}")
    if failed:
        raise click.exceptions.Exit(1)
