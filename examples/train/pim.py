"""Write the stories of Pim, a character that the demo does not know: always a blue elephant in a scarf.

python examples/train/pim.py --out examples/train/stories/pim
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import click

from mgp5.storyland.draw import draw
from mgp5.storyland.language import ORDERS, WHEN, describe
from mgp5.storyland.tell import CHANGEABLE, sentence
from mgp5.storyland.world import ATTRIBUTES, Scene, random_scene, rng

NAME, LOOKS = "Pim", {"species": "elephant", "colour": "blue", "wears": "scarf"}
PLAIN = "an elephant"  # what he is called in a description that hides his colour
CHANGES = [name for name in CHANGEABLE if name not in LOOKS]


def scenes(number: int, length: int) -> list[Scene]:
    """Return scenes in which one or two things change, never what Pim looks like; he wakes up before he goes on."""
    source = rng("pim", 0, number)
    told = [replace(random_scene(source), **LOOKS)]
    while len(told) < length:
        names = source.sample(CHANGES, source.choice((1, 2)))
        if told[-1].action == "sleeps" and "action" not in names:
            continue
        told.append(replace(told[-1], **{name: source.choice(ATTRIBUTES[name]) for name in names}))
        if told[-1] == told[-2] or (told[-2].action == "sleeps" and told[-1].action != "stands"):
            told.pop()
    return told


def texts(number: int, told: list[Scene]) -> list[str]:
    """Return a sentence for each scene; none says what he looks like."""
    source, first = rng("pim", 1, number), replace(told[0], wears="nothing")
    when = source.choice(WHEN[first.weather])
    opening = describe(first, source.choice(ORDERS), when, hide=frozenset(["colour"])).replace(PLAIN, NAME)
    said = [f"{opening[0].upper()}{opening[1:]}."]
    return said + [sentence(source, *pair, source.choice((NAME, "he"))) for pair in pairwise(told)]


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="New folder.")
@click.option("--stories", default=24)
@click.option("--length", default=4, help="Scenes of a story.")
def main(out: Path, stories: int, length: int) -> None:
    out.mkdir(parents=True)
    with (out / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(stories):
            told, story = scenes(number, length), []
            for k, (scene, text) in enumerate(zip(told, texts(number, told), strict=True)):
                name = f"{number + 1:02d}-{k + 1}.jpg"
                draw(scene, 100 * number + k).save(out / name, quality=90)
                story.append({"text": text, "path": name})
            file.write(json.dumps({"story": story}) + "\n")


if __name__ == "__main__":
    main()
