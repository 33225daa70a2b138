"""The folder of a run and its checkpoints. A checkpoint is complete or absent, whenever the run is killed.

config.json  log.jsonl  report.json  samples/      settings, losses, samples that were left out, pages of sample images
checkpoints/step-000500/mgp5/                      weights for use: `--model RUN/checkpoints/step-000500`
checkpoints/step-000500/state/                     optimizer and counters for --resume
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

SETTINGS, LOG, REPORT, METADATA = "config.json", "log.jsonl", "report.json", "state/state.json"
# Settings that may change when a run is resumed; of accumulation, only its product with the number of processes stays.
FREE = {"accumulation", "checkpointing", "epochs", "keep", "log_every", "sample_every", "save_every", "steps"}
FREE |= {"generator_batch", "trackers", "workers"}
BROKEN = "start the run again with another --out"


def checkpoints(out: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, the newest last."""
    folders = (path for path in out.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(folders, key=lambda path: int(path.name[5:]))


def check(out: Path, config: TrainConfig, resume: bool) -> None:
    """Check that a run can begin in a folder, or continue there. A run that ended before it saved is overwritten.

    Raises Mgp5Error when the folder holds a run; with `resume`, when it holds none, or one with other settings.
    """
    if not resume:
        if checkpoints(out) or (out / "mgp5").exists() or ((out / SETTINGS).exists() and not (out / LOG).exists()):
            hint = "resume it with --resume, or choose another --out"
            raise Mgp5Error(f"--out {out} already holds a run", hint, usage=True)
        return
    if not checkpoints(out):
        raise Mgp5Error(f"--out {out} holds no run to resume", "leave out --resume to start one", usage=True)
    old, new = read_json(out / SETTINGS, BROKEN), json.loads(json.dumps(asdict(config)))
    if changed := [name for name in new if name not in FREE and not _same(old.get(name, new[name]), new[name])]:
        problem = f"--out {out} is a run with another {', '.join(changed)}"
        raise Mgp5Error(problem, "resume it with the same settings", usage=True)


def _same(old: Any, new: Any) -> bool:
    """Return whether a setting is what it was; those that there were not yet are."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(_same(old.get(name, value), value) for name, value in new.items())
    return old == new


def setting(out: Path, name: str) -> Any:
    """Return a setting of the run in a folder, None where there is no run. Raises Mgp5Error."""
    return read_json(out / SETTINGS, BROKEN).get(name) if (out / SETTINGS).exists() else None


def claim(out: Path, config: TrainConfig, resume: bool, processes: int = 1, stream: bool = False) -> Path | None:
    """Begin or continue a run in a folder; return the checkpoint to continue from, or None.

    The data of a `stream` is divided among processes and workers: their numbers must not change. Raises Mgp5Error as
    `check` does, or when the folder cannot be written, or the order of the data would change.
    """
    check(out, config, resume)
    newest = checkpoints(out)[-1] if resume else None
    if newest:
        old = read_json(newest / METADATA, BROKEN)
        new = {"accumulation": config.accumulation, "processes": processes, "workers": config.workers}
        same = all(old[name] == new[name] for name in ("processes", "workers")) or not stream
        microbatches = [values["accumulation"] * values["processes"] for values in (old, new)]
        if not same or microbatches[0] != microbatches[1]:
            was, now = (", ".join(f"{name} {values[name]}" for name in new) for values in (old, new))
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
    """Add a checkpoint that `fill` writes into the folder it gets, then remove all but the newest `keep`.

    Raises Mgp5Error when the checkpoint cannot be written (a full disk); earlier ones stay.
    """
    try:
        with replacing(out / f"checkpoints/step-{step:06d}", durable=True) as part:
            part.mkdir(parents=True)
            fill(part)
        _link(out)
        for old in checkpoints(out)[:-keep]:
            remove_folder(old)
    except (OSError, SafetensorError, Mgp5Error) as error:
        hint = "the checkpoint before it is whole: make room and go on with --resume"
        raise Mgp5Error(f"step {step} cannot be saved in {out} ({error})", hint) from None


def _step_of(line: str) -> float:
    """Return the step of a row of the log, infinity for an incomplete one."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _link(out: Path) -> None:
    with replacing(out / "mgp5") as link:
        link.symlink_to((checkpoints(out)[-1] / "mgp5").relative_to(out))
