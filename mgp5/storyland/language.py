"""The English of Storyland: phrases for every attribute, the grammar of its sentences, and what a sentence states.

The templates below both write sentences (tell.py, talk.py) and are compiled into the regular expressions that
recognise them, so that the two cannot drift apart.
"""

from __future__ import annotations

import re

from .world import ATTRIBUTES, Scene

PRONOUNS: dict[str, tuple[str, str]] = {"she": ("her", "her"), "he": ("him", "his"), "it": ("it", "its")}
WHERE: dict[str, str] = {"beach": "on the beach", **{p: f"in the {p}" for p in ATTRIBUTES["place"][1:]}}
WHEN: dict[str, tuple[str, ...]] = {
    "sunny": ("on a sunny day", "in the sunshine"),
    "rainy": ("on a rainy day", "in the rain"),
    "snowy": ("on a snowy day", "in the snow"),
    "night": ("at night",),
}
# Orders of a description; a slot that says nothing is left out together with its space.
ORDERS = ("{who}{wears}{action}{prop}{where}{when}", "{when}{who}{wears}{action}{where}{prop}",
          "{who}{action}{where}{when}{outfit}")  # fmt: skip

# What a later sentence of a story may say, by the attribute that changes and the kind of change.
MOVE = ("walks to the {place}", "goes to the {place}", "runs to the {place}")
KEEP = (" with the same {prop}", " in the same {wears}")
CHANGES: dict[str, dict[str, tuple[str, ...]]] = {
    "prop": {
        "get": ("finds {a_prop}", "picks up {a_prop}"),
        "swap": ("swaps the {prop} for {a_prop}", "finds {a_prop}"),
        "lose": ("puts the {prop} away", "puts it away"),
    },
    "wears": {
        "get": ("puts on {a_wears}",),
        "swap": ("swaps the {wears} for {a_wears}", "puts on {a_wears}"),
        "lose": ("takes off the {wears}", "takes it off"),
    },
}
ACTS: dict[str, tuple[str, ...]] = {
    "stands": ("stands still",),
    "jumps": ("jumps", "jumps for joy"),
    "waves": ("waves", "waves hello"),
    "sleeps": ("goes to sleep", "falls asleep"),
}
WAKES = "wakes up"
SKIES: dict[str, tuple[str, ...]] = {
    "sunny": ("the sun comes out", "the sun begins to shine"),
    "rainy": ("it starts to rain", "rain begins to fall"),
    "snowy": ("it starts to snow", "snow begins to fall"),
    "night": ("night falls", "it gets dark"),
}


