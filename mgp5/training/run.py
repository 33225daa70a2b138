"""Train a stage, from Python as from the command line: a request that is checked at once, its estimate and its run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from ..config import Stage, TrainConfig, model_config_from, preset
from ..data import Keyed, Source, check_sources, load_sources
from ..data.shards import Shards
from ..device import DTYPES, pick_device, quiet_libraries
from ..errors import Mgp5Error, raise_all
from ..files import Claim
from ..hub import explain, from_hub, read_config, resolve
from ..loading import CONFIG, build, load_checkpoint
from ..memory.estimate import Estimate, estimate
from ..memory.skeletons import skeleton
from ..model import InterleavedModel
from ..options import override, read_toml
from . import checkpoints as runs
from .distributed import frozen_dtype, launch
from .feature_cache import Caches
from .loop import Progress, num_samples, total_steps, train

Tell = Callable[[str], None]  # takes a line of text for people


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train, on what data, and how. Raises Mgp5Error that names all that is wrong; no weights are read."""

    stage: Stage
    data: tuple[Source, ...]  # format and path of each
    out: Path  # folder of the run
    model: str  # a name, a folder, "MLLM+GENERATOR", or a run of the stage before
    preset: str = "paper"  # settings to begin with
    config_file: Path | None = None  # TOML file of settings that replace those of the preset
    overrides: Mapping[str, Any] = field(default_factory=dict)  # replace both, nested as in {"lora": {"rank": 4}}
    max_steps: int | None = None  # updates in all, instead of epochs
    stop_after: int | None = None  # updates after which this call ends; the run can be resumed
    vokens: int = 8  # of an image, 1 to 16, for a new model
    device: str = "auto"
    caches: tuple[Path, ...] = ()  # folders of `mgp5 data cache`
    resume: bool = False  # go on with the run in `out`
    dry_run: bool = False  # for `estimate_stage` only: `out` is not looked at

    def __post_init__(self) -> None:
        most = {"max_steps": 10**9, "stop_after": 10**9, "vokens": 16}
        counts = {name: value for name in most if (value := getattr(self, name)) is not None}
        bad = {name: value for name, value in counts.items() if not 1 <= value <= most[name]}
        problems = [f"{name} is {value}, expected 1 to {most[name]:,}" for name, value in bad.items()]
        problems += check_sources(self.data)
        problems += [f"no cache at {path}: mgp5 data cache makes one" for path in self.caches if not path.is_dir()]
        checks: list[Callable[[], Any]] = [lambda: resolve(self.model), lambda: pick_device(self.device)]
        checks += [lambda: self.config] if self.dry_run else [lambda: runs.check(self.out, self.config, self.resume)]
        raise_all(problems, checks)

    @cached_property
    def config(self) -> TrainConfig:
        """The settings of the run: preset, then file, then overrides, then `max_steps`."""
        config = preset(self.stage, self.preset)
        if self.config_file:
            config = override(config, read_toml(self.config_file))
        config = override(config, dict(self.overrides))
        return replace(config, steps=self.max_steps) if self.max_steps else config


@dataclass(frozen=True)
class StageEstimate:
    """What a run would do, and take on one device."""

    samples: int | None  # of an epoch, None where that is not known
    updates: int
    batch: int  # samples of an update
    memory: Estimate  # parameters, memory and operations of an update


def train_stage(
    request: TrainRequest, *, stop: Callable[[], bool] = lambda: False, tell: Tell = lambda text: None
) -> Iterator[Progress]:
    """Train a stage and yield after every update; `request.out` then has what was trained.

    Under `torchrun` or `accelerate launch` every process calls this. `stop` is asked in every update: True saves and
    ends the run, which can be resumed. `tell` takes lines about data that was skipped and caches that were used.
    Raises Mgp5Error for data or a model that cannot be used, or a run that cannot be saved.
    """
    with Claim(request.out) if os.environ.get("RANK", "0") == "0" else nullcontext():  # one of several processes writes
        yield from _train_stage(request, stop, tell)


