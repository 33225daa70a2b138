"""The training loop on Accelerate: build, step, log, save, resume; it knows batches and losses, not the model's parts.

A microbatch has the number m = (step x accumulation + part) x processes + process, and its samples and all random draws
are functions of the seed and m: two processes, or one with twice the accumulation, give the same losses, and a resumed
run the same weights as one that went through. What a run leaves on disk is in runs.py.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import TrainConfig
from ..data import Problems
from ..errors import Mgp5Error
from ..files import GiB
from ..model import InterleavedModel
from . import checkpoints as runs
from .batch import Batch, Collator
from .distributed import launch, on_main
from .feature_cache import Caches
from .samples import fixed_samples
from .trainer import Trainer


@dataclass(frozen=True)
class Progress:
    """What the loop says after an update, of all processes together.

    Attributes:
        losses: means over the microbatches of the update.
        lr: of the mapper.
        samples_per_second, images_per_second: read, and drawn, since this piece of the run began.
        eta: seconds to the end of the run.
        memory_gib: at most so far in GiB, of the GPU; of the process, on a CPU.
        problems: samples that were left out or cut since the run began.
        stopped: before the end, by a signal.
    """

    step: int
    total: int
    losses: dict[str, float]
    lr: float
    samples_per_second: float
    images_per_second: float
    eta: float
    memory_gib: float
    problems: int
    stopped: bool = False

    def row(self) -> dict[str, Any]:
        """As JSON."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("losses", "stopped")}
        if not self.problems:
            del facts["problems"]
        return facts | self.losses


class Order(Sampler[list[int]]):
    """Sample numbers of microbatches, without end: a new permutation every epoch, drawn from the seed.

    Args:
        first, every: the microbatches are first, first + every, first + 2 every, ...
    """

    def __init__(self, size: int, batch: int, seed: int, first: int = 0, every: int = 1) -> None:
        self.size, self.batch, self.seed, self.first, self.every = size, batch, seed, first, every

    def __iter__(self) -> Iterator[list[int]]:
        order, drawn = torch.empty(0), -1
        for microbatch in count(self.first, self.every):
            chosen = []
            for position in range(microbatch * self.batch, (microbatch + 1) * self.batch):
                epoch, offset = divmod(position, self.size)
                if epoch != drawn:
                    generator, drawn = torch.Generator().manual_seed(self.seed + epoch), epoch
                    order = torch.randperm(self.size, generator=generator)
                chosen.append(int(order[offset]))
            yield chosen


def total_steps(config: TrainConfig, data: Any, processes: int = 1) -> int:
    """Updates of a run: `config.steps`, else the epochs' worth, for which the samples of shards may have to be counted.

    Raises Mgp5Error when nobody knows how many there are.
    """
    if config.steps:
        return config.steps
    if (samples := num_samples(data)) is None:
        raise Mgp5Error("how many samples the data has is not known", "give --max-steps", usage=True)
    return max(1, config.epochs * samples // (config.batch * config.accumulation * processes))


def num_samples(data: Any) -> int | None:
    """Samples of an epoch; None for a stream of unknown length."""
    return data.size if hasattr(data, "stream") else len(data)


def rate(config: TrainConfig, step: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up, then linear or cosine decay to zero."""
    warmup = max(1, min(config.warmup, total // 10))
    left = min(1.0, max(0.0, (total - step) / max(1, total - warmup)))
    decay = left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
    return min((step + 1) / warmup, decay)


def train(
    model: InterleavedModel,
    data: Dataset,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    accelerator: Accelerator | None = None,
    caches: Caches | None = None,
) -> Iterator[Progress]:
    """Train a stage and yield after every update; what was trained is in `out` at the end, and every `save_every`.

    Args:
        data: samples by number, or with a `stream` of them (`data.shards.Shards`); a sample is a conversation whose
            last message is the target, or a pair of its key and it.
        stop_after: end this call after so many updates (the run can be resumed).
        stop: asked in every update; True on any process saves and ends the call on all of them.
        accelerator: from `launch`; None makes one for the model's device. Its `end_training` is the caller's.
        caches: of what the frozen parts make of the data.

    Raises:
        Mgp5Error: `out` holds a run already and `resume` is not set, or holds a run of another configuration.
    """
    accelerator = accelerator or launch(config, str(model.device), out)
    world = accelerator.num_processes
    total = total_steps(config, data, world)
    newest = on_main(accelerator, lambda: runs.claim(out, config, resume, world, hasattr(data, "stream")))
    with redirect_stdout(sys.stderr):  # some trackers greet
        accelerator.init_trackers("mgp5", {name: str(value) for name, value in asdict(config).items()})
    trainer = Trainer(model, config, accelerator, newest)
    first = trainer.step
    last = total if stop_after is None else min(total, first + stop_after)
    batches = _batches(data, model, config, accelerator, first, caches)
    shown = fixed_samples(data, config.seed) if config.sample_every else []
    samples, images, started = 0.0, 0.0, time.monotonic()
    model.train()
    while trainer.step < last:
        lr = trainer.set_rate(rate(config, trainer.step, total))
        counts = trainer.update(batches, stop)
        step, seconds = trainer.step, time.monotonic() - started
        samples, images = samples + counts.samples, images + counts.images
        progress = Progress(
            step=step,
            total=total,
            losses=counts.losses,
            lr=float(f"{lr:.6g}"),
            samples_per_second=round(samples / seconds, 2),
            images_per_second=round(images / seconds, 2),
            eta=round((total - step) * seconds / (step - first), 1),
            memory_gib=_peak_memory(accelerator.device),
            problems=trainer.num_problems,
            stopped=counts.stop > 0 and step < last,
        )
        ends = progress.stopped or step == last
        if accelerator.is_main_process and (ends or step % config.log_every == 0):
            with (out / runs.LOG).open("a") as log:
                log.write(json.dumps(progress.row()) + "\n")
        if config.sample_every and step % config.sample_every == 0:
            trainer.show(shown, out / f"samples/step-{step:06d}.html")
        if ends or step % config.save_every == 0:
            trainer.save(out, getattr(data, "problems", Problems()))
        accelerator.log(progress.row(), step=step)
        yield progress
        if ends:
            break
    model.eval()


def _batches(
    data: Any, model: InterleavedModel, config: TrainConfig, accelerator: Accelerator, step: int, caches: Caches | None
) -> Iterator[Batch]:
    """Those of this process without end, from a step on."""
    rank, world, done = accelerator.process_index, accelerator.num_processes, step * config.accumulation
    if hasattr(data, "stream"):
        data = data.stream(rank=rank, world=world, batch=config.batch, first=done, seed=config.seed)
        source: dict[str, Any] = {"batch_size": config.batch}
    else:
        source = {"batch_sampler": Order(len(data), config.batch, config.seed, done * world + rank, world)}
    backbone = model.backbone
    loader = DataLoader(
        data,
        collate_fn=Collator(backbone, model.head, backbone.context_length, config, caches),
        num_workers=config.workers,
        worker_init_fn=_own_session,
        multiprocessing_context="fork" if config.workers else None,  # the collator holds the model: not to be copied
        **source,
    )
    try:
        for batch in loader:
            if caches:
                caches.note(batch)
            yield batch
    except Mgp5Error as error:  # that of a worker comes with its traceback: the last line is what it says
        raise Mgp5Error(str(error).splitlines()[-1].partition("Mgp5Error: ")[2] or str(error)) from None


def _own_session(worker: int) -> None:
    """A launcher or terminal signals all processes of its group; the one that trains decides when its workers end."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # not the handlers of the process that was forked


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / GiB, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GiB, 2)  # Linux counts in KiB
