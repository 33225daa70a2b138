"""What one process holds of a training run: model, optimizer and moving average; an update, a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..config import TrainConfig
from ..data import Problems
from ..errors import Mgp5Error
from ..files import read_json, write_json
from ..hub import Parts
from ..loading import WEIGHTS, full, load_trained_tensors, read_weights, trained_tensors, write_tensors, write_weights
from ..messages import Conversation
from ..model import InterleavedModel
from . import checkpoints as runs
from .batch import Batch
from .distributed import Step, on_main, whole
from .samples import sample_page

STATE = "state/tensors.safetensors"


@dataclass(frozen=True)
class Counts:
    """An update in numbers, of all processes."""

    losses: dict[str, float]  # mean over the microbatches that have the term
    samples: float
    images: float  # to be drawn
    problems: float  # samples that were left out or cut
    stop: float  # processes that want to stop


class Trainer:
    """Prepares a model for its stage, from the start or from a checkpoint, and trains it.

    Args:
        checkpoint: of `runs`, to go on from.

    Attributes:
        step: updates so far.
        num_problems: samples so far that were left out or cut.
    """

    def __init__(
        self, model: InterleavedModel, config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None = None
    ) -> None:
        self.model, self.config, self.accelerator = model, config, accelerator
        self.terms = ("text", *model.head.spec.losses)
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.step = self.num_problems = 0
        self.problems = Problems()  # of this process
        torch.manual_seed(config.seed)  # LoRA's first values take the global generator
        model.prepare(config)
        if checkpoint:
            load_trained_tensors(
                model, read_weights(checkpoint / "mgp5" / WEIGHTS), Parts(str(checkpoint), "", "", checkpoint)
            )
        self.wrapped, self.optimizer = accelerator.prepare(Step(model), make_optimizer(model, config))
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = [p.detach().clone() for p in self.trained.values()] if config.ema else []
        if checkpoint:
            self._restore(checkpoint)

    def set_rate(self, share: float) -> float:
        """Set the learning rates to a share of their peaks; returns that of the mapper."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        return self.config.lr * share

    def update(self, batches: Iterator[Batch], stop: Callable[[], bool]) -> Counts:
        """One update over `accumulation` microbatches of every process."""
        config = self.config
        sums = torch.zeros(2 * len(self.terms) + 4, device=self.accelerator.device)
        for part in range(config.accumulation):
            batch = next(batches)
            for note in batch.skipped:
                self.problems.note(*note)
            last = part + 1 == config.accumulation
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                terms = self._backward(batch, part)
            for at, name in enumerate(self.terms):
                if name in terms:
                    sums[2 * at] += terms[name]
                    sums[2 * at + 1] += 1
            sums[-4:-1] += torch.tensor([len(batch.ids), batch.num_targets, len(batch.skipped)], device=sums.device)
        if config.clip:
            self.accelerator.clip_grad_norm_(self.trained.values(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if config.ema:
            get_ema_multi_avg_fn(config.ema)(self.average, [p.detach() for p in self.trained.values()], None)
        self.step += 1
        sums[-1] = stop()
        *pairs, samples, images, problems, stops = self.accelerator.reduce(sums, "sum").tolist()
        self.num_problems += int(problems)
        means = zip(self.terms, pairs[::2], pairs[1::2], strict=True)
        return Counts({n: round(v / times, 5) for n, v, times in means if times}, samples, images, problems, stops)

    def _backward(self, batch: Batch, part: int) -> dict[str, Tensor]:
        microbatch = (self.step * self.config.accumulation + part) * self.world + self.rank
        seed = (self.config.seed * 1_000_003 + microbatch) % 2**32
        torch.manual_seed(seed)  # LoRA's dropout takes the global generator
        batch = batch.to(self.accelerator.device)
        loss, terms = self.wrapped(batch, self.config, torch.Generator().manual_seed(seed))
        self.accelerator.backward(loss / self.config.accumulation)
        return terms

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the moving average for its weights, where there is one."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, average in zip(self.trained.values(), self.average, strict=False):
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)

    def show(self, samples: list[Conversation], path: Path) -> None:
        """Write a page of replies by the model as it is."""
        main = self.accelerator.is_main_process
        if main or self.accelerator.is_fsdp2:  # which shares the weights: the others have to reply too
            with self.averaged(), whole(self.wrapped):
                self.model.eval()
                sample_page(self.model, samples, self.step, path if main else None)
                self.model.train()

    def save(self, out: Path, loaded: Problems) -> None:
        """Add a checkpoint to a run, and its report of what was left out, with what was `loaded` without."""
        values = {
            f"{kind}.{name}": value
            for name, p in self.trained.items()
            for kind, value in self.optimizer.optimizer.state[p].items()
        }
        tensors = {name: full(value).cpu() for name, value in values.items() if isinstance(value, Tensor)}
        if self.average:
            tensors |= {f"weight.{name}": full(p.detach()).cpu().clone() for name, p in self.trained.items()}
        problems = Problems()
        for own in gather_object([self.problems]):
            problems.merge(own)
        facts = {
            "step": self.step,
            "processes": self.world,
            "workers": self.config.workers,
            "accumulation": self.config.accumulation,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "problems": _told(problems),
            "numbers": {name: value for name, value in values.items() if not isinstance(value, Tensor)},
        }
        with self.averaged():
            weights = trained_tensors(self.model)

            def fill(folder: Path) -> None:
                write_weights(weights, self.model.config, folder / "mgp5")
                (folder / STATE).parent.mkdir()
                write_tensors(tensors, folder / STATE)
                write_json(folder / runs.FACTS, facts)

            on_main(self.accelerator, lambda: runs.save(out, self.step, self.config.keep, fill))
        problems.merge(loaded)
        if self.accelerator.is_main_process:
            write_json(out / runs.REPORT, {"step": self.step, "problems": _told(problems)})

    @torch.no_grad()
    def _restore(self, checkpoint: Path) -> None:
        """What a checkpoint holds besides the usable weights, which the model has by now."""
        facts, tensors = read_json(checkpoint / runs.FACTS), read_weights(checkpoint / STATE)
        for full_name, value in (tensors | facts["numbers"]).items():
            kind, _, name = full_name.partition(".")
            weight = self.trained[name]
            own = _as_is(value, weight) if isinstance(value, Tensor) else value
            if kind == "weight":
                weight.copy_(own)
            else:
                self.optimizer.optimizer.state[weight][kind] = own
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.step = facts["step"]
        self.num_problems = sum(number for number, _ in facts["problems"].values())
        if self.accelerator.is_main_process:
            for kind, (number, place) in facts["problems"].items():
                self.problems[kind], self.problems.first[kind] = number, place


def make_optimizer(model: InterleavedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW on what trains. Raises Mgp5Error where its 8-bit form is not to be had."""
    groups, options = model.parameter_groups(config), {"lr": config.lr, "betas": (0.9, 0.999)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        found = "optimizer is adamw8bit, but bitsandbytes is not installed"
        raise Mgp5Error(found, "pip install 'mgp5[quant]', or set optimizer=adamw", usage=True) from None
    if not torch.cuda.is_available():
        raise Mgp5Error("optimizer is adamw8bit, which needs a GPU", "set optimizer=adamw", usage=True)
    return AdamW8bit(groups, **options)


def _as_is(value: Tensor, weight: Tensor) -> Tensor:
    """A tensor of a checkpoint where and as its weight is: on its device, and sharded alike. Step counts stay."""
    if not value.dim():
        return value
    value = value.to(weight.device)
    if isinstance(weight, DTensor):
        return distribute_tensor(value, weight.device_mesh, weight.placements)
    return value


def _told(problems: Problems) -> dict[str, tuple[int, str]]:
    return {kind: (number, problems.first[kind]) for kind, number in problems.items()}
