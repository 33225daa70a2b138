"""What `mgp5 train` does: settings and data together, a model, the loop, progress in the terminal."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

import click

from .checkpoint import load_checkpoint
from .config import TrainConfig, override, parse_settings, preset, read_toml
from .data import load_data
from .device import pick_device, quiet_libraries
from .errors import Mgp5Error
from .hub import resolve
from .model import MiniGPT5, build
from .train import total_steps, train


def settings(flags: dict[str, Any]) -> TrainConfig:
    """Preset < file < --set < flags of their own."""
    config = preset(flags["stage"], flags["preset"])
    if flags["config"]:
        config = override(config, read_toml(flags["config"]))
    config = override(config, parse_settings(flags["settings"]))
    return replace(config, steps=flags["max_steps"]) if flags["max_steps"] else config


def sources(flags: dict[str, Any]) -> Any:
    """All --data with their --format as one data set."""
    from torch.utils.data import ConcatDataset

    if len(flags["sources"]) != len(flags["formats"]):
        found = f"{len(flags['sources'])} --data but {len(flags['formats'])} --format"
        raise Mgp5Error(found, "give one --format for each --data, in the same order", usage=True)
    parts = [load_data(kind, path) for kind, path in zip(flags["formats"], flags["sources"], strict=True)]
    for path, part in zip(flags["sources"], parts, strict=True):
        if part.problems:
            click.echo(f"{path}: skipped {part.problems}", err=True)
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def start(flags: dict[str, Any], config: TrainConfig) -> MiniGPT5:
    """The model that a stage begins with: fresh, or what the stage before has trained (folded into its weights)."""
    parts = resolve(flags["model"])
    # The run's configuration names its parts: folders absolutely, so that it can be used from anywhere.
    mllm, diffusion = (os.path.abspath(p) if os.path.isdir(p) else p for p in (parts.mllm, parts.diffusion))
    if parts.trained is None:
        layers = {"encoder_layers": config.encoder_layers, "decoder_layers": config.decoder_layers}
        return build(mllm, diffusion, num_vokens=flags["vokens"], **layers)
    model = load_checkpoint(parts)
    if model.config.lora is not None:  # a new run saves its own adapter only: the old one would be lost
        raise Mgp5Error(
            f"--model {flags['model']} is finetuned already", "start from its pretrain run, or go on with --resume"
        )
    model.merge()
    model.config = replace(model.config, mllm=mllm, diffusion=diffusion)
    return model


def run(flags: dict[str, Any]) -> None:
    """Train, and tell how it goes. Raises Mgp5Error for what does not fit together."""
    quiet_libraries()
    config = settings(flags)
    data = sources(flags)
    device, _ = pick_device(flags["device"])
    model = start(flags, config).to(device)
    total = total_steps(config, len(data))
    if flags["dry_run"]:
        model.prepare(config.stage, config.lora)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        click.echo(f"{len(data)} samples, {total} updates, {trained:,} trainable parameters", err=True)
        return
    _loop(train(model, data, config, flags["out"], resume=flags["resume"], stop_after=flags["stop_after"]), flags)
    if not flags["as_json"]:
        click.echo(f"What was trained is in {flags['out']}", err=True)


def _loop(progress: Any, flags: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(flags["stage"]),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=flags["as_json"]) as bar:
        task = bar.add_task("", total=None)
        for event in progress:
            losses = "  ".join(f"{name} {value:.4f}" for name, value in event.losses.items())
            bar.update(task, total=event.total, completed=event.step, description=losses)
            if flags["as_json"]:
                sys.stdout.write(json.dumps({"step": event.step, "total": event.total} | event.losses) + "\n")
                sys.stdout.flush()
