"""Own data: one conversation on each line, in the chat format of Hugging Face.

    {"messages": [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": [PART, ...]}]}

A PART is {"type": "text", "text": "Here:"} or {"type": "image", "path": "cat.png"}, paths relative to the file.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..messages import Conversation
from .files import Problems, Rows, check_usable, find_table, lines


class JSONL:
    """Samples from all messages before an answer of the assistant to that answer.

    Attributes:
        problems: skipped at load: "missing image" (the conversation ends before it), "no answer".
    """

    def __init__(self, table: Path) -> None:
        self.table = table
        self.problems = Problems()
        self._chats = Rows()  # each the JSON of [where, messages]
        self._chat_of, self._message_of = array("I"), array("I")  # per sample

    def append(self, where: str, chat: list[dict[str, Any]]) -> None:
        """Add the samples of a conversation. Raises Mgp5Error that names its line when it is not understood."""
        messages = _parse(where, chat, self.table.parent).messages
        answers = 0
        for position, message in enumerate(messages):
            if missing := [image.path for image in message.images if image.path and not image.path.is_file()]:
                self.problems.note("missing image", f"{where} {missing[0]}")
                break
            if message.role == "assistant" and message.content and position:
                self._chat_of.append(len(self._chats))
                self._message_of.append(position)
                answers += 1
        else:
            if not answers:
                self.problems.note("no answer", where)
        self._chats.add(json.dumps([where, chat], separators=(",", ":")).encode())

    def __len__(self) -> int:
        return len(self._message_of)

    def __getitem__(self, index: int) -> Conversation:
        """Return a sample. Raises IndexError."""
        target = self._message_of[index]
        where, chat = json.loads(self._chats[self._chat_of[index]])
        return _parse(where, chat[: target + 1], self.table.parent)

    def key(self, index: int) -> str:
        """Return file, line and message (from 0), as in "train.jsonl:7/1"."""
        where, _ = json.loads(self._chats[self._chat_of[index]])
        return f"{where}/{self._message_of[index]}"


def load(path: Path, split: str = "train") -> JSONL:
    """Read conversations from `<split>.jsonl`.

    Args:
        path: the file, or its folder.
        split: "train", "val" or "test"; the last two stand in for each other.

    Raises:
        Mgp5Error: a missing file, or a line that holds no conversation: own data is repaired, not skipped.
    """
    table = find_table(path, split, "{split}.jsonl")
    dataset = JSONL(table)
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
