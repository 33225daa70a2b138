"""Flags that mean the same in several commands, and what they stand for: options, a model, a view."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Mgp5Error

if TYPE_CHECKING:
    from ..events import Event
    from ..model import InterleavedModel
    from ..options import Options
    from ..views.files import StoryFolder

Command = Callable[..., Any]
SEED = click.IntRange(0, 2**62)  # what torch takes, with room to count up


def generation_options(command: Command) -> Command:
    """Flags that mean the same in every command that generates."""
    for option in reversed(
        (
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
    ):
        command = option(command)
    return command


def ray_option(told: str) -> Callable[[Command], Command]:
    """--ray, with an address or without."""
    return click.option("--ray", is_flag=False, flag_value="local", metavar="[ADDRESS]", help=told)


def without(*names: str) -> Callable[[Command], Command]:
    """Take flags off again that a command has no use for, or has its own of."""

    def take_off(command: Command) -> Command:
        command.__click_params__ = [flag for flag in command.__click_params__ if flag.name not in names]
        return command

    return take_off


def options_of(flags: dict[str, Any]) -> Options:
    from ..config import parse_settings
    from ..options import reply_options

    seed = random.SystemRandom().randrange(2**31) if flags["seed"] is None else flags["seed"]
    given = {name: flags[name] for name in ("steps", "guidance", "guidance_until", "reuse")}
    options = reply_options(seed=seed, **given)
    return options.updated(parse_settings(flags["settings"]))


def model_of(flags: dict[str, Any], folder: StoryFolder | None = None) -> InterleavedModel:
    """The model that the flags ask for; without it an empty folder goes again."""
    try:
        return _load(flags)
    except Mgp5Error:
        if folder:
            folder.discard()
        raise


def _load(flags: dict[str, Any]) -> InterleavedModel:
    from ..device import limit_threads_for_small_models, pick_device, quiet_libraries

    quiet_libraries()  # before anything imports them
    from .. import engines
    from ..hub import resolve
    from ..memory import offload as placement
    from ..model import load, set_backend

    device, dtype = pick_device(flags["device"])
    engines.select_backend(flags["backend"], device, dtype)  # what cannot run is told before anything is loaded
    plan = placement.select_memory_plan(flags["memory"], resolve(flags["model"]), device, dtype, flags["quantize"])
    backend = plan.engine(flags["backend"])
    if plan.why:
        say(flags, plan.why)
    model = load(flags["model"], dtype=dtype, device=str(device), backend=None, memory=plan)
    limit_threads_for_small_models(model)
    choice = set_backend(model, backend, flags["exported"])
    if flags["exported"]:
        from ..engines.exported import put_mapper_on

        put_mapper_on(model.head, flags["exported"], device, backend)
    if choice.why:
        say(flags, f"backend {choice.name or 'diffusers'}: {choice.why}")
    return model


def view_of(flags: dict[str, Any], folder: StoryFolder | None) -> Callable[[Event], None]:
    from ..views.files import JsonEvents
    from ..views.terminal import TerminalView

    if flags["as_json"]:
        return JsonEvents(sys.stdout, folder)
    return TerminalView(flags["show"], folder=folder)


def facts_of(flags: dict[str, Any], options: Options) -> dict[str, Any]:

    given = {key: value for key, value in options.flat().items() if value is not None and key != "seed"}
    return given | engine_of(flags)


def engine_of(flags: dict[str, Any]) -> dict[str, str]:
    """What else pictures depend on, where it was given."""
    named = {name: str(flags[name]) for name in ("backend", "exported", "quantize")}
    return {name: value for name, value in named.items() if value not in ("auto", "None", "none")}


def tell_seed(flags: dict[str, Any], options: Options) -> None:
    if flags["seed"] is None:
        say(flags, f"seed {options.seed}")


def say(flags: dict[str, Any], text: str) -> None:
    if not flags.get("as_json"):
        click.echo(text, err=True)
