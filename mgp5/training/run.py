"""What `mgp5 train` does: settings and data together, a model, the loop, progress in the terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import click
import torch

from ..config import TrainConfig, model_config_from, preset
from ..data import Keyed, load_data, options_of
from ..device import DTYPES, quiet_libraries
from ..errors import Mgp5Error
from ..files import read_json
from ..hub import explain, from_hub, read_config, resolve
from ..loading import CONFIG, build, load_checkpoint
from ..model import InterleavedModel
from ..options import override, parse_settings, read_toml
from . import checkpoints as runs
from .distributed import frozen_dtype, launch
from .feature_cache import Caches
from .loop import Progress, num_samples, total_steps, train

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.shards import Shards


def settings(flags: dict[str, Any]) -> TrainConfig:
    """Preset < file < --set < flags of their own."""
    config = preset(flags["stage"], flags["preset"])
    if flags["config"]:
        config = override(config, read_toml(flags["config"]))
    config = override(config, parse_settings(flags["settings"]))
    return replace(config, steps=flags["max_steps"]) if flags["max_steps"] else config


def sources(flags: dict[str, Any], config: TrainConfig, tokenizer: Any) -> Keyed | Shards:
    """All --data with their --format as one data set; each format takes those settings of `config.data` it knows.

    Args:
        tokenizer: of the LLM, which counts the tokens of a turn.
    """
    formats = flags["formats"]
    if len(flags["sources"]) != len(formats):
        found = f"{len(flags['sources'])} --data but {len(formats)} --format"
        raise Mgp5Error(found, "give one --format for each --data, in the same order", usage=True)
    if "shards" in formats and len(formats) > 1:
        raise Mgp5Error(
            "shards are a stream and go with no other --data", "give all as one: {00000..00331}", usage=True
        )
    known = {field.name: getattr(config.data, field.name) for field in fields(config.data)}
    known["count"] = lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    parts = []
    for format, path in zip(formats, flags["sources"], strict=True):
        options = {name: known[name] for name in options_of(format) if name in known}
        parts.append(load_data(format, path, flags.get("split", "train"), **options))
        if parts[-1].problems:
            click.echo(f"{path}: skipped {parts[-1].problems}", err=True)
    return parts[0] if "shards" in formats else Keyed(parts)


def start(flags: dict[str, Any], config: TrainConfig, dtype: torch.dtype = torch.float32) -> InterleavedModel:
    """The model that a stage begins with: fresh, or what the stage before has trained (folded into its weights).

    Args:
        dtype: of the weights that do not train.
    """
    parts = resolve(flags["model"])
    torch.manual_seed(config.seed)  # a fresh mapper is the same in every process and every run
    # The run's configuration names its parts: folders absolutely, so that it can be used from anywhere.
    mllm, diffusion = (os.path.abspath(p) if os.path.isdir(p) else p for p in (parts.mllm, parts.diffusion))
    if parts.trained is None:
        layers = {name: getattr(config, name) for name in ("encoder_layers", "decoder_layers", "inner", "kind")}
        return build(mllm, diffusion, num_vokens=flags["vokens"], dtype=dtype, quantize=config.quantize, **layers)
    model = load_checkpoint(parts, dtype=dtype, quantize=config.quantize)
    if model.config.lora or model.config.prefix:  # a new run saves its own adapter only: the old one would be lost
        raise Mgp5Error(
            f"--model {flags['model']} is finetuned already", "start from its pretrain run, or go on with --resume"
        )
    model.merge()
    model.config = replace(model.config, mllm=mllm, diffusion=diffusion)
    return model


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model's LLM, without its weights. Raises Mgp5Error."""
    from transformers import AutoTokenizer

    mllm = resolve(model).mllm
    try:
        return from_hub(mllm, lambda name, revision: AutoTokenizer.from_pretrained(name, revision=revision))
    except (OSError, ValueError) as error:
        raise explain(error, mllm) from error


def run(flags: dict[str, Any]) -> None:
    """Train, and tell how it goes; of several processes the first one does. Raises Mgp5Error, KeyboardInterrupt."""
    if os.environ.get("RANK", "0") == "0":
        return _run(flags)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            _run(flags)
        except Mgp5Error as error:
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(130)


