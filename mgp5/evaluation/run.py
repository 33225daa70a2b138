"""What `mgp5 eval` does: replies to samples, kept as they come, by one process or many; then the report of them.

config.json                what is evaluated: a folder goes on with the same only
data/                      Storyland, where no data was given
replies/NAME-RANK.jsonl    a line for each sample that a process has finished
pictures/NAME/             of replies, PNG
report.json  report.html   see `report` and `page`
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from accelerate import PartialState
from accelerate.utils import patch_environment

from ..apps.story import WINDOW
from ..data.files import pick
from ..device import pick_device
from ..errors import Mgp5Error
from ..files import digest, read_json, replacing, sha256, write_json
from ..hub import Parts, read_config, resolve
from ..loading import CONFIG
from ..messages import Conversation, Message
from ..model import InterleavedModel
from ..options import Options
from ..prompts import Scene as Told
from ..prompts import continue_
from ..storyland.write import write as write_storyland
from ..training.checkpoints import SETTINGS
from ..training.distributed import on_main
from ..views.files import write_png
from . import tasks
from .report import check, report
from .systems import Ask, Entry, System, build, entries
from .tasks import Data, Sample

Reply = Message | str  # or why there is none
Load = Callable[[str, str], InterleavedModel]
STORIES = 100  # of Storyland, where no number is given
WAIT = timedelta(days=7)  # that a process waits for the others


def run(flags: dict[str, Any], options: Options, load: Load) -> None:
    """Evaluate. `load` gives a model by its name, on a device.

    Raises Mgp5Error: what was asked cannot be done, or --out holds another evaluation.
    """
    chosen, measured = entries(flags["baselines"], flags["format"]), check(flags["metrics"], flags["weights"])
    tasks.check(flags["format"], flags["tasks"], flags["contexts"])
    parts, out, launched = trained(flags["model"]), flags["out"], "LOCAL_RANK" in os.environ
    if launched and flags["device"] not in ("auto", "cpu"):
        hint = "leave it out: every process takes a GPU"
        raise Mgp5Error(f"--device {flags['device']} under a launcher", hint, usage=True)
    device, _ = pick_device(flags["device"])
    with patch_environment(**({} if launched else {"accelerate_torch_device": str(device)})):
        state = PartialState(cpu=device.type == "cpu", timeout=WAIT)
    flags |= {"limit": flags["limit"] or (STORIES if flags["format"] == "storyland" else None)}
    narrate_from = read_config(parts.trained / CONFIG).get("narrate_from", "full")
    given = {name: flags[name] for name in ("split", "tasks", "contexts", "limit")} | {"narrate_from": narrate_from}
    data = tasks.load(flags["format"], flags["data"], **given) if flags["data"] else None
    settings = _settings(flags, options, on_main(state, lambda: weights(parts)))
    on_main(state, lambda: _claim(out, settings, {entry.name: _weights_by(entry) for entry in chosen}))
    if data is None:
        place = on_main(state, lambda: _storyland(out / "data", flags["split"], flags["limit"], options.seed))
        data = tasks.load(flags["format"], place, **given)
    runner = Runner(flags, options, lambda name: load(name, str(state.device)), data, state)
    for entry in chosen:
        runner.reply_by(entry)
    state.wait_for_everyone()
    runner.free()
    if state.is_main_process:
        facts = {"settings": read_json(out / SETTINGS), "processes": state.num_processes, "device": str(state.device)}
        replies = {name: read_replies(out, name) for name in facts["settings"]["systems"]}  # of earlier calls too
        facts |= {name: flags[name] for name in ("baselines", "batch", "backend", "memory")}
        report(out, data, replies, facts, measured, state.device)
    state.wait_for_everyone()


def trained(name: str) -> Parts:
    """Parts of a model. Raises Mgp5Error for one that nothing has trained."""
    parts = resolve(name)
    if parts.trained is None:
        raise Mgp5Error(f"{name} has no trained mapper", f"train one: mgp5 train --stage pretrain --model {name}")
    return parts


class Runner:
    """Has systems reply to the samples that have no reply yet; this process takes its share of them."""

    def __init__(
        self,
        flags: dict[str, Any],
        options: Options,
        load: Callable[[str], InterleavedModel],
        data: Data,
        state: PartialState,
    ) -> None:
        self.out, self.batch, self.name, self.as_json = (flags[key] for key in ("out", "batch", "model", "as_json"))
        self.options, self.data, self.state, self._load = options, data, state, load
        self._numbers = {sample.key: number for number, sample in enumerate(data.samples)}
        self._model: InterleavedModel | None = None

    def free(self) -> None:
        """Forget the model: what measures needs the memory."""
        self._model = None

    def reply_by(self, entry: Entry) -> None:
        """Write the replies of a system."""
        done = read_replies(self.out, entry.name)
        self.state.wait_for_everyone()  # nobody writes before all have seen what is there
        todo = [sample for sample in self.data.samples if sample.key not in done and entry.takes(sample)]
        if not todo:
            return
        if self._model is None:
            with self.state.main_process_first():  # it may export the model into the user's store
                self._model = self._load(self.name)
        system = build(entry, self._model, self.options, self.data.scenes, self._load)
        kinds = dict.fromkeys(sample.kind for sample in todo)
        groups = ([sample for sample in todo if sample.kind == kind] for kind in kinds)
        shares = [group[i : i + self.batch] for group in groups for i in range(0, len(group), self.batch)]
        self._write(entry.name, system, shares[self.state.process_index :: self.state.num_processes])

    def _write(self, name: str, system: System, batches: Sequence[Sequence[Sample]]) -> None:
        from rich.console import Console
        from rich.progress import Progress

        for folder in (self.out / "replies", self.out / "pictures" / name):
            folder.mkdir(parents=True, exist_ok=True)
        file = self.out / "replies" / f"{name}-{self.state.process_index}.jsonl"
        bar = Progress(console=Console(stderr=True), transient=True, disable=not self.state.is_main_process)
        with bar, file.open("a", encoding="utf-8") as lines:
            lines.write("\n" if file.stat().st_size else "")  # behind a line that a kill has cut off
            for batch in bar.track(batches, description=name):
                start = time.monotonic()
                replies = answer(system, batch, self.options.seed)
                seconds = round((time.monotonic() - start) / len(batch), 3)
                for sample, reply in zip(batch, replies, strict=True):
                    line = json.dumps(self._row(name, sample, reply) | {"seconds": seconds})
                    lines.write(f"{line}\n")
                    if self.as_json:
                        click.echo(line)
                lines.flush()

    def _row(self, name: str, sample: Sample, reply: Reply) -> dict[str, Any]:
        """What is kept of a reply, whose pictures are written."""
        if isinstance(reply, str):
            return {"key": sample.key, "error": reply}
        stem = f"pictures/{name}/{self._numbers[sample.key]:06d}"
        paths = [f"{stem}-{number}.png" for number in range(len(reply.images))]
        for image, path in zip(reply.images, paths, strict=True):
            write_png(image, self.out / path)
        (message,) = Conversation((replace(reply, content=tuple(map(_plain, reply.content))),)).to_chat(iter(paths))
        return {"key": sample.key, "reply": message}


def _plain(part: Any) -> Any:
    """Without what the PNG says of how it was made."""
    return replace(part, meta={}) if hasattr(part, "meta") else part


def answer(system: System, samples: Sequence[Sample], seed: int) -> list[Reply]:
    """Replies to samples of one kind; of one that cannot be answered, why."""
    try:
        return _answer(system, samples, seed)
    except Mgp5Error as error:
        if len(samples) == 1:
            return [str(error)]
    return [answer(system, [sample], seed)[0] for sample in samples]


def _answer(system: System, samples: Sequence[Sample], seed: int) -> list[Reply]:
    """A story goes on in rounds: a reply is history for the next, and without a picture it ends."""
    loaded = [sample.load() for sample in samples]
    for image in (image for conversation in loaded for image in conversation.messages[-1].images):
        image.load()  # a sample whose true picture is broken has failed: nothing could be compared with it
    told: list[list[Told]] = [[sample.opening] if sample.opening else [] for sample in samples]
    parts: list[tuple] = [() for _ in samples]
    for number in range(max(sample.rounds for sample in samples)):
        going = [i for i, s in enumerate(samples) if number < s.rounds and (not s.opening or len(told[i]) > number)]
        asks = []
        for i in going:
            question = continue_(told[i][-WINDOW:]) if told[i] else Conversation(loaded[i].messages[:-1])
            own = pick(2**31, seed, samples[i].key, number)
            asks.append(Ask(samples[i], question, loaded[i].messages[-1], own))
        for i, reply in zip(going, system(asks) if asks else [], strict=True):
            parts[i] += reply.content
            if samples[i].opening and reply.images:
                told[i].append((reply.text, reply.images[0]))
    return [Message("assistant", content) for content in parts]


def read_replies(out: Path, name: str) -> dict[str, dict[str, Any]]:
    """Rows of all processes by the keys of their samples. A line that a kill has cut off does not count."""
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted((out / "replies").glob(f"{name}-[0-9]*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                continue
    return rows


def weights(parts: Parts) -> str:
    """A hash of all weights of a model that lie in folders, and of the names of those on the hub."""
    return digest([list(_weights_of(str(folder))) for folder in (parts.mllm, parts.diffusion, parts.trained)])


def _weights_of(folder: str) -> Iterator[str]:
    if not Path(folder).is_dir():
        yield folder
    for file in sorted(Path(folder).rglob("*.safetensors")):
        yield f"{file.relative_to(folder).as_posix()} {sha256(file)}"


def _weights_by(entry: Entry) -> str:
    """A hash of a baseline's own weights, and where they are; "" without."""
    if not entry.path:
        return ""
    found = weights(trained(entry.path)) if entry.name == "gill" else digest(list(_weights_of(entry.path)))
    return f"{entry.path} {found}"


def _settings(flags: dict[str, Any], options: Options, weights: str) -> dict[str, Any]:
    """What replies depend on, as JSON gives it back."""
    data = str(flags["data"].resolve()) if flags["data"] else "written here"
    kept = {name: flags[name] for name in ("model", "format", "split", "tasks", "contexts", "limit")}
    kept |= {"data": data, "weights": weights, "quantize": flags["quantize"], "options": options.flat()}
    return json.loads(json.dumps(kept))


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


def _storyland(folder: Path, split: str, number: int, seed: int) -> Path:
    """Storyland, written once and whole."""
    if not folder.exists():
        with replacing(folder) as part:
            write_storyland(part, "train" if split == "train" else "test", 0, number, number, seed)
    return folder
