"""OpenING (Zhou et al., CVPR 2025): 56 tasks; a reply is a list of steps, each a text with an image or without.

`test_data.jsonl`, `images/`. Answers: `NAME_output/UID.jsonl`, which its generators write, and the same as UID.json,
which its judges read, with images UID-o-STEP.jpg.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import write_text
from ...messages import Message
from . import prompts
from .cases import Answered, Benchmark, Case, Judged, Turn, known, pictures, save, steps, unite
from .judge import Question, scored

CRITERIA = (
    *("Correctness", "Image-Text Coherency", "Multi-step Consistency", "Content Quality"),
    *("Human Preference Alignment", "Completeness", "Content Richness"),
)


class OpenING(Benchmark):
    """See the head of the file."""

    name = "opening"
    files = ("test_data.jsonl", "OpenING-benchmark/test_data.jsonl", "dev_data.jsonl")
    judge = "IntJudge/IntJudge"
    about = "seven criteria, 0 to 10, and wins of pairs; the published numbers are GPT-4o's with other prompts"

    def cases(self, row: Any, root: Path) -> Iterator[Case]:
        """Yield the case of a line."""
        asked, true = row["conversations"][0]["input"], row["conversations"][1]["output"]
        shown = pictures(root, [part["image"] for part in asked])
        said = [(part["text"].replace("<BEGIN>", ""), image) for part, image in zip(asked, shown, strict=True)]
        images = known(root, [part["image"] for part in true])
        reply = unite([(part["text"], image) for part, image in zip(true, images, strict=True)])
        key = uid(row)
        yield Case(key=key, group=key, table=row["meta_task_name"], turns=(Turn(unite(said), reply),), row=row)

    def write(self, folder: Path, name: str, answered: Answered) -> Path:
        """Write `NAME_output`."""
        out = folder / f"{name}_output"
        for case, (reply,) in answered:
            output, key = [], case.key
            for number, (text, image) in enumerate(steps(reply.content)):
                file = f"{key}-o-{number}.jpg" if image else None
                output.append({"text": text, "image": file})
                if image and file:
                    save(image, out / file)
            asked, _ = case.row["conversations"]
            row = dict(case.row) | {"total_uid": key, "conversations": [asked, {"output": output}]}
            for suffix in ("jsonl", "json"):
                out.mkdir(parents=True, exist_ok=True)
                write_text(out / f"{key}.{suffix}", json.dumps(row, indent=4))
        return out

    def read(self, folder: Path, cases: Sequence[Case]) -> dict[str, list[Message]]:
        """Read `NAME_output`, of .json or .jsonl files."""
        found = {}
        for case in cases:
            files = [file for suffix in ("json", "jsonl") if (file := folder / f"{case.key}.{suffix}").is_file()]
            if files:
                output = json.loads(files[0].read_bytes())["conversations"][1]["output"]
                images = known(folder, [part["image"] and Path(part["image"]).name for part in output])
                pairs = [(part["text"], image) for part, image in zip(output, images, strict=True)]
                found[case.key] = [Message("assistant", unite(pairs))]
        return found

    def questions(self, case: Case, replies: Sequence[Message]) -> Iterator[Question]:
        """Ask for the seven criteria at once."""
        parts = prompts.about(prompts.OPENING, case.said(()), replies[0].content, CRITERIA)
        yield Question("criteria", parts, scored(CRITERIA, 0, 10))

    def scores(self, case: Case, replies: Sequence[Message], judged: Judged) -> Iterator[tuple[str, float]]:
        """Yield the criteria and their mean, "Overall"."""
        found = dict(super().scores(case, replies, judged))
        yield from found.items()
        if found:
            yield "Overall", sum(found.values()) / len(found)


def uid(row: Mapping[str, Any]) -> str:
    """Return the name of a line, which some files leave to its three numbers: 2, 2 and 3 digits."""
    if "total_uid" in row:
        return str(row["total_uid"])
    return f"{int(row['meta_task_id']):02}{int(row['subtask_id']):02}{int(row['data_id']):03}"
