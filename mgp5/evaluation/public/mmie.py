"""MMIE (Xia et al., ICLR 2025): situations, projects and reasoning in steps, told apart by SA, PBL or MSR in the id.

A table of {id, question, answer, model, gt_answer}, parts being {text, image}, either of them null; an answer may be a
bare text. Answers: `data.json` of the same form, images beside it, which is the INPUT_DIR of its own `main.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...files import write_json
from ...messages import Image, Message, Text
from . import prompts
from .cases import Answered, Benchmark, Case, Turn, known, pictures, save, steps, unite
from .judge import Question, scored

KINDS = ("SA", "PBL", "MSR")
SEEN = 3  # images that MMIE's own judge sees: of the question, then of the answer


class MMIE(Benchmark):
    """See the head of the file."""

    name = "mmie"
    files = ("data.json", "mmie.json", "*.json")
    judge = "MMIE/MMIE-Score"
    about = "one score, 0 to 6; the judge sees three images, as MMIE's own"

    def cases(self, row: Any, root: Path) -> Iterator[Case]:
        """Yield the case of an item."""
        shown = pictures(root, [part["image"] for part in row["question"]])
        said = unite([(part["text"], image) for part, image in zip(row["question"], shown, strict=True)])
        true = unite(_pairs(root, row["gt_answer"]))
        kind = next((kind for kind in KINDS if kind in str(row["id"])), "other")
        yield Case(key=str(row["id"]), group=str(row["id"]), table=kind, turns=(Turn(said, true),), row=row)

    def write(self, folder: Path, name: str, answered: Answered) -> Path:
        """Write `data.json`, and the images of questions and answers that it names."""
        table = []
        for number, (case, (reply,)) in enumerate(answered):
            question = [dict(part) for part in case.row["question"]]
            shown = iter(part for part in case.turns[0].said if isinstance(part, Image))
            for position, part in enumerate(part for part in question if part["image"]):
                part["image"] = f"images/{number}-q-{position}.png"
                save(next(shown), folder / part["image"])
            answer = []
            for position, (text, image) in enumerate(steps(reply.content)):
                file = f"images/{number}-a-{position}.png" if image else None
                answer.append({"text": text or None, "image": file})
                if image and file:
                    save(image, folder / file)
            answer = answer or [{"text": "", "image": None}]  # its script reads the first
            table.append(dict(case.row) | {"id": case.key, "question": question, "answer": answer, "model": name})
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "data.json", table)
        return folder

    def read(self, folder: Path, cases: Sequence[Case]) -> dict[str, list[Message]]:
        """Read the answers of a `data.json`."""
        rows = {str(row["id"]): row for row in json.loads((folder / "data.json").read_bytes())}
        kept = {case.key: rows[case.key] for case in cases if case.key in rows}
        return {key: [Message("assistant", unite(_pairs(folder, row["answer"])))] for key, row in kept.items()}

    def questions(self, case: Case, replies: Sequence[Message]) -> Iterator[Question]:
        """Ask for one score; reasoning in steps has the true answer beside."""
        said = case.said(())
        left = SEEN - sum(isinstance(part, Image) for part in said)
        reply = []
        for part in replies[0].content:
            left -= isinstance(part, Image)
            reply += [part] if isinstance(part, Text) or left >= 0 else []
        true = [part for part in case.turns[0].true if isinstance(part, Text)] if case.table == "MSR" else ()
        yield Question("score", prompts.about(prompts.MMIE, said, reply, ("Score",), true), scored(("Score",), 0, 6))


def _pairs(root: Path, parts: Any) -> list[tuple[str | None, Image | None]]:
    parts = [{"text": parts, "image": None}] if isinstance(parts, str) else parts
    images = known(root, [part["image"] for part in parts])
    return [(part["text"], image) for part, image in zip(parts, images, strict=True)]
