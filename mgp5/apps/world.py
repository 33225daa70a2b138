"""Tell what a model has never met, words and images, where its configuration names the one world that it knows."""

from __future__ import annotations

from collections.abc import Sequence

from ..events import Note
from ..messages import Image

NAMED = 6  # words in a line
SIDE = 128  # pixels of an image that are enough to judge it


def remarks(world: str, text: str, images: Sequence[Image] = ()) -> list[Note]:
    """Return a note on what a user gives that is not of a model's world; none where it knows no bounds ("").
    Raises Mgp5Error if an image cannot be read."""
    if world != "storyland":
        return []
    from ..storyland.judge import is_foreign
    from ..storyland.words import unknown_words

    found, words = [], unknown_words(text)
    if words:
        found.append(f"it has no word for {', '.join(words[:NAMED])}{' ...' if words[NAMED:] else ''}")
    if count := sum(is_foreign(image.load(least=SIDE)) for image in images):
        which = "this" if len(images) == 1 else f"{count} of these {len(images)}"
        found.append(f"it has never seen a picture like {which}")
    return [Note(f"this model knows one drawn world only, Storyland: {', and '.join(found)}")] if found else []
