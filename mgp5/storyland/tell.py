"""Captions and stories of Storyland: sentences whose images need the sentences before them.

The rule of a story: each later sentence names exactly what changes (place, weather, prop, wears, action), and all that
it does not mention persists. An action is named whenever it changes; who sleeps first wakes up before doing anything
else; a new prop or garment replaces the old one. So a scene is `replace(previous, **mentions(sentence))`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import compress, pairwise

from .language import ACTS, CHANGES, KEEP, MOVE, ORDERS, PRONOUNS, SKIES, WAKES, WHEN, a, describe
from .world import ATTRIBUTES, Scene, Split, held_out, random_scene

OMIT = 0.35  # how often the first sentence leaves an attribute to the image
CHANGEABLE = ("place", "weather", "prop", "wears", "action")


@dataclass(frozen=True)
class Step:
    """One sentence of a story and the scene that it and its past describe."""

    text: str
    scene: Scene


@dataclass(frozen=True)
class Story:
    """Steps in order; step k is drawn with `draw(scene, seed + k)`."""

    steps: tuple[Step, ...]
    seed: int


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe everything in a scene in lower case; "nothing" worn or held is not said."""
    return describe(scene, rng.choice(ORDERS), rng.choice(WHEN[scene.weather]), rng.choice(("with", "holding")))


def story(rng: random.Random, split: Split, length: int = 5) -> Story:
    """Write a story of 1 or more steps about one character. "train" stories hold no held-out scene; of a "test" story's
    later steps at least two are held out, if there are two."""
    while True:
        scenes = list(_scenes(rng, split, length))
        if split == "train" or sum(map(held_out, scenes[1:])) >= min(2, length - 1):
            break
    she = rng.choice(tuple(PRONOUNS))
    hide = frozenset(n for n in ("colour", "wears", "prop", "place", "weather") if rng.random() < OMIT)
    steps = [Step(opening(rng, scenes[0], hide), scenes[0])]
    steps += [Step(sentence(rng, *pair, she), pair[1]) for pair in pairwise(scenes)]
    return Story(tuple(steps), rng.randrange(2**31))


def _scenes(rng: random.Random, split: Split, length: int) -> Iterator[Scene]:
    scene = random_scene(rng, split)
    home = scene.place  # of a test story: the one place where this character was never seen in training
    if split == "test" and rng.random() < 0.6:
        scene = replace(scene, place=rng.choice([p for p in ATTRIBUTES["place"] if p != home]))
    yield scene
    for _ in range(length - 1):
        scene = _next(rng, scene, split, home)
        yield scene


def _next(rng: random.Random, scene: Scene, split: Split, home: str) -> Scene:
    """Return a scene that differs in one or two attributes and can be told in one sentence."""
    while True:
        names = rng.sample(CHANGEABLE, rng.choice((1, 2)))
        new = {n: rng.choice([v for v in ATTRIBUTES[n] if v != getattr(scene, n)]) for n in names}
        if split == "test" and "place" in new and scene.place != home and rng.random() < 0.6:
            new["place"] = home
        things = {"place", "prop", "wears"} & new.keys()
        if scene.action == "sleeps" and things and (len(names) == 1 or new.get("action") != "stands"):
            continue  # nobody walks asleep: first wake up
        after = replace(scene, **new)
        if not (split == "train" and held_out(after)):
            return after


def opening(rng: random.Random, scene: Scene, hide: frozenset[str] = frozenset()) -> str:
    """Write the sentence that tells a scene on its own, but for the attributes in `hide`."""
    holds = rng.choice(("with", "holding"))
    return _finish(describe(scene, rng.choice(ORDERS), rng.choice(WHEN[scene.weather]), holds, hide))


def sentence(rng: random.Random, before: Scene, after: Scene, she: str) -> str:
    """Write the sentence that takes `before` to `after`."""
    changed = [n for n in CHANGEABLE if getattr(before, n) != getattr(after, n)]
    deeds = [_move(rng, before, after)] if "place" in changed else []
    deeds += [_change(rng, name, getattr(before, name), getattr(after, name)) for name in changed if name in CHANGES]
    if "action" in changed:
        wakes = [WAKES] if before.action == "sleeps" else []
        acts = [] if wakes and after.action == "stands" else [rng.choice(ACTS[after.action])]
        deeds = wakes + deeds + acts
    parts = [f"{she} {' and '.join(deeds)}"] if deeds else []
    if "weather" in changed:
        parts.insert(0, rng.choice(SKIES[after.weather]))
    return _finish(" and ".join(parts))


def _move(rng: random.Random, before: Scene, after: Scene) -> str:
    """Tell that somebody goes somewhere, at times with what stays the same."""
    same = [getattr(before, name) == getattr(after, name) != "nothing" for name in ("prop", "wears")]
    kept = list(compress(KEEP, same))
    kept = rng.choice(kept) if kept and rng.random() < 0.5 else ""
    return (rng.choice(MOVE) + kept).format(place=after.place, prop=after.prop, wears=after.wears)


def _change(rng: random.Random, name: str, old: str, new: str) -> str:
    kind = "lose" if new == "nothing" else "get" if old == "nothing" else "swap"
    return rng.choice(CHANGES[name][kind]).format(**{name: old, f"a_{name}": a(new)})


def _finish(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