def _train_stage(request: TrainRequest, stop: Callable[[], bool], tell: Tell) -> Iterator[Progress]:
    quiet_libraries()
    config = request.config
    data = _load_data(request, tell)
    accelerator = launch(config, request.device, request.out)
    total_steps(config, data, accelerator.num_processes)  # raises before weights are loaded
    dtype = frozen_dtype(config, accelerator.device)
    model = initial_model(request.model, config, vokens=request.vokens, dtype=dtype)
    formats = {format for format, _ in request.data}
    if config.stage == "finetune" and "mmdialog" in formats and "jsonl" not in formats:  # which has whole conversations
        model.config = replace(model.config, history=config.data.history)
    caches = Caches.open(request.caches, model) if request.caches else None
    options = {"resume": request.resume, "stop_after": request.stop_after, "stop": stop, "caches": caches}
    yield from train(model, data, config, request.out, accelerator=accelerator, **options)
    with redirect_stdout(sys.stderr):  # trackers print when they end
        accelerator.end_training()
    if caches:
        tell(f"taken from the caches: {caches}")


def estimate_stage(request: TrainRequest, *, tell: Tell = lambda text: None) -> StageEstimate:
    """Estimate what a run would take on one device; data and configurations are read, no weights. Raises Mgp5Error."""
    quiet_libraries()
    config, parts, processes = request.config, resolve(request.model), int(os.environ.get("WORLD_SIZE", "1"))
    data = _load_data(request, tell)
    samples, updates = num_samples(data), total_steps(config, data, processes)
    trained = parts.trained and model_config_from(read_config(parts.trained / CONFIG), parts.name)
    shapes = {"num_vokens": request.vokens, "trained": trained, "dtype": DTYPES[config.precision]}
    memory = estimate(skeleton(parts.mllm, parts.diffusion, config, **shapes), config)
    return StageEstimate(samples, updates, config.batch * config.accumulation * processes, memory)


def _load_data(request: TrainRequest, tell: Tell) -> Keyed | Shards:
    return load_sources(request.data, request.config.data, count=token_counter(request.model), tell=tell)


def token_counter(model: str) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text; the LLM's tokenizer is loaded when it is first called."""
    tokenizer = cache(lambda: _load_tokenizer(resolve(model).mllm))
    return lambda text: len(tokenizer().encode(text, add_special_tokens=False))


def _load_tokenizer(mllm: str) -> Any:
    from ..backbones.processors import load_tokenizer

    try:
        return from_hub(mllm, lambda name, revision: load_tokenizer(name, revision=revision))
    except (OSError, ValueError) as error:
        raise explain(error, mllm) from error


def initial_model(
    name: str, config: TrainConfig, *, vokens: int = 8, dtype: torch.dtype = torch.float32
) -> InterleavedModel:
    """Build the model that a stage begins with: a new one, or what the stage before has trained, adapters merged.

    `dtype` is that of the weights that do not train. Raises Mgp5Error for a model that is finetuned already.
    """
    parts = resolve(name)
    torch.manual_seed(config.seed)  # a new mapper is the same in every process and every run
    # The run's configuration names its parts: folders absolutely, so that it can be used from anywhere.
    mllm, diffusion = (os.path.abspath(p) if os.path.isdir(p) else p for p in (parts.mllm, parts.diffusion))
    if parts.trained is None:
        layers = {name: getattr(config, name) for name in ("encoder_layers", "decoder_layers", "inner", "kind")}
        model = build(mllm, diffusion, num_vokens=vokens, dtype=dtype, quantize=config.quantize, **layers)
        model.limit_pixels(config.data.max_pixels)
        return model
    model = load_checkpoint(parts, dtype=dtype, quantize=config.quantize)
    model.limit_pixels(config.data.max_pixels)
    if model.config.lora or model.config.prefix:  # a new run saves its own adapter only: the old one would be lost
        raise Mgp5Error(f"--model {name} is finetuned already", "start from its pretrain run, or go on with --resume")
    model.merge()
    model.config = replace(model.config, mllm=mllm, diffusion=diffusion, world="")
    return model


class Interruption:
    """A `stop` for `train_stage` that Ctrl-C and SIGTERM set; a second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> Interruption:
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
