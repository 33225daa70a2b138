"""Storyland's stories and dialogues as own data, each picture with a full description, which GILL's objective needs."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import click

from mgp5.data import load_data
from mgp5.data.storyland.tell import caption
from mgp5.evaluation.tasks import pictured


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--vary", is_flag=True, help="Descriptions in changing words, as people's are; else always in the same.")
def main(data: Path, vary: bool) -> None:
    """Write DATA/train.jsonl from DATA/vist and DATA/mmdialog."""
    with (data / "train.jsonl").open("x") as file:
        for format in ("vist", "mmdialog"):
            scenes, samples = dict(pictured(data / format)), load_data(format, data / format)
            chats = [samples[index].to_chat() for index in range(len(samples))]
            for chat, after in pairwise([*chats, []]):
                if after[: len(chat)] == chat:
                    continue  # a dialogue that goes on: own data learns every answer of the whole one
                for part in (part for message in chat for part in message["content"] if part["type"] == "image"):
                    place = Path(part["path"])
                    part["path"] = str(place.relative_to(data))
                    part["caption"] = caption(scenes[place], random.Random(part["path"] if vary else 0))
                file.write(json.dumps({"messages": chat}) + "\n")


if __name__ == "__main__":
    main()