def a(noun: str) -> str:
    """Return a noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def describe(scene: Scene, order: str, when: str, holds: str = "with", hide: frozenset[str] = frozenset()) -> str:
    """Describe a scene in lower case, in one of `ORDERS`, by one of `WHEN[scene.weather]` and "with" or "holding".
    "nothing" is never said, nor what is in `hide` (of colour, wears, prop, place, weather)."""
    worn = "" if scene.wears == "nothing" or "wears" in hide else a(scene.wears)
    held = "" if scene.prop == "nothing" or "prop" in hide else a(scene.prop)
    outfit = " and ".join(filter(None, (worn and f"wearing {worn}", held and f"holding {held}")))
    slots = {
        "who": a(scene.species) if "colour" in hide else f"a {scene.colour} {scene.species}",
        "wears": worn and f"in {worn}",
        "prop": held and f"{holds} {held}",
        "action": scene.action,
        "where": "" if "place" in hide else WHERE[scene.place],
        "when": "" if "weather" in hide else when,
        "outfit": outfit,
    }
    return order.format(**{name: text and f" {text}" for name, text in slots.items()}).strip()


def _any(options: object) -> str:
    return f"(?:{'|'.join(options)})"


def _something(name: str) -> tuple[str, ...]:
    return tuple(value for value in ATTRIBUTES[name] if value != "nothing")


def _fill(template: str) -> str:
    """Return a story template as a regular expression."""
    slots = {"place": _any(ATTRIBUTES["place"])}
    for name in ("prop", "wears"):
        slots[name] = _any(_something(name))
        slots[f"a_{name}"] = _any(map(a, _something(name)))
    return template.format(**slots)


def _description() -> str:
    worn, held = _any(map(a, _something("wears"))), _any(map(a, _something("prop")))
    bare = _any(map(a, ATTRIBUTES["species"]))
    coloured = f"a {_any(ATTRIBUTES['colour'])} {_any(ATTRIBUTES['species'])}"
    slots = {
        "who": f" {_any((bare, coloured))}",
        "action": f" {_any(ATTRIBUTES['action'])}",
        "wears": f"(?: in {worn})?",
        "prop": f"(?: (?:with|holding) {held})?",
        "where": f"(?: {_any(WHERE.values())})?",
        "when": f"(?: {_any(phrase for phrases in WHEN.values() for phrase in phrases)})?",
        "outfit": f"(?: wearing {worn}(?: and holding {held})?| holding {held})?",
    }
    return _any(order.format(**slots) for order in ORDERS)


def _step() -> str:
    sky = _any(phrase for phrases in SKIES.values() for phrase in phrases)
    act = _any(phrase for phrases in ACTS.values() for phrase in phrases)
    kept = _any(map(_fill, KEEP))
    thing = _any(_fill(t) for kinds in CHANGES.values() for options in kinds.values() for t in options)
    deed = f"(?:{_any(map(_fill, MOVE))}{kept}?|{thing})"
    does = f"(?:{WAKES}(?: and (?:{deed}|{act}))?|{act}|{deed}(?: and (?:{thing}|{act}))?)"
    she = _any(PRONOUNS)
    return f" (?:{sky}(?: and {she} {does})?|{she} {does})"


_GRAMMAR = re.compile(f"(?:{_description()}|{_step()})")


def accepts(text: str) -> bool:
    """Return whether `caption` or `story` can write this sentence; case and a final period do not matter."""
    return _GRAMMAR.fullmatch(f" {text.strip().removesuffix('.').lower()}") is not None


def _word(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{pattern})\b")


_NOTHING = {
    "prop": _word(r"puts (?:the \w+|it) away|takes? the \w+ away|puts? the \w+ away|holding nothing"),
    "wears": _word(r"takes? off (?:the|her|his|its) \w+|takes it off|wearing nothing"),
}
_SWAP = re.compile(r"\bswaps? (?:the|her|his|its) \w+ for ")
_STATED: dict[str, dict[str, re.Pattern[str]]] = {
    **{name: {v: _word(v) for v in _something(name)} for name in ("species", "colour", "wears", "place", "prop")},
    "weather": {
        "sunny": _word("sun|sunny|sunshine"),
        "rainy": _word("rain|rains|raining|rainy"),
        "snowy": _word("snow|snows|snowing|snowy"),
        "night": _word("night|dark"),
    },
    "action": {
        "stands": _word("stand|stands|standing"),
        "jumps": _word("jump|jumps|jumping"),
        "waves": _word("wave|waves|waving"),
        "sleeps": _word("sleep|sleeps|sleeping|asleep"),
    },
}


def mentions(text: str) -> dict[str, str]:
    """Return the attributes that a sentence states, name -> value; in a story all that is not mentioned persists.

    What is put away or taken off counts as "nothing", of a swap only the new thing counts, and "wakes up" means that
    the character stands unless another action is named.
    """
    text = _SWAP.sub("", text.lower())
    found: dict[str, str] = {}
    for name, pattern in _NOTHING.items():
        if pattern.search(text):
            found[name] = "nothing"
            text = pattern.sub("", text)
    for name, patterns in _STATED.items():
        for value, pattern in patterns.items():
            if pattern.search(text):
                found[name] = value
    if "action" not in found and WAKES in text:
        found["action"] = "stands"
    return {name: found[name] for name in ATTRIBUTES if name in found}
