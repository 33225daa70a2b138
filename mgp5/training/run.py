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

from ..config import LoraConfig, ModelConfig, TrainConfig
from ..data import Keyed, Source, check_sources, load_sources
from ..data.shards import Shards
from ..device import DTYPES, limit_threads_for_small_models, pick_device, pick_precision, quiet_libraries
from ..errors import Mgp5Error, raise_all
from ..files import Claim, GiB
from ..heads import head_class
from ..heads.settings import model_config_from
from ..hub import explain, from_hub, read_config, resolve
from ..loading import CONFIG, build, load_checkpoint
from ..memory.estimate import Estimate, estimate, weigh
from ..memory.host import HostNeeds, check_loading, loaded, surely_fits
from ..memory.skeletons import skeleton
from ..model import InterleavedModel
from ..options import override, read_toml
from . import checkpoints as runs
from .distributed import check_machine, frozen_dtype, launch
from .feature_cache import Caches
from .loop import Progress, num_samples, num_workers, total_steps, train
from .presets import PRESETS, preset

FEW = 50  # updates of a run below which its user is warned
Tell = Callable[[str], None]  # takes a line of text for people


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train, on what data, and how. Raises Mgp5Error that names all that is wrong; no weights are read."""

    stage: str
    data: tuple[Source, ...]  # format and path of each
    out: Path  # folder of the run
    model: str  # a name, a folder, "MLLM+GENERATOR", or a run of the stage before
    head: str | None = None  # of a new model; None: that of a trained one, else "minigpt5"
    preset: str | None = None  # settings to begin with; None: "own-..." of the device for own stories, else "paper"
    config_file: Path | None = None  # TOML file of settings that replace those of the preset
    overrides: Mapping[str, Any] = field(default_factory=dict)  # replace both, nested as in {"lora": {"rank": 4}}
    max_steps: int | None = None  # updates in all, instead of epochs
    stop_after: int | None = None  # updates after which this call ends; the run can be resumed
    vokens: int | None = None  # of an image, 1 to 16, for a new MiniGPT-5; None: 8
    device: str = "auto"
    caches: tuple[Path, ...] = ()  # folders of `mgp5 data cache`
    resume: bool = False  # go on with the run in `out`
    dry_run: bool = False  # for `estimate_stage` only: the precision "auto" is that of a GPU

    def __post_init__(self) -> None:
        most = {"max_steps": 10**9, "stop_after": 10**9, "vokens": 16}
        counts = {name: value for name in most if (value := getattr(self, name)) is not None}
        bad = {name: value for name, value in counts.items() if not 1 <= value <= most[name]}
        problems = [f"{name} is {value}, expected 1 to {most[name]:,}" for name, value in bad.items()]
        problems += check_sources(self.data)
        problems += [f"no cache at {path}: mgp5 data cache makes one" for path in self.caches if not path.is_dir()]
        checks: list[Callable[[], Any]] = [lambda: resolve(self.model), lambda: pick_device(self.device)]
        checks += [
            self._check_model,
            lambda: runs.check(self.out, self.config, self.resume),
        ]
        raise_all(problems, checks)

    def _check_model(self) -> None:
        """Check that what the model is trained for goes on in this run. Raises Mgp5Error."""
        check_head(self.model, self.trained, self.head)
        check_adapter(self.model, self.trained, self.config)

    @cached_property
    def config(self) -> TrainConfig:
        """The settings of the run: preset, then file, then overrides, then `max_steps`; "auto" is resolved."""
        config = preset(self.stage, self.preset or self.own_preset or "paper", self.head_name)
        if self.config_file:
            config = override(config, read_toml(self.config_file))
        config = override(config, dict(self.overrides) | ({"num_vokens": self.vokens} if self.vokens else {}))
        if config.precision == "auto":
            usual = "bf16" if self.dry_run else pick_precision("auto", pick_device(self.device)[0])
            old = runs.setting(self.out, "precision") if self.resume else None
            config = replace(config, precision=old or usual)
        return replace(config, steps=self.max_steps) if self.max_steps else config

    @cached_property
    def own_preset(self) -> str | None:
        """The preset for finetuning on own stories by the device, None for other runs."""
        if self.preset or self.stage != "finetune" or "own-laptop" not in PRESETS[self.head_name]:
            return None
        if {format for format, _ in self.data} != {"jsonl"}:
            return None
        device = pick_device(self.device)[0]
        if device.type == "cpu":
            return "own-laptop"
        return "own-80gb" if _is_large(device) else "own-24gb"

    @property
    def head_name(self) -> str:
        """The head that is trained."""
        if self.head:
            return self.head
        try:
            return self.trained.head if self.trained else "minigpt5"
        except Mgp5Error:  # of a model that is not there, which `resolve` tells
            return "minigpt5"

    @cached_property
    def trained(self) -> ModelConfig | None:
        """The configuration of what the model was trained to, None for parts that are put together."""
        path = resolve(self.model).trained
        return path and model_config_from(read_config(path / CONFIG), str(path / CONFIG))


@dataclass(frozen=True)
class StageEstimate:
    """What a run would do, and take on one device."""

    samples: int | None  # of an epoch, None where that is not known
    updates: int
    batch: int  # samples of an update
    memory: Estimate  # parameters, memory and operations of an update
    host: HostNeeds  # of the machine's own memory, for all processes on it


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
    _advise(request, data, tell)
    accelerator = launch(config, request.device, request.out)
    total_steps(config, data, accelerator.num_processes)  # raises before weights are loaded
    dtype = frozen_dtype(config, accelerator.device)
    _check_host(request, dtype, accelerator.device.type != "cpu")
    model = initial_model(request.model, config, head=request.head_name, dtype=dtype)
    if accelerator.device.type == "cpu":
        limit_threads_for_small_models(model)
    formats = {format for format, _ in request.data}
    talks = model.head.stage(config.stage).data == "conversations"
    if talks and "mmdialog" in formats and "jsonl" not in formats:  # which has whole conversations
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
    config, parts, processes = request.config, resolve(request.model), _processes()
    data = _load_data(request, tell)
    samples, updates = num_samples(data), total_steps(config, data, processes)
    shapes = {"head": request.head_name, "trained": request.trained, "dtype": DTYPES[config.precision]}
    memory = estimate(skeleton(parts.mllm, parts.diffusion, config, **shapes), config)
    device = pick_device(request.device)[0]
    host = memory.host(config, on_gpu=True, workers=num_workers(config, device)).times(_local_processes())
    _advise(request, data, tell)
    try:
        check_machine(config, device)
        check_loading(host, request.model)
    except Mgp5Error as error:  # the estimate may be for another machine
        tell(f"warning: on this machine the run is refused: {error}")
    return StageEstimate(samples, updates, config.batch * config.accumulation * processes, memory, host)


def _load_data(request: TrainRequest, tell: Tell) -> Keyed | Shards:
    """Read the data of a request. Raises Mgp5Error for one without the captions that are all that trains the head."""
    config = request.config
    options = {"narrate_from": request.trained.narrate_from} if request.trained else {}
    data = load_sources(request.data, config.data, count=token_counter(request.model), tell=tell, **options)
    if config.captions_alone and isinstance(data, Keyed):
        targets = (data[number][1].messages[-1] for number in range(len(data)))
        if not any(image.caption for target in targets for image in target.images):
            found = "captions alone train the head in this stage, and no image of the data has one"
            hint = "give data with captions (cc3m, shards, jsonl), or set ldm_weight=1 where there is one"
            raise Mgp5Error(found, hint, usage=True)
    return data


def _advise(request: TrainRequest, data: Keyed | Shards, tell: Tell) -> None:
    """Tell what was chosen for the user, and what would make the run useless."""
    config, updates = request.config, total_steps(request.config, data, _processes())
    if request.own_preset:
        tell(f"settings: --preset {request.own_preset}")
    if config.precision == "fp32" and pick_precision("auto", pick_device(request.device)[0]) == "fp32":
        tell("precision: fp32, as this processor only emulates bf16")
    each = config.batch * config.accumulation * _processes()
    if updates < FEW:
        hint = "more stories, --set epochs=N, or --set accumulation=1"
        tell(f"warning: only {updates} update{'s' * (updates != 1)} of {each} samples will hardly be seen: {hint}")
    _advise_speed(request, updates * each / (num_samples(data) or updates * each), tell)
    if config.warmup >= updates:
        tell(f"warning: the learning rate grows over {config.warmup} updates, the run has {updates}: --set warmup=N")


def _advise_speed(request: TrainRequest, epochs: float, tell: Tell) -> None:
    """Tell what makes a run faster: a cache of what each epoch would compute again, and on a large GPU a preset that
    recomputes nothing."""
    config, head, device = request.config, head_class(request.head_name), pick_device(request.device)[0]
    stage = head.stage(config.stage)
    captions = stage.data == "captions" and stage.llm and head.target_cache
    if captions and not request.caches and epochs >= 2:
        kinds = head.target_cache[0] + ",captions" * bool(getattr(config, "caption_weight", 0))
        tell(f"hint: every epoch encodes all images again: mgp5 data cache --kinds {kinds} --out DIR, then --cache DIR")
    if captions and not request.preset and "paper-80gb" in PRESETS[request.head_name] and _is_large(device):
        tell("hint: --preset paper-80gb has the same numbers for a GPU of this size, and is faster")


def _is_large(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 60 * GiB


def _check_host(request: TrainRequest, dtype: torch.dtype, on_gpu: bool) -> None:
    """Raise Mgp5Error where the weights, which every process loads, do not fit the machine's memory."""
    parts, config = resolve(request.model), request.config
    if surely_fits(parts):
        return
    shapes = {"head": request.head_name, "trained": request.trained, "dtype": dtype}
    rows, _ = weigh(skeleton(parts.mllm, parts.diffusion, config, **shapes), config)
    loading = loaded([(row.part, row.weights) for row in rows], config.quantize, on_gpu)
    check_loading(HostNeeds(loading).times(_local_processes()), request.model)


