"""Conversations in the JSON that ShareGPT, LLaMA-Factory, LLaVA and VARGPT's data have (VARGPT, figure 15).

    [{"messages": [{"role": "user", "content": "Draw a fox"}, {"role": "assistant", "content": "Here: <image_gen>"}],
      "images": ["fox.jpg"]}, ...]

<image> and <image_gen> stand for the images in order, whose paths are relative to the file. LLaVA writes
{"conversations": [{"from": "human", "value": ...}], "image": "fox.jpg"}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from .files import check_usable, find_table, lines, parse
from .jsonl import JSONL
from .vist import StoryTasks

PLACE = re.compile("<image>|<image_gen>")
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}


def load(path: Path, split: str = "train") -> JSONL:
    """Read conversations from `<split>.json`, a list of objects or one on each line; each answer is a sample.

    Rows that are no conversations, have more or fewer images than places for them, or an image that is not there are
    skipped and counted. Raises Mgp5Error for a missing file, one that is not JSON, or one without a usable sample.
    """
    table = find_table(path, split, "{split}.json")
    dataset = JSONL(table.parent, StoryTasks())
    for where, row in _rows(table):
        try:
            chat = _chat(row)
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            dataset.problems.note("bad row" if not isinstance(error, ValueError) else str(error), where)
            continue
        dataset.append(where, chat)
    check_usable(dataset, table)
    return dataset


def _rows(table: Path) -> Iterable[tuple[str, Any]]:
    """Yield the rows of a file, each behind "name:number"."""
    numbered = list(lines(table))
    try:
        if numbered and not numbered[0][1].lstrip().startswith(b"["):
            return [(where, parse(line)) for where, line in numbered]
        rows = parse(b"\n".join(line for _, line in numbered))
    except (ValueError, RecursionError) as error:
        raise Mgp5Error(f"{table} is not JSON ({error})", "write a list of objects, or one on each line") from None
    return [(f"{table.name}:{number}", row) for number, row in enumerate(rows, 1)]


def _chat(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the chat messages of a row. Raises an error of Python's where it is none, and ValueError that says so
    where its images are not as many as its places for them."""
    turns = row["messages"] if "messages" in row else row["conversations"]
    images = row.get("images", [row["image"]] if "image" in row else [])
    texts = [turn["content"] if "content" in turn else turn["value"] for turn in turns]
    if sum(len(PLACE.findall(text)) for text in texts) != len(images):
        raise ValueError("more or fewer images than places for them")
    paths, chat = iter(images), []
    for turn, text in zip(turns, texts, strict=True):
        parts: list[dict[str, Any]] = []
        for number, words in enumerate(PLACE.split(text)):
            parts += [{"type": "image", "path": str(next(paths))}] if number else []
            parts += [{"type": "text", "text": words.strip()}] if words.strip() else []
        role = turn["role"] if "role" in turn else turn["from"]
        chat.append({"role": ROLES[role], "content": parts})
    return chat
