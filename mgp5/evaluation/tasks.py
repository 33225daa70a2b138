"""The papers' tasks as samples: a conversation whose last message is the true reply, and what is known of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from ..data import Dataset, Problems, load_data
from ..data.files import lines, pick
from ..data.vist import Story
from ..errors import Mgp5Error
from ..messages import Conversation, Image
from ..prompts import TASK_PROMPTS, continue_, illustrate, narrate
from ..prompts import Scene as Told
from ..storyland.world import Scene

Kind = Literal["caption", "illustrate", "narrate", "continue", "story", "dialogue"]
CONTEXTS = ("none", "text", "image", "full")  # MiniGPT-5, table 6
STORY_TASKS = ("illustrate", "narrate", "continue", "last")
TASKS = {
    "cc3m": ("caption",),
    "vist": STORY_TASKS,
    "mmdialog": ("dialogue",),
    "storyland": (*STORY_TASKS, "story", "dialogue"),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A question of a task.

    Attributes:
        key: its name, of which the seeds of its reply are made.
        group: story, dialogue or picture it belongs to; the samples of one are not independent.
        context: what its question shows of the history.
        tables: of the report, that count it: the last picture of a story is one of all its pictures too.
        load: the conversation, whose last message is the true reply.
        words: what the true picture shows, as its data set says it; "" where it does not.
        past: texts that were told before, for a model that reads text alone.
        opening: of a story to be continued: its first scene.
        rounds: how many replies continue it.
        before: of a story, the true picture before the one that is due.
    """

    key: str
    group: str
    kind: Kind
    context: str = "full"
    tables: tuple[str, ...]
    load: Callable[[], Conversation] = field(repr=False)
    words: str = ""
    past: tuple[str, ...] = ()
    opening: Told | None = None
    rounds: int = 1
    before: Image | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """Samples, and what is known of all: what could not be read, and of Storyland the scene that each picture shows."""

    samples: list[Sample]
    problems: Problems
    scenes: dict[Path, Scene]


def check(format: str, tasks: Sequence[str], contexts: Sequence[str]) -> None:
    """See that a format has these tasks and contexts. Raises Mgp5Error (wrong usage)."""
    if unknown := [task for task in tasks if task not in TASKS[format]]:
        known = ", ".join(TASKS[format])
        raise Mgp5Error(f"format {format} has no task {', '.join(unknown)}", f"it has {known}", usage=True)
    if contexts and format in ("cc3m", "mmdialog"):
        raise Mgp5Error(f"--context with format {format}", "leave it out: it is for stories", usage=True)


def load(
    format: str,
    path: Path,
    split: str,
    *,
    tasks: Sequence[str] = (),
    contexts: Sequence[str] = (),
    limit: int | None = None,
    narrate_from: str = "full",
) -> Data:
    """The samples of a data set.

    Args:
        format: of `TASKS`; "storyland" is a folder that `mgp5 data storyland` has written.
        tasks: of the format; empty takes all. "illustrate" draws every picture (of Storyland from the second on, the
            first that the sentences before it decide), "last" the last one, "narrate" tells every picture from the
            second on, "continue" asks for text and picture of one step of a story, chosen by its name, and "story" for
            all scenes after the first, each reply being history for the next.
        contexts: of story tasks; empty takes all four for "last", `narrate_from` to narrate, else "full".
        limit: the first stories, dialogues or pictures.

    Raises:
        Mgp5Error: as `check`, or data that cannot be used.
    """
    check(format, tasks, contexts)
    asked, samples, problems, scenes = tasks or TASKS[format], [], Problems(), {}
    root = {"vist": path, "mmdialog": path}
    if format == "storyland":
        root = {name: path / name for name in root}
        scenes = {place: scene for folder in root.values() for place, scene in pictured(folder)}
    if set(asked) & {*STORY_TASKS, "story"}:
        stories = load_data("vist", root["vist"], split)
        plan = _plan(asked, contexts, narrate_from, int(format == "storyland"))
        for story in stories.stories[:limit]:
            samples += plan(story)
        problems.merge(stories.problems)
    if "dialogue" in asked:
        samples += _plain(load_data("mmdialog", root["mmdialog"], split), "dialogue", limit, problems)
    if "caption" in asked:
        samples += _plain(load_data("cc3m", path, split), "caption", limit, problems)
    if not samples:
        raise Mgp5Error(f"{path} has no sample of these tasks", "stories need two scenes or more")
    keys: Counter[str] = Counter()
    for number, sample in enumerate(samples):  # data sets give two samples one name at times
        keys[sample.key] += 1
        if keys[sample.key] > 1:
            samples[number] = replace(sample, key=f"{sample.key}#{keys[sample.key]}")
    return Data(samples=samples, problems=problems, scenes=scenes)


