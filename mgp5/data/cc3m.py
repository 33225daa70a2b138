"""CC3M (Sharma et al., 2018): single captioned images, for the pretraining stage."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import Mgp5Error
from ..messages import Conversation, Image
from ..prompts import CAPTION_INSTRUCTIONS, caption_to_image
from .files import ImageFiles, Records, check_usable, find_table, instructed, lines, pick

COLUMNS = ("caption", "image_path")
_DROPPED = re.compile(r'[.!"()*#:;~]')


def clean_caption(caption: str) -> str:
    """Return a caption in lower case, without the characters . ! " ( ) * # : ; ~ and with single blanks."""
    return " ".join(_DROPPED.sub(" ", caption.lower()).split())


class CC3M(Records):
    """Samples from a caption to its image; after every `instruct_every`-th row, the row again as an instruction."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root)
        self._seed = seed

    def __getitem__(self, index: int) -> Conversation:
        name, caption, instruct = self.record(index)
        image = Image(path=self.root / name, caption=caption)
        return caption_to_image(image, pick(len(CAPTION_INSTRUCTIONS), self._seed, name) if instruct else None)

    def key(self, index: int) -> str:
        """Return the path of the image, relative to the folder; that of an instruction ends in "#instruction"."""
        name, _, instruct = self.record(index)
        return name + "#instruction" * instruct


def load(path: Path, split: str = "train", *, instruct_every: int = 100, seed: int = 0) -> CC3M:
    """Read captioned images from `cc3m_<split>.tsv`: a header "caption<TAB>image_path", then a row for each image.

    Args:
        path: folder of the table, or the table itself; image paths are relative to the table's folder.
        instruct_every: after how many training rows one is repeated as an instruction; 0 = never.
            Other splits have none, so that every image counts once in an evaluation.
        seed: chooses among the wordings of the instruction.

    Raises:
        Mgp5Error: a missing table, a wrong header, a path that leaves the folder, or no usable row.
    """
    if instruct_every < 0:
        raise Mgp5Error(f"instruct_every is {instruct_every}", "expected 0 or more", usage=True)
    table = find_table(path, split, "cc3m_{split}.tsv")
    dataset, images, source = CC3M(table.parent, seed), ImageFiles(table.parent), lines(table)
    every, count = instruct_every if split == "train" else 0, 0
    header = next(source, ("", b""))[1].decode(errors="replace").split("\t")
    if not set(COLUMNS) <= set(header):
        raise Mgp5Error(f"{table} begins with the columns {header}", f"expected {' and '.join(COLUMNS)}, tab-separated")
    for where, line in source:
        if not (fields := _fields(line, header)):
            dataset.problems.note("bad row", where)
        elif path := images.find(fields[1], where):
            count += 1
            dataset.add(path, fields[0], instructed(count, every))
        else:
            dataset.problems.note("missing image", f"{where} {fields[1]}")
    check_usable(dataset, table)
    return dataset


def _fields(line: bytes, header: list[str]) -> tuple[str, str] | None:
    """Return the cleaned caption and the image path of a row, None when either is missing."""
    try:
        fields = line.decode().split("\t")
    except UnicodeDecodeError:
        return None
    if len(fields) != len(header):
        return None
    caption, name = (fields[header.index(column)] for column in COLUMNS)
    caption, name = clean_caption(caption), name.strip().strip('"')  # a spreadsheet may have put quotes around fields
    return (caption, name) if caption and name else None
