"""What `mgp5 eval` does: replies to samples, kept as they come, by one process or many; then the report of them.

config.json                what is evaluated: a folder goes on with the same only
data/                      Storyland, where no data was given
replies/NAME-RANK.jsonl    a line for each sample that a process has finished
pictures/NAME/             images of replies, PNG
report.json  report.html   see `report`
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate import PartialState
from accelerate.utils import patch_environment

from ..apps.open_model import Tell, open_model, silent
from ..apps.story import WINDOW
from ..data.files import pick
from ..device import launched, pick_device
from ..errors import Mgp5Error
from ..files import Claim, digest, read_json, sha256, write_json
from ..hub import Parts, read_config
from ..loading import CONFIG
from ..messages import Conversation, Image, Message
from ..model import InterleavedModel
from ..prompts import Scene, continue_
from ..training.checkpoints import SETTINGS
from ..training.distributed import on_main
from ..views.files import write_png
from . import tasks
from .report import report
from .request import EvaluateRequest, trained
from .storyland import write_data
from .systems import Entry, System, build
from .tasks import Data, Question, Sample

WAIT = timedelta(days=7)  # that a process waits for the others
Reply = Message | str  # or why there is none


class Keyed(Protocol):
    """What is replied to: it has a name of its own."""

    key: str


class Replied(NamedTuple):
    """A reply that was kept: how many samples of all that this process takes its system has finished, and its row."""

    system: str
    done: int
    total: int
    row: dict[str, Any]  # "key", "reply" or "error", "seconds"


def evaluate(
    request: EvaluateRequest, tell: Tell = silent, progress: Callable[[Replied], None] = lambda replied: None
) -> dict[str, Any]:
    """Evaluate a model, and return what report.json holds; `progress` is called with every reply of this process.

    Under `torchrun` or `accelerate launch` every process calls this, and takes a share of the samples. Raises Mgp5Error
    if data or a model cannot be used, or if `request.out` holds another evaluation.
    """
    with claimed(request.out):
        return _evaluate(request, tell, progress)


def claimed(out: Path) -> AbstractContextManager[Any]:
    """Claim a folder for this process, where it is the first of several: one writes."""
    return Claim(out) if os.environ.get("RANK", "0") == "0" else nullcontext()


def started(device_name: str) -> PartialState:
    """Return the state of this process among those that evaluate together."""
    device, _ = pick_device(device_name)
    with patch_environment(**({} if launched() else {"accelerate_torch_device": str(device)})):
        return PartialState(cpu=device.type == "cpu", timeout=WAIT)


def _evaluate(request: EvaluateRequest, tell: Tell, progress: Callable[[Replied], None]) -> dict[str, Any]:
    out = request.out
    parts = trained(request.model.model)
    state = started(request.model.device)
    data = None if request.data is None else _load_data(request, request.data, parts)
    settings = _settings(request, on_main(state, lambda: weights_hash(parts)))
    on_main(state, lambda: claim(out, settings, {entry.name: _baseline_hash(entry) for entry in request.systems}))
    if data is None:
        folder, seed = out / "data", request.options.seed
        on_main(state, lambda: write_data(folder, request.split, request.num_groups, seed, request.tasks))
        data = _load_data(request, folder, parts)

    def load(name: str) -> InterleavedModel:
        return open_model(replace(request.model, model=name, device=str(state.device)), tell, request.batch)

    model = cache(partial(load, request.model.model))
    for entry in request.systems:
        for replied in reply_by(entry, request, data, state, model, load, tell):
            progress(replied)
    state.wait_for_everyone()
    model.cache_clear()  # metrics need the memory
    if state.is_main_process:
        made = {"settings": read_json(out / SETTINGS), "processes": state.num_processes, "device": str(state.device)}
        made |= {"baselines": request.baselines, "batch": request.batch}
        made |= {"backend": request.model.backend, "memory": request.model.memory, "bytes": weights_bytes(parts)}
        replies = {name: read_replies(out, name) for name in made["settings"]["systems"]}  # of earlier calls too
        report(request, data, replies, made, state.device)
    state.wait_for_everyone()
    return read_json(out / "report.json")


def _load_data(request: EvaluateRequest, folder: Path, parts: Parts) -> tasks.Data:
    trained_with = read_config(parts.trained / CONFIG)
    shown = {name: trained_with[name] for name in ("narrate_from", "history", "bare_captions") if name in trained_with}
    shown |= {"tasks": request.tasks, "contexts": request.contexts}
    return tasks.load(request.format, folder, request.split, limit=request.num_groups, **shown)


def weights_hash(parts: Parts) -> str:
    """Return a hash of all weights of a model that lie in folders, and of the names of those on the hub."""
    return digest([_file_hashes(str(folder)) for folder in (parts.mllm, parts.diffusion, parts.trained)])


def weights_bytes(parts: Parts) -> dict[str, int]:
    """Return how large the weights on this machine are, of each part of a model."""
    folders = {"llm": parts.mllm, "generator": parts.diffusion, "trained": parts.trained}
    files = {name: Path(folder).rglob("*.safetensors") for name, folder in folders.items() if Path(folder).is_dir()}
    return {name: sum(file.stat().st_size for file in each) for name, each in files.items()}


def _file_hashes(folder: str) -> list[str]:
    if not Path(folder).is_dir():
        return [folder]
    files = sorted(Path(folder).rglob("*.safetensors"))
    return [f"{file.relative_to(folder).as_posix()} {sha256(file)}" for file in files]


def _baseline_hash(entry: Entry) -> str:
    """Return the path of a baseline's own weights and a hash of them; "" without."""
    if not entry.path:
        return ""
    weights = weights_hash(trained(entry.path)) if entry.name == "gill" else digest(_file_hashes(entry.path))
    return f"{entry.path} {weights}"


