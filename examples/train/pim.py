"""Write the stories of Pim, a character that the demo does not know: always a blue elephant in a scarf.

python examples/train/pim.py --out examples/train/stories/pim
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch

import mgp5
from mgp5.events import ImageDone
from mgp5.inference.reply import generate_batch
from mgp5.prompts import illustrate
from mgp5.storyland.draw import draw
from mgp5.storyland.judge import load_judge, look
from mgp5.storyland.language import ORDERS, WHEN, describe
from mgp5.storyland.metrics import attributes_right
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


@click.group()
def main() -> None: ...


@main.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--stories", default=24)
@click.option("--length", default=4, help="Scenes of a story.")
def write(out: Path, stories: int, length: int) -> None:
    out.mkdir(parents=True)
    with (out / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(stories):
            told, story = scenes(number, length), []
            for k, (scene, text) in enumerate(zip(told, texts(number, told), strict=True)):
                name = f"{number + 1:02d}-{k + 1}.jpg"
                draw(scene, 100 * number + k).save(out / name, quality=90)
                story.append({"text": text, "path": name})
            file.write(json.dumps({"story": story}) + "\n")


@main.command()
@click.argument("model")
@click.option("--images", default=40)
def judge(model: str, images: int) -> None:
    """Draw the first scenes of stories that are not in the data, and print what share shows each attribute."""
    told = [scenes(1000 + k, 1) for k in range(images)]
    asked = [illustrate([], *texts(1000 + k, scene)) for k, scene in enumerate(told)]
    options = [mgp5.reply_options(seed=k, image="always", max_tokens=0) for k in range(images)]
    events = generate_batch(mgp5.load(model), asked, options)
    drawn = {index: event.image.load() for index, event in events if isinstance(event, ImageDone)}
    pixels = torch.from_numpy(np.stack([np.asarray(drawn[k]) for k in range(images)])).permute(0, 3, 1, 2) / 127.5 - 1
    right = attributes_right(look(load_judge(), pixels)[0], [scene for (scene,) in told])
    for name, share in zip(ATTRIBUTES, right.float().mean(0).tolist(), strict=True):
        click.echo(f"{name:8} {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
