"""Set up Accelerate for one or more processes: device, precision, DDP and FSDP.

FSDP is always version 2 of PyTorch (`fully_shard`), whichever version `accelerate launch` was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
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

from ..backbones.quantization import TORCHAO, check_quantization
from ..config import TrainConfig
from ..device import DTYPES, check_launched, launched, pick_device, pick_precision
from ..errors import Mgp5Error
from ..model import InterleavedModel
from .batch import Batch

T = TypeVar("T")


def launch(config: TrainConfig, device: str = "auto", out: str | os.PathLike = ".") -> Accelerator:
    """Return the Accelerator of this process, which `torchrun` or `accelerate launch` may have started with others.

    `device` is that of a single process: under a launcher each takes its own GPU. Trackers write to `out`/trackers.
    Raises Mgp5Error when the device, precision or a tracker is not available.
    """
    check_launched(device)
    torch_device, _ = pick_device(device)
    config = replace(config, precision=pick_precision(config.precision, torch_device))
    check_machine(config, torch_device)
    plugin = _fsdp_plugin(config) if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    if plugin and config.quantize in TORCHAO:
        problem = f"quantize is {config.quantize}, but FSDP cannot split torchao's weights"
        raise Mgp5Error(problem, "launch without FSDP, or set quantize=none", usage=True)
    with patch_environment(**({} if launched() else {"accelerate_torch_device": str(torch_device)})):
        accelerator = Accelerator(
            cpu=torch_device.type == "cpu",
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop accumulates itself
            fsdp_plugin=plugin,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
            log_with=list(config.trackers) or None,
            project_dir=os.path.join(out, "trackers") if config.trackers else None,
        )
    if plugin and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate supports FSDP on GPUs only; PyTorch also on CPUs, where the tests run it.
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def check_machine(config: TrainConfig, device: torch.device) -> None:
    """Raise Mgp5Error when the precision, the optimizer, quantization or a tracker does not run here."""
    if device.type == "cpu" and config.precision == "fp16":
        raise Mgp5Error("precision is fp16, but a CPU cannot train in it", "set precision=bf16 or fp32", usage=True)
    if config.optimizer == "adamw8bit":
        if find_spec("bitsandbytes") is None:
            problem = "optimizer is adamw8bit, but bitsandbytes is not installed"
            raise Mgp5Error(problem, "pip install 'mgp5[quant]', or set optimizer=adamw", usage=True)
        if device.type != "cuda":
            raise Mgp5Error("optimizer is adamw8bit, which needs a GPU", "set optimizer=adamw", usage=True)
    check_quantization(config.quantize)
    available = sorted(LoggerType(tracker).value for tracker in get_available_trackers())
    if missing := sorted(set(config.trackers) - set(available)):
        hint = f"pip install 'mgp5[track]'; here are: {', '.join(available) or 'none'}"
        raise Mgp5Error(f"no tracker {', '.join(missing)}", hint, usage=True)


def _fsdp_plugin(config: TrainConfig) -> FullyShardedDataParallelPlugin:
    """Return the settings of FSDP, which replace those of `accelerate launch`: each layer of the LLM is a unit."""
    low = None if config.precision == "fp32" else DTYPES[config.precision]
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=transformer_auto_wrap_policy,
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32) if low else None,
        cpu_ram_efficient_loading=False,  # every process reads the weights itself
        activation_checkpointing=False,  # `config.checkpointing` decides
    )


def frozen_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of frozen weights: that of `config.precision` on a GPU, float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else DTYPES[pick_precision(config.precision, device)]


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Call `work` in the first process only; return its result, or raise its Mgp5Error, in all of them."""
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


class LossModule(nn.Module):
    """The module that DDP and FSDP wrap; its outputs are plain tensors, as they require.

    All processes must run the same layers and have gradients for the same weights, or they wait for each other forever.
    But a batch without target images does not use the head, and an empty batch no layer. So a zero (the sum of an empty
    slice) of every weight is added to the loss, and for an empty batch the LLM reads two tokens.
    """

    def __init__(self, model: InterleavedModel) -> None:
        super().__init__()
        self.model = model
        # FSDP unshards these layers one by one; vision towers and generators do not run for every batch.
        self._no_split_modules = sorted({type(layer).__name__ for layer in model.backbone.language.layers})
        # DDP cannot send torchao's weights, which are the same in all processes.
        self._ddp_params_and_buffers_to_ignore = [n for n, p in self.named_parameters() if hasattr(p, "qdata")]

    def forward(
        self, batch: Batch, config: TrainConfig, generator: torch.Generator, shares: Mapping[str, float] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss, whose terms count by their `shares`, and the detached loss terms of a batch;
        `generator` is on the CPU."""
        losses = self.model(batch, config, generator)
        total = losses.shared(shares or {}).total
        if not len(batch.ids):
            ids = batch.ids.new_zeros(1, 2)
            total = self.model.hidden(replace(batch, ids=ids, mask=torch.ones_like(ids), begins=None))[:0].sum()
        weights = [p for p in self.model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        none = torch.cat([p.flatten()[:0] for p in weights]) if weights else total.new_zeros(0)
        return total + none.sum(), {name: value.detach() for name, value in losses.terms.items()}


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather the weights outside the LLM's layers within a `with` block, so that FSDP lets parts be called."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
