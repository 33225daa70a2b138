"""Flags that mean the same in several commands, and the requests and views that they stand for."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..options import ModelRequest, Options
    from ..views.files import JsonEvents
    from ..views.terminal import TerminalView

Command = Callable[..., Any]
SEED = click.IntRange(0, 2**62)  # what torch takes, with room to count up


GENERATION = (
    click.option("--model", default="demo", show_default=True, help="A name, or the folder of a model."),
    click.option("--seed", type=SEED, help="Seed of text and images; random, and told, if not given."),
    click.option("--steps", type=int, default=20, show_default=True, help="Denoising steps per image."),
    click.option("--guidance", type=float, help="Guidance scale; 1 turns it off.  [default: the model's]"),
    click.option(
        "--guidance-until",
        type=click.FloatRange(0, 1),
        default=1.0,
        metavar="FRACTION",
        help="Guide this share of the steps only: faster, another picture.",
    ),
    click.option(
        "--reuse",
        type=click.IntRange(1),
        default=1,
        metavar="N",
        help="Run the whole UNet in one of N steps only: faster, another picture.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
    click.option(
        "--backend",
        type=click.Choice(["auto", "eager", "compile", "triton", "onnx", "trt"]),
        default="auto",
        show_default=True,
        help="What draws: auto takes the fastest that works here.",
    ),
    click.option(
        "--exported",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Made by export, for --backend onnx or trt.  [onnx on a CPU: made when needed, and kept]",
    ),
    click.option(
        "--memory",
        type=click.Choice(["auto", "low", "full"]),
        default="auto",
        show_default=True,
        help="On a GPU: auto saves what it must, low all it can. See doctor.",
    ),
    click.option(
        "--quantize",
        type=click.Choice(["none", "4bit", "8bit"]),
        default="none",
        show_default=True,
        help="Bits of the LLM's layers.",
    ),
    click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any option of generation."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object per event on stdout."),
    click.option(
        "--show",
        type=click.Choice(["auto", "blocks", "off"]),
        default="auto",
        show_default=True,
        help="Images in the terminal (never when piped).",
    ),
)


def generation_options(command: Command) -> Command:
    """Add the flags that mean the same in every command that generates."""
    for option in reversed(GENERATION):
        command = option(command)
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


def requests_of(flags: dict[str, Any]) -> tuple[ModelRequest, Options]:
    """Return what the flags of `generation_options` ask for. A seed that was not given is drawn at random.

    Raises:
        Mgp5Error: options that are unknown or out of range.
    """
    from ..apps.open_model import image_options
    from ..options import DiffusionOptions, parse_settings, reply_options

    seed = random.SystemRandom().randrange(2**31) if flags["seed"] is None else flags["seed"]
    model = model_request(flags)
    kind, usual = image_options(model), DiffusionOptions()
    known = {field.name for field in fields(kind)}
    image = {name: flags[name] for name in ("steps", "guidance", "guidance_until", "reuse")}
    # A flag at its default asks for nothing: a head without such an option is not told of it.
    image = {name: value for name, value in image.items() if name in known or value != getattr(usual, name)}
    return model, reply_options(kind, seed=seed, **image).updated(parse_settings(flags["settings"]))


def model_request(flags: dict[str, Any]) -> ModelRequest:
    """Return which model the flags ask for, and how to hold and run it."""
    from ..options import ModelRequest

    return ModelRequest(**{field.name: flags[field.name] for field in fields(ModelRequest)})


def view_of(flags: dict[str, Any]) -> JsonEvents | TerminalView:
    """Return the view that shows events on this terminal, or writes them as JSON lines."""
    from ..views.files import JsonEvents
    from ..views.terminal import TerminalView

    if flags["as_json"]:
        return JsonEvents(sys.stdout)
    return TerminalView(flags["show"])


def notes(flags: dict[str, Any]) -> Callable[[str], None]:
    """Return a function that prints a line on stderr; with --json it drops the line."""
    return (lambda line: None) if flags.get("as_json") else lambda line: click.echo(line, err=True)
