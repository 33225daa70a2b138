"""ISG-Bench (Chen et al., ICLR 2025): the structure of a reply, and questions about it and its blocks and images.

`ISG-Bench.jsonl`, `images/`. Answers: `NAME.jsonl` with the model's blocks as `output`, for its own `ISG-eval.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import write_text
from ...messages import Image, Message, Part, Text
from . import prompts
from .cases import Answered, Benchmark, Case, Judged, Turn, known, picture, save
from .judge import Question, scored, yes_or_no

SIDES = ("subject", "object")  # of a question about two blocks


class ISG(Benchmark):
    """See the head of the file."""

    name = "isg"
    files = ("ISG-Bench.jsonl", "ISG_eval/ISG-Bench.jsonl")
    about = "structure exactly as the golden answer; block and holistic 1 to 10, image 0 to 1; 1, 1, 0 where it is not"

    def cases(self, row: Any, root: Path) -> Iterator[Case]:
        """Yield the case of a line."""
        said = tuple(Text(p["content"]) if p["type"] == "text" else picture(root, p["content"]) for p in row["Query"])
        turn = Turn(said, tuple(_blocks(row["Golden"], root)))
        yield Case(key=str(row["id"]), group=str(row["id"]), table=str(row["Category"]), turns=(turn,), row=row)

    def write(self, folder: Path, name: str, answered: Answered) -> Path:
        """Write `NAME.jsonl`; paths of images are whole ones, as the script looks for others in its own folder."""
        lines = []
        for number, (case, (reply,)) in enumerate(answered):
            output = []
            for position, part in enumerate(merged(reply.content)):
                if isinstance(part, Text):
                    output.append({"type": "text", "content": part.text})
                else:
                    file = folder.resolve() / f"images/{number}-{position}.png"
                    save(part, file)
                    output.append({"type": "image", "content": str(file)})
            lines.append(json.dumps(dict(case.row) | {"id": case.key, "output": output}) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{name}.jsonl", "".join(lines))
        return folder / f"{name}.jsonl"

    def read(self, folder: Path, cases: Sequence[Case]) -> dict[str, list[Message]]:
        """Read a file of answers, whose images lie in its folder."""
        rows = [json.loads(line) for line in folder.read_text(encoding="utf-8").splitlines() if line.strip()]
        kept = {str(row["id"]): _blocks(row.get("output") or (), folder.parent) for row in rows}
        return {key: [Message("assistant", tuple(blocks))] for key, blocks in kept.items()}

    def local(self, case: Case, replies: Sequence[Message]) -> Iterator[tuple[str, float]]:
        """Yield whether the structure is that of the golden answer."""
        yield from super().local(case, replies)
        yield "structural", float(_right(case, replies[0]))

    def questions(self, case: Case, replies: Sequence[Message]) -> Iterator[Question]:
        """Ask about images and pairs of blocks where the structure is right, and about the whole in any case."""
        reply, golden = replies[0].content, case.turns[0].true
        predict = case.row.get("predict", {})
        if _right(case, replies[0]):
            named = _named("query", case.turns[0].said) | _named("gen", merged(reply))
            for asked in _image_questions(predict):
                if asked["image"] in named:
                    text = prompts.ISG_IMAGE.format(question=asked["Question"])
                    yield Question(f"image {asked['id']}", (Text(text), named[asked["image"]]), yes_or_no)
            for number, asked in enumerate(predict.get("block_qa", {}).get("questions", ())):
                pair = [named.get(asked.get(side)) for side in SIDES]
                if all(pair) and "Question" in asked:
                    text = prompts.ISG_BLOCK.format(question=asked["Question"], **{k: asked[k] for k in SIDES})
                    yield Question(f"block {number}", (Text(text), *pair), scored(("Score",), 1, 10))
        if reply:
            parts = prompts.about(prompts.ISG_HOLISTIC, case.said(()), reply, ("Score",), golden)
            yield Question("holistic", parts, scored(("Score",), 1, 10))

    def scores(self, case: Case, replies: Sequence[Message], judged: Judged) -> Iterator[tuple[str, float]]:
        """Yield block, image and holistic scores; a question counts as no where one that it builds on is no."""
        right = _right(case, replies[0])
        blocks = [next(iter(found.values())) for key, found in judged.items() if key.startswith("block ")]
        if blocks or not right:
            yield "block", sum(blocks) / len(blocks) if right else 1.0
        questions, yes = _image_questions(case.row.get("predict", {})), set()
        for asked in questions:
            found = judged.get(f"image {asked['id']}", {}).get("yes", 0.0) if right else 0.0
            if found and yes.issuperset(asked.get("Preliminary") or ()):
                yes.add(asked["id"])
        if questions:
            yield "image", len(yes) / len(questions)
        if not replies[0].content:
            yield "holistic", 1.0
        elif "holistic" in judged:
            yield "holistic", judged["holistic"]["Score"]


def merged(parts: Sequence[Part]) -> list[Part]:
    """Return parts in which no text follows a text, and none is empty."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and found and isinstance(found[-1], Text):
            found[-1] = Text(f"{found[-1].text} {part.text}")
        elif not isinstance(part, Text) or part.text.strip():
            found.append(part)
    return found


def _right(case: Case, reply: Message) -> bool:
    golden = [part["type"] == "text" for part in case.row["Golden"]]
    return [isinstance(part, Text) for part in merged(reply.content)] == golden


def _named(whose: str, parts: Sequence[Any]) -> dict[str, Part]:
    """Return parts by their names in questions: <gen_text1>, <query_img2>."""
    texts = [part for part in parts if isinstance(part, Text)]
    images = [part for part in parts if isinstance(part, Image)]
    named = {f"<{whose}_text{n}>": part for n, part in enumerate(texts, 1)}
    return named | {f"<{whose}_img{n}>": part for n, part in enumerate(images, 1)}


def _image_questions(predict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the questions about images, which stand in a list, or in an object under one key or another."""
    found = predict.get("image_qa") or []
    return found if isinstance(found, list) else next(iter(found.values()), [])


def _blocks(rows: Sequence[Mapping[str, Any]], root: Path) -> list[Part]:
    images = iter(known(root, [_inside(row["content"], root) for row in rows if row["type"] == "image"]))
    blocks = [Text(row["content"]) if row["type"] == "text" else next(images) for row in rows]
    return [block for block in blocks if block is not None]


def _inside(name: str, root: Path) -> str:
    """Return a path relative to a folder where it is a whole one that lies there."""
    path = Path(name)
    return path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else name
