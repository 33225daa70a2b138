"""OBELICS (Laurencon et al., arXiv 2306.16527): web pages as texts and images in their order.

Each line of `obelics*.jsonl` is a document, in two lists of one length of which one has a value at each place:

    {"images": [null, "a.jpg", null], "texts": ["A cat.", null, "It jumps."]}

The published files name images by addresses; here they are files in `images/` or beside the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import check_usable, lines
from .mmc4 import Documents, Parts, document_of, shards_of


def load(path: Path, split: str = "train") -> Documents:
    """Read documents from the shards of a folder (of `<split>/` in it, if it is there), or from one file.

    An image that is not there is left out. Raises Mgp5Error for a missing shard, a path that leaves the folder, or no
    usable document.
    """
    tables, root = shards_of(path, split, "obelics*.jsonl")
    dataset = Documents(root)
    for where, line in (row for table in tables for row in lines(table)):
        document = document_of(line)
        images, texts = document.get("images"), document.get("texts")
        if not _pairs(images, texts):
            dataset.problems.note("bad row", where)
            continue
        parts: Parts = []
        for image, text in zip(images, texts, strict=True):
            if text and text.strip():
                parts.append(("text", text.strip()))
            elif image and (found := dataset.find(image, where)):
                parts.append(("image", found))
        dataset.append(where, parts)
    check_usable(dataset, root)
    return dataset


def _pairs(images: Any, texts: Any) -> bool:
    """Whether these are lists of one length of texts and None, with at most one text at each place."""
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        return False
    return all(isinstance(v, str | None) for v in (*images, *texts)) and not any(
        map(all, zip(images, texts, strict=True))
    )
