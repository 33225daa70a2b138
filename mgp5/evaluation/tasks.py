"""The papers' tasks as samples: a conversation whose last message is the true reply, and what is known of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Literal

from ..data import Dataset, Problems, load_data
from ..data.files import pick
from ..data.vist import Story
from ..errors import Mgp5Error
from ..messages import Conversation, Image, Message
from ..prompts import TASK_PROMPTS, continue_, illustrate, narrate
from ..prompts import Scene as Step
from ..storyland.language import mentions
from ..storyland.world import ATTRIBUTES, Scene
from ..storyland.write import ATTRIBUTES as SHOWN
from ..storyland.write import read_scenes

Kind = Literal["caption", "illustrate", "narrate", "continue", "story", "dialogue", "details"]
CONTEXTS = ("none", "text", "image", "full")  # MiniGPT-5, table 6
STORY_TASKS = ("illustrate", "narrate", "continue", "last")
TASKS = {
    "cc3m": ("caption",),
    "vist": STORY_TASKS,
    "mmdialog": ("dialogue",),
    "storyland": ("first", *STORY_TASKS, "story", "dialogue", "subject", "details"),
}
EXTRA = "details"  # asked for by name only


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A question of a task; `load` gives the conversation, whose last message is the true reply."""

    key: str  # its name, from which the seeds of its reply are made
    group: str  # the story, dialogue or image it belongs to; the samples of one are not independent
    kind: Kind
    context: str = "full"  # how much of the history its question shows
    tables: tuple[str, ...]  # of the report, that count it: the last image of a story is one of all its images too
    load: Callable[[], Conversation] = field(repr=False)
    words: str = ""  # what the true image shows, as its data set says it
    open: frozenset[str] = frozenset()  # attributes of Storyland that the question leaves to the image
    past: tuple[str, ...] = ()  # earlier texts of the story, for a model that reads text alone
    opening: Step | None = None  # first scene of a story that is to be continued
    rounds: int = 1  # how many replies continue it
    before: Image | None = None  # of a story, the true image before the one that is due


@dataclass(frozen=True)
class Question:
    """What a system is asked."""

    sample: Sample
    conversation: Conversation  # ends with the user's turn
    truth: Message  # the true reply, for upper bounds only
    seed: int  # of the reply


@dataclass(frozen=True, kw_only=True)
class Data:
    """Samples, what could not be read, and the scene that each image of Storyland shows."""

    samples: list[Sample]
    problems: Problems
    scenes: dict[Path, Scene]


def check(format: str, tasks: Sequence[str], contexts: Sequence[str]) -> None:
    """Raise Mgp5Error (wrong usage) if a format is unknown or does not have these tasks and contexts."""
    if format not in TASKS:
        raise Mgp5Error(f"format is {format!r}", f"expected one of {', '.join(TASKS)}", usage=True)
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
    history: int | None = None,
    bare_captions: bool = False,
) -> Data:
    """Read the samples of a data set. Raises Mgp5Error as `check`, or if the data cannot be used.

    Args:
        format: of `TASKS`; "storyland" is a folder that `mgp5 data storyland` has written.
        tasks: of the format; empty takes all but EXTRA. "illustrate" draws every image (of Storyland from the second
            on), "last" the last one, "narrate" tells every image from the second on, "continue" asks for text and image
            of one step of a story, chosen by its name, "story" for all scenes after the first, each reply history for
            the next. Of Storyland "first" draws the first image, of which its sentence leaves something open, "subject"
            has those replies of "dialogue" whose image shows another character than the one before, and "details" draws
            what has to keep something of the image before that no text tells.
        history: of dialogues, messages before the reply that a question has; None: all.
        bare_captions: of CC3M, ask without the chat template.
        contexts: of story tasks; empty takes all four for "last", `narrate_from` for "narrate", else "full".
        limit: takes only the first stories, dialogues or images.
    """
    check(format, tasks, contexts)
    asked, samples, problems = tasks or [task for task in TASKS[format] if task != EXTRA], [], Problems()
    own = format == "storyland"
    root = {name: path / name if own else path for name in ("vist", "mmdialog", EXTRA)}
    folders = root.values() if own else [path] if (path / SHOWN).is_file() else ()
    scenes = {image: scene for folder in folders for image, scene in read_scenes(folder)}
    if set(asked) & {*STORY_TASKS, "story", "first"}:
        stories = load_data("vist", root["vist"], split)
        usual = dict.fromkeys(TASKS[format], ("full",)) | {"last": CONTEXTS, "narrate": (narrate_from,)}
        usual["first"] = ("none",)
        plan = {task: contexts if contexts and task not in ("story", "first") else usual[task] for task in asked}
        samples = [sample for story in stories.stories[:limit] for sample in _of_story(story, plan, first=int(own))]
        problems.merge(stories.problems)
    if set(asked) & {"dialogue", "subject"}:
        talks = _plain(load_data("mmdialog", root["mmdialog"], split, history=history), "dialogue", limit, problems)
        samples += [sample for talk in talks if (sample := _of_dialogue(talk, asked, scenes)).tables]
    if EXTRA in asked:
        samples += _plain(load_data("jsonl", root[EXTRA], split), EXTRA, limit, problems)
    if "caption" in asked:
        samples += _plain(load_data("cc3m", path, split, bare_captions=bare_captions), "caption", limit, problems)
    if not samples:
        raise Mgp5Error(f"{path} has no sample of these tasks", "stories need two scenes or more")
    keys: Counter[str] = Counter()
    for number, sample in enumerate(samples):  # data sets give two samples one name at times
        keys[sample.key] += 1
        if keys[sample.key] > 1:
            samples[number] = replace(sample, key=f"{sample.key}#{keys[sample.key]}")
    return Data(samples=samples, problems=problems, scenes=scenes)


