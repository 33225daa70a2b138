"""mgp5 chat: talk with a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .flags import generation_options, notes, requests_of, view_of


@click.command()
@click.option(
    "--image", "images", type=click.Path(path_type=Path), multiple=True, help="Picture for the first message."
)
@click.option("--message", "messages", multiple=True, help="Say this and exit; may be given several times.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the conversation.")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with the conversation in this folder.")
@generation_options
def chat(
    images: tuple[Path, ...], messages: tuple[str, ...], out: Path | None, resume: Path | None, **flags: Any
) -> None:
    """Talk with the model; it answers in text and images."""
    from ..apps.chat import ChatRequest, open_chat
    from .repl import Repl

    model, options = requests_of(flags)
    say = notes(flags)
    chat = open_chat(ChatRequest(images=images, out=out, resume=resume, model=model, options=options), say)
    if flags["seed"] is None:
        say(f"seed {options.seed}")
    repl = Repl(chat, lambda: view_of(flags))
    if messages:
        repl.say_all(messages)
    elif sys.stdin.isatty():
        repl.run()
    else:
        repl.say_all(line for line in map(str.strip, sys.stdin) if line)
    if chat.folder:
        say(f"The conversation is in {chat.folder.path}")
