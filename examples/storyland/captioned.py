"""Storyland's data as own data with other captions: stories and dialogues, whose pictures have none, for GILL's
objective, and captions in the same words for SEED's tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click

from mgp5.data import load_data
from mgp5.storyland.tell import caption
from mgp5.storyland.write import read_scenes


def sentence(format: str, asked: dict, answer: dict) -> str:
    """What the data itself says of an answer's picture: the sentence of that scene, or a dialogue's request."""
    texts = [part["text"] for message in (asked, answer) for part in message["content"] if part["type"] == "text"]
    if format == "mmdialog":  # its answers say "Here you are."
        texts = [part["text"] for part in asked["content"] if part["type"] == "text"]
    return texts[-1].rpartition("description: ")[2]


def captioned(data: Path, format: str, words: str) -> Iterator[list[dict]]:
    """Chats of DATA/format, with a caption of every picture that is to be drawn."""
    scenes, samples = dict(read_scenes(data / format)), load_data(format, data / format)
    chats = [samples[index].to_chat() for index in range(len(samples))]
    for chat, after in pairwise([*chats, []]):
        if after[: len(chat)] == chat:
            continue  # a dialogue that goes on: own data learns every answer of the whole one
        for asked, message in pairwise(chat):
            for part in (part for part in message["content"] if part["type"] == "image"):
                place = Path(part["path"])
                part["path"] = str(place.relative_to(data))
                if message["role"] == "assistant" and words == "story":
                    part["caption"] = sentence(format, asked, message)
                elif message["role"] == "assistant":
                    part["caption"] = caption(scenes[place], random.Random(part["path"] if words == "changing" else 0))
        yield chat


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--format", "formats", multiple=True, default=["vist", "mmdialog"], help="Of what in DATA; or cc3m.")
@click.option(
    "--words",
    type=click.Choice(["story", "changing", "same"]),
    default="story",
    help="The data's own sentences; else full descriptions, in changing words as people's are, or always in the same.",
)
def main(data: Path, out: Path, formats: tuple[str, ...], words: str) -> None:
    """Write OUT, which is to lie in DATA, from DATA/vist and DATA/mmdialog."""
    chats = [chat for format in formats for chat in captioned(data, format, words)]
    with out.open("x") as file:
        file.writelines(json.dumps({"messages": chat}) + "\n" for chat in chats)


if __name__ == "__main__":
    main()
