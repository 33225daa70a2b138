"""Tell what words a model has never met, where its configuration names the one world that it knows."""

from __future__ import annotations

from ..events import Note

NAMED = 6  # words in a line


def remarks(world: str, text: str) -> list[Note]:
    """Return a note on the words of a user that are not of a model's world; none where it knows no bounds ("")."""
    if world != "storyland":
        return []
    from ..storyland.words import unknown_words

    words = unknown_words(text)
    named = f"{', '.join(words[:NAMED])}{' ...' if words[NAMED:] else ''}"
    return [Note(f"this model knows one drawn world only, Storyland: it has no word for {named}")] if words else []
