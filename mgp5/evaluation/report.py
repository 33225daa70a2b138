"""The report of an evaluation: report.json with all that is needed to repeat it, and report.html to look at."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import torch

from ..device import machine, versions
from ..errors import Mgp5Error, counted
from ..files import write_json, write_text
from ..messages import Conversation, Image, Message, Part, Text
from ..storyland.metrics import acceptance
from ..views.html import PAGE, STYLE, data_uri
from .encoders import ANTIALIAS, Encoders
from .measure import METRICS, METRICS_OF, measure
from .replies import Replies
from .request import EvaluateRequest
from .storyland import METRICS as STORYLAND
from .tasks import Data, Sample
from .words import words

PAGE_STYLE = STYLE + Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SIDE = 192  # pixels of an image in the page
SHOWN = 5  # reasons of failures, and samples of a table
LOWER = {name for name, metric in METRICS.items() if metric.better == "lower"} | {"LPIPS"}  # is better
PUBLISHED = Path(__file__).with_name("published.json")  # rows of the papers' tables, by format and table
Rows = Mapping[str, dict[str, Any]]  # of a system's files, by the keys of samples
Shown = list[tuple[Conversation, dict[str, Message]]]  # true replies behind their questions, replies by system


def report(
    request: EvaluateRequest, data: Data, replies: Mapping[str, Rows], made: dict[str, Any], device: torch.device
) -> None:
    """Measure what each system replied on a device, and write both files; `made` tells what was evaluated, and how."""
    out, by_table = request.out, {}
    for sample in data.samples:
        for table in sample.tables:
            by_table.setdefault(table, []).append(sample)
    kinds = {sample.kind for sample in data.samples}
    names = {kind: [name for name in METRICS_OF[kind] if data.scenes or name not in STORYLAND] for kind in kinds}
    usual = {name for each in names.values() for name in each}
    encoders = Encoders(request.weights, device, data.scenes)
    seed, tables = made["settings"]["options"]["seed"], {}
    for table, samples in by_table.items():
        measured = [name for name in names[samples[0].kind] if name in request.measured]
        for system, rows in replies.items():
            if answered := [(sample, rows[sample.key]) for sample in samples if sample.key in rows]:
                tables.setdefault(table, {})[system] = _measure(out, answered, measured, encoders, seed)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    groups = len({sample.group for sample in data.samples})
    written = {"command": shlex.join(["mgp5", *sys.argv[1:]]), "made": now, **made}
    written |= {"versions": versions(), "machine": machine(), "antialias": ANTIALIAS}
    written["data"] = {"samples": len(data.samples), "groups": groups, "problems": dict(data.problems)}
    written["left_out"] = {name: why for name, why in request.left_out.items() if name in usual}
    written["protocols"] = {name: METRICS[name].protocol for name in METRICS if name in usual}
    published = json.loads(PUBLISHED.read_bytes()).get(request.format, {})
    written |= {"tables": tables, "published": {table: rows for table, rows in published.items() if table in tables}}
    if request.format == "storyland":
        written["acceptance"] = acceptance(tables)
    write_json(out / "report.json", written)
    write_page(out / "report.html", written, {table: _shown(out, by_table[table], replies) for table in tables})


def _measure(
    out: Path, rows: Sequence[tuple[Sample, dict[str, Any]]], names: Sequence[str], encoders: Encoders, seed: int
) -> dict[str, Any]:
    failed = [f"{sample.key}: {row['error']}" for sample, row in rows if "error" in row]
    replies = Replies([(s, s.load().messages[-1], _reply(out, row)) for s, row in rows if "error" not in row])
    numbers, left_out = measure(replies, names, encoders, seed)
    entry = {"asked": len(rows), "failed": len(failed)} | replies.counts()
    entry |= {"images": sum(len(reply.images) for _, _, reply in replies.rows)}
    entry |= {"seconds": round(sum(row.get("seconds", 0) for _, row in rows), 1), "metrics": numbers}
    return entry | {"left_out": left_out, "failures": failed[:SHOWN]}


def _reply(out: Path, row: dict[str, Any]) -> Message:
    return Conversation.from_chat([row["reply"]], out).messages[0]


def _shown(out: Path, samples: Sequence[Sample], replies: Mapping[str, Rows]) -> Shown:
    """Return samples for the page, spread over the table and not chosen by hand."""
    shown = []
    for sample in samples[:: -(-len(samples) // SHOWN)]:
        kept = {system: rows[sample.key] for system, rows in replies.items() if "reply" in rows.get(sample.key, {})}
        shown.append((sample.load(), {system: _reply(out, row) for system, row in kept.items()}))
    return shown


def write_page(path: Path, report: dict[str, Any], samples: dict[str, Shown]) -> None:
    """Write what report.json holds as one page without scripts: numbers beside the papers', charts, and samples."""
    settings = report["settings"]
    parts = [f"<p>{escape(_summary(report))}</p>", f"<p><code>{escape(report['command'])}</code></p>"]
    if "acceptance" in report:
        parts.append(_acceptance(report["acceptance"]))
    meanings = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in words(report).items())
    parts.append(f"<details><summary>What the words mean</summary><dl>{meanings}</dl></details>")
    parts += ["<h2>Charts</h2>", "<p><small>Lines are 95 % intervals.</small></p>", *_charts(report)]
    for table, systems in report["tables"].items():
        parts += [f"<h2>{escape(table)}</h2>", _numbers(systems, report["published"].get(table, [])), *_notes(systems)]
        parts += [_sample(conversation, replies) for conversation, replies in samples[table]]
    if report["left_out"]:
        rows = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in report["left_out"].items())
        parts.append(f"<h2>Left out</h2><ul>{rows}</ul>")
    title = escape(f"{settings['model']} on {settings['format']}")
    footer = f"Made with mgp5 {report['versions']['mgp5']}, {report['made']}, weights {settings['weights']}"
    body = "\n".join(parts)
    write_text(path, PAGE.format(lang="en", title=title, style=PAGE_STYLE, body=body, footer=escape(footer)))


