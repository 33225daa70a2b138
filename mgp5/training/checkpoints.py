"""The folder of a run, in which a checkpoint is whole or not there, at whatever moment the run is killed.

config.json  log.jsonl  report.json  samples/      settings, losses, what was left out, pages of pictures
checkpoints/step-000500/mgp5/                      weights to use: `--model RUN/checkpoints/step-000500`
checkpoints/step-000500/state/                     what --resume needs besides
mgp5 -> checkpoints/step-000500/mgp5               the newest weights: `--model RUN`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..config import TrainConfig
from ..errors import Mgp5Error
from ..files import read_json, remove_folder, remove_leftovers, replacing, write_json, write_text

SETTINGS, LOG, REPORT, FACTS = "config.json", "log.jsonl", "report.json", "state/state.json"
# What may change between the pieces of a run; of accumulation, only how it is split between processes and steps.
FREE = {"accumulation", "checkpointing", "epochs", "keep", "log_every", "sample_every", "save_every", "steps"}
FREE |= {"trackers", "workers"}
BROKEN = "start the run again with another --out"


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest last."""
    found = (path for path in out.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(found, key=lambda path: int(path.name[5:]))


def check(out: Path, config: TrainConfig, resume: bool) -> None:
    """See that a run can begin in a folder, or go on there. One that ended before it saved anything leaves it free.

    Raises Mgp5Error: the folder holds a run already, or with `resume` none, or one of other settings.
    """
    if not resume:
        if checkpoints(out) or (out / "mgp5").exists() or ((out / SETTINGS).exists() and not (out / LOG).exists()):
            hint = "resume it with --resume, or choose another --out"
            raise Mgp5Error(f"--out {out} already holds a run", hint, usage=True)
        return
    if not checkpoints(out):
        raise Mgp5Error(f"--out {out} holds no run to resume", "leave out --resume to start one", usage=True)
    old, new = read_json(out / SETTINGS, BROKEN), json.loads(json.dumps(asdict(config)))
    if changed := [name for name in new if name not in FREE and old.get(name) != new[name]]:
        other = f"--out {out} is a run with another {', '.join(changed)}"
        raise Mgp5Error(other, "resume it with the same settings", usage=True)


def claim(out: Path, config: TrainConfig, resume: bool, processes: int = 1, stream: bool = False) -> Path | None:
    """Begin or go on with a run: clean up behind one that was killed. Returns the checkpoint to go on from.

    Args:
        stream: the data is dealt to processes and their workers, whose numbers then have to stay.

    Raises Mgp5Error: as `check`, the folder cannot be written, or the data would go on in another order.
    """
    check(out, config, resume)
    newest = checkpoints(out)[-1] if resume else None
    if newest:
        old = read_json(newest / FACTS, BROKEN)
        new = {"accumulation": config.accumulation, "processes": processes, "workers": config.workers}
        same = ("processes", "workers") if stream else ()
        if any(old[name] != new[name] for name in same) or _microbatches(old) != _microbatches(new):
            was, now = (", ".join(f"{name} {facts[name]}" for name in new) for facts in (old, new))
            hint = "resume it with the same" if stream else "keep accumulation x processes"
            raise Mgp5Error(f"--out {out} is a run with {was}, not {now}", hint, usage=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out / "checkpoints")
        write_json(out / SETTINGS, asdict(config))
        log = (out / LOG).read_text().splitlines(keepends=True) if newest else []
        write_text(out / LOG, "".join(line for line in log if newest and _step_of(line) <= int(newest.name[5:])))
        if newest:
            _link(out)
    except OSError as error:
        raise Mgp5Error(f"--out {out} cannot be written ({error.strerror})", "choose another --out") from None
    return newest


def save(out: Path, step: int, keep: int, fill: Callable[[Path], None]) -> None:
    """Add a checkpoint, whose files `fill` writes into a folder; then remove all but the newest `keep`.

    Raises Mgp5Error when the disk is full, say; the checkpoints before it stay as they are.
    """
    place = out / f"checkpoints/step-{step:06d}"
    try:
        with replacing(place, durable=True) as part:
            part.mkdir(parents=True)
            fill(part)
        _link(out)
        for old in checkpoints(out)[:-keep]:
            remove_folder(old)
    except (OSError, SafetensorError, Mgp5Error) as error:
        hint = "the checkpoint before it is whole: make room and go on with --resume"
        raise Mgp5Error(f"step {step} cannot be saved in {out} ({error})", hint) from None


def _microbatches(facts: dict[str, Any]) -> int:
    """Of an update."""
    return facts["accumulation"] * facts["processes"]


def _step_of(line: str) -> float:
    """Step of a row of the log; infinity for one that was cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _link(out: Path) -> None:
    with replacing(out / "mgp5") as link:
        link.symlink_to((checkpoints(out)[-1] / "mgp5").relative_to(out))