def _local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_adapter(name: str, trained: ModelConfig | None, config: TrainConfig) -> None:
    """Check that the adapter of a finetuned model can go on in that of the run. Raises Mgp5Error."""
    if trained is None or config.whole_llm or not (trained.lora or trained.prefix):
        return
    old, new = trained.lora or trained.prefix, config.lora or config.prefix
    if not head_class(trained.head).stage(config.stage).adapter:
        raise Mgp5Error(f"--model {name} is finetuned already", "finetune it, or pretrain the parts it is made of")
    if isinstance(old, LoraConfig) and isinstance(new, LoraConfig):
        if new.rank >= old.rank and {*new.targets} == {*old.targets}:
            return
        targets = ", ".join(f'"{target}"' for target in old.targets)
        hint = f"set lora.rank={old.rank} or more, and lora.targets=[{targets}]"
        raise Mgp5Error(f"--model {name} has a LoRA that does not fit into the run's", hint)
    if old != new:
        raise Mgp5Error(f"--model {name} is finetuned with {old}, the run has {new}", "set the same lora or prefix")


def check_head(name: str, trained: ModelConfig | None, head: str | None) -> None:
    """Check that a model is trained for the head that is asked for. Raises Mgp5Error."""
    head_class(head or "minigpt5")
    if trained and head and trained.head != head:
        found = f"--model {name} is trained for the head {trained.head}, not {head}"
        raise Mgp5Error(found, "give its parts, as in MLLM+GENERATOR, to begin with a fresh head", usage=True)


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
    name: str, config: TrainConfig, *, head: str = "minigpt5", dtype: torch.dtype = torch.float32
) -> InterleavedModel:
    """Build the model that a stage begins with: a new one, or what was trained before, whose adapter will go on.

    `dtype` is that of the weights that do not train. Raises Mgp5Error as `check_adapter` does.
    """
    parts = resolve(name)
    torch.manual_seed(config.seed)  # a new head is the same in every process and every run
    # The run's configuration names its parts: folders absolutely, so that it can be used from anywhere.
    mllm, diffusion = (os.path.abspath(p) if os.path.isdir(p) else p for p in (parts.mllm, parts.diffusion))
    if parts.trained is None:
        model = build(mllm, diffusion, head=head, dtype=dtype, quantize=config.quantize, **config.shape)
        model.limit_pixels(config.data.max_pixels)
        return model
    model = load_checkpoint(parts, dtype=dtype, quantize=config.quantize)
    model.limit_pixels(config.data.max_pixels)
    check_adapter(name, model.config, config)
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
