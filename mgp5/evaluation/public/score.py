"""The report of a public benchmark: answers in its layout, local metrics, a judge's scores, wins against others."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ...data.files import Problems, pick
from ...device import machine, versions
from ...files import digest, write_json
from ...messages import Conversation, Image, Message, Text
from ..encoders import Encoders
from ..replies import mean
from ..report import PUBLISHED, SHOWN, write_page
from ..run import Replied
from . import prompts
from .cases import Answered, Case
from .judge import FAILED, Judge, Question, open_judge, verdict
from .request import PublicRequest

ALL = "all"  # the table of all cases
Rows = Mapping[str, dict[str, Any]]  # of replies, by the keys of cases
Said = dict[str, dict[str, float] | None]  # what a judge said, by the digests of questions; None could not be read
Values = list[tuple[str, float, str]]  # name of a score, value, group of its case


def score(
    request: PublicRequest,
    cases: Sequence[Case],
    problems: Problems,
    rows: Rows,
    settings: dict[str, Any],
    device: torch.device,
    progress: Callable[[Replied], None],
) -> None:
    """Write the answers of a model and its report; `settings` say what was evaluated."""
    out, benchmark = request.out, request.benchmark
    replies = read_answers(rows, out)
    answered = [(case, replies[case.key]) for case in cases if case.key in replies]
    answers = benchmark.write(out / "answers", request.name, answered)
    others = {path.name.removesuffix("_output"): benchmark.read(path, cases) for path in request.against}
    judge, said = None, Said()
    if request.judge_name:
        judge = open_judge(request.judge_name, request.judge_model, request.model.device)
        questions = [q for case, r in answered for q in benchmark.questions(case, r)]
        questions += [pair for name, theirs in others.items() for _, _, pair in _pairs(answered, name, theirs)]
        said = ask(out / "judged.jsonl", judge, questions, progress)
    scorer = Scorer(request, judge, said, others, device)
    tables = {ALL: cases} | {name: [c for c in cases if c.table == name] for name in {c.table: 0 for c in cases}}
    if len(tables) == 2:  # one category is all
        del tables[cases[0].table]
    published = json.loads(PUBLISHED.read_bytes()).get(request.format, {})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    notes = [f"scored: {benchmark.about}", f"answers for its own scripts: {answers}"]
    written = {"command": shlex.join(["mgp5", *sys.argv[1:]]), "made": now, "settings": settings}
    written |= {"versions": versions(), "machine": machine(), "device": str(device), "batch": request.batch}
    groups = len({case.group for case in cases})
    written["data"] = {"samples": len(cases), "groups": groups, "problems": dict(problems)}
    written["left_out"] = {} if judge else {"what a judge scores": "no --judge was given"}
    if judge:
        unread = sum(value is None for value in said.values())
        written["judge"] = {"name": judge.name, "prompts": prompts.HASH, "asked": len(said), "not readable": unread}
        notes += [f"judge {judge.name}, prompts {prompts.HASH}, {unread} of {len(said)} answers not readable"]
    written |= {"notes": notes, "published": published}
    written["tables"] = {name: scorer.table(group, rows, replies) for name, group in tables.items()}
    write_json(out / "report.json", written)
    shown = {name: _shown(group, replies) for name, group in tables.items()}
    write_page(out / "report.html", written, shown)


class Scorer:
    """Makes the entries of tables."""

    def __init__(
        self,
        request: PublicRequest,
        judge: Judge | None,
        said: Said,
        others: Mapping[str, Mapping[str, list[Message]]],
        device: torch.device,
    ) -> None:
        self._benchmark, self._judge, self._said, self._others = request.benchmark, judge, said, others
        self._encoders, self._seed = Encoders(request.weights, device, {}), request.options.seed

    def table(self, cases: Sequence[Case], rows: Rows, replies: Mapping[str, list[Message]]) -> dict[str, Any]:
        """Return the entries of a table: the model's, and one for each that it is compared with."""
        answered = [(case, replies[case.key]) for case in cases if case.key in replies]
        failed = [f"{case.key}: {rows[case.key]['error']}" for case in cases if "error" in rows.get(case.key, {})]
        metrics, left_out = self._benchmark.measure(answered, self._encoders, self._generator())
        values = [(*one, case.group) for case, reply in answered for one in self._scores(case, reply)]
        numbers = {name: _plain(asdict(number)) for name, number in metrics.items()} | self._numbers(values)
        lacking = {kind: sum(_lacks(case, r, kind) for case, r in answered) for kind in (Image, Text)}
        entry = {"asked": len(answered) + len(failed), "failed": len(failed), "replies": len(answered)}
        entry |= {"without a picture that is due": lacking[Image], "without a text that is due": lacking[Text]}
        entry |= {"seconds": round(sum(rows[case.key].get("seconds", 0) for case, _ in answered), 1)}
        entry |= {"metrics": numbers, "left_out": left_out, "failures": failed[:SHOWN]}
        return {"model": entry} | {f"against {name}": self._against(answered, name) for name in self._others}

    def _scores(self, case: Case, replies: Sequence[Message]) -> Iterator[tuple[str, float]]:
        yield from self._benchmark.local(case, replies)
        if self._judge:
            asked = {q.key: self._said[key_of(self._judge, q)] for q in self._benchmark.questions(case, replies)}
            yield from self._benchmark.scores(case, replies, {key: found for key, found in asked.items() if found})

    def _against(self, answered: Answered, name: str) -> dict[str, Any]:
        """Return win rates of the model: a tie as nothing, as half a win, as its leaning says, and left out."""
        values, pairs = Values(), 0
        for case, first, question in _pairs(answered, name, self._others[name]):
            pairs += 1
            found = self._said[key_of(self._judge, question)]
            if found is None:
                continue
            won = found["A"] if first else 1 - found["A"]
            tie = won == 0.5
            values += [("wins, ties 0", float(won == 1), case.group), ("wins, ties .5", won, case.group)]
            if "A leaning" in found:
                leaning = found["A leaning"] if first else 1 - found["A leaning"]
                values.append(("wins, ties by leaning", leaning if tie else won, case.group))
            if not tie:
                values.append(("wins, no ties", won, case.group))
        entry = {"asked": pairs, "failed": 0, "replies": pairs, "seconds": 0, "failures": [], "left_out": {}}
        entry |= dict.fromkeys(("without a picture that is due", "without a text that is due"), 0)
        return entry | {"metrics": self._numbers(values)}

    def _numbers(self, values: Values) -> dict[str, dict[str, Any]]:
        """Return means with 95 % intervals (bootstrap over groups) of scores by their names."""
        numbers = {}
        for name in dict.fromkeys(name for name, _, _ in values):
            found, groups = zip(*((value, group) for n, value, group in values if n == name), strict=True)
            numbers[name] = _plain(asdict(mean(torch.tensor(found, dtype=torch.float64), groups, self._generator())))
        return numbers

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)


