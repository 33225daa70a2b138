"""Metrics of Storyland: what images show and sentences say, against the truth (B images, S stories, T steps).

Images are given as the attribute indices that `judge.look` reads. All results are booleans, whose means are shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .language import accepts, mentions
from .world import ATTRIBUTES, Scene

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
    """Return which of the attributes read are those that the history and the reply's own text tell.

    None are when the text is no sentence of Storyland.
    """
    after = [next_scene(*pair) for pair in zip(before, texts, strict=True)]
    known = torch.tensor([scene is not None for scene in after])
    return attributes_right(read, [scene or old for scene, old in zip(after, before, strict=True)]) & known[:, None]


def grammatical(stories: Sequence[Sequence[str]]) -> Tensor:  # (S,)
    """Return whether the grammar accepts every sentence of a story."""
    return torch.tensor([all(map(accepts, story)) for story in stories])


def identity_kept(read: Tensor, characters: Sequence[Scene]) -> Tensor:  # (S, T, 7) -> (S,)
    """Return whether species and colour are the character's in all images of a story.

    Args:
        read: attribute indices; a row of -1 for an image that is missing.
        characters: a true scene of each story.
    """
    truth = torch.tensor([scene.indices() for scene in characters])
    return (read == truth[:, None])[..., IDENTITY].all(dim=(1, 2))
