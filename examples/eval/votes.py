"""Let people judge two systems of `mgp5 eval` side by side, as in the papers' human evaluation (MiniGPT-5, table 3).

    python votes.py page out/eval/model out/eval/two-stage --out out/judge
    python votes.py count votes-*.jsonl --key out/judge/key.json

`page` writes compare.html, one file for raters that names no system and from which votes leave as JSON lines, and
key.json, which says who is A and who is B. `count` prints win rates by criterion, and how far raters agree.
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
from datetime import datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any

import click

from mgp5.errors import Mgp5Error
from mgp5.evaluation import tasks
from mgp5.evaluation.run import read_replies
from mgp5.evaluation.tasks import Sample
from mgp5.files import digest, read_json, write_json, write_text
from mgp5.messages import Conversation, Image, Text
from mgp5.training.checkpoints import SETTINGS
from mgp5.views.html import STYLE

CRITERIA = {"language": "Language continuity", "image": "Image quality", "coherence": "Multimodal coherence"}
CRITERIA_OF = dict.fromkeys(("illustrate", "caption"), ("image", "coherence")) | {"narrate": ("language",)}
MULTIMODAL = ("continue", "story", "dialogue")
TEMPLATE = Path(__file__).with_name("compare.html")
SIDES = {"history": 384, "reply": 1024}  # pixels of an image
Content = Sequence[Text | Image]
Images = dict[str, tuple[int, tuple[int, int]]]  # data: URIs, their numbers and sizes


@dataclass(frozen=True)
class Replied:
    """What a system of an evaluation has replied: its name, its folder, rows and samples by key."""

    name: str
    folder: Path
    rows: dict[str, dict[str, Any]]
    samples: dict[str, Sample]

    @classmethod
    def read(cls, name: str) -> Replied:
        """Read DIR/SYSTEM, or DIR for the model itself. Raises Mgp5Error."""
        path = Path(name)
        folder = path if (path / SETTINGS).is_file() else path.parent
        if not (folder / "replies").is_dir() or not (folder / SETTINGS).is_file():
            raise Mgp5Error(f"no evaluation at {name}", "give what mgp5 eval has written: DIR/SYSTEM")
        rows = read_replies(folder, "model" if folder == path else path.name)
        if not rows:
            raise Mgp5Error(f"{folder} has no replies by {path.name!r}", "give DIR/SYSTEM")
        settings = read_json(folder / SETTINGS)
        data = folder / "data" if settings["data"] == "written here" else Path(settings["data"])
        asked = {name: settings[name] for name in ("split", "tasks", "contexts", "limit")}
        narrated = (key.rpartition("/")[2] for key in rows if key.rpartition("/")[0].endswith("/narrate"))
        found = tasks.load(settings["format"], data, narrate_from=next(narrated, "full"), **asked)
        return cls(name, folder, rows, {sample.key: sample for sample in found.samples})

    def reply(self, key: str) -> Content:
        """Return the parts of a reply."""
        return Conversation.from_chat([self.rows[key]["reply"]], self.folder).messages[0].content

    def asked(self, key: str) -> list[str] | None:
        """Return what was asked, to compare; None for no such question."""
        messages = self.samples[key].load().messages[:-1] if key in self.samples else None
        return messages and [p.text if isinstance(p, Text) else p.digest() for one in messages for p in one.content]


def make_page(
    first: Replied, second: Replied, out: Path, *, kinds: Sequence[str] = (), limit: int = 50, seed: int = 0
) -> dict[str, Any]:
    """Write a page and its key into a folder, and return the key. Raises Mgp5Error.

    Args:
        kinds: of questions; empty takes those whose replies hold text and images, where there are.
        limit: of questions, chosen by `seed`, which also decides who is A and, with the rater's name, who stands left.
    """
    if (out / "key.json").exists():
        raise Mgp5Error(f"{out / 'key.json'} exists", "choose another --out")
    samples, left_out = common(first, second, kinds)
    draw = random.Random(seed)
    chosen = draw.sample(samples, min(limit, len(samples)))
    systems = dict(zip("AB" if draw.random() >= 0.5 else "BA", (first, second), strict=True))
    images: Images = {}
    questions = [question(sample, systems, images) for sample in chosen]
    shown = [[uri, *size] for uri, (_, size) in images.items()]
    page = {"seed": seed, "criteria": CRITERIA, "questions": questions, "pictures": shown}
    page["page"] = digest(page)
    key = {"page": page["page"], "seed": seed, "systems": {label: system.name for label, system in systems.items()}}
    key |= {"of": len(samples), "left_out": left_out}
    key["questions"] = {one["question"]: {name: one[name] for name in ("group", "criteria")} for one in questions}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "key.json", key)
    write_text(out / "compare.html", html(page))
    return key


def common(first: Replied, second: Replied, kinds: Sequence[str]) -> tuple[list[Sample], dict[str, int]]:
    """Return the questions that both have answered, and how many each has failed at. Raises Mgp5Error."""
    both = [key for key in first.samples if key in first.rows and key in second.rows]
    answered = {first.samples[key].kind for key in both}
    wanted = kinds or [kind for kind in MULTIMODAL if kind in answered] or answered
    found, failed = [], Counter()
    for key in (key for key in both if first.samples[key].kind in wanted):
        if first.folder != second.folder and first.asked(key) != second.asked(key):
            raise Mgp5Error(f"question {key} of {first.name} is another in {second.name}", "compare on the same data")
        errors = [system.name for system in (first, second) if "error" in system.rows[key]]
        failed.update(errors)
        found += [] if errors else [first.samples[key]]
    if not found or (first.folder, first.rows) == (second.folder, second.rows):
        raise Mgp5Error(f"{first.name} and {second.name} have nothing to compare", "give two systems on the same data")
    return found, dict(failed)


def question(sample: Sample, systems: Mapping[str, Replied], images: Images) -> dict[str, Any]:
    """Return a question as the page has it: parts are texts, or numbers of images."""

    def parts(content: Content, use: str) -> list[str | int]:
        return [part.text if isinstance(part, Text) else number(part, SIDES[use], images) for part in content]

    asked = [message for message in sample.load().messages[:-1] if message.role != "system"]
    history = [[message.role, parts(message.content, "history")] for message in asked]
    replies = {label: parts(systems[label].reply(sample.key), "reply") for label in sorted(systems)}
    found = {"question": sample.key, "group": sample.group, "history": history, "replies": replies}
    return found | {"criteria": CRITERIA_OF.get(sample.kind, tuple(CRITERIA))}


def number(image: Image, side: int, images: Images) -> int:
    """Return the number of an image among the page's, as a JPEG: its file might tell who drew it."""
    picture, buffer = image.load(), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return images.setdefault(uri, (len(images), picture.size))[0]


