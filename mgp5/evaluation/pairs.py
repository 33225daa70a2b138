"""The papers' human evaluation: a page that shows two systems' replies to a question side by side, and its key.

compare.html  one file for raters; names no system, and votes leave it as JSON lines
key.json      which system is A and which is B: kept from the raters, needed to count their votes
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..files import digest, read_json, write_json, write_text
from ..messages import Conversation, Image, Message, Text
from ..training.checkpoints import SETTINGS
from ..views.html import STYLE
from . import tasks
from .run import read_replies
from .tasks import Sample
from .votes import CRITERIA

LANGUAGE, PICTURE = ("language",), ("image", "coherence")  # of replies that are text or a picture alone
ASKED_OF = {"narrate": LANGUAGE, "illustrate": PICTURE, "caption": PICTURE}
MULTIMODAL = ("continue", "story", "dialogue")
TEMPLATE = Path(__file__).with_name("compare.html")
KEY, PAGE = "key.json", "compare.html"
SIDES = {"history": 384, "reply": 1024}  # pixels of a picture
Pictures = dict[str, tuple[int, tuple[int, int]]]  # data: URIs, their numbers and sizes


@dataclass(frozen=True)
class Replied:
    """A system of an evaluation, as `DIR/SYSTEM`, or `DIR` for the model itself."""

    name: str

    @cached_property
    def folder(self) -> Path:
        """Of the evaluation. Raises Mgp5Error."""
        path = Path(self.name)
        for folder in (path, path.parent):
            if (folder / SETTINGS).is_file() and (folder / "replies").is_dir():
                return folder
        raise Mgp5Error(f"no evaluation at {self.name}", "give what mgp5 eval has written: DIR/SYSTEM", usage=True)

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Of replies, by the keys of questions. Raises Mgp5Error."""
        system = "model" if self.folder == Path(self.name) else Path(self.name).name
        if found := read_replies(self.folder, system):
            return found
        known = sorted({file.stem.rpartition("-")[0] for file in self.folder.glob("replies/*.jsonl")})
        raise Mgp5Error(f"{self.folder} has no replies by {system!r}", f"it has {', '.join(known)}", usage=True)

    @cached_property
    def samples(self) -> dict[str, Sample]:
        """What was asked. Raises Mgp5Error."""
        given = read_json(self.folder / SETTINGS)
        data = self.folder / "data" if given["data"] == "written here" else Path(given["data"])
        asked = {name: given[name] for name in ("split", "tasks", "contexts", "limit")}
        narrated = (key.rpartition("/")[2] for key in self.rows if key.rpartition("/")[0].endswith("/narrate"))
        found = tasks.load(given["format"], data, narrate_from=next(narrated, "full"), **asked)
        return {sample.key: sample for sample in found.samples}

    def reply(self, key: str) -> tuple[Text | Image, ...]:
        """To a question."""
        return Conversation.from_chat([self.rows[key]["reply"]], self.folder).messages[0].content


def compare(
    first: Replied, second: Replied, out: Path, *, kinds: Sequence[str] = (), limit: int = 50, seed: int = 0
) -> dict[str, Any]:
    """Write a page and its key into a folder; what the key holds.

    Args:
        kinds: of questions, as `tasks.Kind`; empty takes those whose replies hold text and pictures, where there are.
        limit: questions, chosen by `seed`, which also decides who is A and, with the rater's name, who stands left.

    Raises Mgp5Error when the two cannot be compared, or `out` holds a page already.
    """
    if existing := [out / name for name in (PAGE, KEY) if (out / name).exists()]:
        raise Mgp5Error(f"{existing[0]} exists", "choose another --out", usage=True)
    samples, left_out = _common(first, second, kinds)
    draw = random.Random(seed)
    chosen = draw.sample(samples, min(limit, len(samples)))
    systems = {"A": first, "B": second}
    if draw.random() < 0.5:
        systems = {"B": first, "A": second}
    pictures: Pictures = {}
    questions = [_question(sample, systems, pictures) for sample in chosen]
    shown = [[uri, *size] for uri, (_, size) in pictures.items()]
    page = {"seed": seed, "criteria": CRITERIA, "questions": questions, "pictures": shown}
    page["page"] = digest(page)
    key = {"page": page["page"], "seed": seed, "systems": {label: system.name for label, system in systems.items()}}
    key |= {"of": len(samples), "left_out": left_out}
    key["questions"] = {one["question"]: {name: one[name] for name in ("group", "criteria")} for one in questions}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / KEY, key)
    except OSError as error:
        raise Mgp5Error(f"--out {out} cannot be written ({error.strerror})", "choose another --out") from None
    write_text(out / PAGE, _html(page))
    return key


