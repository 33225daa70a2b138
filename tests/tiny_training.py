"""Short runs on tiny models, for the tests of both stages."""

import copy
import multiprocessing
import os
import socket
import sys
from dataclasses import replace
from functools import cache
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


@cache
def _built(mllm: Path, diffusion: Path, **options) -> InterleavedModel:
    torch.manual_seed(1)
    return build(str(mllm), str(diffusion), num_vokens=VOKENS, guidance=3.0, **options)


def fresh(mllm: Path, diffusion: Path, **options) -> InterleavedModel:
    """A model of random weights, always the same ones: a copy of one that is built once."""
    model = copy.deepcopy(_built(mllm, diffusion, **options))
    torch.manual_seed(1)
    return model


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


def fork(args: list[str], output: Path | None = None, **env: str) -> multiprocessing.Process:
    """`mgp5 ARGS` in a process of its own, which has torch already; `output`.out and .err have what it writes."""
    files = [open(f"{output}.{name}", "w", buffering=1) for name in ("out", "err")] if output else []  # noqa: SIM115

    def work() -> None:
        os.environ.update(env)
        if files:
            sys.stdout, sys.stderr = files
        cli.main(args)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def fork_two(args: list[str], folder: Path, **env: str) -> list[multiprocessing.Process]:
    """Two processes with the environment of `torchrun`; they write to 0.out, 0.err, 1.out and 1.err of the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [fork(args, folder / rank, **env, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]


def same(one: InterleavedModel | dict, other: InterleavedModel | dict) -> bool:
    """Whether all trained tensors are equal, bit for bit."""
    one, other = (x if isinstance(x, dict) else trained_tensors(x) for x in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