def ask(file: Path, judge: Judge, questions: Sequence[Question], progress: Callable[[Replied], None]) -> Said:
    """Ask a judge what it has not been asked before, keep its words in a file, and return what they say."""
    keyed = {key_of(judge, question): question for question in questions}
    words: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
            if not row["reply"].startswith(FAILED):
                words[row["key"]] = row["reply"]
        except (AttributeError, KeyError, TypeError, ValueError):
            continue  # a kill has cut it off
    todo = [key for key in keyed if key not in words]
    with file.open("a", encoding="utf-8") as lines, ThreadPoolExecutor(judge.at_once) as pool:
        lines.write("\n" if file.stat().st_size else "")
        try:
            replies = pool.map(lambda key: judge(keyed[key].parts), todo)
            for number, (key, reply) in enumerate(zip(todo, replies, strict=True), 1):
                words[key] = reply
                row = {"key": key, "question": keyed[key].key, "judge": judge.name, "reply": reply}
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                progress(Replied("judge", number, len(todo), row))
        finally:
            pool.shutdown(cancel_futures=True)  # interrupted, it asks nothing more; what has been said is kept
    return {key: question.read(words[key]) for key, question in keyed.items()}


def key_of(judge: Judge, question: Question) -> str:
    """Return a digest of a question and of who is asked."""
    return digest([judge.name, [p.text if isinstance(p, Text) else p.digest() for p in question.parts]])


def _pairs(
    answered: Answered, name: str, theirs: Mapping[str, Sequence[Message]]
) -> Iterator[tuple[Case, bool, Question]]:
    """Yield each case that both have answered, whether the model stands first (by its name), and the question."""
    for case, replies in answered:
        if case.key in theirs:
            sides = [tuple(p for reply in who for p in reply.content) for who in (replies, theirs[case.key])]
            first = pick(2, case.key, name) == 0
            a, b = sides if first else reversed(sides)
            yield case, first, Question(f"against {name}", prompts.pair(_whole(case, replies), a, b), verdict)


def _whole(case: Case, replies: Sequence[Message]) -> list[Any]:
    """Return all that the user says."""
    return [part for turn in range(len(case.turns)) for part in case.said(replies, turn)]


def _lacks(case: Case, replies: Sequence[Message], kind: type) -> bool:
    """Return whether a reply lacks a kind of part that the true one has."""
    turns = zip(case.turns, replies, strict=True)
    return any(
        any(isinstance(part, kind) for part in turn.true) and not any(isinstance(part, kind) for part in reply.content)
        for turn, reply in turns
    )


def _plain(number: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in number.items() if value not in (None, {})}


def _shown(cases: Sequence[Case], replies: Mapping[str, list[Message]]) -> list[tuple[Conversation, dict]]:
    """Return cases for the page, spread over the table: what was asked last, the true reply and the model's."""
    found = []
    for case in [case for case in cases if case.key in replies][:: -(-len(cases) // SHOWN)]:
        *before, last = replies[case.key]
        conversation = case.asked(before).add("assistant", *case.turns[-1].true)
        found.append((conversation, {"model": last}))
    return found


def read_answers(rows: dict[str, dict[str, Any]], out: Path) -> dict[str, list[Message]]:
    """Return the replies that `evaluate` has kept, by the keys of cases."""
    whole = {key: row["replies"] for key, row in rows.items() if "replies" in row}
    return {key: list(Conversation.from_chat(replies, out).messages) for key, replies in whole.items()}
