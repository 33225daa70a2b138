"""One process or many: what Accelerate is told about devices, precision, DDP and FSDP, and what all processes agree on.

FSDP is version 2 of PyTorch's (`fully_shard`), whichever `accelerate launch` was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    LoggerType,
    broadcast_object_list,
    parse_flag_from_env,
    patch_environment,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from ..config import TrainConfig
from ..device import DTYPES, pick_device
from ..errors import Mgp5Error
from ..model import InterleavedModel
from .batch import Batch

T = TypeVar("T")


def launch(config: TrainConfig, device: str = "auto", out: str | os.PathLike = ".") -> Accelerator:
    """The Accelerator of this process, which may be one of many under `torchrun` or `accelerate launch`.

    Args:
        device: of a single process; under a launcher each takes its own GPU.
        out: the run's folder; trackers write below it.

    Raises:
        Mgp5Error: a device, precision or tracker that is not to be had here.
    """
    launched = "LOCAL_RANK" in os.environ
    if launched and device not in ("auto", "cpu"):
        raise Mgp5Error(f"--device {device} under a launcher", "leave it out: every process takes a GPU", usage=True)
    chosen, _ = pick_device(device)
    if chosen.type == "cpu" and config.precision == "fp16":
        raise Mgp5Error("precision is fp16, but a CPU cannot train in it", "set precision=bf16 or fp32", usage=True)
    here = sorted(LoggerType(tracker).value for tracker in get_available_trackers())
    if missing := sorted(set(config.trackers) - set(here)):
        hint = f"pip install 'mgp5[track]'; here are: {', '.join(here) or 'none'}"
        raise Mgp5Error(f"no tracker {', '.join(missing)}", hint, usage=True)
    plugin = _sharding(config) if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    with patch_environment(**({} if launched else {"accelerate_torch_device": str(chosen)})):
        accelerator = Accelerator(
            cpu=chosen.type == "cpu",
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop accumulates itself
            fsdp_plugin=plugin,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
            log_with=list(config.trackers) or None,
            project_dir=os.path.join(out, "trackers") if config.trackers else None,
        )
    if plugin and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate offers FSDP on GPUs only; PyTorch has it on CPUs too, where our tests run it.
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def _sharding(config: TrainConfig) -> FullyShardedDataParallelPlugin:
    """FSDP by layers of the LLM; everything else is one more unit, so that any part of the model may be called.

    What `accelerate launch` would choose otherwise: sums of gradients stay in float32, every process reads the weights
    itself, and activations are recomputed by `checkpointing` only.
    """
    low = None if config.precision == "fp32" else DTYPES[config.precision]
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=transformer_auto_wrap_policy,
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32) if low else None,
        cpu_ram_efficient_loading=False,
        activation_checkpointing=False,
    )


def frozen_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Of the weights that do not train: the precision's on a GPU, float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else DTYPES[config.precision]


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something on the first process only; its result, or its Mgp5Error, becomes that of all."""
    box: list = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = work()
        except Mgp5Error as error:
            box[1] = error
    result, error = broadcast_object_list(box)
    if error:
        raise error
    return result


class Step(nn.Module):
    """The module that DDP and FSDP wrap: it gives what they can look into, a loss and plain terms.

    Processes have to do the same number of passes through the same layers, and every weight that trains has to get a
    gradient in each, or they wait for each other for ever: a batch without pictures does not touch the mapper, an empty
    one does not touch anything. So each takes a zero from every weight (the sum of an empty slice), and for an empty
    batch two tokens go through the LLM.
    """

    def __init__(self, model: InterleavedModel) -> None:
        super().__init__()
        self.model = model
        # Layers that FSDP unshards one by one; those of vision towers and generators are not run for every batch.
        self._no_split_modules = sorted({type(layer).__name__ for layer in model.backbone.language.layers})

    def forward(
        self, batch: Batch, config: TrainConfig, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.model(batch, config, generator)
        total = losses.total
        if not len(batch.ids):
            ids = batch.ids.new_zeros(1, 2)
            total = self.model.hidden(replace(batch, ids=ids, mask=torch.ones_like(ids)))[:0].sum()
        weights = [p for p in self.model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        return total + sum(p[:0].sum() for p in weights), {k: v.detach() for k, v in losses.terms.items()}


@contextmanager
def whole(step: nn.Module) -> Iterator[None]:
    """Under FSDP: all of the weights outside the LLM's layers are here, so that parts of the model can be called."""
    if not isinstance(step, FSDPModule):
        yield
        return
    step.unshard()
    try:
        yield
    finally:
        step.reshard()
