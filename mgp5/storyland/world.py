"""The state space of Storyland: attributes, scenes, the held-out triples and seeded sampling.

Letters: s species index, c colour index, p place index.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Literal

Split = Literal["train", "test"]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "species": ("fox", "rabbit", "bear", "cat", "owl", "frog", "elephant", "duck"),
    "colour": ("purple", "green", "red", "blue", "yellow", "white"),
    "wears": ("nothing", "hat", "scarf", "bow"),
    "place": ("beach", "forest", "mountains", "town", "desert", "meadow"),
    "weather": ("sunny", "rainy", "snowy", "night"),
    "prop": ("nothing", "ball", "balloon", "umbrella", "flower", "book", "lantern"),
    "action": ("stands", "jumps", "waves", "sleeps"),
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one image shows: a value for each of the seven attributes of `ATTRIBUTES`."""

    species: str
    colour: str
    wears: str
    place: str
    weather: str
    prop: str
    action: str

    def __post_init__(self) -> None:
        values = self.attributes().items()
        wrong = [f"{name} {value!r}" for name, value in values if value not in ATTRIBUTES[name]]
        if wrong:
            raise ValueError(f"unknown {', '.join(wrong)}; see ATTRIBUTES")

    def indices(self) -> tuple[int, ...]:
        """Return the index of each value in its tuple, in the order of `ATTRIBUTES`."""
        return tuple(values.index(getattr(self, name)) for name, values in ATTRIBUTES.items())

    @classmethod
    def from_indices(cls, indices: tuple[int, ...]) -> Scene:
        """Return the scene of `indices`; raises IndexError or ValueError for what is no scene."""
        return cls(**{name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), indices, strict=True)})

    def attributes(self) -> dict[str, str]:
        """Return attribute name -> value, in the order of `ATTRIBUTES`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def held_out(scene: Scene) -> bool:
    """Return whether a scene is kept for testing: a fixed eighth of the 288 (species, colour, place) triples.

    For each (colour, place) exactly one of the eight species is held out (species and offset agree modulo 8), so
    every species, colour and place, and every pair of them, is still seen in training.
    """
    species, colour, _, place, *_ = scene.indices()
    return (species + 3 * colour + 5 * place) % 8 == 0


def rng(split: str, seed: int, index: int) -> random.Random:
    """Return the random generator of item `index` of a split; test never repeats the draws of train."""
    return random.Random(f"storyland|{split}|{seed}|{index}")


def random_scene(rng: random.Random, split: Split | None = None) -> Scene:
    """Draw a uniform scene: never held out for "train", always held out for "test", any for None."""
    while True:
        scene = Scene(**{name: rng.choice(values) for name, values in ATTRIBUTES.items()})
        if split is None or held_out(scene) == (split == "test"):
            return scene
