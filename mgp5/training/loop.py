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
from dataclasses import asdict, dataclass, replace
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
from .trainer import Trainer


@dataclass(frozen=True)
class Progress:
    """The state of a run after an update, over all processes."""

    step: int  # updates done
    total: int  # updates of the run
    losses: dict[str, float]  # means over the update
    lr: float  # of the head
    samples_per_second: float  # since this call of `train` began
    images_per_second: float  # target images
    eta: float  # estimated seconds to the end of the run
    memory_gib: float  # peak, of the GPU, or on a CPU of the process
    problems: int  # samples that were left out or truncated since the run began
    stopped: bool = False  # whether a signal ends the run before its last step

    def row(self) -> dict[str, Any]:
        """Return a row of the log: numbers by name, the losses among them."""
        row = {name: value for name, value in asdict(self).items() if name not in ("losses", "stopped")}
        if not self.problems:
            del row["problems"]
        return row | self.losses


class Order(Sampler[list[int]]):
    """Yield the sample numbers of microbatches `first`, `first + every`, ...; every epoch has a permutation of its own.

    `size` is the number of samples, `batch` that of a microbatch, `seed` that of the permutations.
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
    """Return the number of updates of a run. Raises Mgp5Error where neither steps nor number of samples are known."""
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
    warmup = max(1, config.warmup)
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
    """Train a stage and yield after every update; the trained weights are saved in `out` at the end and periodically.

    Args:
        data: samples by number, or with a `stream` of them (`data.shards.Shards`): conversations whose last message is
            the target, or pairs of a key and a conversation.
        resume: continue the run in `out`.
        stop_after: updates after which this call ends; the run can be resumed.
        stop: called in every update; True in any process saves and ends this call in all of them.
        accelerator: from `launch`; None creates one for the model's device. The caller calls its `end_training`.

    Raises:
        Mgp5Error: `out` holds a run and `resume` is not set, or holds a run of another configuration.
    """
    accelerator = accelerator or launch(config, str(model.device), out)
    config = replace(config, workers=num_workers(config, accelerator.device))
    processes, streams = accelerator.num_processes, hasattr(data, "stream")
    total = total_steps(config, data, processes)
    newest = on_main(accelerator, lambda: checkpoints.claim(out, config, resume, processes, streams))
    with redirect_stdout(sys.stderr):  # some trackers print a greeting
        accelerator.init_trackers("mgp5", {name: str(value) for name, value in asdict(config).items()})
    trainer = Trainer(model, config, accelerator, newest)
    stage = model.head.stage(config.stage)
    if stage.data == "captions" and accelerator.device.type == "cuda":  # with images of one size in all of a run
        torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms in the first update
    last = total if stop_after is None else min(total, trainer.step + stop_after)
    batches = _batches(data, model, config, accelerator, trainer.step, caches)
    samples = fixed_samples(data, config.seed) if config.sample_every and stage.llm else []
    first, started = trainer.step, time.monotonic()
    model.train()
    while trainer.step < last:
        trainer.set_rate(rate(config, trainer.step, total))
        trainer.update(batches, stop)
        progress = _progress(trainer, total, last, trainer.step - first, time.monotonic() - started)
        step, ends = progress.step, progress.stopped or progress.step == last
        if accelerator.is_main_process and (ends or step % config.log_every == 0):
            with (out / checkpoints.LOG).open("a") as log:
                log.write(json.dumps(progress.row()) + "\n")
        if config.sample_every and (step % config.sample_every == 0 or step == total):
            trainer.write_samples(samples, out / f"samples/step-{step:06d}.html")
        if ends or step % config.save_every == 0:
            trainer.save(out, getattr(data, "problems", Problems()))
        accelerator.log(progress.row(), step=step)
        yield progress
        if ends:
            break
    model.eval()


def _progress(trainer: Trainer, total: int, last: int, done: int, seconds: float) -> Progress:
    """Describe a run after an update; this call of `train` has done `done` of them, in so many seconds."""
    return Progress(
        step=trainer.step,
        total=total,
        losses=trainer.losses,
        lr=float(f"{trainer.lr:.6g}"),
        samples_per_second=round(trainer.samples / seconds, 2),
        images_per_second=round(trainer.images / seconds, 2),
        eta=round((total - trainer.step) * seconds / done, 1),
        memory_gib=_peak_memory(trainer.accelerator.device),
        problems=trainer.num_problems,
        stopped=trainer.stopped and trainer.step < last,
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
    # as replies are asked for; captions of the first stage stand alone
    talks = model.head.stage(config.stage).data == "conversations"
    system = model.config.system if talks else ""
    loader = DataLoader(
        data,
        collate_fn=Collator(model.backbone, model.head, model.backbone.context_length, config, caches, system),
        num_workers=config.workers,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if config.workers else None,  # shares the collator's model instead of copying it
        pin_memory=accelerator.device.type == "cuda",
        **source,
    )
    try:
        for batch in loader:
            if caches:
                caches.note(batch)
            yield batch
    except Mgp5Error as error:  # a worker's error has its traceback before the last line, which is the message
        raise Mgp5Error(str(error).splitlines()[-1].partition("Mgp5Error: ")[2] or str(error)) from None


def num_workers(config: TrainConfig, device: torch.device) -> int:
    """Return how many processes read data for this one: as set, else on a GPU its share of the cores, at most 8."""
    if config.workers is not None or device.type != "cuda":
        return config.workers or 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, cores - 1))


def _start_worker(worker: int) -> None:
    """Detach a worker from the signals of the process group: the training process decides when its workers end."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # instead of the handlers that were inherited by the fork


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / GiB, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GiB, 2)  # Linux counts in KiB
