"""VIST (Huang et al., 2016): stories of images, for the finetuning stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..files import read_json
from ..messages import Conversation, Image
from ..prompts import TASK_PROMPTS, Context, Scene, Task, continue_, illustrate, narrate
from .files import SUFFIXES, ImageFiles, Problems, check_usable, find_table, pick

Find = Callable[[str, str], str | None]  # image id, and where it is named -> path of the image
TASKS: tuple[Task, ...] = tuple(TASK_PROMPTS)
CONTEXTS = ("none", "text", "full")  # the least history first
DATA_HINT = "give the folder that holds this file as data, and repair it if it is broken"


@dataclass(frozen=True)
class Story:
    """A story of the data set: its name, and its scenes in order."""

    name: str
    scenes: tuple[Scene, ...]


@dataclass(frozen=True, kw_only=True)
class StoryTasks:
    """Which questions about a story are samples, and how they are asked. Raises Mgp5Error."""

    tasks: Sequence[Task] = TASKS  # any of "illustrate" (from step 0), "continue" and "narrate" (from step 1)
    context: Context = "full"  # how much of the history the prompt shows: "full", "text" or "none"
    narrate_first: bool = False  # also narrate step 0, without any history
    narrate_from: Context = "full"  # the most that prompts of narrations show, as `ModelConfig.narrate_from`
    seed: int = 0  # chooses among the wordings of a question, per story, step and task

    def __post_init__(self) -> None:
        if not self.tasks or set(self.tasks) - set(TASKS):
            raise Mgp5Error(f"unknown tasks {tuple(self.tasks)}", f"expected some of {', '.join(TASKS)}", usage=True)
        if self.context not in CONTEXTS:
            raise Mgp5Error(f"unknown context {self.context!r}", "expected full, text or none", usage=True)

    def samples(self, length: int) -> list[tuple[int, Task]]:
        """Return step and task of each sample of a story of `length` scenes."""
        first = {"illustrate": 0, "continue": 1, "narrate": 0 if self.narrate_first else 1}
        return [(step, task) for step in range(length) for task in self.tasks if step >= first[task]]

    def sample(self, story: Story, step: int, task: Task) -> Conversation:
        """Return a question about a step of a story, and its answer."""
        history, (text, image) = story.scenes[:step], story.scenes[step]
        choice = pick(len(TASK_PROMPTS[task]), self.seed, story.name, step, task)
        if task == "illustrate":
            return illustrate(history, text, choice, context=self.context).add("assistant", image)
        if task == "continue":
            return continue_(history, choice, context=self.context).add("assistant", text, image)
        context = min(self.context, self.narrate_from, key=CONTEXTS.index)
        return narrate(history, image, choice, context=context).add("assistant", text)


class VIST:
    """Samples of the three tasks, story by story, step by step, task by task."""

    def __init__(self, stories: list[Story], problems: Problems, tasks: StoryTasks) -> None:
        self.stories, self.problems, self._tasks = stories, problems, tasks  # stories in file order
        self._samples = [
            (number, *sample) for number, story in enumerate(stories) for sample in tasks.samples(len(story.scenes))
        ]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Conversation:
        number, step, task = self._samples[index]
        return self._tasks.sample(self.stories[number], step, task)

    def key(self, index: int) -> str:
        """Return story, step (from 0) and task, as in "40470/2/narrate"."""
        number, step, task = self._samples[index]
        return f"{self.stories[number].name}/{step}/{task}"


OPTIONS = StoryTasks


def load(path: Path, split: str = "train", **options: Any) -> VIST:
    """Read stories from `<split>_cleaned.json` and `<split>_image_mapping.json`, or from the official files.

    The first is {story: [{"caption", "image_id", "sequence_index"}, ...]}, the second {image_id: image path}. The
    official `<split>.story-in-sequence.json`, also in `sis/`, goes with images `<flickr id>.jpg` (or another suffix)
    in `images/`, `<split>/`, `images/<split>/` or beside the file.

    `path` is the folder of the files, or the file of the stories; image paths are relative to the folder. A story ends
    before its first missing image. Options are those of `StoryTasks`. Raises Mgp5Error for a missing or malformed file,
    a path that leaves the folder, or no usable story.
    """
    asked = StoryTasks(**options)
    official = "{split}.story-in-sequence.json"
    table = find_table(path, split, "{split}_cleaned.json", official, f"sis/{official}")
    images = ImageFiles(path if path.is_dir() else table.parent)
    problems, stories, raw_stories = Problems(), [], read_json(table, DATA_HINT)
    if isinstance(raw_stories.get("annotations"), list):
        raw_stories, names = _official(raw_stories["annotations"], problems, table), None
        own = table.name.partition(".")[0]
        folders = ("images", own, f"images/{own}", table.parent.relative_to(images.root).as_posix())
        patterns = [f"{folder}/{{}}{suffix}" for folder in folders for suffix in SUFFIXES]
    else:
        names = read_json(table.with_name(table.name.replace("cleaned", "image_mapping")), DATA_HINT)
        patterns = ["{}"]
    find = partial(_find, images, names, patterns)
    for name, raw in raw_stories.items():
        if scenes := _scenes(raw, find, images.root, problems, f"{table.name} story {name}"):
            stories.append(Story(name, scenes))
    dataset = VIST(stories, problems, asked)
    check_usable(dataset, table)
    return dataset


def _find(
    images: ImageFiles, names: dict[str, Any] | None, patterns: list[str], image_id: str, where: str
) -> str | None:
    """Return the first path that exists for an image: of its name, or of its id where no list has the names."""
    name = image_id if names is None else names.get(image_id)
    paths = (images.find(pattern.format(name), where) for pattern in patterns if isinstance(name, str))
    return next(filter(None, paths), None)


def _official(annotations: list[Any], problems: Problems, table: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the steps of each story in the form of the cleaned files, with the words that people wrote if given."""
    stories: dict[str, list[dict[str, Any]]] = {}
    for number, annotation in enumerate(annotations):
        for step in annotation if isinstance(annotation, list) else [annotation]:
            try:
                text, order = step.get("original_text") or step["text"], step["worker_arranged_photo_order"]
                scene = {"caption": text, "image_id": step["photo_flickr_id"], "sequence_index": order}
                stories.setdefault(str(step["story_id"]), []).append(scene)
            except (KeyError, AttributeError, TypeError):
                problems.note("bad annotation", f"{table.name} annotation {number}")
    return stories


def _scenes(raw: Any, find: Find, root: Path, problems: Problems, where: str) -> tuple[Scene, ...]:
    """Return the scenes of a story before the first one without its image; none when the story is malformed."""
    try:
        raw = sorted(raw, key=lambda step: int(step["sequence_index"]))
        once = {int(step["sequence_index"]): step for step in reversed(raw)}  # the first of each is kept
        if len(once) < len(raw):
            problems.note("scene listed twice", where)
            raw = [once[number] for number in sorted(once)]
        steps = [(step["caption"].strip(), str(step["image_id"])) for step in raw]
    except (TypeError, KeyError, ValueError, AttributeError):
        steps = []
    if not steps or not all(text for text, _ in steps):
        problems.note("bad story", where)
        return ()
    scenes: list[Scene] = []
    for text, image_id in steps:
        path = find(image_id, where)
        if not path:
            problems.note("missing image", f"{where} {image_id}")
            break
        scenes.append((text, Image(path=root / path)))
    return tuple(scenes)
