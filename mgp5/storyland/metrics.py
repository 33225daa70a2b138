"""Metrics of Storyland: what images show and sentences say, against the truth (B images, S stories, T steps).

Images are given as the attribute indices that `judge.look` reads. All results are booleans, whose means are shares.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .language import accepts, mentions
from .world import ATTRIBUTES, Scene

SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt}
IDENTITY = [list(ATTRIBUTES).index(name) for name in ("species", "colour")]


def attributes_right(read: Tensor, scenes: Sequence[Scene]) -> Tensor:  # (B, 7) -> (B, 7)
    """Return which of the attributes read are those of the true scenes."""
    return read == torch.tensor([scene.indices() for scene in scenes])


def next_scene(before: Scene, text: str) -> Scene | None:
    """Return the scene that a story's sentence makes of the one before it; None for no sentence of Storyland."""
    return replace(before, **mentions(text)) if accepts(text) else None


def narration_right(texts: Sequence[str], before: Sequence[Scene], shown: Sequence[Scene]) -> Tensor:  # (B,)
    """Return whether each narration makes the scene that its image shows of the one before it."""
    return torch.tensor([next_scene(*pair) == scene for *pair, scene in zip(before, texts, shown, strict=True)])


def coherence(read: Tensor, texts: Sequence[str], before: Sequence[Scene]) -> Tensor:  # (B, 7) -> (B, 7)
    """Return which of the attributes read are those that history and text tell; none where it is no sentence."""
    after = [next_scene(*pair) for pair in zip(before, texts, strict=True)]
    known = torch.tensor([scene is not None for scene in after])
    return attributes_right(read, [scene or old for scene, old in zip(after, before, strict=True)]) & known[:, None]


def grammatical(stories: Sequence[Sequence[str]]) -> Tensor:  # (S,)
    """Return whether the grammar accepts every sentence of a story."""
    return torch.tensor([all(map(accepts, story)) for story in stories])


def identity_kept(read: Tensor, characters: Sequence[Scene]) -> Tensor:  # (S, T, 7) -> (S,)
    """Return whether species and colour are the character's, of one true scene, in all images of a story."""
    truth = torch.tensor([scene.indices() for scene in characters])
    return (read == truth[:, None])[..., IDENTITY].all(dim=(1, 2))


def acceptance(tables: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is wanted of the demo, what was found, and whether it holds (None where the tables do not tell).

    `tables` are those of a report of `mgp5 eval`: table -> system -> numbers.
    """

    def metric(table: str, system: str, name: str, part: str = "value") -> float:
        return tables[table][system]["metrics"][name][part]

    drawn = partial(metric, "illustrate, full", name="attributes")
    distance = partial(metric, "illustrate, full", name="Frechet distance, judge")
    coherence = partial(metric, "continue, full", name="coherence")
    narrate = next((table for table in tables if table.startswith("narrate")), "")
    narrated = partial(metric, narrate, name="narrations")
    stories = partial(metric, "story, full", "model")
    last = partial(metric, system="model", name="attributes")

    def gap() -> float:
        above_text = last("last, full", part="low") - last("last, text", part="high")
        return min(above_text, last("last, text", part="low") - last("last, none", part="high"))

    def ahead(other: str) -> float:
        return coherence("model") - coherence(other)

    wanted: list[tuple[str, str, float, Callable[[], float]]] = [
        ("attributes right in pictures, full context", ">=", 0.985, lambda: drawn("model")),
        ("of first pictures, without context", ">=", 0.99, lambda: metric("first, none", "model", "attributes")),
        ("of another character's in a dialogue", ">=", 0.97, lambda: metric("subject", "model", "attributes")),
        ("narrations that tell just the change", ">=", 0.75, lambda: narrated("model")),
        ("the oracle's attributes less the model's", "<=", 0.01, lambda: drawn("oracle") - drawn("model")),
        ("Frechet distance over that of VAE reconstructions", "<=", 2, lambda: distance("model") / distance("VAE")),
        ("the same, of other renders of the same scenes", "<=", 2, lambda: distance("model") / distance("VAE-anew")),
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
