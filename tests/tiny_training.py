"""Short runs on tiny models, for the tests of both stages."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import torch

from mgp5 import Conversation, cli
from mgp5.config import TrainConfig
from mgp5.heads.batch import Batch
from mgp5.loading import build, trained_tensors
from mgp5.model import InterleavedModel
from mgp5.training.batch import Collator
from mgp5.training.loop import Progress, train
from mgp5.training.presets import preset

VOKENS = 4
TIMES = {"samples_per_second", "images_per_second", "eta", "memory_gib"}  # of a row of the log


def config(stage: str, steps: int | None = 2, **values) -> TrainConfig:
    """The demo preset, small."""
    own = {"batch": 2, "warmup": 0, "precision": "fp32", "lr": 1e-3, "weight_decay": 0.1}
    return replace(preset(stage, "demo"), steps=steps, **own | values)


def fresh(mllm: Path, diffusion: Path, **options) -> InterleavedModel:
    torch.manual_seed(1)
    return build(str(mllm), str(diffusion), num_vokens=VOKENS, guidance=3.0, **options)


def join(folder: Path, mllm: Path, diffusion: Path) -> Path:
    """Make a folder that --model takes."""
    folder.mkdir(exist_ok=True)
    (folder / "mllm").symlink_to(mllm)
    (folder / "diffusion").symlink_to(diffusion)
    return folder


def finish(*args, **more) -> list[Progress]:
    return list(train(*args, **more))


def batch_of(model: InterleavedModel, *conversations: Conversation) -> Batch:
    return Collator(model.backbone, model.head, model.backbone.context_length, config("finetune"))(conversations)


def fork(args: list[str], **env: str) -> multiprocessing.Process:
    """`mgp5 ARGS` in a process of its own, which has torch already."""

    def work() -> None:
        os.environ.update(env)
        cli.main(args)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def same(one: InterleavedModel | dict, other: InterleavedModel | dict) -> bool:
    """Whether all trained tensors are equal, bit for bit."""
    one, other = (x if isinstance(x, dict) else trained_tensors(x) for x in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