def _run(flags: dict[str, Any]) -> None:
    quiet_libraries()
    config, out = settings(flags), flags["out"]
    if flags["dry_run"]:
        return _dry_run(flags, config)
    runs.check(out, config, flags["resume"])
    data = sources(flags, config, tokenizer_of(flags["model"]))
    accelerator = launch(config, flags["device"], out)
    total_steps(config, data, accelerator.num_processes)  # an error is told before weights are loaded
    model = start(flags, config, frozen_dtype(config, accelerator.device))
    caches = Caches.open(flags["caches"], model) if flags["caches"] else None
    with Interruption() as asked:
        pieces = {"resume": flags["resume"], "stop_after": flags["stop_after"], "caches": caches}
        last = _show(train(model, data, config, out, stop=asked, accelerator=accelerator, **pieces), flags)
    with redirect_stdout(sys.stderr):  # trackers take leave
        accelerator.end_training()
    if not flags["as_json"]:
        if caches:
            click.echo(f"taken from the caches: {caches}", err=True)
        _tell(flags["out"], bool(last and last.stopped))
    if last and last.stopped:
        raise KeyboardInterrupt


def _dry_run(flags: dict[str, Any], config: TrainConfig) -> None:
    """Tell what a run would train and what it would take on one GPU; configurations are read, no weights."""
    from rich.console import Console

    from ..memory.estimate import estimate, table
    from ..memory.skeletons import skeleton

    parts, processes = resolve(flags["model"]), int(os.environ.get("WORLD_SIZE", "1"))
    data = sources(flags, config, _Later(flags["model"]))
    samples, total = num_samples(data), total_steps(config, data, processes)
    own = parts.trained and model_config_from(read_config(parts.trained / CONFIG), parts.name)
    vokens, dtype = flags["vokens"], DTYPES[config.precision]
    told = estimate(skeleton(parts.mllm, parts.diffusion, config, num_vokens=vokens, trained=own, dtype=dtype), config)
    facts = {"samples": samples, "updates": total, "tokens": told.length, "tflop": round(told.flops / 1e12, 3)}
    if flags["as_json"]:
        print(json.dumps(facts | {"parts": [asdict(row) for row in told.rows], "bytes": told.total.total}))
        return
    Console(stderr=True).print(table(told))
    batch = config.batch * config.accumulation * processes
    work = f"{samples} samples, {total} updates of {batch} samples, {config.batch} of {told.length} tokens at a time"
    click.echo(f"{work}; {told.total.trained:,} trainable parameters, {facts['tflop']} TFLOP per update", err=True)


class _Later:
    """A tokenizer that is loaded when it is first needed: few formats do, and a dry run of known shapes needs none."""

    def __init__(self, model: str) -> None:
        self.load = cache(lambda: tokenizer_of(model))

    def encode(self, *args: Any, **options: Any) -> list[int]:
        return self.load().encode(*args, **options)


class Interruption:
    """Ctrl-C and SIGTERM as a question: the loop finishes its update and saves. A second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.asked

    def __enter__(self) -> Interruption:
        self._old = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def _tell(out: Path, stopped: bool) -> None:
    """Where the result is, and what was not trained on."""
    for kind, (number, place) in read_json(out / runs.REPORT)["problems"].items():
        click.echo(f"{number} x {kind} (first: {place})", err=True)
    click.echo(f"What was trained is in {out}{': go on with --resume' if stopped else ''}", err=True)


def _show(events: Iterator[Progress], flags: dict[str, Any]) -> Progress | None:
    """Show every update; returns the last."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(flags["stage"]), BarColumn(8), MofNCompleteColumn(), TextColumn("{task.description}"))
    event = None
    with Bar(*columns, console=Console(stderr=True), disable=flags["as_json"]) as bar:
        task = bar.add_task("", total=None)
        for event in events:
            bar.update(task, total=event.total, completed=event.step, description=_line(event))
            if flags["as_json"]:
                sys.stdout.write(json.dumps(event.row()) + "\n")
                sys.stdout.flush()
    return event


def _line(event: Progress) -> str:
    """An update in short: it has to fit a terminal of 80 columns; the log has the rest."""
    hours, seconds = divmod(round(event.eta), 3600)
    losses = " ".join(f"{name} {value:.3f}" for name, value in event.losses.items())
    eta = f"{hours}:{seconds // 60:02}:{seconds % 60:02}"
    return f"{eta} {losses} {event.images_per_second:.1f} images/s {event.memory_gib:.1f} GiB"
