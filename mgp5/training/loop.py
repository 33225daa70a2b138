"""The training loop on Accelerate: draw microbatches, update, log, save, resume. It does not depend on the head.

Microbatch m is (step * accumulation + part) * processes + process. Its samples and all its random numbers depend on the
seed and m only: two processes give the same losses as one with twice the accumulation, and a resumed run the same
weights as an uninterrupted one. checkpoints.py describes the files of a run.
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
from . import checkpoints
from .batch import Batch, Collator
from .distributed import launch, on_main
from .feature_cache import Caches
from .samples import fixed_samples
from .trainer import Counts, Trainer


@dataclass(frozen=True)
class Progress:
    """The state of a run after an update, over all processes.

    Attributes:
        step: updates done.
        total: updates of the run.
        losses: means over the microbatches of the update, by name.
        lr: learning rate of the head.
        samples_per_second, images_per_second: samples and target images, since this call of `train` began.
        eta: estimated seconds to the end of the run.
        memory_gib: peak memory in GiB, of the GPU, or on a CPU of the process.
        problems: samples that were left out or truncated since the run began.
        stopped: whether a signal ends the run before its last step.
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
        """Return a row of the log: numbers by name, the losses among them."""
        row = {name: value for name, value in asdict(self).items() if name not in ("losses", "stopped")}
        if not self.problems:
            del row["problems"]
        return row | self.losses


class Order(Sampler[list[int]]):
    """Yield the sample numbers of microbatches without end, with a new permutation of the data in every epoch.

    Args:
        size: number of samples.
        batch: samples of a microbatch.
        seed: of the permutations.
        first, every: the microbatches are first, first + every, first + 2 * every, ...
    """

    def __init__(self, size: int, batch: int, seed: int, first: int = 0, every: int = 1) -> None:
        self.size, self.batch, self.seed, self.first, self.every = size, batch, seed, first, every

    def __iter__(self) -> Iterator[list[int]]:
        order, current = torch.empty(0), -1
        for microbatch in count(self.first, self.every):
            numbers = []
            for position in range(microbatch * self.batch, (microbatch + 1) * self.batch):
                epoch, offset = divmod(position, self.size)
                if epoch != current:
                    generator, current = torch.Generator().manual_seed(self.seed + epoch), epoch
                    order = torch.randperm(self.size, generator=generator)
                numbers.append(int(order[offset]))
            yield numbers


