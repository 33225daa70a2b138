"""Pictures drawn by one training of the ablations, and what the judge reads in them (B pictures, F features)."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..apps.open_model import load
from ..config import Stage
from ..data.files import pick
from ..device import pick_device
from ..files import read_json, write_json
from ..heads.minigpt5 import to_pixels
from ..inference.request import to_picture
from ..messages import Conversation
from ..model import InterleavedModel
from ..options import reply_options
from ..storyland.judge import load_judge, look
from ..storyland.world import ATTRIBUTES as NAMES
from ..training import checkpoints as runs
from ..training.trainer import TERMS
from . import tasks
from .ablations import ATTRIBUTES, FRECHET
from .images import frechet_distance
from .storyland import attributes_right
from .systems import Ask, Model

if TYPE_CHECKING:
    from .ablations_run import Plan

Drawn = tuple[str, float]  # context and guidance
TASK: dict[Stage, tuple[str, str]] = {"pretrain": ("cc3m", "caption"), "finetune": ("vist", "last")}
SIZE = (128, 128)  # what the judge reads, pixels
AT_ONCE, SHOWN = 8, 8  # pictures drawn at a time, and kept for the page


def place(folder: Path, drawn: Drawn) -> Path:
    """Where the numbers of what a run has drawn lie; a strip of pictures lies beside them, with the ending .jpg."""
    context, guidance = drawn
    return folder / "measured" / f"{context}-{guidance:g}.json"


def measure(plan: Plan, stage: Stage, folder: Path, drawn: Collection[Drawn]) -> None:
    """Draw and measure what has no numbers yet."""
    todo = [one for one in sorted(drawn) if not place(folder, one).exists()]
    if not todo:
        return
    device, dtype = pick_device(plan.device)
    model, judge = load(folder, dtype=dtype, device=str(device), backend=plan.backend), load_judge().to(device)
    for context, guidance in todo:
        pictures, real, scenes = _draw(plan, stage, model, context, guidance)
        read, features = look(judge, pictures)
        _, true_features = look(judge, real)
        hits = attributes_right(read, scenes).float()  # (B, 7)
        found = {"pictures": len(hits), ATTRIBUTES: hits.mean().item(), "all seven": hits.prod(1).mean().item()}
        found |= {FRECHET: frechet_distance(features, true_features)}
        found |= {"by attribute": dict(zip(NAMES, hits.mean(0).tolist(), strict=True)), "training": _training(folder)}
        file = place(folder, (context, guidance))
        file.parent.mkdir(exist_ok=True)
        strip = to_picture(torch.cat(list(pictures[:SHOWN]), dim=2))
        strip.save(file.with_suffix(".jpg"), quality=88)
        write_json(file, found)


@torch.inference_mode()
def _draw(
    plan: Plan, stage: Stage, model: InterleavedModel, context: str, guidance: float
) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Pictures drawn and true, both (B, 3, 128, 128) in [-1, 1], and what the true ones show."""
    format, task = TASK[stage]
    root = plan.out / "data" / "test" / format
    contexts = (context,) if stage == "finetune" else ()
    samples = tasks.load(format, root, "test", tasks=(task,), contexts=contexts, limit=plan.samples).samples
    scenes = dict(tasks.pictured(root))
    system = Model(model, reply_options(steps=plan.steps, guidance=guidance))
    drawn, real, shown = [], [], []
    for start in range(0, len(samples), AT_ONCE):
        asks = []
        for sample in samples[start : start + AT_ONCE]:
            *question, truth = sample.load().messages
            own = pick(2**31, task, sample.group)  # the same noise in all rows
            asks.append(Ask(sample, Conversation(tuple(question)), truth, own))
        drawn += [to_pixels(reply.images[0].load(), SIZE) for reply in system(asks)]
        real += [to_pixels(ask.truth.images[0].load(), SIZE) for ask in asks]
        shown += [scenes[ask.truth.images[0].path.resolve()] for ask in asks]
    return torch.stack(drawn), torch.stack(real), shown


def _training(folder: Path) -> dict[str, Any]:
    """Of a finished run: updates, minutes of them, and losses, means over the last quarter of its log."""
    log = [json.loads(line) for line in (folder / runs.LOG).read_text().splitlines()]
    last = log[-1]
    batch = read_json(folder / runs.SETTINGS)["batch"]
    minutes = last["step"] * batch / last["samples_per_second"] / 60 if last["samples_per_second"] else 0.0
    tail = log[-max(1, len(log) // 4) :]
    losses = {name: sum(row[name] for row in tail) / len(tail) for name in TERMS if name in last}
    return {"updates": last["step"], "minutes": round(minutes, 2), "losses": losses}
