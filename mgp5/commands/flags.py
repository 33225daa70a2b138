"""Flags that mean the same in several commands, and the requests and views that they stand for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from ..options import ModelRequest, Options
    from ..views.files import JsonEvents
    from ..views.terminal import TerminalView

T = TypeVar("T")
Command = Callable[..., Any]
SEED = click.IntRange(0, 2**62)  # what torch takes, with room to count up
PATH = click.Path(path_type=Path)
COUNT = click.IntRange(1)


class Group(click.Group):
    """A group of commands whose help tells the whole first sentence of each."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        commands = sorted((name, command.get_short_help_str(1000)) for name, command in self.commands.items())
        with formatter.section("Commands"):
            formatter.write_dl(commands)


class Word(click.Choice):
    """A word of a Literal of `options`, which is imported when it is asked for: `mgp5 --help` does not wait for it."""

    def __init__(self, literal: str) -> None:
        self._literal, self.case_sensitive = literal, True

    @property
    def choices(self) -> tuple[str, ...]:
        """All words."""
        from .. import options

        return get_args(getattr(options, self._literal))


def settings_option(name: str, text: str) -> Callable[[Command], Command]:
    """Return the option --set, whose value is the nested dictionary of all settings."""

    def parse(context: click.Context, flag: click.Parameter, items: tuple[str, ...]) -> dict[str, Any]:
        from ..options import parse_settings

        return parse_settings(items)

    return click.option("--set", name, multiple=True, callback=parse, metavar="NAME=VALUE", help=text)


GENERATION = (
    click.option("--model", default="demo", help="A name, or the folder of a model."),
    click.option("--seed", type=SEED, help="Seed of text and images; random, and told, if not given."),
    click.option("--steps", type=int, default=20, help="Denoising steps per image."),
    click.option("--guidance", type=float, help="Guidance scale; 1 turns it off.  [default: the model's]"),
    click.option(
        "--guidance-until",
        type=click.FloatRange(0, 1),
        default=1.0,
        show_default=False,
        metavar="FRACTION",
        help="Guide this share of the steps only: faster, another picture.",
    ),
    click.option(
        "--reuse",
        type=COUNT,
        default=1,
        show_default=False,
        metavar="N",
        help="Run the whole UNet in one of N steps only: faster, another picture.",
    ),
    click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ..."),
    click.option(
        "--backend",
        type=Word("Backend"),
        default="auto",
        help="What draws: auto takes the fastest that works here.",
    ),
    click.option(
        "--exported",
        type=PATH,
        metavar="DIR",
        help="Made by export, for --backend onnx or trt.  [onnx on a CPU: that of export --cache]",
    ),
    click.option(
        "--memory",
        type=Word("Memory"),
        default="auto",
        help="On a GPU: auto saves what it must, low all it can. See doctor.",
    ),
    click.option(
        "--quantize",
        type=Word("Quantize"),
        default="none",
        help="Bits of the LLM's layers; int8 and fp8: of the denoiser too.",
    ),
    settings_option("settings", "Any option of generation."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object per event on stdout."),
    click.option(
        "--show",
        type=click.Choice(["auto", "blocks", "off"]),
        default="auto",
        help="Images in the terminal (never when piped); with --json, off leaves out the steps of images.",
    ),
)


def generation_options(command: Command) -> Command:
    """Add the flags that mean the same in every command that generates."""
    for flag in reversed(GENERATION):
        command = flag(command)
    return command


def ray_option(text: str) -> Callable[[Command], Command]:
    """Return the option --ray, with an address or without."""
    return click.option("--ray", is_flag=False, flag_value="local", metavar="[ADDRESS]", help=text)


def without(*names: str) -> Callable[[Command], Command]:
    """Remove flags from a command that has no use for them, or has its own."""

    def remove(command: Command) -> Command:
        command.__click_params__ = [flag for flag in command.__click_params__ if flag.name not in names]
        return command

    return remove


def random_seed() -> int:
    """Return a seed that people can type."""
    import random

    return random.SystemRandom().randrange(2**31)


def requests_of(flags: dict[str, Any]) -> tuple[ModelRequest, Options]:
    """Return what the flags of `generation_options` ask for. A seed that was not given is drawn at random, and told."""
    from ..apps.open_model import image_options
    from ..options import DiffusionOptions, ModelRequest, reply_options

    seed = random_seed() if flags["seed"] is None else flags["seed"]
    model = fill(ModelRequest, flags)
    kind, usual = image_options(model), DiffusionOptions()
    known = {field.name for field in fields(kind)}
    image = {name: flags[name] for name in ("steps", "guidance", "guidance_until", "reuse")}
    # A flag at its default asks for nothing: a head without such an option is not told of it.
    image = {name: value for name, value in image.items() if name in known or value != getattr(usual, name)}
    return model, reply_options(kind, seed=seed, **image).updated(flags["settings"])


def fill(kind: type[T], flags: dict[str, Any], **values: Any) -> T:
    """Return a request (a dataclass) of the flags that its fields are named after, and of other values."""
    return kind(**{field.name: flags[field.name] for field in fields(kind) if field.name in flags} | values)


def view_of(flags: dict[str, Any]) -> JsonEvents | TerminalView:
    """Return the view that shows events on this terminal, or writes them as JSON lines."""
    from ..views.files import JsonEvents
    from ..views.terminal import TerminalView

    return JsonEvents(sys.stdout, flags["show"] != "off") if flags["as_json"] else TerminalView(flags["show"])


def say(line: str) -> None:
    """Print a line on stderr."""
    click.echo(line, err=True)


def progress(*columns: ProgressColumn, **settings: Any) -> Progress:
    """Return a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), **settings)


def notes(flags: dict[str, Any]) -> Callable[[str], None]:
    """Return a function that prints a line on stderr; with --json it drops the line."""
    return (lambda line: None) if flags.get("as_json") else say
