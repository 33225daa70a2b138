"""What a public benchmark is read into: cases, each with what a user says in one turn or more, and the true replies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...data.files import Problems, lines
from ...errors import Mgp5Error
from ...files import read_text, replacing
from ...messages import Conversation, Image, Message, Part, Text, inside
from ..encoders import Encoders
from ..replies import Number
from .judge import Question

MARK = re.compile(r"<image>|<IMAGE>")  # an image in a text
FOLDERS = ("", "images", "zipped_images")  # that benchmarks unpack their images into, beside the table
Judged = Mapping[str, Mapping[str, float]]  # key of a question -> scores by name
Numbers = tuple[dict[str, Number], dict[str, str]]  # metrics by name, and why others have no number


class Earlier(NamedTuple):
    """The image of the reply to an earlier turn; `instead` where that reply has none."""

    turn: int
    instead: Image


class Turn(NamedTuple):
    """What the user says, the true reply, and options that the reply must have."""

    said: tuple[Part | Earlier, ...]
    true: tuple[Part, ...] = ()
    options: Mapping[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A question of a benchmark, of several turns where it is a dialogue.

    Attributes:
        key: its name; seeds and files of its reply are made of it.
        group: cases of one group are not independent.
        table: of the report, beside that of all cases.
        row: the benchmark's own line.
    """

    key: str
    group: str
    table: str
    turns: tuple[Turn, ...]
    row: Mapping[str, Any] = field(repr=False)

    def asked(self, replies: Sequence[Message]) -> Conversation:
        """Return the conversation that ends with the turn after these replies."""
        conversation = Conversation()
        for turn, reply in zip(self.turns, (*replies, None), strict=False):
            said = (_resolved(part, replies) if isinstance(part, Earlier) else part for part in turn.said)
            conversation = conversation.add("user", *said)
            if reply is not None:
                conversation = conversation.add("assistant", *reply.content)
        return conversation

    def said(self, replies: Sequence[Message], turn: int = 0) -> tuple[Part, ...]:
        """Return what the user said in a turn."""
        return self.asked(replies[:turn]).messages[-1].content


Answered = Sequence[tuple[Case, Sequence[Message]]]  # a reply for each turn


def _resolved(part: Earlier, replies: Sequence[Message]) -> Image:
    return next(iter(replies[part.turn].images), part.instead)


class Benchmark:
    """A public benchmark: reads its files, writes and reads answers in its own layout, and says how they are scored.

    Attributes:
        files: patterns of its table in a folder, the first that is there counts.
        judge: hub id of its own judge, "" where it has none that is published.
        about: what is scored, for the report.
    """

    name = ""
    files: tuple[str, ...] = ()
    judge = ""
    about = ""

    def cases(self, row: Any, root: Path) -> Iterator[Case]:
        """Yield the cases of a line. Raises Mgp5Error if one cannot be asked."""
        raise NotImplementedError

    def write(self, folder: Path, name: str, answered: Answered) -> Path:
        """Write the answers of a model as the benchmark's own scripts read them; return where they are."""
        raise NotImplementedError

    def read(self, folder: Path, cases: Sequence[Case]) -> dict[str, list[Message]]:
        """Return answers that `write`, or the benchmark's own code, has written, by the keys of cases."""
        raise NotImplementedError

    def local(self, case: Case, replies: Sequence[Message]) -> Iterator[tuple[str, float]]:
        """Yield scores that need no judge."""
        due = sum(isinstance(part, Image) for turn in case.turns for part in turn.true)
        if due:
            yield "pictures of those due", min(sum(len(reply.images) for reply in replies), due) / due

    def measure(self, answered: Answered, encoders: Encoders, generator: torch.Generator) -> Numbers:
        """Return numbers of a whole table that need no judge, and why others are left out."""
        return {}, {}

    def questions(self, case: Case, replies: Sequence[Message]) -> Iterator[Question]:
        """Yield what a judge is asked about the replies."""
        return iter(())

    def scores(self, case: Case, replies: Sequence[Message], judged: Judged) -> Iterator[tuple[str, float]]:
        """Yield scores of what a judge has said, by the keys of questions; what could not be read is not there."""
        for scores in judged.values():
            yield from scores.items()