def _summary(report: dict[str, Any]) -> str:
    data, options = report["data"], report["settings"]["options"]
    problems = ", ".join(f"{count} x {kind}" for kind, count in data["problems"].items()) or "none"
    parts = [f"{counted(data['samples'], 'sample')} of {counted(data['groups'], 'group')} (problems: {problems})"]
    if "sampler" in options:  # of a diffusion model
        parts.append(f"{options['steps']} steps of {options['sampler']}")
    if "guidance" in options:
        parts.append(f"guidance {options['guidance'] or 'of the model'}")
    return ", ".join([*parts, f"seed {options['seed']}", *report.get("notes", ())]) + "."


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    return f'<div class="wide"><table>{_row(heads, "th")}{"".join(rows)}</table></div>'


def _row(values: Iterable[object], tag: str = "td", kind: str = "") -> str:
    cells = "".join(f"<{tag}>{value}</{tag}>" for value in values)
    return f'<tr class="{kind}">{cells}</tr>'


def _acceptance(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        found = "not measured" if row["found"] is None else f"{row['found']:.4f}"
        holds = {None: "", True: "yes", False: "no"}[row["holds"]]
        lines.append(_row((escape(row["what"]), escape(row["wanted"]), found, holds)))
    return _table(("asked of the demo", "wanted", "found", "holds"), lines)


def _numbers(systems: dict[str, Any], published: Sequence[dict[str, Any]]) -> str:
    """Return the table of systems and of the papers' rows by metrics; what is more stands one below the other."""
    names = list(dict.fromkeys(name for row in (*systems.values(), *published) for name in row["metrics"]))
    arrows = {name: "&darr;" if name in LOWER else "&uarr;" for name in names}
    counts = {"replies": "replies", "failed": "failed"}
    counts |= {"without a picture that is due": "no picture", "without a text that is due": "no text"}
    counts = {key: head for key, head in counts.items() if key == "replies" or any(e[key] for e in systems.values())}
    lines = [["", *counts.values(), *(f"{escape(name)} {arrows[name]}" for name in names)]]
    for system, entry in systems.items():
        numbers = [_number(entry["metrics"].get(name)) for name in names]
        lines.append([escape(system), *(entry[name] for name in counts), *numbers])
    for row in published:
        who = f"<i>{escape(row['model'])} <small>theirs: {escape(row['source'])}</small></i>"
        numbers = [f"<i>{row['metrics'][name]}</i>" if name in row["metrics"] else "" for name in names]
        lines.append([who, *("" for _ in counts), *numbers])
    heads, *rows = lines if len(lines) >= len(lines[0]) else zip(*lines, strict=True)
    return _table(heads, map(_row, rows))


def _notes(systems: dict[str, Any]) -> list[str]:
    """Return the first failures of each system, and metrics that this table has no number of."""
    lines = [f"{system}, failed: {reason}" for system, entry in systems.items() for reason in entry["failures"]]
    lines += [f"{system}, no {n}: {why}" for system, entry in systems.items() for n, why in entry["left_out"].items()]
    return [f"<p><small>{escape(line)}</small></p>" for line in lines]


def _number(number: dict[str, Any] | None) -> str:
    if number is None:
        return ""
    spread = f" <small>{number['low']:.3f} to {number['high']:.3f}</small>" if "low" in number else ""
    return f"{number['value']:.4f}{spread} <small>n {number['n']}</small>"


def _charts(report: dict[str, Any]) -> list[str]:
    """Return bars, with their intervals, of each metric that more than one table or system has."""
    bars: dict[str, list[tuple[str, dict[str, Any], str]]] = {}  # metric -> labels, numbers, and whose they are
    for table, systems in report["tables"].items():
        for system, entry in systems.items():
            for name, number in entry["metrics"].items():
                bars.setdefault(name, []).append((f"{table}: {system}", number, ""))
        for row in report["published"].get(table, []):
            for name in row["metrics"].keys() & bars:
                bars[name].append((f"{table}: {row['model']} (theirs)", {"value": row["metrics"][name]}, "theirs"))
    charts = []
    for name, rows in bars.items():
        share = 100 / (max(max(number["value"], number.get("high", 0)) for _, number, _ in rows) or 1)  # percent
        lines = []
        for label, number, whose in rows:
            bar = f'<div class="bar"><b style="width: {share * max(0, number["value"]):.1f}%"></b>'
            if "low" in number:
                low, high = (share * max(0, number[end]) for end in ("low", "high"))
                bar += f'<i style="left: {low:.1f}%; width: {high - low:.1f}%"></i>'
            lines.append(_row((escape(label), f"{bar}</div>", f"{number['value']:.4g}"), kind=whose))
        charts += [_table((escape(name), "", ""), lines)] if len(rows) > 1 else []
    return charts


def _sample(conversation: Conversation, replies: dict[str, Message]) -> str:
    *history, truth = conversation.messages
    asked = [part for message in history if message.role != "system" for part in message.content]
    cards = [_card("asked", asked, "asked"), _card("true reply", truth.content)]
    cards += [_card(system, reply.content) for system, reply in replies.items()]
    return f'<div class="row">{"".join(cards)}</div>'


def _card(title: str, content: Sequence[Part], kind: str = "") -> str:
    shown = "".join(f"<p>{escape(p.text)}</p>" if isinstance(p, Text) else _image(p, title) for p in content)
    return f'<div class="card {kind}"><h3>{escape(title)}</h3>{shown}</div>'


def _image(image: Image, title: str) -> str:
    """Return a small JPEG in the page, or the reason why an image cannot be read."""
    try:
        uri, _ = data_uri(image, max_bytes=0, max_side=SIDE)
    except Mgp5Error as error:
        return f"<p>{escape(error.message)}</p>"
    return f'<img src="{uri}" alt="{escape(title)}">'
