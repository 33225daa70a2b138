"""Metrics of Storyland, whose truth is known: what pictures show and sentences say (B pictures, S stories, T steps).

Pictures are judged by what `judge.look` reads, attribute indices (B, 7). All results are booleans: their means are the
shares that the report shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..storyland.tell import accepts, mentions
from ..storyland.world import ATTRIBUTES, Scene

IDENTITY = [list(ATTRIBUTES).index(name) for name in ("species", "colour")]


def attributes_right(read: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Attribute accuracy (B, 7): which attributes read (B, 7) are those of the true scene."""
    return read == torch.tensor([scene.indices() for scene in scenes])


def told(before: Scene, text: str) -> Scene | None:
    """The scene that a story's next sentence makes of the one before it; None for no sentence of Storyland."""
    return replace(before, **mentions(text)) if accepts(text) else None


def narration_right(texts: Sequence[str], before: Sequence[Scene], shown: Sequence[Scene]) -> Tensor:
    """Whether each narration (B,) makes the scene that its picture shows of the one before it."""
    return torch.tensor([told(*pair) == scene for *pair, scene in zip(before, texts, shown, strict=True)])


def coherence(read: Tensor, texts: Sequence[str], before: Sequence[Scene]) -> Tensor:
    """Multimodal coherence (B, 7): which attributes read (B, 7) are those that history and the reply's own text tell.

    Nothing is right when the text is no sentence of Storyland: neither is then known to fit the other.
    """
    after = [told(*pair) for pair in zip(before, texts, strict=True)]
    known = torch.tensor([scene is not None for scene in after])
    return attributes_right(read, [scene or old for scene, old in zip(after, before, strict=True)]) & known[:, None]


def grammatical(stories: Sequence[Sequence[str]]) -> Tensor:
    """Whether the grammar accepts every generated sentence of a story (S,)."""
    return torch.tensor([all(map(accepts, story)) for story in stories])


def identity_kept(read: Tensor, characters: Sequence[Scene]) -> Tensor:
    """Whether species and colour, read (S, T, 7), are the character's in all pictures of a story (S,).

    Args:
        read: attribute indices; a row of -1 for a picture that is missing.
        characters: a true scene of each story.
    """
    truth = torch.tensor([scene.indices() for scene in characters])
    return (read == truth[:, None])[..., IDENTITY].all(dim=(1, 2))
