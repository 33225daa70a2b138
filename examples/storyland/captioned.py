"""Storyland's stories and dialogues as own data, each picture with a full description, which GILL's objective needs."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import click

from mgp5.data import load_data
from mgp5.data.storyland.tell import caption
from mgp5.data.storyland.world import Scene


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
def main(data: Path) -> None:
    """Write DATA/train.jsonl from DATA/vist and DATA/mmdialog."""
    with (data / "train.jsonl").open("x") as file:
        for format in ("vist", "mmdialog"):
            root = data / format
            rows = map(json.loads, (root / "attributes.jsonl").read_text().splitlines())
            scenes = {str(root / row["image"]): Scene(**row["attributes"]) for row in rows}
            samples = load_data(format, root)
            chats = [samples[index].to_chat() for index in range(len(samples))]
            for chat, after in pairwise([*chats, []]):
                if after[: len(chat)] == chat:
                    continue  # a dialogue that goes on: own data learns every answer of the whole one
                for part in (part for message in chat for part in message["content"] if part["type"] == "image"):
                    # Always in the same words: no history tells which of many a caption would choose.
                    part["caption"] = caption(scenes[part["path"]], random.Random(0))
                    part["path"] = str(Path(part["path"]).relative_to(data))
                file.write(json.dumps({"messages": chat}) + "\n")


if __name__ == "__main__":
    main()
