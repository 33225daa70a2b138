"""InterleavedBench (Liu et al., EMNLP 2024): `image` has the pictures of a whole conversation in order, also the true
reply's; marks in the turns of `human` and `gpt` say whose they are.

Answers: `predictions.json` in the table's own form, with the model's turns in the place of gpt's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...files import write_json
from ...messages import Image, Message, Text
from . import prompts
from .cases import MARK, Answered, Benchmark, Case, Turn, interleave, known, pictures, save
from .judge import Question, scored

TEXTS = ("text quality", "text-image coherence")  # not of tasks that ask for an image alone
ASPECTS = (*TEXTS, "perceptual quality", "image coherence", "helpfulness")
IMAGE_TASKS = ("edit", "subject")  # in the name of such a task


class InterleavedBench(Benchmark):
    """See the head of the file."""

    name = "interleavedbench"
    files = ("interleaved_bench.json", "predictions.json")
    about = "five aspects, 0 to 5; editing and subject-driven tasks have no score of text, as the benchmark says"

    def cases(self, row: Any, root: Path) -> Iterator[Case]:
        """Yield the case of an item."""
        names, turns, chat = list(row["image"]), [], row["conversations"]
        for human, gpt in zip(chat[::2], [*chat[1::2], {"value": ""}], strict=False):
            asked, true = _text(human), _text(gpt)
            count = len(MARK.findall(asked))
            shown, names = pictures(root, names[:count]), names[count:]
            last = len(turns) * 2 + 2 >= len(chat)  # what is left over is the last reply's, with a mark or without
            count = len(names) if last else len(MARK.findall(true))
            turns.append(Turn(interleave(asked, shown), interleave(true, known(root, names[:count]))))
            names = names[count:]
        key = str(row["id"])
        yield Case(key=key, group=key, table=str(row["task_name"]), turns=tuple(turns), row=row)

    def write(self, folder: Path, name: str, answered: Answered) -> Path:
        """Write `predictions.json` and the images that it names."""
        table = []
        for number, (case, replies) in enumerate(answered):
            names, chat = [], []
            for turn, reply in enumerate(replies):
                chat.append(dict(case.row["conversations"][turn * 2]))
                value = " ".join(p.text if isinstance(p, Text) else "<image>" for p in reply.content)
                chat.append({"from": "gpt", "value": value})
                for image in (*_images(case.said(replies, turn)), *reply.images):
                    names.append(f"images/{number}-{len(names)}.png")
                    save(image, folder / names[-1])
            table.append(dict(case.row) | {"id": case.key, "model": name, "image": names, "conversations": chat})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "images").mkdir(exist_ok=True)
        write_json(folder / "predictions.json", table)
        return folder

    def read(self, folder: Path, cases: Sequence[Case]) -> dict[str, list[Message]]:
        """Read a `predictions.json`."""
        rows = json.loads((folder / "predictions.json").read_bytes())
        kept = {str(row["id"]): next(self.cases(row, folder)) for row in rows}
        return {key: [Message("assistant", turn.true) for turn in case.turns] for key, case in kept.items()}

    def questions(self, case: Case, replies: Sequence[Message]) -> Iterator[Question]:
        """Ask for the aspects of each reply."""
        names = [name for name in ASPECTS if name not in TEXTS or not any(word in case.table for word in IMAGE_TASKS)]
        for turn, reply in enumerate(replies):
            parts = prompts.about(prompts.INTERLEAVEDBENCH, case.said(replies, turn), reply.content, names)
            yield Question(f"aspects {turn}", parts, scored(names, 0, 5))


def _text(message: Any) -> str:
    # A full stop behind a mark ends the sentence before it, and is no text of its own.
    return message["value"].replace("<BEGIN>", "").replace("<image>.", "<image>")


def _images(parts: Sequence[Any]) -> list[Image]:
    return [part for part in parts if isinstance(part, Image)]
