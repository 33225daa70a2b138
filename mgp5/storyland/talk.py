"""Dialogues of Storyland: requests that are answered with an image, and questions that are answered in words.

A new drawing shows what is asked for; what the request leaves open is: wears and holds nothing, stands, on a sunny day.
A colour or place that it leaves open is named by the reply. A changed drawing is the last image with
`mentions(request)` applied. A dialogue may take a new character, whom pronouns then mean, and come back to an earlier
one as last drawn.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Literal

from .language import ORDERS, PRONOUNS, WHEN, WHERE, a, describe
from .world import ATTRIBUTES, Scene, Split, held_out, random_scene

DRAW = ("Please draw {it}.", "Can you show me {it}?", "Paint {it}.", "Could you draw {it}?",
        "I would like to see {it}.", "{it}")  # fmt: skip
SHORT = ("a {it}", "a {it}", "{it}", "{it}", "A {it}!", "A {it}, please.", "a {it} please", "I want a {it}.",
         "Draw a {it}.", "Please draw a {it}.")  # fmt: skip
NEXT = ("And {it}.", "Now draw {it}.", "Now {it}, please.", "Next, {it}.", "{it}")
BACK = ("Back to the {colour} {species}.", "Now the {colour} {species} again.", "Show me the {colour} {species} again.")
MANY = ("Draw {number} {species}.", "Can you draw {number} {species}?", "Now {number} {species}, please.")
ONE = "I draw one at a time."  # of many that are asked for
NUMBERS = ("two", "three", "four", "five")
CHANGE: dict[str, tuple[str, ...]] = {
    "place": ("Take {her} to the {new}.", "Now show {her} {where}.", "What does {she} look like {where}?"),
    "weather": ("Now make it {sky}.", "Let it {sky}.", "What does {she} look like {when}?"),
    "prop": ("Give {her} {a_new}.", "Let {her} hold {a_new}.", "Now draw {her} with {a_new}."),
    "wears": ("Put {a_new} on {her}.", "Now draw {her} in {a_new}.", "Let {her} wear {a_new}."),
    "action": ("Let {her} {act}.", "Make {her} {act}.", "Now {she} should {act}."),
}
REMOVE = {"prop": ("Take the {old} away.", "Now put the {old} away."), "wears": ("Take off {hers} {old}.",)}
MAKE_SKY = {"sunny": "sunny", "rainy": "rain", "snowy": "snow", "night": "night"}
LET_SKY = {"sunny": "be sunny", "rainy": "rain", "snowy": "snow", "night": "be night"}
ACT = {"stands": "stand still", "jumps": "jump", "waves": "wave", "sleeps": "sleep"}
DOING = {"stands": "standing", "jumps": "jumping", "waves": "waving", "sleeps": "sleeping"}
SKY_NOW = {
    "sunny": "The sun is shining.",
    "rainy": "It is raining.",
    "snowy": "It is snowing.",
    "night": "It is night.",
}
HERE = ("Here {she} is.", "Here you are.", "Of course, here {she} is.", "Sure, here is the {species}.",
        "Here is {short}.")  # fmt: skip
LOOK = (("What do you see in this picture?", "I see"), ("Who is this?", "This is"),
        ("Please describe this picture.", "I see"), ("What is in this picture?", "This is"))  # fmt: skip
ASK: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "species": (("What animal is this?",), ("This is {a_species}.",)),
    "colour": (("What colour is the {species}?", "What colour is {she}?"),
               ("The {species} is {colour}.", "{She} is {colour}.")),
    "place": (("Where is {she}?", "Where is the {species}?"), ("{She} is {where}.", "The {species} is {where}.")),
    "prop": (("What is {she} holding?",), ("{She} is holding {a_prop}.",)),
    "wears": (("What is {she} wearing?",), ("{She} is wearing {a_wears}.",)),
    "weather": (("How is the weather?", "What is the weather like?"), ("{now}",)),
    "action": (("What is {she} doing?", "What is the {species} doing?"),
               ("{She} is {doing}.", "The {species} is {doing}.")),
}  # fmt: skip
OTHER = 0.25  # share of turns that are about another character
OPEN = 0.15  # how often a drawing leaves colour, or place, to the reply
BARE = 0.25  # how often it asks for "a green frog" and no more
GREET = (("Hello!", "Hi there!", "Good morning!"), ("Hello! What shall I draw?", "Hi! What would you like to see?"))
THANK = (("Thank you!", "Thanks a lot!", "That is lovely, thank you."), ("You are welcome.", "You are welcome, bye!"))
PRAISE = (("That looks great!", "How cute!"), ("I am glad that you like it.", "I am happy to hear that."))


@dataclass(frozen=True)
class Turn:
    """What one side says; `scene` is what its image shows, if there is one."""

    role: Literal["user", "assistant"]
    text: str
    scene: Scene | None = None


@dataclass(frozen=True)
class Dialog:
    """Alternating turns that begin with the user; the image of turn k is `draw(scene, seed + k)`."""

    turns: tuple[Turn, ...]
    seed: int


def dialog(rng: random.Random, split: Split) -> Dialog:
    """Write a dialogue of 4, 6 or 8 turns; the first image of a "test" dialogue is held out, none of "train"."""
    she = rng.choice(tuple(PRONOUNS))
    scene = random_scene(rng, split)
    exchanges = rng.choice((2, 3, 3, 4, 4))
    turns = _begin(rng, scene, she, exchanges > 2)
    scene = turns[-1].scene or turns[-2].scene
    asked: set[str] = set()
    earlier: list[tuple[Scene, str]] = []  # other characters as last drawn, and their pronouns
    while len(turns) < 2 * exchanges:
        if rng.random() < OTHER:
            before = scene, she
            if earlier and rng.random() < 0.5:
                scene, she = earlier.pop(rng.randrange(len(earlier)))
                turns += _back(rng, scene, she)
            else:
                she = rng.choice(tuple(PRONOUNS))
                turns += _other(rng, scene, split, she)
                scene = turns[-1].scene
            asked, earlier = set(), [(s, p) for s, p in (*earlier, before) if _who(s) != _who(scene)]
            continue
        last, lookless = len(turns) == 2 * exchanges - 2, exchanges == 2 and turns[1].scene is None
        if last and not lookless and rng.random() < 0.2:
            turns += _words(rng, rng.choice((THANK, PRAISE)))
        elif lookless or rng.random() < 0.5:
            turns += _changed(rng, scene, split, she)
            scene, asked = turns[-1].scene, set()
        else:
            name = rng.choice([name for name in ASK if name not in asked])
            asked.add(name)
            turns += _question(rng, name, scene, she)
    return Dialog(tuple(turns), rng.randrange(2**31))


def _begin(rng: random.Random, scene: Scene, she: str, greet: bool) -> list[Turn]:
    """Begin, at times with a greeting, then the first image: the user's own, which is described, or a drawing."""
    turns: list[Turn] = []
    if greet and rng.random() < 0.2:
        turns += _words(rng, GREET)
    if rng.random() < 0.75:
        return turns + _drawing(rng, scene, she)
    question, answer = rng.choice(LOOK)
    reply = Turn("assistant", f"{answer} {_pictured(rng, scene, full=True)}.")
    return [*turns, Turn("user", question, scene), reply]


