"""The training loop on Accelerate: build, step, log, save, resume; it knows batches and losses, not the model's parts.

A run is a folder: config.json, log.jsonl, mgp5/ (what was trained), state.pt (optimizer and position, for --resume).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from .checkpoint import put, save_checkpoint, trained_tensors
from .collate import Batch, Collator
from .config import TrainConfig
from .errors import Mgp5Error
from .hub import Parts
from .model import MiniGPT5

STATE, LOG = "state.pt", "log.jsonl"


@dataclass(frozen=True)
class Progress:
    """What the loop says after an update."""

    step: int
    total: int
    losses: dict[str, float]
    rate: float  # updates per second


class Order:
    """Sample indices without end: a new permutation every epoch, drawn from the seed; can start anywhere."""

    def __init__(self, size: int, seed: int, first: int) -> None:
        self.size, self.seed, self.first = size, seed, first

    def __iter__(self) -> Iterator[int]:
        epoch, offset = divmod(self.first, self.size)
        while True:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
            yield from order[offset:]
            epoch, offset = epoch + 1, 0


def total_steps(config: TrainConfig, samples: int, processes: int = 1) -> int:
    """Updates of a run: `config.steps`, else the epochs' worth."""
    return config.steps or max(1, config.epochs * samples // (config.batch * config.accumulation * processes))


def rate(config: TrainConfig, step: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up, then linear decay to zero."""
    warmup = max(1, min(config.warmup, total // 10))
    return min((step + 1) / warmup, max(0.0, (total - step) / max(1, total - warmup)), 1.0)


def train(
    model: MiniGPT5,
    data: Dataset,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
) -> Iterator[Progress]:
    """Train a stage and yield after every update; what was trained is in `out` at the end, and every `save_every`.

    An interrupted run that is resumed gives the same weights as an uninterrupted one: order of the data and all
    random draws are functions of seed and step.

    Args:
        data: conversations whose last message is the target.
        stop_after: end this call after so many updates (the run can be resumed).

    Raises:
        Mgp5Error: `out` holds a run already and `resume` is not set, or holds a run of another configuration.
    """
    accelerator = Accelerator(mixed_precision="no" if config.precision == "fp32" else config.precision)
    _claim(out, config, resume)
    model.prepare(config.stage, config.lora)
    total = total_steps(config, len(data), accelerator.num_processes)
    optimizer = torch.optim.AdamW(model.parameter_groups(config), lr=config.lr, betas=(0.9, 0.999))
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    first = _restore(model, optimizer, out) if resume else 0
    collator = _collator(model)
    order = Order(len(data), config.seed, first * config.batch * config.accumulation * accelerator.num_processes)
    loader = DataLoader(
        data, config.batch, sampler=_Lazy(order), collate_fn=collator, num_workers=config.workers, drop_last=True
    )
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = iter(loader)
    model.train()
    last = total if stop_after is None else min(total, first + stop_after)
    started = time.monotonic()
    with (out / LOG).open("a") as log:
        for step in range(first, last):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(config, step, total)
            losses = _update(accelerator, wrapped, optimizer, batches, config, step)
            progress = Progress(step + 1, total, losses, (step + 1 - first) / (time.monotonic() - started))
            if accelerator.is_main_process:
                row = {"step": step + 1, "lr": optimizer.param_groups[-1]["lr"], "rate": round(progress.rate, 3)}
                if collator.too_long:
                    row["too_long"] = collator.too_long
                if (step + 1) % config.log_every == 0 or step + 1 == last:
                    log.write(json.dumps(row | losses) + "\n")
                    log.flush()
                if (step + 1) % config.save_every == 0 or step + 1 == last:
                    _save(accelerator.unwrap_model(wrapped), optimizer, step + 1, out)
            yield progress
    model.eval()


def _update(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    batches: Iterator[Batch | None],
    config: TrainConfig,
    step: int,
) -> dict[str, float]:
    """One update over `accumulation` batches; returns the mean of each loss."""
    sums: dict[str, list[float]] = {}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for part in range(config.accumulation):
        batch = next(batches)
        if batch is None:
            continue
        draw = (config.seed * 1_000_003 + step) * 1009 + part + 500_009 * accelerator.process_index
        torch.manual_seed(draw)  # LoRA's dropout takes the global generator
        losses = model(batch.to(accelerator.device), config, torch.Generator().manual_seed(draw))
        accelerator.backward(losses.total / config.accumulation)
        for name, value in losses.terms.items():
            sums.setdefault(name, []).append(value.item())
    if config.clip:
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: round(sum(values) / len(values), 5) for name, values in sums.items()}


class _Lazy(torch.utils.data.Sampler):
    """An endless Order as a sampler with the length of one epoch, which is all that a DataLoader asks for."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


def _collator(model: MiniGPT5) -> Collator:
    side = model.diffusion.native_size
    return Collator(model.backbone, model.head.tokens, (side, side), model.backbone.context_length)


def _claim(out: Path, config: TrainConfig, resume: bool) -> None:
    """Make the run's folder, or check that the run to be resumed is this one.

    A folder whose run ended before it saved anything is free again.
    """
    path = out / "config.json"
    text = json.dumps(asdict(config), indent=2) + "\n"
    if resume:
        if not (out / STATE).is_file():
            raise Mgp5Error(f"--out {out} holds no run to resume", "leave out --resume to start one", usage=True)
        old, new = _read_json(path), json.loads(text)
        free = {"steps", "epochs", "log_every", "save_every", "workers"}  # may change between the pieces of a run
        if changed := [name for name in new if name not in free and old.get(name) != new[name]]:
            other = f"--out {out} is a run with another {', '.join(changed)}"
            raise Mgp5Error(other, "resume it with the same settings", usage=True)
    elif (out / STATE).exists() or (path.exists() and not (out / LOG).exists()):
        raise Mgp5Error(
            f"--out {out} already holds a run", "resume it with --resume, or choose another --out", usage=True
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (out / LOG).open("a" if resume else "w").close()
    except OSError as error:
        raise Mgp5Error(f"--out {out} cannot be written ({error.strerror})", "choose another --out") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Mgp5Error(f"cannot read {path} ({error})", "start the run again with another --out") from None


def _save(model: MiniGPT5, optimizer: Any, step: int, out: Path) -> None:
    save_checkpoint(model, out)
    # The state holds the weights too: a crash between the two files must not mix those of one step with another's.
    state = {"step": step, "weights": trained_tensors(model), "optimizer": optimizer.state_dict()}
    torch.save(state, out / f"{STATE}.tmp")
    os.replace(out / f"{STATE}.tmp", out / STATE)


def _restore(model: MiniGPT5, optimizer: torch.optim.Optimizer, out: Path) -> int:
    state = torch.load(out / STATE, map_location="cpu", weights_only=True)
    put(model, state["weights"], Parts(str(out), "", "", out))
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
