"""Which words of a text are not of Storyland: its sentences do not have them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import language, talk
from .world import ATTRIBUTES

WORD, SLOT = re.compile(r"[^\W\d_]+(?:'\w+)?"), re.compile(r"\{\w+\}")
# Words that show nothing, whether its sentences have them or not.
COMMON = frozenset(
    WORD.findall(
        """a about again all also am an and any are as at be been but by can could day did do does down for from had has
        have he her here him his how i if in into is it its just let like look looks make me more my no not now of off
        on one or our out over picture please scene see she show so some story tell than that the their them then there
        these they this those to too under up us very was we were what when where which who will with would yes you
        your animal animals"""
    )
)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield SLOT.sub(" ", value)
    elif isinstance(value, dict | tuple):
        for part in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            yield from _texts(part)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


_CONSTANTS = [value for module in (language, talk) for name, value in vars(module).items() if name.isupper()]
VOCABULARY = COMMON.union(word for text in _texts((ATTRIBUTES, *_CONSTANTS)) for word in _words(text))


def unknown_words(text: str) -> list[str]:
    """Return the words of a text that no sentence of Storyland has, each once; a plural counts as its word."""
    known = VOCABULARY | {f"{word}{s}" for word in VOCABULARY for s in ("s", "es")}
    return [word for word in dict.fromkeys(_words(text)) if word not in known]