def _words(rng: random.Random, pair: tuple[tuple[str, ...], tuple[str, ...]]) -> list[Turn]:
    return [Turn("user", rng.choice(pair[0])), Turn("assistant", rng.choice(pair[1]))]


def _slots(scene: Scene, she: str) -> dict[str, str]:
    nothing = {name: getattr(scene, name) for name in ("prop", "wears")}
    return {
        **scene.attributes(),
        **{f"a_{name}": value if value == "nothing" else a(value) for name, value in nothing.items()},
        "a_species": a(scene.species), "she": she, "She": she.capitalize(), "where": WHERE[scene.place],
        "doing": DOING[scene.action], "now": SKY_NOW[scene.weather], "her": PRONOUNS[she][0], "hers": PRONOUNS[she][1],
    }  # fmt: skip


def _pictured(rng: random.Random, scene: Scene, full: bool = False, hide: frozenset[str] = frozenset()) -> str:
    """Return a noun phrase for a scene; unless `full`, it leaves out at times what a new drawing takes for granted."""
    plain = {"action": "stands", "weather": "sunny"}
    drop = {n for n, v in plain.items() if not full and getattr(scene, n) == v and rng.random() < 0.7}
    text = describe(scene, ORDERS[0], rng.choice(WHEN[scene.weather]), "with", hide | (drop & {"weather"}))
    doing = "" if "action" in drop else f" {DOING[scene.action]}"
    return re.sub(rf" {scene.action}\b", doing, text, count=1)