def html(page: dict[str, Any]) -> str:
    """Return the page; by its hash a browser runs only our script, whatever a reply says."""
    text = TEMPLATE.read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    data = json.dumps(page).replace("<", "\\u003c")  # a reply may say </script>
    for name, value in (("SCRIPT-HASH", f"sha256-{hashed}"), ("HOUSE-STYLE", STYLE), ("PAGE-DATA", data)):
        text = text.replace(f"@{name}@", value, 1)
    return text


def read_votes(files: Sequence[Path], key: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the votes on the page of a key, the later one where a rater has voted twice. Raises Mgp5Error."""
    votes: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in files:
        for count, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                name = row["question"], row["criterion"], row["rater"]
                good = row["page"] == key["page"] and row["criterion"] in key["questions"][row["question"]]["criteria"]
                good &= {row["left"], row["right"]} == {"A", "B"} and row["choice"] in ("left", "right", "tie")
                row |= {"when": datetime.fromisoformat(row["time"]), "better": row.get(row["choice"], "tie")}
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                raise Mgp5Error(f"{file}, line {count} is no vote", "expected what the page of this key has saved")
            if name not in votes or votes[name]["when"] <= row["when"]:
                votes[name] = row
    return list(votes.values())


def win_rates(votes: Sequence[dict[str, Any]], key: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by criterion the share of all votes, ties too, for A, B and neither, with its 95 % interval."""
    found = {}
    for name in CRITERIA:
        if mine := [vote for vote in votes if vote["criterion"] == name]:
            groups = [key["questions"][vote["question"]]["group"] for vote in mine]
            shares = {
                label: share_interval([v["better"] == label for v in mine], groups) for label in ("A", "B", "tie")
            }
            found[name] = {"votes": len(mine)} | shares | agreement(mine)
    return found


def share_interval(hits: Sequence[bool], groups: Sequence[object]) -> tuple[float, float, float]:
    """Return the share of hits and the ends of Wilson's interval; votes of a group that say the same count as one."""
    count, share = len(hits), sum(hits) / len(hits)
    sums = dict.fromkeys(groups, 0.0)
    for hit, group in zip(hits, groups, strict=True):
        sums[group] += hit - share
    spread = max(sum(value**2 for value in sums.values()), 1e-12)
    size = min(count, count**2 * share * (1 - share) / spread) or len(sums)
    z = NormalDist().inv_cdf(0.975)
    middle, width = share + z**2 / (2 * size), z * (share * (1 - share) / size + z**2 / (4 * size**2)) ** 0.5
    return share, (middle - width) / (1 + z**2 / size), (middle + width) / (1 + z**2 / size)


def agreement(votes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the share of pairs of votes on a question that agree, and Krippendorff's alpha (nominal), if any."""
    from nltk.metrics.agreement import AnnotationTask

    totals, same = (
        sum(n * (n - 1) for n in Counter(tuple(vote[name] for name in names) for vote in votes).values())
        for names in (("question",), ("question", "better"))
    )
    if not totals or len({vote["better"] for vote in votes}) < 2:
        return {}
    rows = [(vote["rater"], vote["question"], vote["better"]) for vote in votes]
    return {"agreement": same / totals, "alpha": AnnotationTask(rows).alpha()}


@click.group()
def main() -> None:
    """Let people judge two systems of mgp5 eval, and count their votes."""


@main.command()
@click.argument("first", metavar="DIR/SYSTEM")
@click.argument("second", metavar="DIR/SYSTEM")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--task", "kinds", multiple=True, help="Kind of questions; repeatable.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of questions, and of who stands where.")
def page(first: str, second: str, out: Path, **options: Any) -> None:
    key = make_page(Replied.read(first), Replied.read(second), out, **options)
    failed = "".join(f", {count} left out where {name} has failed" for name, count in key["left_out"].items())
    click.echo(
        f"{len(key['questions'])} of {key['of']} questions{failed}; for raters: {out / 'compare.html'}", err=True
    )


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--key", "key_file", type=click.Path(path_type=Path), required=True)
def count(files: tuple[Path, ...], key_file: Path) -> None:
    key = read_json(key_file, "give the key.json beside the page")
    votes = read_votes(files, key)
    click.echo(json.dumps({"systems": key["systems"], "criteria": win_rates(votes, key)}, indent=2))


if __name__ == "__main__":
    main()
