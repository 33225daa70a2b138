"""Own data: one conversation on each line, in the chat format of Hugging Face, or one story, as in a batch.

    {"messages": [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": [PART, ...]}]}
    {"story": [{"text": "A cat wakes up.", "path": "cat-1.png"}, {"text": "It goes out.", "path": "cat-2.png"}]}

A PART is {"type": "text", "text": "Here:"} or {"type": "image", "path": "cat.png"}, paths relative to the file. A story
is learnt by the tasks of VIST.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..messages import Conversation, Image, inside
from ..prompts import Context
from .files import Records, check_usable, find_table, lines
from .vist import FIRST_STEP, TASKS, Story, story_sample

_FIRST = [FIRST_STEP[task] for task in TASKS]


class JSONL(Records):
    """Samples from all messages before an answer of the assistant to that answer; keys like "train.jsonl:7/1"."""

    def __init__(self, root: Path, context: Context) -> None:
        super().__init__(root)
        self._context = context

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

    def append_story(self, where: str, raw: Any) -> None:
        """Add the samples of a story. Raises Mgp5Error for a scene without text, or without an image that is there."""
        scenes = [scene for scene in raw if _is_scene(scene)] if isinstance(raw, list) else []
        if not scenes or len(scenes) < len(raw):
            raise Mgp5Error(f"{where} has a story without scenes", 'write [{"text": ..., "path": ...}, ...]')
        try:
            missing = [scene["path"] for scene in scenes if not inside(self.root, scene["path"]).is_file()]
        except Mgp5Error as error:
            raise Mgp5Error(f"{where}: {error.message}", error.hint) from None
        if missing:
            raise Mgp5Error(f"{where} names {missing[0]}, which is not there", "check the path")
        steps = range(len(scenes))
        self.add(
            where, {"story": scenes}, [len(TASKS) * k + n for k in steps for n in range(len(TASKS)) if k >= _FIRST[n]]
        )

    def __getitem__(self, index: int) -> Conversation:
        where, content, number = self.record(index)
        if isinstance(content, list):
            return _parse(where, content[: number + 1], self.root)
        scenes = tuple((scene["text"].strip(), Image(path=self.root / scene["path"])) for scene in content["story"])
        step, task = divmod(number, len(TASKS))
        return story_sample(Story(where, scenes), step, TASKS[task], context=self._context)


def load(path: Path, split: str = "train", *, context: Context = "full") -> JSONL:
    """Read conversations and stories from `<split>.jsonl`, a file or in a folder.

    `context` is how much of a story's history its questions show. Raises Mgp5Error for a missing file, or a line
    without a conversation: own data is repaired, not skipped.
    """
    table = find_table(path, split, "{split}.jsonl")
    dataset = JSONL(table.parent, context)
    for where, line in lines(table):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Mgp5Error(f"{where} is not JSON ({error})", "write one object per line") from None
        if isinstance(row, dict) and "story" in row:
            dataset.append_story(where, row["story"])
        elif not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise Mgp5Error(f"{where} has no list of messages", 'write {"messages": [...]} on each line')
        else:
            dataset.append(where, row["messages"])
    check_usable(dataset, table)
    return dataset


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
