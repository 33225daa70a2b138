"""Model, optimizer and moving average of a training run in one process: updates, checkpoints and restoring them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..config import TrainConfig
from ..data import Problems
from ..engines import fuse_unet, fuse_vae
from ..files import read_json, write_json
from ..hub import Parts
from ..loading import WEIGHTS, full, load_trained_tensors, read_weights, trained_tensors, write_tensors, write_weights
from ..messages import Conversation
from ..model import InterleavedModel
from . import checkpoints
from .batch import Batch
from .distributed import LossModule, on_main, unsharded
from .samples import sample_page

STATE = "state/tensors.safetensors"


class Trainer:
    """Prepare a model for a stage, fresh or from the folder of a checkpoint, and train it; the model is changed."""

    def __init__(
        self, model: InterleavedModel, config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None = None
    ) -> None:
        self.model, self.config, self.accelerator = model, config, accelerator
        self.terms = ("text", *model.head.spec.losses)
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.step, self.lr = 0, config.lr  # updates done, current learning rate of the head
        self.losses: dict[str, float] = {}  # of the last update, means over its labels, images or captions
        self.samples = self.images = 0.0  # samples and target images that this call has trained on
        self.stopped = False  # whether a process was asked to stop
        self.num_problems, self.problems = 0, Problems()  # samples left out or truncated: of the run, of this process
        torch.manual_seed(config.seed)  # LoRA is initialized by the global generator
        model.prepare(config)
        if checkpoint:
            weights = read_weights(checkpoint / "mgp5" / WEIGHTS)
            load_trained_tensors(model, weights, Parts(str(checkpoint), "", "", checkpoint))
        self.wrapped, self.optimizer = accelerator.prepare(LossModule(model), make_optimizer(model, config))
        generator = getattr(model.head, "generator", None)
        sharded = accelerator.distributed_type == DistributedType.FSDP  # it puts other weights into its modules
        if accelerator.device.type == "cuda" and hasattr(generator, "vae") and not sharded:
            fuse_vae(generator)
            if hasattr(generator, "unet"):
                fuse_unet(generator.unet)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = [p.detach().clone() for p in self.trained.values()] if config.ema else []
        if checkpoint:
            self._restore(checkpoint)

    def set_rate(self, factor: float) -> None:
        """Set the learning rates to their peaks times a factor in [0, 1]."""
        self.lr = self.config.lr * factor
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def update(self, batches: Iterator[Batch], stop: Callable[[], bool]) -> None:
        """Do one update over `accumulation` microbatches; `stop` returns whether this process was asked to stop."""
        config = self.config
        microbatches = [next(batches) for _ in range(config.accumulation)]
        totals, together = self._totals(microbatches)
        # Sum and number of each loss term, then samples, images, problems and stops: reduced in one call.
        sums = torch.zeros(2 * len(self.terms) + 4, device=self.accelerator.device)
        for part, batch in enumerate(microbatches):
            for note in batch.skipped:
                self.problems.note(*note)
            last = part + 1 == config.accumulation
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                terms = self._backward(replace(batch, together=together), part, totals)
            for i, name in enumerate(self.terms):
                if name in terms and (number := batch.count(name)):
                    sums[2 * i] += terms[name] * number
                    sums[2 * i + 1] += number
            sums[-4:-1] += torch.tensor([batch.num_samples, batch.num_targets, len(batch.skipped)], device=sums.device)
        if config.clip:
            self.accelerator.clip_grad_norm_(self.trained.values(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if config.ema:
            get_ema_multi_avg_fn(config.ema)(self.average, [p.detach() for p in self.trained.values()], None)
        self.step += 1
        sums[-1] = stop()
        *pairs, samples, images, problems, stops = self.accelerator.reduce(sums, "sum").tolist()
        terms = zip(self.terms, pairs[::2], pairs[1::2], strict=True)
        self.losses = {name: round(total / number, 5) for name, total, number in terms if number}
        self.samples, self.images, self.stopped = self.samples + samples, self.images + images, stops > 0
        self.num_problems += int(problems)

    def _totals(self, microbatches: list[Batch]) -> tuple[dict[str, float], bool]:
        """Return what each loss term of the update is a mean of: a number over its microbatches in all processes; and
        whether there are several, and all their microbatches have target images."""
        numbers = [sum(batch.count(name) for batch in microbatches) for name in self.terms]
        numbers.append(sum(not batch.num_targets for batch in microbatches))
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        *totals, without = self.accelerator.reduce(tensor, "sum").tolist()
        return dict(zip(self.terms, totals, strict=True)), self.world > 1 and not without

    def _backward(self, batch: Batch, part: int, totals: dict[str, float]) -> dict[str, Tensor]:
        """Add the gradients of one microbatch; return its loss terms.

        Each counts by its share of the update, so that how this is split does not matter; DDP takes the mean over
        processes.
        """
        microbatch = (self.step * self.config.accumulation + part) * self.world + self.rank
        seed = (self.config.seed * 1_000_003 + microbatch) % 2**32
        torch.manual_seed(seed)  # LoRA's dropout uses the global generator
        shares = {name: self.world * batch.count(name) / (totals[name] or 1) for name in self.terms}
        batch = batch.to(self.accelerator.device)
        loss, terms = self.wrapped(batch, self.config, torch.Generator().manual_seed(seed), shares)
        self.accelerator.backward(loss)
        return terms

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the trained weights by their moving average, if there is one, within a `with` block."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        """Exchange trained weights and their average one by one, so that only one copy of one weight is made."""
        for parameter, average in zip(self.trained.values() if self.average else (), self.average, strict=True):
            weight = parameter.detach()
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def write_samples(self, samples: list[Conversation], path: Path) -> None:
        """Write a page with the model's current replies to samples."""
        main = self.accelerator.is_main_process
        if main or self.accelerator.is_fsdp2:  # with sharded weights all processes have to compute the replies
            with self.averaged(), unsharded(self.wrapped):
                self.model.eval()
                sample_page(self.model, samples, self.step, path if main else None)
                self.model.train()

    def save(self, out: Path, loading: Problems) -> None:
        """Add a checkpoint to a run, and write its report of samples left out, also those left out in loading."""
        values = {
            f"{kind}.{name}": value
            for name, p in self.trained.items()
            for kind, value in self.optimizer.optimizer.state[p].items()
        }
        tensors = {name: full(value).cpu() for name, value in values.items() if isinstance(value, Tensor)}
        if self.average:
            tensors |= {f"weight.{name}": full(p.detach()).cpu().clone() for name, p in self.trained.items()}
        problems = Problems()
        for gathered in gather_object([self.problems]):
            problems.merge(gathered)
        metadata = {
            "step": self.step,
            "processes": self.world,
            "workers": self.config.workers,
            "accumulation": self.config.accumulation,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "problems": _examples(problems),
            "numbers": {name: value for name, value in values.items() if not isinstance(value, Tensor)},
        }
        with self.averaged():
            weights = trained_tensors(self.model)

            def fill(folder: Path) -> None:
                write_weights(weights, self.model.config, folder / "mgp5")
                (folder / STATE).parent.mkdir()
                write_tensors(tensors, folder / STATE)
                write_json(folder / checkpoints.METADATA, metadata)

            on_main(self.accelerator, lambda: checkpoints.save(out, self.step, self.config.keep, fill))
        problems.merge(loading)
        if self.accelerator.is_main_process:
            write_json(out / checkpoints.REPORT, {"step": self.step, "problems": _examples(problems)})

    @torch.no_grad()
    def _restore(self, checkpoint: Path) -> None:
        """Restore optimizer, counters and, with a moving average, the trained weights themselves."""
        metadata, tensors = read_json(checkpoint / checkpoints.METADATA), read_weights(checkpoint / STATE)
        for full_name, value in (tensors | metadata["numbers"]).items():
            kind, _, name = full_name.partition(".")
            weight = self.trained[name]
            value = _like(value, weight) if isinstance(value, Tensor) else value
            if kind == "weight":
                weight.copy_(value)
            else:
                self.optimizer.optimizer.state[weight][kind] = value
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(metadata["scaler"])
        self.step = metadata["step"]
        self.num_problems = sum(number for number, _ in metadata["problems"].values())
        if self.accelerator.is_main_process:
            for kind, (number, first) in metadata["problems"].items():
                self.problems[kind], self.problems.first[kind] = number, first


def make_optimizer(model: InterleavedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter, arXiv 1711.05101), in 8 bits if asked for: see `check_machine`."""
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    groups = model.parameter_groups(config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **options)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """Return a tensor of a checkpoint on the device and with the sharding of its weight; step counts stay scalars."""
    if not value.dim():
        return value
    value = value.to(weight.device)
    if isinstance(weight, DTensor):
        return distribute_tensor(value, weight.device_mesh, weight.placements)
    return value


def _examples(problems: Problems) -> dict[str, tuple[int, str]]:
    """Return for each kind of problem its number and the first sample that has it."""
    return {kind: (number, problems.first[kind]) for kind, number in problems.items()}
