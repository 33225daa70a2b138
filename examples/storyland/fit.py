"""One resumable training loop for all tiny backbones: linear warm-up, constant, linear decay; EMA; JSONL log."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Losses = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Run:
    """How one backbone is trained. All runs stop at `minutes` and go on where they stopped when called again."""

    name: str
    work: Path
    steps: int
    lr: float
    minutes: float = 1e9
    warmup: int = 200
    decay: float = 0.3  # last share of the steps over which the learning rate falls to zero
    ema: float = 0.999
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    log_every: int = 50
    save_minutes: float = 3.0

    @property
    def folder(self) -> Path:
        return self.work / self.name

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.lr * min(rise, fall)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """bfloat16 where the processor computes in it, else float32: emulated it takes four times as long."""
    fast = device().type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.autocast(device().type, torch.bfloat16, enabled=fast)


def step_generator(step: int, seed: int = 0) -> torch.Generator:
    """The randomness of one step: the same on resuming as without the interruption."""
    return torch.Generator().manual_seed(1_000_003 * seed + step)


def fit(
    run: Run,
    model: nn.Module,
    loss: Callable[[int], Losses],
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    evaluate_every: int = 1000,
) -> nn.Module:
    """Train `model` in place by the sum of `loss(step)`; returns the exponential moving average of it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": run.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=run.betas, fused=True)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    first = _resume(run, model, average, optimizer)
    start = saved = mark = time.monotonic()
    log = (run.folder / "log.jsonl").open("a")
    sums: dict[str, float] = {}
    since = first  # the step that the sums begin with
    for step in range(first, run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate(step)
        with autocast():
            losses = loss(step)
        torch.stack([value.float() for value in losses.values()]).sum().backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _follow(average, model, min(run.ema, (step + 1) / (step + 10)))
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + value.item()
        if (step + 1) % run.log_every == 0:
            rate, mark = run.log_every / (time.monotonic() - mark), time.monotonic()
            means = {key: round(value / (step + 1 - since), 5) for key, value in sums.items()}
            row = {"step": step + 1, "rate": round(rate, 2)} | means
            if evaluate is not None and (step + 1) % evaluate_every == 0:
                row |= {key: round(value, 4) for key, value in evaluate(average).items()}
                mark = time.monotonic()
            log.write(json.dumps(row) + "\n")
            log.flush()
            sums, since = {}, step + 1
        over = time.monotonic() - start > 60 * run.minutes
        if over or step + 1 == run.steps or time.monotonic() - saved > 60 * run.save_minutes:
            _save(run, step + 1, model, average, optimizer)
            saved = time.monotonic()
        if over:
            break
    log.close()
    return average


def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        for slow, fast in zip(average.buffers(), model.buffers(), strict=True):
            slow.copy_(fast)


def _save(run: Run, step: int, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}  # also unties shared ones
    save_file(tensors, run.folder / "state.tmp", metadata={"step": str(step)})
    (run.folder / "state.tmp").replace(run.folder / "state.safetensors")


def _resume(run: Run, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    path = run.folder / "state.safetensors"
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    average.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("average.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step