def load(benchmark: Benchmark, path: Path, limit: int | None = None) -> tuple[list[Case], Problems]:
    """Read the cases of a benchmark's file or folder, of the first `limit` lines. Raises Mgp5Error if there are none.
    A line that cannot be asked is counted with its reason, and left out; a name that two have is made unique."""
    cases: dict[str, Case] = {}
    problems = Problems()
    for number, (where, row, root) in enumerate(rows(path, benchmark.files)):
        if limit is not None and number >= limit:
            break
        try:
            for case in benchmark.cases(row, root):
                inside(Path(), case.key)  # files of answers are called so
                key, count = case.key, 1
                while key in cases:
                    key, count = f"{case.key}#{count + 1}", count + 1
                cases[key] = Case(**vars(case) | {"key": key})
        except Mgp5Error as error:
            problems.note("cannot be asked", f"{where}: {error}")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # whatever stands where a field should
            problems.note("is not of this benchmark's form", where)
    if not cases:
        raise Mgp5Error(f"{path} has no line of {benchmark.name} that can be asked", str(problems))
    return list(cases.values()), problems


def rows(path: Path, patterns: Sequence[str]) -> Iterator[tuple[str, Any, Path]]:
    """Yield the lines of a JSONL file, the items of a JSON list or of a .pth, or a JSON object, with where it is, and
    the folder that its paths are relative to. Raises Mgp5Error if there is no such file, or it cannot be read."""
    files = [path] if path.is_file() else next(filter(None, (sorted(path.glob(name)) for name in patterns)), [])
    if not files:
        raise Mgp5Error(f"{path} holds no {' or '.join(patterns)}", "give --data the benchmark's folder, or its file")
    for file in files:
        for number, row in enumerate(_items(file), 1):
            yield f"{file.name}:{number}", row, file.parent


def _items(file: Path) -> Iterator[Any]:
    if file.suffix == ".jsonl":
        for _, line in lines(file):
            try:
                yield json.loads(line)
            except ValueError:
                yield None  # is counted as a line of another form
        return
    if file.suffix == ".pth":
        value = torch.load(file, weights_only=True)
    else:
        try:
            value = json.loads(read_text(file))
        except ValueError as error:
            raise Mgp5Error(f"{file} is not JSON ({error})", "check the file") from None
    yield from value if isinstance(value, list) else [value]


def picture(root: Path, name: str) -> Image:
    """Return an image by its path relative to the table. Raises Mgp5Error if it is not there, or leaves the folder."""
    for folder in FOLDERS:
        if (path := inside(root, f"{folder}/{name}" if folder else name)).is_file():
            return Image(path)
    raise Mgp5Error(f"no image {name}", "unpack the benchmark's images beside its table")


def pictures(root: Path, names: Sequence[str | None]) -> list[Image | None]:
    """Return the images of a question, None for none; see `picture`."""
    return [picture(root, name) if name else None for name in names]


def known(root: Path, names: Sequence[str | None]) -> list[Image | None]:
    """Return images of a true reply; None for one that is not there, which no model is asked about."""
    found: list[Image | None] = []
    for name in names:
        try:
            found.append(picture(root, name) if name else None)
        except Mgp5Error:
            found.append(None)
    return found


def interleave(text: str, images: Sequence[Image | None]) -> tuple[Part, ...]:
    """Put images where the text has its marks, and those left over behind it; a mark without an image is dropped."""
    left, parts = iter(images), list[Part | None]()
    for number, piece in enumerate(MARK.split(text)):
        parts += [next(left, None)] if number else []
        parts += [Text(piece.strip())] if piece.strip() else []
    return tuple(part for part in (*parts, *left) if part is not None)


def steps(parts: Sequence[Part]) -> list[tuple[str, Image | None]]:
    """Return parts as pairs of a text and the image behind it, as most benchmarks keep an answer."""
    pairs: list[tuple[str, Image | None]] = []
    for part in parts:
        if isinstance(part, Text):
            pairs.append((part.text, None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = pairs[-1][0], part
        else:
            pairs.append(("", part))
    return pairs


def unite(pairs: Sequence[tuple[str | None, Image | None]]) -> tuple[Part, ...]:
    """Return the parts that `steps` made pairs of; marks in a text are those of the image behind it."""
    return tuple(part for text, image in pairs for part in interleave(text or "", [image]))


def save(image: Image, path: Path) -> None:
    """Write an image as PNG or JPEG, by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    with replacing(path) as part:
        image.load().save(part, format=kind, quality=95)
