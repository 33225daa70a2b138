"""MMC4 (Zhu et al., arXiv 2304.06939): documents of sentences, and images that belong to one sentence each.

Each line of `docs_shard_*.jsonl`, which may be in a .zip of its own, is a document:

    {"text_list": ["A cat.", ...], "image_info": [{"image_name": "a.jpg", "matched_text_index": 0, "matched_sim": 0.3}]}

Images lie in `images/` or beside the file. What is chosen of them is as MM-Interleaved's release does.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..messages import Conversation, Image, Message, Text
from .files import ImageFiles, Records, check_usable, lines, parse, pick

Parts = list[tuple[str, str]]  # "text" or "image", and the text or the path


class Documents(Records):
    """Documents of text and images, each a sample that is learnt whole; keys like "docs_shard_0_v2.jsonl:7/0"."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.images = ImageFiles(root)

    def find(self, name: str, where: str) -> str | None:
        """Return the path of an image in `images/` or beside the file, None when there is none; notes which."""
        found = self.images.find(f"images/{name}", where) or self.images.find(name, where)
        if found is None:
            self.problems.note("missing image", f"{where} {name}")
        return found

    def append(self, where: str, parts: Parts) -> None:
        """Add a document, unless it has no text or no image."""
        if {"text", "image"} <= {kind for kind, _ in parts}:
            self.add(where, parts, (0,))
        else:
            self.problems.note("no text or no image", where)

    def __getitem__(self, index: int) -> Conversation:
        _, parts, _ = self.record(index)
        content = [Text(value) if kind == "text" else Image(path=self.root / value) for kind, value in parts]
        return Conversation((Message("assistant", tuple(content)),), bare=True)


def load(
    path: Path, split: str = "train", *, least_similarity: float = 0.24, most_images: int = 6, seed: int = 0
) -> Documents:
    """Read documents from the shards of a folder (of `<split>/` in it, if it is there), or from one file.

    Images less similar to their sentence than `least_similarity` are left out, then all but `most_images` of a
    document, and every other document that has one image only; an image stands before or behind its sentence; `seed`
    chooses. Raises Mgp5Error for a missing shard, a path that leaves the folder, or no usable document.
    """
    tables, root = shards_of(path, split, "docs_shard_*.jsonl", "docs_shard_*.jsonl.zip")
    dataset = Documents(root)
    for where, line in (row for table in tables for row in _rows(table)):
        document = document_of(line)
        sentences, found = document.get("text_list"), document.get("image_info")
        if not _texts(sentences) or not isinstance(found, list):
            dataset.problems.note("bad row", where)
            continue
        images = [image for image in found if _fits(image, len(sentences), least_similarity)]
        images.sort(key=lambda image: pick(1 << 30, seed, where, image["image_name"]))
        named = [
            (image["matched_text_index"], dataset.find(image["image_name"], where)) for image in images[:most_images]
        ]
        placed = sorted((index, name) for index, name in named if name is not None)
        if len(placed) == 1 and pick(2, seed, where):
            dataset.problems.note("one image", where)
            continue
        parts: Parts = []
        for index, sentence in enumerate(sentences):
            own: Parts = [("image", name) for at, name in placed if at == index]
            text: Parts = [("text", sentence.strip())] if sentence.strip() else []
            parts += own + text if pick(2, seed, where, index) else text + own
        dataset.append(where, parts)
    check_usable(dataset, root)
    return dataset


def shards_of(path: Path, split: str, *patterns: str) -> tuple[list[Path], Path]:
    """Return the files of a split that match one of the patterns, in order, and the folder of their images.
    Raises Mgp5Error if there is none: what lies in no folder of a split is for training."""
    if path.is_file():
        return [path], path.parent
    folder = path / split if (path / split).is_dir() else path
    tables = sorted(table for pattern in patterns for table in folder.glob(pattern))
    if not tables or (folder == path and split != "train"):
        raise Mgp5Error(f"no {patterns[0]} of the split {split} in {path}", "give the folder that holds such files")
    return tables, folder


def document_of(line: bytes) -> dict[str, Any]:
    """Return the object on a line, {} where there is none."""
    try:
        document = parse(line)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _rows(table: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the lines of a file or of a .zip of one, each behind "name:number". Raises Mgp5Error."""
    if table.suffix != ".zip":
        yield from lines(table)
        return
    try:
        with zipfile.ZipFile(table) as archive, archive.open(archive.namelist()[0]) as file:
            yield from ((f"{table.name}:{number}", line.strip(b"\r\n")) for number, line in enumerate(file, 1))
    except (OSError, IndexError, zipfile.BadZipFile) as error:
        raise Mgp5Error(f"{table} cannot be read ({error})", "download it again") from None


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _fits(image: Any, sentences: int, least: float) -> bool:
    """Whether what a document says of an image is complete, and it is similar enough to its sentence."""
    values = image if isinstance(image, dict) else {}
    index, similarity = values.get("matched_text_index"), values.get("matched_sim")
    known = isinstance(values.get("image_name"), str) and isinstance(index, int) and isinstance(similarity, int | float)
    return known and 0 <= index < sentences and similarity >= least
