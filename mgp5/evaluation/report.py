"""The report of an evaluation: report.json with all that is needed to repeat it, and report.html to look at."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..device import machine, versions
from ..files import write_json
from ..messages import Conversation, Message
from ..storyland.metrics import acceptance
from .encoders import ANTIALIAS, Encoders
from .measure import METRICS, measure, measured_of
from .page import write_page
from .replies import Replies
from .request import EvaluateRequest
from .tasks import Data, Sample

SHOWN = 5  # reasons of failures, and samples of a table
PUBLISHED = Path(__file__).with_name("published.json")  # rows of the papers' tables, by format and table
Rows = Mapping[str, dict[str, Any]]  # of a system's files, by the keys of samples


def report(
    request: EvaluateRequest, data: Data, replies: Mapping[str, Rows], made: dict[str, Any], device: torch.device
) -> None:
    """Measure what each system replied on a device, and write both files; `made` tells what was evaluated, and how."""
    out, by_table = request.out, {}
    for sample in data.samples:
        for table in sample.tables:
            by_table.setdefault(table, []).append(sample)
    names = {kind: measured_of(kind, bool(data.scenes)) for kind in {sample.kind for sample in data.samples}}
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
    entry |= {"seconds": round(sum(row.get("seconds", 0) for _, row in rows), 1), "metrics": numbers}
    return entry | {"left_out": left_out, "failures": failed[:SHOWN]}


def _reply(out: Path, row: dict[str, Any]) -> Message:
    return Conversation.from_chat([row["reply"]], out).messages[0]


def _shown(
    out: Path, samples: Sequence[Sample], replies: Mapping[str, Rows]
) -> list[tuple[Conversation, dict[str, Message]]]:
    """Return samples for the page, spread over the table and not chosen by hand: conversations, replies by system."""
    shown = []
    for sample in samples[:: -(-len(samples) // SHOWN)]:
        kept = {system: rows[sample.key] for system, rows in replies.items() if "reply" in rows.get(sample.key, {})}
        shown.append((sample.load(), {system: _reply(out, row) for system, row in kept.items()}))
    return shown
