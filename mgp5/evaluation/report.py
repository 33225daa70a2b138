"""The report of an evaluation: report.json with all that is needed to repeat it, and report.html to look at."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..doctor import machine, versions
from ..errors import Mgp5Error
from ..files import write_json
from ..messages import Conversation, Message
from . import METRICS
from .encoded import ANTIALIAS, Encoded
from .measure import METRICS_OF, measure
from .measure_storyland import STORYLAND, acceptance
from .page import write_page
from .published import PUBLISHED
from .replies import Replies
from .tasks import Data, Sample
from .weights import WEIGHTS, left_out

SHOWN = 5  # reasons of failures


@dataclass(frozen=True)
class Measured:
    """Names of metrics that are to be measured, paths of weights by their names, and why metrics are left out."""

    names: tuple[str, ...]
    given: Mapping[str, Path]
    left_out: Mapping[str, str]


def check(metrics: Sequence[str], weights: Sequence[str]) -> Measured:
    """What can be measured here.

    Args:
        metrics: names, () for all.
        weights: NAME=PATH of `WEIGHTS`.

    Raises Mgp5Error (wrong usage): an unknown name, or a path that does not hold what its name says.
    """
    given = {}
    for item in weights:
        name, equals, path = item.partition("=")
        if not equals or name not in WEIGHTS:
            raise Mgp5Error(f"--weights {item}", f"give NAME=PATH, NAME one of {', '.join(WEIGHTS)}", usage=True)
        given[name] = Path(path).expanduser()
    if unknown := [name for name in metrics if name not in METRICS]:
        raise Mgp5Error(f"no metric {', '.join(map(repr, unknown))}", f"there are {'; '.join(METRICS)}", usage=True)
    names = tuple(metrics) or tuple(METRICS)
    reasons = {name: left_out(name, given) for name in names}
    return Measured(
        tuple(name for name in names if not reasons[name]), given, {name: why for name, why in reasons.items() if why}
    )


def report(
    out: Path,
    data: Data,
    replies: Mapping[str, Mapping[str, dict[str, Any]]],
    facts: dict[str, Any],
    measured: Measured,
    device: torch.device,
) -> None:
    """Measure what systems replied, and write both files.

    Args:
        out: the folder of the evaluation.
        replies: of each system, rows of its files by the keys of samples.
        facts: what was evaluated.
    """
    by_table: dict[str, list[Sample]] = {}
    for sample in data.samples:
        for table in sample.tables:
            by_table.setdefault(table, []).append(sample)
    kinds = {sample.kind for sample in data.samples}
    usual = {name for kind in kinds for name in METRICS_OF[kind] if data.scenes or name not in STORYLAND}
    encoded = Encoded(measured.given, device, data.scenes)
    seed, tables = facts["settings"]["options"]["seed"], {}
    for table, samples in by_table.items():
        names = [name for name in METRICS_OF[samples[0].kind] if name in usual and name in measured.names]
        for system, rows in replies.items():
            if mine := [(sample, rows[sample.key]) for sample in samples if sample.key in rows]:
                tables.setdefault(table, {})[system] = _measured(out, mine, names, encoded, seed)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    groups = len({sample.group for sample in data.samples})
    found = {"command": shlex.join(["mgp5", *sys.argv[1:]]), "made": now, **facts}
    found |= {"versions": versions(), "machine": machine(), "antialias": ANTIALIAS}
    found["data"] = {"samples": len(data.samples), "groups": groups, "problems": dict(data.problems)}
    found["left_out"] = {name: why for name, why in measured.left_out.items() if name in usual}
    found["protocols"] = {name: METRICS[name].protocol for name in METRICS if name in usual}
    found |= {"tables": tables, "published": _published(facts["settings"]["format"], tables)}
    if data.scenes:
        found["acceptance"] = acceptance(tables)
    write_json(out / "report.json", found)
    write_page(out / "report.html", found, {table: _shown(out, by_table[table], replies) for table in tables})


def _published(format: str, tables: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The papers' rows of the tables that were measured."""
    rows = {table: found for table, found in PUBLISHED.get(format, {}).items() if table in tables}
    return {
        table: [{"model": who, "metrics": numbers, "source": source} for who, numbers, source in found]
        for table, found in rows.items()
    }


def _measured(
    out: Path, rows: Sequence[tuple[Sample, dict[str, Any]]], names: Sequence[str], encoded: Encoded, seed: int
) -> dict[str, Any]:
    failed = [(sample.key, row["error"]) for sample, row in rows if "error" in row]
    found = Replies([(s, s.load().messages[-1], _reply(out, row)) for s, row in rows if "error" not in row])
    metrics, reasons = measure(found, names, encoded, seed)
    entry = {"asked": len(rows), "failed": len(failed)} | found.counts()
    entry |= {"seconds": round(sum(row.get("seconds", 0) for _, row in rows), 1), "metrics": metrics}
    return entry | {"left_out": reasons, "failures": [": ".join(failure) for failure in failed[:SHOWN]]}


def _reply(out: Path, row: dict[str, Any]) -> Message:
    return Conversation.from_chat([row["reply"]], out).messages[0]


def _shown(
    out: Path, samples: Sequence[Sample], replies: Mapping[str, Mapping[str, dict[str, Any]]]
) -> list[tuple[Conversation, dict[str, Message]]]:
    """Samples for the page, spread over the table and not chosen by hand: conversations, and replies by systems."""
    shown = []
    for sample in samples[:: -(-len(samples) // SHOWN)]:
        mine = {system: rows[sample.key] for system, rows in replies.items() if "reply" in rows.get(sample.key, {})}
        shown.append((sample.load(), {system: _reply(out, row) for system, row in mine.items()}))
    return shown
