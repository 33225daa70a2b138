"""What `mgp5 eval` does: replies to samples, kept as they come, by one process or many; then the report of them.

config.json                what is evaluated: a folder goes on with the same only
data/                      Storyland, where no data was given
replies/  pictures/        see `runner`
report.json  report.html   see `report` and `page`
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import patch_environment

from ..apps.open_model import Tell, open_model, silent
from ..device import pick_device
from ..errors import Mgp5Error
from ..files import digest, read_json, sha256, write_json
from ..hub import Parts, read_config
from ..loading import CONFIG
from ..model import InterleavedModel
from ..training.checkpoints import SETTINGS
from ..training.distributed import on_main
from . import tasks
from .report import report
from .request import EvaluateRequest, launched, trained
from .runner import Replied, read_replies, reply_by
from .storyland import write_data
from .systems import Entry

WAIT = timedelta(days=7)  # that a process waits for the others


def evaluate(
    request: EvaluateRequest, tell: Tell = silent, progress: Callable[[Replied], None] = lambda replied: None
) -> dict[str, Any]:
    """Evaluate a model, and return what report.json holds; `progress` is called with every reply of this process.

    Under `torchrun` or `accelerate launch` every process calls this, and takes a share of the samples. Raises Mgp5Error
    if data or a model cannot be used, or if `request.out` holds another evaluation.
    """
    out = request.out
    parts = trained(request.model.model)
    device, _ = pick_device(request.model.device)
    with patch_environment(**({} if launched() else {"accelerate_torch_device": str(device)})):
        state = PartialState(cpu=device.type == "cpu", timeout=WAIT)
    data = None if request.data is None else _load_data(request, request.data, parts)
    settings = _settings(request, on_main(state, lambda: _weights_hash(parts)))
    on_main(state, lambda: _claim(out, settings, {entry.name: _baseline_hash(entry) for entry in request.systems}))
    if data is None:
        folder, seed = out / "data", request.options.seed
        on_main(state, lambda: write_data(folder, request.split, request.num_groups, seed))
        data = _load_data(request, folder, parts)

    def load(name: str) -> InterleavedModel:
        return open_model(replace(request.model, model=name, device=str(state.device)), tell)

    model = cache(partial(load, request.model.model))
    for entry in request.systems:
        for replied in reply_by(entry, request, data, state, model, load, tell):
            progress(replied)
    state.wait_for_everyone()
    model.cache_clear()  # metrics need the memory
    if state.is_main_process:
        made = {"settings": read_json(out / SETTINGS), "processes": state.num_processes, "device": str(state.device)}
        made |= {"baselines": request.baselines, "batch": request.batch}
        made |= {"backend": request.model.backend, "memory": request.model.memory}
        replies = {name: read_replies(out, name) for name in made["settings"]["systems"]}  # of earlier calls too
        report(request, data, replies, made, state.device)
    state.wait_for_everyone()
    return read_json(out / "report.json")


def _load_data(request: EvaluateRequest, folder: Path, parts: Parts) -> tasks.Data:
    narrate_from = read_config(parts.trained / CONFIG).get("narrate_from", "full")
    shown = {"tasks": request.tasks, "contexts": request.contexts, "narrate_from": narrate_from}
    return tasks.load(request.format, folder, request.split, limit=request.num_groups, **shown)


def _weights_hash(parts: Parts) -> str:
    """Return a hash of all weights of a model that lie in folders, and of the names of those on the hub."""
    return digest([_file_hashes(str(folder)) for folder in (parts.mllm, parts.diffusion, parts.trained)])


def _file_hashes(folder: str) -> list[str]:
    if not Path(folder).is_dir():
        return [folder]
    files = sorted(Path(folder).rglob("*.safetensors"))
    return [f"{file.relative_to(folder).as_posix()} {sha256(file)}" for file in files]


def _baseline_hash(entry: Entry) -> str:
    """Return the path of a baseline's own weights and a hash of them; "" without."""
    if not entry.path:
        return ""
    weights = _weights_hash(trained(entry.path)) if entry.name == "gill" else digest(_file_hashes(entry.path))
    return f"{entry.path} {weights}"


def _settings(request: EvaluateRequest, weights: str) -> dict[str, Any]:
    """Return what replies depend on, as JSON gives it back."""
    data = str(request.data.resolve()) if request.data else "written here"
    settings = {name: getattr(request, name) for name in ("format", "split", "tasks", "contexts")}
    settings |= {"model": request.model.model, "limit": request.num_groups, "data": data, "weights": weights}
    settings |= {"quantize": request.model.quantize, "options": request.options.flat()}
    return json.loads(json.dumps(settings))


def _claim(out: Path, settings: dict[str, Any], systems: dict[str, str]) -> None:
    """Begin an evaluation in a folder, or see that it goes on there; baselines may be added. Raises Mgp5Error."""
    file = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not file.exists() and any(out.iterdir()):
            raise Mgp5Error(f"--out {out} is not empty and holds no evaluation", "choose another --out", usage=True)
        old = read_json(file) if file.exists() else settings
        changed = [name for name in settings if old.get(name) != settings[name]]
        known = old.get("systems", {})
        changed += [f"baseline {name}" for name in systems if known.get(name, systems[name]) != systems[name]]
        if changed:
            found = f"--out {out} is an evaluation with another {', '.join(changed)}"
            raise Mgp5Error(found, "go on with the same, or choose another --out", usage=True)
        write_json(file, settings | {"systems": known | systems})
    except OSError as error:
        raise Mgp5Error(f"--out {out} cannot be written ({error.strerror})", "choose another --out") from None
