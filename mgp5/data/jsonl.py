"""Own data: one conversation on each line, in the chat format of Hugging Face.

    {"messages": [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": [PART, ...]}]}

A PART is {"type": "text", "text": "Here:"} or {"type": "image", "path": "cat.png"}, paths relative to the file.
In finetuning a conversation without a system message begins with the model's own, as replies do.
Or a story, of which all three tasks of VIST are samples:

    {"story": [{"text": "A cat sits on a wall.", "path": "1.png"}, {"text": "It jumps down.", "path": "2.png"}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..messages import Conversation
from .files import Records, check_usable, find_table, lines, parse
from .vist import Story, StoryTasks


class JSONL(Records):
    """Samples from all messages before an answer of the assistant to that answer, and of stories; keys like
    "train.jsonl:7/1"."""

    def __init__(self, root: Path, tasks: StoryTasks) -> None:
        super().__init__(root)
        self._tasks = tasks

    def append(self, where: str, chat: list[dict[str, Any]]) -> None:
        """Add the samples of a conversation, which ends before a missing image. Raises Mgp5Error."""
        targets = []
        for position, message in enumerate(_parse(where, chat, self.root).messages):
            if missing := [image.path for image in message.images if image.path and not image.path.is_file()]:
                self.problems.note("missing image", f"{where} {missing[0]}")
                break
            if message.role == "assistant" and message.content and position:
                targets.append(position)
        else:
            if not targets:
                self.problems.note("no answer", where)
        self.add(where, chat, targets)

    def append_story(self, where: str, scenes: Any) -> None:
        """Add the samples of a story. Raises Mgp5Error for a scene without text, or without an image that is there."""
        story = _story(where, scenes, self.root)
        if missing := [image.path for _, image in story.scenes if image.path and not image.path.is_file()]:
            raise Mgp5Error(f"{where} names {missing[0]}, which is not there", "check the path")
        self.add(where, {"story": scenes}, range(len(self._tasks.samples(len(scenes)))))

    def __getitem__(self, index: int) -> Conversation:
        where, content, number = self.record(index)
        if isinstance(content, dict):
            story = _story(where, content["story"], self.root)
            return self._tasks.sample(story, *self._tasks.samples(len(story.scenes))[number])
        return _parse(where, content[: number + 1], self.root)


OPTIONS = StoryTasks


def load(path: Path, split: str = "train", **options: Any) -> JSONL:
    """Read conversations and stories from `<split>.jsonl`, a file or in a folder; options are those of `StoryTasks`.
    Raises Mgp5Error for a missing file, or a line without a conversation: own data is repaired, not skipped."""
    table, asked = find_table(path, split, "{split}.jsonl"), StoryTasks(**options)
    dataset = JSONL(table.parent, asked)
    for where, line in lines(table):
        try:
            row = parse(line)
        except (ValueError, RecursionError) as error:
            raise Mgp5Error(f"{where} is not JSON ({error})", "write one object per line") from None
        if isinstance(row, dict) and {"story", "messages"} <= row.keys():
            raise Mgp5Error(f"{where} has both a story and messages", "write them on two lines")
        if isinstance(row, dict) and "story" in row:
            dataset.append_story(where, row["story"])
        elif isinstance(row, dict) and isinstance(row.get("messages"), list):
            dataset.append(where, row["messages"])
        else:
            found = f"{where} has no list of messages or scenes"
            raise Mgp5Error(found, 'write {"messages": [...]} or {"story": [...]} on each line')
    check_usable(dataset, table)
    return dataset


def _story(where: str, scenes: Any, folder: Path) -> Story:
    """Return a story of {"text": ..., "path": ...}, one each scene. Raises Mgp5Error."""
    if not isinstance(scenes, list) or not scenes or not all(map(_is_scene, scenes)):
        raise Mgp5Error(f"{where} has a story without scenes", 'write [{"text": ..., "path": ...}, ...]')
    parts = [scene | {"type": "image"} for scene in scenes]
    images = _parse(where, [{"role": "user", "content": parts}], folder).images
    return Story(where, tuple((scene["text"].strip(), image) for scene, image in zip(scenes, images, strict=True)))


def _is_scene(raw: Any) -> bool:
    kinds = [raw.get(name) for name in ("text", "path")] if isinstance(raw, dict) else [None]
    return all(isinstance(value, str) and value.strip() for value in kinds)


def _parse(where: str, chat: list[dict[str, Any]], folder: Path) -> Conversation:
    try:
        return Conversation.from_chat(chat, folder)
    except Mgp5Error as error:
        raise Mgp5Error(f"{where}: {error.message}", error.hint) from None
    except (AttributeError, TypeError, ValueError) as error:
        raise Mgp5Error(f"{where}: not chat messages ({error})", "give each a role and a content") from None
