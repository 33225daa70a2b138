"""Storyland's metrics of replies, whose truth is known, and what is asked of the demo (B replies)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..messages import Text
from ..storyland.tell import mentions
from ..storyland.world import ATTRIBUTES, held_out
from . import images, storyland
from .encoded import Encoded
from .replies import Number, Replies, mean

Measure = Callable[[Replies, Encoded, torch.Generator], Number]


def _attributes(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    made, real, samples = replies.pictures
    shown = [encoded.scene(picture) for picture in real]
    hits = storyland.attributes_right(encoded.judged(made)[0], shown).float()  # (B, 7)
    unsaid = torch.tensor([[name not in mentions(sample.words) for name in ATTRIBUTES] for sample in samples])
    new = torch.tensor([held_out(scene) for scene in shown])
    detail = {
        "all seven": hits.prod(1).mean(),
        "not in the sentence": hits[unsaid].mean(),
        "held out": hits[new].mean(),
    }
    detail |= {name: hits[:, column].mean() for column, name in enumerate(ATTRIBUTES)}
    groups = [sample.group for sample in samples]
    return mean(hits.mean(1), groups, generator, **{name: _or_none(value) for name, value in detail.items()})


def _or_none(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


def _frechet(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    made, real, _ = replies.pictures
    return Number(images.frechet_distance(encoded.judged(made)[1], encoded.judged(real)[1]), len(made))


def _coherence(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    read, _ = encoded.judged([reply.images[0] if reply.images else None for _, _, reply in replies.rows])
    before = [encoded.scene(sample.before) for sample, _, _ in replies.rows]
    hits = storyland.coherence(read, [reply.text for _, _, reply in replies.rows], before).float()  # (B, 7)
    groups = [sample.group for sample, _, _ in replies.rows]
    return mean(hits.mean(1), groups, generator, **{"all seven": hits.prod(1).mean().item()})


def _narrations(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    told = [reply.text for _, _, reply in replies.rows]
    before = [encoded.scene(sample.before) for sample, _, _ in replies.rows]
    shown = [encoded.scene(sample.load().images[-1]) for sample, _, _ in replies.rows]
    groups = [sample.group for sample, _, _ in replies.rows]
    return mean(storyland.narration_right(told, before, shown), groups, generator)


def _grammar(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    """A story that ended early lacks sentences, which "" stands for: no sentence of the grammar."""
    stories = []
    for sample, _, reply in replies.rows:
        said = [part.text for part in reply.content if isinstance(part, Text)]
        stories.append(said + [""] * (sample.rounds - len(said)))
    return mean(storyland.grammatical(stories), [sample.group for sample, _, _ in replies.rows], generator)


def _identity(replies: Replies, encoded: Encoded, generator: torch.Generator) -> Number:
    """In all pictures of a story, the first, which was given, being read too."""
    read, characters = [], []
    for sample, _, reply in replies.rows:
        drawn = [sample.opening[1], *reply.images]
        read.append(encoded.judged(drawn + [None] * (1 + sample.rounds - len(drawn)))[0])
        characters.append(encoded.scene(sample.opening[1]))
    kept = torch.cat([storyland.identity_kept(rows[None], [who]) for rows, who in zip(read, characters, strict=True)])
    return mean(kept, [sample.group for sample, _, _ in replies.rows], generator)


STORYLAND: dict[str, Measure] = {
    "attributes": _attributes,
    "Frechet distance, judge": _frechet,
    "coherence": _coherence,
    "narrations": _narrations,
    "grammar": _grammar,
    "identity": _identity,
}


def acceptance(tables: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the demo is to reach, what it reaches, and whether that holds; None where the tables do not tell.

    Args:
        tables: of a report, by the name of the table and of the system.
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
            holds = {">=": operator.ge, "<=": operator.le, ">": operator.gt}[sign](found, bound)
        except (KeyError, ZeroDivisionError):
            found = holds = None
        rows.append({"what": what, "wanted": f"{sign} {bound}", "found": found, "holds": holds})
    return rows
