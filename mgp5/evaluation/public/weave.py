"""WEAVE (Chow et al., CVPR 2026): dialogues in which "Image #3" is the third of `images`, counted from 1; an image that
the assistant is to draw is one of them, and later turns speak of it.

`test.json`, images beside it. Answers: one folder with images by the names of the true ones, and texts as
STEM-OF-THE-FIRST-IMAGE_TURN.txt: the `--input_dir` of its own `main.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ...files import write_text
from ...messages import Image, Message, Text
from . import prompts
from .cases import Answered, Benchmark, Case, Earlier, Judged, Turn, known, picture, save
from .judge import Question, scored

NUMBER, TRUE = re.compile(r"Image #(\d+)"), re.compile(r"(GT|Image) #(\d+)")
IMAGE, TEXT = {"image": "always", "max_images": 1}, {"image": "never"}  # options of a reply of either type
METRICS = ("key_point", "visual_consistency", "image_quality")
# The weights of an overall score, with an answer in words and without (its summarize.py).
WITH = {"key_point": 0.4, "visual_consistency": 0.1, "image_quality": 0.2, "accuracy": 0.3}
WITHOUT = {"key_point": 0.5, "visual_consistency": 0.2, "image_quality": 0.3}


class WEAVE(Benchmark):
    """See the head of the file."""

    name = "weave"
    files = ("test.json", "test/test.json")
    about = "each 0 to 10, divided by 10; Overall is weighted as the benchmark's own"

    def cases(self, row: Any, root: Path) -> Iterator[Case]:
        """Yield the case of an item."""
        drawn: dict[int, int] = {}  # number of an image -> the turn that draws it
        turns, chats, shown = list[Turn](), row["chats"], set[int]()
        for number, (user, assistant) in enumerate(zip(chats[::2], chats[1::2], strict=True)):
            said = tuple(_said(user["content"], row["images"], root, drawn, shown))
            if assistant["type"] == "image":
                target = _numbers(assistant["content"])[0]
                true = tuple(filter(None, known(root, [row["images"][target - 1]])))
                drawn[target] = number
                turns.append(Turn(said, true, IMAGE))
            else:
                turns.append(Turn(said, (Text(assistant["content"]),), TEXT))
        key = str(row.get("idx", PurePosixPath(row["images"][0]).stem))
        row = dict(row) | {"root": root}
        yield Case(key=key, group=key, table=str(row["domain"]), turns=tuple(turns), row=row)

    def write(self, folder: Path, name: str, answered: Answered) -> Path:
        """Write images and texts of answers."""
        folder.mkdir(parents=True, exist_ok=True)
        for case, replies in answered:
            for turn, reply in enumerate(replies):
                path = folder / _file(case, turn)
                if path.suffix == ".txt":
                    write_text(path, reply.text)
                elif reply.images:
                    save(reply.images[0], path)
        return folder

    def read(self, folder: Path, cases: Sequence[Case]) -> dict[str, list[Message]]:
        """Read the answers of a folder; a dialogue with no file at all has none."""
        found = {}
        for case in cases:
            files = [folder / _file(case, turn) for turn in range(len(case.turns))]
            if any(file.is_file() for file in files):
                found[case.key] = [Message("assistant", tuple(_part(file))) for file in files]
        return found

    def questions(self, case: Case, replies: Sequence[Message]) -> Iterator[Question]:
        """Ask for each turn: of an image by key points with the images they name, of a text whether it is right."""
        for turn, (reply, assistant) in enumerate(zip(replies, case.row["chats"][1::2], strict=True)):
            said = [part for part in case.said(replies, turn) if isinstance(part, Text)]
            if assistant["type"] != "image":
                true = case.turns[turn].true
                parts = prompts.about(prompts.WEAVE_ACCURACY, said, reply.content, ("accuracy",), true)
                yield Question(f"accuracy {turn}", parts, scored(("accuracy",), 0, 10))
            elif reply.images:
                points = assistant.get("key_point") or {}
                listed = "\n".join(f"{number}. {point}" for number, point in enumerate(points.values(), 1))
                named = [image for name in points for image in self._image(case, replies, name)]
                text = prompts.WEAVE_IMAGE.format(points=listed)
                parts = prompts.about(text, [*said, *named], reply.images[:1], METRICS)
                yield Question(f"image {turn}", parts, scored(METRICS, 0, 10))

    def scores(self, case: Case, replies: Sequence[Message], judged: Judged) -> Iterator[tuple[str, float]]:
        """Yield the scores of each turn, 0 for an image that is missing, and their weighted mean."""
        found: dict[str, list[float]] = {}
        for turn, (reply, assistant) in enumerate(zip(replies, case.row["chats"][1::2], strict=True)):
            missing = assistant["type"] == "image" and not reply.images
            scores = dict.fromkeys(METRICS, 0.0) if missing else {}
            scores |= judged.get(f"image {turn}", {}) | judged.get(f"accuracy {turn}", {})
            for name, value in scores.items():
                found.setdefault(name, []).append(value / 10)
                yield name, value / 10
        weights = WITH if "accuracy" in found else WITHOUT
        if found.keys() >= weights.keys():
            yield "Overall", sum(weight * sum(found[n]) / len(found[n]) for n, weight in weights.items())

    def _image(self, case: Case, replies: Sequence[Message], name: str) -> list[Image]:
        """Return the image that a key point is named after: "GT #2" is the true one, "Image #2" the model's own."""
        if not (match := TRUE.search(name)):
            return []
        number, turns = int(match[2]), range(len(case.turns))
        true = known(case.row["root"], [case.row["images"][number - 1]])
        path = PurePosixPath(case.row["images"][number - 1]).name
        own = [image for turn in turns if _file(case, turn) == path for image in replies[turn].images[:1]]
        return own or [i for i in true if i] if match[1] == "Image" else [i for i in true if i]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in NUMBER.findall(text)]


def _said(text: str, names: Sequence[str], root: Path, drawn: dict[int, int], shown: set[int]) -> Iterator[Any]:
    """Yield a text with each image behind its number, where it is spoken of for the first time in a dialogue."""
    start = 0
    for match in NUMBER.finditer(text):
        if (number := int(match[1])) in shown:
            continue
        shown.add(number)
        image = picture(root, names[number - 1])
        yield Text(text[start : match.end()].strip())
        yield Earlier(drawn[number], image) if number in drawn else image
        start = match.end()
    if rest := text[start:].strip():
        yield Text(rest)


def _file(case: Case, turn: int) -> str:
    """Return the name of the file that holds the answer of a turn."""
    assistant, images = case.row["chats"][turn * 2 + 1], case.row["images"]
    if assistant["type"] == "image":
        return PurePosixPath(images[_numbers(assistant["content"])[0] - 1]).name
    return f"{PurePosixPath(images[0]).stem}_{turn}.txt"


def _part(file: Path) -> Iterator[Text | Image]:
    if file.is_file():
        yield Text(file.read_text(encoding="utf-8")) if file.suffix == ".txt" else Image(file)