def _common(first: Replied, second: Replied, kinds: Sequence[str]) -> tuple[list[Sample], dict[str, int]]:
    """Questions that both have answered, and how many one of them has failed at. Raises Mgp5Error."""
    if (first.folder.resolve(), first.rows) == (second.folder.resolve(), second.rows):
        raise Mgp5Error(f"{first.name} and {second.name} are one system", "give two", usage=True)
    asked = [key for key in first.samples if key in first.rows and key in second.rows]
    answered = Counter(first.samples[key].kind for key in asked)
    if unknown := [kind for kind in kinds if kind not in answered]:
        hint = f"they have {', '.join(answered) or 'nothing in common'}"
        raise Mgp5Error(f"not both have replied to {', '.join(unknown)}", hint, usage=True)
    wanted = kinds or [kind for kind in MULTIMODAL if kind in answered] or answered
    failed: Counter[str] = Counter()
    found = []
    for key in (key for key in asked if first.samples[key].kind in wanted):
        _same_question(key, first, second)
        errors = [system.name for system in (first, second) if "error" in system.rows[key]]
        failed.update(errors)
        found += [] if errors else [first.samples[key]]
    if not found:
        hint = "they must be of evaluations of the same data"
        raise Mgp5Error(f"{first.name} and {second.name} have replied to no question in common", hint, usage=True)
    return found, dict(failed)


def _same_question(key: str, first: Replied, second: Replied) -> None:
    if first.folder.resolve() == second.folder.resolve():
        return
    asked = [
        _contents(one.samples[key].load().messages[:-1]) if key in one.samples else None for one in (first, second)
    ]
    if asked[0] != asked[1]:
        hint = "compare evaluations of the same data"
        raise Mgp5Error(f"question {key} of {first.name} is another in {second.name}", hint, usage=True)


def _contents(messages: Sequence[Message]) -> list[str]:
    return [part.text if isinstance(part, Text) else part.digest() for one in messages for part in one.content]


def _question(sample: Sample, systems: Mapping[str, Replied], pictures: Pictures) -> dict[str, Any]:
    """A question as the page has it: parts are texts, or numbers of pictures."""

    def parts(content: Sequence[Text | Image], use: str) -> list[str | int]:
        return [part.text if isinstance(part, Text) else _number(part, SIDES[use], pictures) for part in content]

    asked = [message for message in sample.load().messages[:-1] if message.role != "system"]
    history = [[message.role, parts(message.content, "history")] for message in asked]
    found = {"question": sample.key, "group": sample.group, "criteria": ASKED_OF.get(sample.kind, tuple(CRITERIA))}
    replies = {label: parts(systems[label].reply(sample.key), "reply") for label in sorted(systems)}
    return found | {"history": history, "replies": replies}


def _number(image: Image, side: int, pictures: Pictures) -> int:
    """Of a picture among the page's, as a JPEG of its own: the file might tell who drew it."""
    picture, buffer = image.load(), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return pictures.setdefault(uri, (len(pictures), picture.size))[0]


def _html(page: dict[str, Any]) -> str:
    """The page; of all scripts a browser runs only ours, whatever a reply says."""
    text = TEMPLATE.read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    data = json.dumps(page).replace("<", "\\u003c")  # a reply may say </script>
    for name, value in (("SCRIPT-HASH", f"sha256-{digest}"), ("HOUSE-STYLE", STYLE), ("PAGE-DATA", data)):
        text = text.replace(f"@{name}@", value, 1)
    return text