def total_steps(config: TrainConfig, data: Any, processes: int = 1) -> int:
    """Return the number of updates of a run: `config.steps`, or those of `config.epochs` passes over the data.

    Raises:
        Mgp5Error: neither the steps nor the number of samples is known.
    """
    if config.steps:
        return config.steps
    if (samples := num_samples(data)) is None:
        raise Mgp5Error("how many samples the data has is not known", "give --max-steps", usage=True)
    return max(1, config.epochs * samples // (config.batch * config.accumulation * processes))


def num_samples(data: Any) -> int | None:
    """Return the number of samples of an epoch; None for a stream of unknown length."""
    return data.size if hasattr(data, "stream") else len(data)


def rate(config: TrainConfig, step: int, total: int) -> float:
    """Return the factor of the peak learning rates: linear warm-up, then linear or cosine decay to zero."""
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
    """Train a stage; yield after every update. The trained weights are saved in `out` at the end and periodically.

    Args:
        model: changed in place.
        data: samples by number, or with a `stream` of them (`data.shards.Shards`). A sample is a conversation whose
            last message is the target, or a pair of its key and the conversation.
        config: of the stage.
        out: folder of the run, see checkpoints.py.
        resume: continue the run in `out`.
        stop_after: end this call after so many updates; the run can be resumed.
        stop: called in every update; True in any process saves and ends this call in all of them.
        accelerator: from `launch`; None creates one for the model's device. The caller calls its `end_training`.
        caches: stored outputs of the frozen parts.

    Raises:
        Mgp5Error: `out` holds a run and `resume` is not set, or holds a run of another configuration.
    """
    accelerator = accelerator or launch(config, str(model.device), out)
    processes, streams = accelerator.num_processes, hasattr(data, "stream")
    total = total_steps(config, data, processes)
    newest = on_main(accelerator, lambda: checkpoints.claim(out, config, resume, processes, streams))
    with redirect_stdout(sys.stderr):  # some trackers print a greeting
        accelerator.init_trackers("mgp5", {name: str(value) for name, value in asdict(config).items()})
    trainer = Trainer(model, config, accelerator, newest)
    last = total if stop_after is None else min(total, trainer.step + stop_after)
    batches = _batches(data, model, config, accelerator, trainer.step, caches)
    samples = fixed_samples(data, config.seed) if config.sample_every else []
    meter = _Meter(trainer, last, total)
    model.train()
    while trainer.step < last:
        trainer.set_rate(rate(config, trainer.step, total))
        progress = meter.progress(trainer.update(batches, stop))
        step, ends = progress.step, progress.stopped or progress.step == last
        if accelerator.is_main_process and (ends or step % config.log_every == 0):
            with (out / checkpoints.LOG).open("a") as log:
                log.write(json.dumps(progress.row()) + "\n")
        if config.sample_every and step % config.sample_every == 0:
            trainer.write_samples(samples, out / f"samples/step-{step:06d}.html")
        if ends or step % config.save_every == 0:
            trainer.save(out, getattr(data, "problems", Problems()))
        accelerator.log(progress.row(), step=step)
        yield progress
        if ends:
            break
    model.eval()


class _Meter:
    """Measure the speed of a call of `train`, whose last step is `last` of `total` in the run."""

    def __init__(self, trainer: Trainer, last: int, total: int) -> None:
        self.trainer, self.first, self.last, self.total = trainer, trainer.step, last, total
        self.samples = self.images = 0.0
        self.started = time.monotonic()

    def progress(self, counts: Counts) -> Progress:
        """Return the progress after an update."""
        step, seconds = self.trainer.step, time.monotonic() - self.started
        self.samples, self.images = self.samples + counts.samples, self.images + counts.images
        return Progress(
            step=step,
            total=self.total,
            losses=counts.losses,
            lr=float(f"{self.trainer.lr:.6g}"),
            samples_per_second=round(self.samples / seconds, 2),
            images_per_second=round(self.images / seconds, 2),
            eta=round((self.total - step) * seconds / (step - self.first), 1),
            memory_gib=_peak_memory(self.trainer.accelerator.device),
            problems=self.trainer.num_problems,
            stopped=counts.stop > 0 and step < self.last,
        )


def _batches(
    data: Any, model: InterleavedModel, config: TrainConfig, accelerator: Accelerator, step: int, caches: Caches | None
) -> Iterator[Batch]:
    """Yield the batches of this process without end, starting at an update."""
    rank, world, done = accelerator.process_index, accelerator.num_processes, step * config.accumulation
    if hasattr(data, "stream"):
        data = data.stream(rank=rank, world=world, batch=config.batch, first=done, seed=config.seed)
        source: dict[str, Any] = {"batch_size": config.batch}
    else:
        source = {"batch_sampler": Order(len(data), config.batch, config.seed, done * world + rank, world)}
    loader = DataLoader(
        data,
        collate_fn=Collator(model.backbone, model.head, model.backbone.context_length, config, caches),
        num_workers=config.workers,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if config.workers else None,  # shares the collator's model instead of copying it
        **source,
    )
    try:
        for batch in loader:
            if caches:
                caches.note(batch)
            yield batch
    except Mgp5Error as error:  # a worker's error has its traceback before the last line, which is the message
        raise Mgp5Error(str(error).splitlines()[-1].partition("Mgp5Error: ")[2] or str(error)) from None


def _start_worker(worker: int) -> None:
    """Detach a worker from the signals of the process group: the training process decides when its workers end."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # instead of the handlers that were inherited by the fork


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory in GiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / GiB, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GiB, 2)  # Linux counts in KiB