def _plain(dataset: Dataset, kind: Kind, limit: int | None, problems: Problems) -> Iterator[Sample]:
    """Yield every sample of a data set, of the first `limit` dialogues or images."""
    problems.merge(dataset.problems)
    groups: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        key = dataset.key(index)
        groups.setdefault(key.rpartition("/")[0] if kind == "dialogue" else key, []).append(index)
    for group in islice(groups, limit):
        for index in groups[group]:
            words = ""
            if kind in ("caption", EXTRA):
                *_, asked, due = dataset[index].messages
                words = asked.text if kind == EXTRA else due.images[0].caption
            make = partial(dataset.__getitem__, index)
            yield Sample(key=dataset.key(index), group=group, kind=kind, tables=(kind,), load=make, words=words)


def _of_dialogue(sample: Sample, asked: Sequence[str], scenes: Mapping[Path, Scene]) -> Sample:
    """Return a sample of a dialogue with the tables that count it, and what its request leaves open.

    A request for a character says all but at times colour and place; whoever comes back is as drawn before, if shown.
    """
    *past, reply = sample.load().messages
    shown = [scenes.get(image.path.resolve()) for message in past for image in message.images]
    who = [scene and (scene.colour, scene.species) for scene in shown]
    true = scenes.get(reply.images[0].path.resolve()) if reply.images else None
    tables, words, left = [task for task in asked if task == "dialogue"], "", frozenset()
    if true and (not who or who[-1] != (true.colour, true.species)):
        words = past[-1].text
        tables += [task for task in asked if who and task == "subject"]
        back = re.match(r"back to |.* again\.$", words.lower())
        unsaid = (set(ATTRIBUTES) if back else {"colour", "place"}) - mentions(words).keys()
        left = frozenset() if true in shown else frozenset(unsaid)
    return replace(sample, tables=tuple(tables), words=words, open=left)


def _of_story(story: Story, plan: Mapping[str, Sequence[str]], first: int) -> Iterator[Sample]:
    """Yield the samples of a story by tasks and their contexts; a question that two tasks ask is one sample."""
    if (end := len(story.scenes)) < 2:
        return
    steps = {
        "first": range(1),
        "illustrate": range(first, end),
        "last": range(end - 1, end),
        "narrate": range(1, end),
        "continue": [1 + pick(end - 1, "continue", story.name)],
        "story": range(1, 2),
    }
    asked: dict[tuple[Kind, int, str], list[str]] = {}
    for task, contexts in plan.items():
        for context, step in product(contexts, steps.get(task, ())):
            kind = "illustrate" if task in ("first", "last") else task
            asked.setdefault((kind, step, context), []).append(f"{task}, {context}")
    for (kind, step, context), tables in asked.items():
        yield _sample(story, kind, step, context, tuple(tables))


def _sample(story: Story, kind: Kind, step: int, context: str, tables: tuple[str, ...]) -> Sample:
    history, (text, image) = story.scenes[:step], story.scenes[step]
    shown = [("", before) for _, before in history] if context == "image" else history
    how = "full" if context == "image" else context

    def conversation() -> Conversation:
        if kind == "story":
            return continue_(history).add("assistant", *(part for scene in story.scenes[1:] for part in scene))
        choice = pick(len(TASK_PROMPTS[kind]), story.name, step, kind)
        if kind == "illustrate":
            return illustrate(shown, text, choice, context=how).add("assistant", image)
        if kind == "continue":
            return continue_(shown, choice, context=how).add("assistant", text, image)
        return narrate(shown, image, choice, context=how).add("assistant", text)

    return Sample(
        key=f"{story.name}/{step}/{kind}/{context}",
        group=story.name,
        kind=kind,
        context=context,
        tables=tables,
        load=conversation,
        words=text,
        past=() if context == "none" else tuple(before for before, _ in history),
        opening=story.scenes[0] if kind == "story" else None,
        rounds=len(story.scenes) - 1 if kind == "story" else 1,
        before=history[-1][1] if history else None,
        open=frozenset(ATTRIBUTES) - mentions(text).keys() if step == 0 else frozenset(),
    )