def pictured(folder: Path) -> Iterator[tuple[Path, Scene]]:
    """Pictures of a Storyland folder, and what they show. Raises Mgp5Error."""
    for place, line in lines(folder / "attributes.jsonl") if folder.is_dir() else ():
        try:
            row = json.loads(line)
            yield (folder / row["image"]).resolve(), Scene(**row["attributes"])
        except (ValueError, TypeError, KeyError) as error:
            raise Mgp5Error(f"{place} of {folder} tells no scene ({error})", "write Storyland again") from None


def _plain(dataset: Dataset, kind: Kind, limit: int | None, problems: Problems) -> Iterator[Sample]:
    """Every sample of a data set, the first `limit` dialogues or pictures of it."""
    problems.merge(dataset.problems)
    groups: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        key = dataset.key(index)
        groups.setdefault(key.rpartition("/")[0] if kind == "dialogue" else key, []).append(index)
    for group in islice(groups, limit):
        for index in groups[group]:
            words = dataset[index].messages[-1].images[0].caption if kind == "caption" else ""
            make = partial(dataset.__getitem__, index)
            yield Sample(key=dataset.key(index), group=group, kind=kind, tables=(kind,), load=make, words=words)


def _plan(
    tasks: Sequence[str], contexts: Sequence[str], narrate_from: str, first: int
) -> Callable[[Story], Iterator[Sample]]:
    """What makes the samples of a story; a question that two tasks ask is one sample."""
    usual = {"last": CONTEXTS, "narrate": (narrate_from,), "story": ("full",)}

    def samples(story: Story) -> Iterator[Sample]:
        end = len(story.scenes)
        steps = {
            "illustrate": range(first, end),
            "last": range(end - 1, end),
            "narrate": range(1, end),
            "continue": [1 + pick(end - 1, "continue", story.name)] if end > 1 else [],
            "story": range(1, 2),
        }
        asked: dict[tuple[Kind, int, str], list[str]] = {}
        for task in tasks if end > 1 else ():
            for context in contexts if contexts and task != "story" else usual.get(task, ("full",)):
                for step in steps.get(task, ()):
                    kind = "illustrate" if task == "last" else task
                    asked.setdefault((kind, step, context), []).append(f"{task}, {context}")
        for (kind, step, context), tables in asked.items():
            yield _sample(story, kind, step, context, tuple(tables))

    return samples


def _sample(story: Story, kind: Kind, step: int, context: str, tables: tuple[str, ...]) -> Sample:
    history, (text, image) = story.scenes[:step], story.scenes[step]
    seen = [("", picture) for _, picture in history] if context == "image" else history
    how = "full" if context == "image" else context

    def conversation() -> Conversation:
        if kind == "story":
            return continue_(history).add("assistant", *(part for scene in story.scenes[1:] for part in scene))
        choice = pick(len(TASK_PROMPTS[kind]), story.name, step, kind)
        if kind == "illustrate":
            return illustrate(seen, text, choice, context=how).add("assistant", image)
        if kind == "continue":
            return continue_(seen, choice, context=how).add("assistant", text, image)
        return narrate(seen, image, choice, context=how).add("assistant", text)

    return Sample(
        key=f"{story.name}/{step}/{kind}/{context}",
        group=story.name,
        kind=kind,
        context=context,
        tables=tables,
        load=conversation,
        words=text,
        past=() if context == "none" else tuple(told for told, _ in history),
        opening=story.scenes[0] if kind == "story" else None,
        rounds=len(story.scenes) - 1 if kind == "story" else 1,
        before=history[-1][1] if history else None,
    )
