"""Votes that left the page of `pairs` as JSON lines: win rates as in the papers' table, and how far raters agree."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from .intervals import share_interval

CRITERIA = {  # MiniGPT-5, section 4.2.2
    "language": "Language continuity",
    "image": "Image quality",
    "coherence": "Multimodal coherence",
}
FIELDS = ("page", "question", "rater", "criterion", "left", "right", "choice", "time")
CHOICES = ("left", "right", "tie")


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What a rater said of a question by a criterion.

    Attributes:
        choice: side that is better, or "tie".
        better: label of the system that is better, or "tie".
        time: when, with its zone.
    """

    question: str
    rater: str
    criterion: str
    choice: str
    better: str
    time: datetime


def read_votes(files: Sequence[Path], key: Mapping[str, Any]) -> tuple[list[Vote], int]:
    """Votes on the page of a key, and how many were replaced: where a rater has voted twice the later vote counts.

    Raises Mgp5Error that names file and line of what is no vote on this page.
    """
    votes: dict[tuple[str, str, str], Vote] = {}
    count = 0
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Mgp5Error(f"cannot read {file} ({error})", "give a file of votes, JSON lines") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                vote = _vote(line, key)
            except ValueError as error:
                hint = f"expected a vote that the page of this key has saved, with {', '.join(FIELDS)}"
                raise Mgp5Error(f"{file}, line {number}: {error}", hint) from None
            count += 1
            name = (vote.question, vote.criterion, vote.rater)
            if name not in votes or votes[name].time <= vote.time:
                votes[name] = vote
    return list(votes.values()), count - len(votes)


def _vote(line: str, key: Mapping[str, Any]) -> Vote:
    """Raises ValueError that says what is wrong."""
    row = json.loads(line)
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) and row[name] for name in FIELDS):
        raise ValueError("no text in one of its fields")
    if row["page"] != key["page"]:
        raise ValueError(f"a vote on another page, {row['page']}")
    if row["criterion"] not in key["questions"].get(row["question"], {}).get("criteria", ()):
        raise ValueError(f"no question {row['question']!r} with criterion {row['criterion']!r}")
    if {row["left"], row["right"]} != {"A", "B"} or row["choice"] not in CHOICES:
        raise ValueError(f"choice {row['choice']!r} between {row['left']!r} and {row['right']!r}")
    time = datetime.fromisoformat(row["time"])
    if time.tzinfo is None:
        raise ValueError(f"time {row['time']!r} has no zone")
    kept = {name: row[name] for name in ("question", "rater", "criterion", "choice")}
    return Vote(**kept, better=row.get(row["choice"], "tie"), time=time)


def win_rates(votes: Sequence[Vote], replaced: int, key: Mapping[str, Any]) -> dict[str, Any]:
    """What the votes say.

    As in MiniGPT-5, table 3, shares are of all votes by a criterion, ties too. Their 95 % intervals are Wilson's, with
    the questions of a story or dialogue as one group.

    Args:
        key: what key.json holds.
    """
    systems, groups = key["systems"], {name: question["group"] for name, question in key["questions"].items()}
    decided = [vote.choice for vote in votes if vote.choice != "tie"]
    found: dict[str, Any] = {"systems": systems, "questions": len({vote.question for vote in votes})}
    found |= {"of": len(groups), "raters": len({vote.rater for vote in votes}), "votes": len(votes)}
    found |= {"replaced": replaced, "left": decided.count("left") / len(decided) if decided else None, "criteria": {}}
    for name in CRITERIA:
        if mine := [vote for vote in votes if vote.criterion == name]:
            found["criteria"][name] = {"votes": len(mine)} | agreement(mine)
            for label in (*systems, "tie"):
                hits = [vote.better == label for vote in mine]
                share, low, high = share_interval(hits, [groups[vote.question] for vote in mine])
                row = {"votes": sum(hits), "share": share, "low": low, "high": high}
                found["criteria"][name][label] = row
    return found


def agreement(votes: Sequence[Vote]) -> dict[str, float | None]:
    """Of raters on the questions that two or more have voted on, by one criterion; None where there is none.

    "agreement" is the share of pairs of votes on a question that agree. "alpha" is Krippendorff's (1980), nominal:
    Fleiss' kappa, corrected for few votes, where not all raters answered all; 0 is chance, 1 full agreement.
    """
    ordered = sorted(votes, key=lambda vote: vote.question)
    answers = [Counter(vote.better for vote in group) for _, group in groupby(ordered, lambda vote: vote.question)]
    shared = [counts for counts in answers if counts.total() > 1]
    if not shared:
        return {"agreement": None, "alpha": None}
    same = sum(_pairs(counts) for counts in shared) / sum(n * (n - 1) for n in map(Counter.total, shared))
    observed = 1 - sum(_pairs(counts) / (counts.total() - 1) for counts in shared) / sum(map(Counter.total, shared))
    total = sum(shared, Counter())
    expected = 1 - _pairs(total) / (total.total() * (total.total() - 1))
    return {"agreement": same, "alpha": 1 - observed / expected if expected else None}


def _pairs(counts: Counter[str]) -> int:
    """Of votes that say the same, in order."""
    return sum(n * (n - 1) for n in counts.values())


def read_key(path: Path) -> dict[str, Any]:
    """What `compare` has written beside a page. Raises Mgp5Error."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        found = {"page", "systems", "questions"} - key.keys() and "no key"
    except (OSError, ValueError, AttributeError) as error:
        found = str(error)
    if found:
        raise Mgp5Error(f"cannot read {path} ({found})", "give the key.json that mgp5 compare has written")
    return key
