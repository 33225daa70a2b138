"""MMDialog (Feng et al., 2022): dialogues between two people who send each other text and images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..messages import Conversation, Image, Part, Text
from ..prompts import CHAT_SYSTEM
from .files import SUFFIXES, ImageFiles, Records, check_usable, find_table, lines

Turn = list[list[str]]  # [["text", words] or ["image", path], ...]


class MMDialog(Records):
    """Samples from the turns before an answer to that answer; keys like "17/3", turns counted from 0."""

    def __init__(self, root: Path, history: int | None) -> None:
        super().__init__(root)
        self._history = history

    def __getitem__(self, index: int) -> Conversation:
        _, turns, target = self.record(index)
        first = 0 if self._history is None else max(0, target - self._history)
        conversation = Conversation().add("system", CHAT_SYSTEM)
        for position in range(first, target + 1):
            role = "user" if (target - position) % 2 else "assistant"
            conversation = conversation.add(role, *(self._part(*part) for part in turns[position]))
        return conversation

    def _part(self, kind: str, value: str) -> Part:
        return Text(value) if kind == "text" else Image(path=self.root / value)


def load(
    path: Path,
    split: str = "train",
    *,
    history: int | None = None,
    user_targets: bool = False,
    turn_tokens: int | None = None,
    count: Callable[[str], int] | None = None,
) -> MMDialog:
    """Read dialogues from `<split>/<split>_conversations.txt`: a JSON object on each line, images beside it by id.

    A dialogue ends before a turn that is malformed, too long or without its image.

    Args:
        path: folder of the splits, folder of one split, or the file itself.
        history: how many utterances before the answer are kept; None = all (the release keeps at most 3).
            An even number makes the assistant speak first, which some chat templates refuse.
        user_targets: also learn the turns at even positions (as the release does), roles swapped, so that
            the assistant speaks first and answers last; never the very first turn.
        turn_tokens: most tokens of a turn (the release: 50); None = no limit.
        count: returns the number of tokens of a text, at most that of its UTF-8 bytes; needed for `turn_tokens`.

    Raises:
        Mgp5Error: a missing file, an id that leaves the folder, or no usable dialogue.
    """
    if history is not None and history < 0:
        raise Mgp5Error(f"history is {history}", "expected 0 or more", usage=True)
    if turn_tokens is not None and (turn_tokens < 1 or count is None):
        hint = "expected 1 or more, and a tokenizer to count them"
        raise Mgp5Error(f"turn_tokens is {turn_tokens}", hint, usage=True)

    def too_long(text: str) -> bool:
        raw = text.encode(errors="replace")  # a token has one byte or more: short texts need no tokenizer
        return turn_tokens is not None and len(raw) > turn_tokens and count(raw.decode()) > turn_tokens

    table = find_table(path, split, "{split}/{split}_conversations.txt", "{split}_conversations.txt")
    dataset, images = MMDialog(table.parent, history), ImageFiles(table.parent)
    for where, line in lines(table):
        try:
            raw = json.loads(line)
            name, raw_turns = str(raw.get("conversation_id", where)), [item["turn"] for item in raw["conversation"]]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            dataset.problems.note("bad row", where)
            continue
        turns: list[Turn] = []
        for number, raw_turn in enumerate(raw_turns):
            turn = _turn(raw_turn, images, f"{where} turn {number}", too_long)
            if isinstance(turn, str):
                dataset.problems.note(turn, f"{where} turn {number}")
                break
            turns.append(turn)
        dataset.add(name, turns, range(1, len(turns), 1 if user_targets else 2))
    check_usable(dataset, table)
    return dataset


def _turn(raw: Any, images: ImageFiles, where: str, too_long: Callable[[str], bool]) -> Turn | str:
    """Return texts and image paths of a turn in order, or what is wrong with it."""
    turn = []
    for element in raw if isinstance(raw, list) else [None]:
        if not isinstance(element, dict) or not element.keys() & {"__TEXT__", "__MEDIA__"}:
            return "bad turn"
        if text := str(element.get("__TEXT__") or "").strip():
            turn.append(["text", text])
        if "__MEDIA__" in element:
            turn.append(["image", str(element["__MEDIA__"])])
    if not turn:
        return "bad turn"
    if too_long(" ".join(value for kind, value in turn if kind == "text")):
        return "long turn"
    for part in turn:
        if part[0] == "image":
            part[1] = next((path for suffix in SUFFIXES if (path := images.find(part[1] + suffix, where))), "")
    return "missing image" if ["image", ""] in turn else turn