def _settings(request: EvaluateRequest, weights: str) -> dict[str, Any]:
    """Return what replies depend on, as JSON gives it back."""
    data = str(request.data.resolve()) if request.data else "written here"
    settings = {name: getattr(request, name) for name in ("format", "split", "tasks", "contexts")}
    settings |= {"model": request.model.model, "limit": request.num_groups, "data": data, "weights": weights}
    settings |= {"quantize": request.model.quantize, "options": request.options.flat()}
    return json.loads(json.dumps(settings))


def claim(out: Path, settings: dict[str, Any], systems: dict[str, str]) -> None:
    """Begin an evaluation in a folder, or see that it goes on there; baselines may be added. Raises Mgp5Error."""
    file = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not file.exists() and any(path.name != ".lock" for path in out.iterdir()):
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


def reply_by(
    entry: Entry,
    request: EvaluateRequest,
    data: Data,
    state: PartialState,
    model: Callable[[], InterleavedModel],
    load: Callable[[str], InterleavedModel],
    tell: Callable[[str], None],
) -> Iterator[Replied]:
    """Let a system reply to this process's share of the samples that have no reply yet; write and yield each reply.

    `model` gives the one that is evaluated, `load` another by its name or folder; `tell` takes a line when the system
    is left out.
    """
    done = read_replies(request.out, entry.name)
    state.wait_for_everyone()  # nobody writes before all have seen what is there
    todo = [sample for sample in data.samples if sample.key not in done and entry.takes(sample)]
    if not todo:
        return
    with state.main_process_first():  # it may export the model into the user's store
        shared = model()
    try:
        system = build(entry, shared, request.options, data.scenes, load)
    except Mgp5Error as error:
        if not entry.implied:
            raise
        tell(f"{entry.name} is left out: {error}")
        return
    groups = ([sample for sample in todo if sample.kind == kind] for kind in dict.fromkeys(one.kind for one in todo))
    batches = [group[i : i + request.batch] for group in groups for i in range(0, len(group), request.batch)]
    numbers = {sample.key: number for number, sample in enumerate(data.samples)}

    def reply(batch: Sequence[Sample]) -> Iterator[dict[str, Any]]:
        for sample, made in zip(batch, answer(system, batch, request.options.seed), strict=True):
            if isinstance(made, str):
                yield {"error": made}
            else:
                stem = f"pictures/{entry.name}/{numbers[sample.key]:06d}"
                yield {"reply": write_messages(request.out, stem, [made])[0]}

    yield from kept(request.out, entry.name, state, batches, reply)


