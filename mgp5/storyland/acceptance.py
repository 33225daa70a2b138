"""What is asked of the demo on Storyland, as a table of numbers and bounds."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt}


def acceptance(tables: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is wanted of the demo, what was found, and whether it holds (None where the tables do not tell).

    Args:
        tables: of a report of `mgp5 eval`, by the name of the table and of the system.
    """

    def metric(table: str, system: str, name: str, part: str = "value") -> float:
        return tables[table][system]["metrics"][name][part]

    def drawn(system: str, name: str = "attributes") -> float:
        return metric("illustrate, full", system, name)

    def last(context: str, part: str) -> float:
        return metric(f"last, {context}", "model", "attributes", part)

    def ratio(other: str) -> float:
        return drawn("model", "Frechet distance, judge") / drawn(other, "Frechet distance, judge")

    def gap() -> float:
        return min(last("full", "low") - last("text", "high"), last("text", "low") - last("none", "high"))

    def ahead(other: str) -> float:
        return metric("continue, full", "model", "coherence") - metric("continue, full", other, "coherence")

    def stories(name: str) -> float:
        return metric("story, full", "model", name)

    wanted: list[tuple[str, str, float, Callable[[], float]]] = [
        ("attributes right in pictures, full context", ">=", 0.985, lambda: drawn("model")),
        ("the oracle's attributes less the model's", "<=", 0.01, lambda: drawn("oracle") - drawn("model")),
        ("Frechet distance over that of VAE reconstructions", "<=", 2, lambda: ratio("VAE")),
        ("the same, of other renders of the same scenes", "<=", 2, lambda: ratio("VAE-anew")),
        ("image-text, text, no context: least gap between intervals", ">", 0, gap),
        ("coherence less that of two-stage", ">", 0, lambda: ahead("two-stage")),
        ("coherence less that of GILL's objective (--baseline gill=RUN)", ">", 0, lambda: ahead("gill")),
        ("stories that the grammar accepts", ">=", 0.97, lambda: stories("grammar")),
        ("stories that keep species and colour", ">=", 0.95, lambda: stories("identity")),
    ]
    rows = []
    for what, sign, bound, compute in wanted:
        try:
            found = compute()
            holds = SIGNS[sign](found, bound)
        except (KeyError, ZeroDivisionError):
            found = holds = None
        rows.append({"what": what, "wanted": f"{sign} {bound}", "found": found, "holds": holds})
    return rows