def _drawing(rng: random.Random, scene: Scene, she: str, requests: tuple[str, ...] = DRAW) -> list[Turn]:
    if rng.random() < BARE:
        return _bare(rng, scene)
    for name, usual, share in (("wears", "nothing", 0.4), ("action", "stands", 0.35), ("weather", "sunny", 0.2)):
        if rng.random() < share:
            scene = replace(scene, **{name: usual})
    hide = frozenset(name for name in ("colour", "place") if rng.random() < OPEN)
    told = _pictured(rng, scene, hide=hide)
    request = rng.choice(requests)
    if request == "{it}" and rng.random() < 0.7:  # as a caption says it
        told = describe(scene, rng.choice(ORDERS), rng.choice(WHEN[scene.weather]), hide=hide)
    request = request.format(it=told)
    reply = f"Here is {_short(scene)}." if hide else _here(rng, scene, she)
    return [Turn("user", request), Turn("assistant", reply, scene)]


def _bare(rng: random.Random, scene: Scene) -> list[Turn]:
    scene = _alone(scene)
    request = rng.choice(SHORT).format(it=f"{scene.colour} {scene.species}")
    return [Turn("user", request), Turn("assistant", f"Here is {_short(scene)}.", scene)]


def _other(rng: random.Random, scene: Scene, split: Split, she: str) -> list[Turn]:
    """Ask for a new character, at times for several of a kind, of which one is drawn."""
    new = scene
    while _who(new) == _who(scene):
        new = random_scene(rng, split)
    if rng.random() < 0.15:
        new = _alone(new)
        kind = "foxes" if new.species == "fox" else f"{new.species}s"
        request = rng.choice(MANY).format(number=rng.choice(NUMBERS), species=kind)
        return [Turn("user", request), Turn("assistant", f"{ONE} Here is {_short(new)}.", new)]
    return _drawing(rng, new, she, (*NEXT, *NEXT, *DRAW))


def _back(rng: random.Random, scene: Scene, she: str) -> list[Turn]:
    request = rng.choice(BACK).format(**scene.attributes())
    return [Turn("user", request), Turn("assistant", _here(rng, scene, she), scene)]


def _alone(scene: Scene) -> Scene:
    return replace(scene, wears="nothing", prop="nothing", action="stands", weather="sunny")


def _who(scene: Scene) -> tuple[str, str]:
    return scene.colour, scene.species


def _short(scene: Scene) -> str:
    return f"a {scene.colour} {scene.species} {WHERE[scene.place]}"


def _here(rng: random.Random, scene: Scene, she: str) -> str:
    return rng.choice(HERE).format(**_slots(scene, she), short=_short(scene))


def _changed(rng: random.Random, scene: Scene, split: Split, she: str) -> list[Turn]:
    while True:
        name = rng.choice(tuple(CHANGE))
        new = rng.choice([value for value in ATTRIBUTES[name] if value != getattr(scene, name)])
        after = replace(scene, **{name: new})
        if not (split == "train" and held_out(after)):
            break
    template = rng.choice(REMOVE[name] if new == "nothing" else CHANGE[name])
    slots = {**_slots(after, she), "old": getattr(scene, name), "new": new, "a_new": a(new)}
    if name == "weather":
        slots["sky"] = (LET_SKY if template.startswith("Let") else MAKE_SKY)[new]
        slots["when"] = rng.choice(WHEN[new])
    elif name == "action":
        slots["act"] = ACT[new]
    request = template.format(**slots)
    reply = _here(rng, after, she) if rng.random() < 0.6 else _echo(after, name, she)
    return [Turn("user", request), Turn("assistant", reply, after)]


def _echo(scene: Scene, name: str, she: str) -> str:
    """Return a reply that repeats the change."""
    answer = ASK[name][1][0].format(**_slots(scene, she))
    return f"Now {answer[0].lower()}{answer[1:]}"


def _question(rng: random.Random, name: str, scene: Scene, she: str) -> list[Turn]:
    questions, answers = ASK[name]
    slots = _slots(scene, she)
    return [Turn("user", rng.choice(questions).format(**slots)), Turn("assistant", rng.choice(answers).format(**slots))]
