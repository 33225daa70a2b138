"""Write Storyland to disk in exactly the formats of CC3M, VIST and MMDialog, so that the same loaders read it.

Beside each data set lies `attributes.jsonl` with the true attributes of every image.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from ..data.files import lines
from ..errors import Mgp5Error
from ..files import Claim
from ..prompts import STORY_SYSTEM, TASK_PROMPTS
from .details import Detail, random_detail
from .draw import draw
from .talk import dialog
from .tell import caption, opening, story
from .world import Scene, Split, random_scene, rng

ATTRIBUTES = "attributes.jsonl"  # of a data set: what its images show
QUALITY = 95  # of the JPEG files


def write(
    out: Path,
    split: Split,
    pairs: int,
    stories: int,
    dialogs: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    details: int = 0,
    narrations: int = 0,
) -> None:
    """Write captioned images to `out/cc3m`, stories of five images to `out/vist`, dialogues to `out/mmdialog`, to
    `out/details` pairs of images whose second must keep a kite that no text tells, and to `out/narrations` images that
    are told whole, without a story before them.

    The same seed gives the same files; "test" (CC3M and VIST call it "val") has held-out scenes. `progress` is called
    with (items done, items in all). Raises Mgp5Error for a wrong split or number, or if `out` is no empty folder.
    """
    out, counts = Path(out), {"cc3m": pairs, "vist": stories, "mmdialog": dialogs, "details": details}
    counts["narrations"] = narrations
    if split not in get_args(Split):
        raise Mgp5Error(f"split is {split!r}, expected one of {', '.join(get_args(Split))}", "use train or test")
    if min(counts.values()) < 0 or not any(counts.values()):
        raise Mgp5Error(f"asked for {counts}, expected numbers >= 0 and not all 0", "ask for at least one item")
    if out.exists() and not out.is_dir():
        raise Mgp5Error(f"{out} is a file, expected a folder", "name a new folder")
    done, total, writers = 0, sum(counts.values()), (_cc3m, _vist, _mmdialog, _details, _narrations)
    with Claim(out):
        if any(path.name != ".lock" for path in out.iterdir()):
            raise Mgp5Error(f"{out} is not empty, expected a new or empty folder", "name a new folder or remove it")
        for (name, count), writer in zip(counts.items(), writers, strict=True):
            for _ in writer(out / name, split, count, seed) if count else ():
                done += 1
                if progress:
                    progress(done, total)


def read_scenes(folder: Path) -> Iterator[tuple[Path, Scene]]:
    """Yield the images of one data set and what they show. Raises Mgp5Error for a line that tells no scene."""
    for place, line in lines(folder / ATTRIBUTES) if folder.is_dir() else ():
        try:
            row = json.loads(line)
            yield (folder / row["image"]).resolve(), Scene(**row["attributes"])
        except (ValueError, TypeError, KeyError) as error:
            raise Mgp5Error(f"{place} of {folder} tells no scene ({error})", "write Storyland again") from None


def _draw(root: Path, path: str, scene: Scene, seed: int, detail: Detail | None = None) -> str:
    """Draw a scene to a file of a data set, and note there what it shows; return the path."""
    draw(scene, seed, detail=detail).save(root / path, quality=QUALITY)
    row = {"image": path, "attributes": scene.attributes()} | ({"detail": asdict(detail)} if detail else {})
    with (root / ATTRIBUTES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return path


def _cc3m(root: Path, split: Split, count: int, seed: int) -> Iterator[None]:
    """Write `cc3m_{train|val}.tsv` with a header, and `{train|val}/000000012.jpg`."""
    name = "train" if split == "train" else "val"
    (root / name).mkdir(parents=True)
    with (root / f"cc3m_{name}.tsv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(("caption", "image_path"))
        for index in range(count):
            source = rng(f"pairs|{split}", seed, index)
            scene = random_scene(source, split)
            text = caption(scene, source)
            table.writerow((text, _draw(root, f"{name}/{index:09d}.jpg", scene, source.randrange(2**31))))
            yield


def _vist(root: Path, split: Split, count: int, seed: int) -> Iterator[None]:
    """Write `{train|val}_cleaned.json`, `{train|val}_image_mapping.json` and `{train|val}_images/000000005.jpg`."""
    name = "train" if split == "train" else "val"
    (root / f"{name}_images").mkdir(parents=True)
    told: dict[str, list[dict[str, Any]]] = {}
    mapping: dict[str, str] = {}
    for index in range(count):
        tale = story(rng(f"stories|{split}", seed, index), split)
        told[str(index)] = []
        for k, step in enumerate(tale.steps):
            number = len(mapping)
            told[str(index)].append({"caption": step.text, "image_id": str(number), "sequence_index": k})
            mapping[str(number)] = _draw(root, f"{name}_images/{number:09d}.jpg", step.scene, tale.seed + k)
        yield
    for suffix, value in (("cleaned", told), ("image_mapping", mapping)):
        (root / f"{name}_{suffix}.json").write_text(json.dumps(value, indent=4), encoding="utf-8")


def _mmdialog(root: Path, split: Split, count: int, seed: int) -> Iterator[None]:
    """Write `{train|test}/{train|test}_conversations.txt`, a JSON object a line, and the images in the same folder."""
    numbers = itertools.count()
    (root / split).mkdir(parents=True)
    with (root / split / f"{split}_conversations.txt").open("w", encoding="utf-8") as file:
        for index in range(count):
            talk = dialog(rng(f"dialogs|{split}", seed, index), split)
            conversation = []
            for k, turn in enumerate(talk.turns):
                elements = [{"__TEXT__": turn.text}]
                if turn.scene:
                    name = str(next(numbers))
                    _draw(root, f"{split}/{name}.jpg", turn.scene, talk.seed + k)
                    elements.append({"__MEDIA__": name})
                conversation.append({"turn": elements})
            row = {"conversation_id": index, "conversation": conversation}
            row |= {"negative_candidate_media_keys": [], "negative_candidate_texts": []}
            file.write(f"{json.dumps(row)}\n")
            yield


def _details(root: Path, split: Split, count: int, seed: int) -> Iterator[None]:
    """Write `{train|test}.jsonl`: a user shows an image with a kite and tells the next scene, which has it too."""
    (root / split).mkdir(parents=True)
    with (root / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for index in range(count):
            source = rng(f"details|{split}", seed, index)
            tale, detail = story(source, split, 2), random_detail(source)
            names = [
                _draw(root, f"{split}/{index:09d}-{k}.jpg", step.scene, tale.seed + k, detail)
                for k, step in enumerate(tale.steps)
            ]
            first, second = ({"type": "image", "path": name} for name in names)
            asked = [first, {"type": "text", "text": tale.steps[1].text}]
            file.write(_chat(("user", asked), ("assistant", [second])))
            yield


def _narrations(root: Path, split: Split, count: int, seed: int) -> Iterator[None]:
    """Write `{train|test}.jsonl`: the question of a narration and an image, and all that the image shows."""
    (root / split).mkdir(parents=True)
    with (root / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for index in range(count):
            source = rng(f"narrations|{split}", seed, index)
            scene = random_scene(source, split)
            name = _draw(root, f"{split}/{index:09d}.jpg", scene, source.randrange(2**31))
            asked = [{"type": "text", "text": source.choice(TASK_PROMPTS["narrate"])}, {"type": "image", "path": name}]
            file.write(_chat(("system", STORY_SYSTEM), ("user", asked), ("assistant", opening(source, scene))))
            yield


def _chat(*messages: tuple[str, str | list[dict[str, str]]]) -> str:
    """Return a conversation as a line of our own format."""
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}) + "\n"
