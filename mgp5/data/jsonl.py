"""Own data: one conversation on each line, in the chat format of Hugging Face.

    {"messages": [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": [PART, ...]}]}

A PART is {"type": "text", "text": "Here:"} or {"type": "image", "path": "cat.png"}, paths relative to the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..messages import Conversation
from .files import Records, check_usable, find_table, lines


class JSONL(Records):
    """Samples from all messages before an answer of the assistant to that answer; keys like "train.jsonl:7/1"."""

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

    def __getitem__(self, index: int) -> Conversation:
        where, chat, target = self.record(index)
        return _parse(where, chat[: target + 1], self.root)


def load(path: Path, split: str = "train") -> JSONL:
    """Read conversations from `<split>.jsonl`, a file or in a folder.

    Raises Mgp5Error for a missing file, or a line without a conversation: own data is repaired, not skipped.
    """
    table = find_table(path, split, "{split}.jsonl")
    dataset = JSONL(table.parent)
    for where, line in lines(table):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Mgp5Error(f"{where} is not JSON ({error})", "write one object per line") from None
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise Mgp5Error(f"{where} has no list of messages", 'write {"messages": [...]} on each line')
        dataset.append(where, row["messages"])
    check_usable(dataset, table)
    return dataset


def _parse(where: str, chat: list[dict[str, Any]], folder: Path) -> Conversation:
    try:
        return Conversation.from_chat(chat, folder)
    except Mgp5Error as error:
        raise Mgp5Error(f"{where}: {error.message}", error.hint) from None
    except (AttributeError, TypeError, ValueError) as error:
        raise Mgp5Error(f"{where}: not chat messages ({error})", "give each a role and a content") from None