def kept(
    out: Path,
    name: str,
    state: PartialState,
    batches: Sequence[Sequence[Keyed]],
    reply: Callable[[Sequence[Any]], Iterable[dict[str, Any]]],
) -> Iterator[Replied]:
    """Let a system reply to this process's share of batches; write and yield the row of each reply.

    `reply` makes the rows of a batch, of which this adds "key" and "seconds".
    """
    batches = batches[state.process_index :: state.num_processes]
    (out / "replies").mkdir(exist_ok=True)
    file, count = out / "replies" / f"{name}-{state.process_index}.jsonl", 0
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" if file.stat().st_size else "")  # behind a line that a kill has cut off
        for batch in batches:
            start = time.monotonic()
            rows = list(reply(batch))
            seconds = round((time.monotonic() - start) / len(batch), 3)
            for one, made in zip(batch, rows, strict=True):
                row = {"key": one.key, "seconds": seconds} | made
                lines.write(f"{json.dumps(row)}\n")
                count += 1
                yield Replied(name, count, sum(map(len, batches)), row)
            lines.flush()


def write_messages(out: Path, stem: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Write the images of replies to `stem`-NUMBER.png, and return the replies as the row of a sample has them."""
    images = [image for message in messages for image in message.images]
    paths = [f"{stem}-{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        write_png(image, out / path)
    # The PNG has the metadata of an image, the row leaves it out.
    bare = [tuple(replace(p, meta={}) if isinstance(p, Image) else p for p in m.content) for m in messages]
    plain = (replace(message, content=content) for message, content in zip(messages, bare, strict=True))
    return Conversation(tuple(plain)).to_chat(iter(paths))


def answer(system: System, samples: Sequence[Sample], seed: int) -> list[Reply]:
    """Return the replies to samples of one kind; for a sample that cannot be answered, the reason."""
    try:
        return _answer(system, samples, seed)
    except Mgp5Error as error:
        if len(samples) == 1:
            return [str(error)]
    return [answer(system, [sample], seed)[0] for sample in samples]


def _answer(system: System, samples: Sequence[Sample], seed: int) -> list[Reply]:
    """Reply in rounds: a reply of a story is history for the next, and without an image the story ends."""
    loaded = [sample.load() for sample in samples]
    for image in (image for conversation in loaded for image in conversation.messages[-1].images):
        image.load()  # a sample whose true image is broken has failed: nothing could be compared with it
    history: list[list[Scene]] = [[sample.opening] if sample.opening else [] for sample in samples]
    parts: list[tuple] = [() for _ in samples]
    for number in range(max(sample.rounds for sample in samples)):
        active = [i for i, s in enumerate(samples) if number < s.rounds and (not s.opening or len(history[i]) > number)]
        questions = []
        for i in active:
            shown = (
                continue_(history[i][-WINDOW:]) if history[i] else replace(loaded[i], messages=loaded[i].messages[:-1])
            )
            own_seed = pick(2**31, seed, samples[i].key, number)
            questions.append(Question(samples[i], shown, loaded[i].messages[-1], own_seed))
        for i, reply in zip(active, system(questions) if questions else [], strict=True):
            parts[i] += reply.content
            if samples[i].opening and reply.images:
                history[i].append((reply.text, reply.images[0]))
    return [Message("assistant", content) for content in parts]


def read_replies(out: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of all processes by the keys of their samples. A line that a kill has cut off does not count."""
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted((out / "replies").glob(f"{name}-[0-9]*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                continue
    return rows
