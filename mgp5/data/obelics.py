"""OBELICS (Laurencon et al., arXiv 2306.16527): web pages as texts and images in their order.

Each line of `obelics*.jsonl`, or row of `obelics*.parquet` (extra `datasets`), is a document, in two lists of one
length of which one has a value at each place:

    {"images": [null, "a.jpg", null], "texts": ["A cat.", null, "It jumps."]}

Images are files in `images/` or beside the table. The published files name addresses: the file of one is called by
its SHA-256, as `printf %s ADDRESS | sha256sum` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from . import tables
from .files import check_usable, lines
from .mmc4 import Documents, Parts, document_of, shards_of


def load(path: Path, split: str = "train") -> Documents:
    """Read documents from the shards of a folder (of `<split>/` in it, if it is there), or from one file.

    An image that is not there is left out. Raises Mgp5Error for a missing shard, a path that leaves the folder, or no
    usable document.
    """
    found, root = shards_of(path, split, "obelics*.jsonl", "obelics*.parquet")
    dataset = Documents(root)
    for where, document in (row for table in found for row in _rows(table)):
        images, texts = document.get("images"), document.get("texts")
        if not _pairs(images, texts):
            dataset.problems.note("bad row", where)
            continue
        parts: Parts = []
        for image, text in zip(images, texts, strict=True):
            if text and text.strip():
                parts.append(("text", text.strip()))
            elif image and (file := dataset.find(_file_of(image), where)):
                parts.append(("image", file))
        dataset.append(where, parts)
    check_usable(dataset, root)
    return dataset


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the documents of a file, each behind "name:number". Raises Mgp5Error."""
    if table.suffix == ".parquet":
        return tables.rows(table, ["images", "texts"])
    return ((where, document_of(line)) for where, line in lines(table))


def _file_of(image: str) -> str:
    return sha256(image.encode()).hexdigest() if "://" in image else image


def _pairs(images: Any, texts: Any) -> bool:
    """Whether these are lists of one length of texts and None, with at most one text at each place."""
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        return False
    return all(isinstance(v, str | None) for v in (*images, *texts)) and not any(
        map(all, zip(images, texts, strict=True))
    )
