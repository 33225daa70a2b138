"""CC3M (Sharma et al., 2018): single captioned images, for the pretraining stage."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import Mgp5Error
from ..messages import Conversation, Image
from ..prompts import CAPTION_INSTRUCTIONS, caption_to_image
from .files import ImageFiles, Problems, Rows, check_usable, find_table, lines, pick

COLUMNS = ("caption", "image_path")
_DROPPED = re.compile(r'[.!"()*#:;~]')


def clean_caption(caption: str) -> str:
    """Return a caption in lower case, without the characters . ! " ( ) * # : ; ~ and with single blanks."""
    return " ".join(_DROPPED.sub(" ", caption.lower()).split())


def num_samples(rows: int, instruct_every: int) -> int:
    """Return how many samples rows make where every `instruct_every`-th is repeated as an instruction; 0 = none is."""
    return rows + (rows // instruct_every if instruct_every else 0)


def locate(index: int, instruct_every: int) -> tuple[int, bool]:
    """Return the row of a sample, and whether it is its instruction: the last of `instruct_every` + 1 samples."""
    if not instruct_every:
        return index, False
    block, offset = divmod(index, instruct_every + 1)
    return block * instruct_every + min(offset, instruct_every - 1), offset == instruct_every


class CC3M:
    """Samples from a caption to its image; after every `instruct_every`-th row, the row again as an instruction."""

    def __init__(self, root: Path, rows: Rows, problems: Problems, instruct_every: int, seed: int) -> None:
        self.root, self.problems = root, problems
        self._rows = rows  # each "caption<TAB>path"
        self._every, self._seed = instruct_every, seed

    def __len__(self) -> int:
        return num_samples(len(self._rows), self._every)

    def __getitem__(self, index: int) -> Conversation:
        caption, name, instruct = self._row(index)
        image = Image(path=self.root / name, caption=caption)
        return caption_to_image(image, pick(len(CAPTION_INSTRUCTIONS), self._seed, name) if instruct else None)

    def key(self, index: int) -> str:
        """Return the path of the image, relative to the folder; that of an instruction ends in "#instruction"."""
        _, name, instruct = self._row(index)
        return name + ("#instruction" if instruct else "")

    def _row(self, index: int) -> tuple[str, str, bool]:
        """Return caption and path of a sample, and whether it is an instruction. Raises IndexError."""
        row, instruct = locate(range(len(self))[index], self._every)
        caption, name = self._rows[row].decode().split("\t")
        return caption, name, instruct


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
    problems, rows, images = Problems(), Rows(), ImageFiles(table.parent)
    source = lines(table)
    header = next(source, ("", b""))[1].decode(errors="replace").split("\t")
    if not set(COLUMNS) <= set(header):
        raise Mgp5Error(f"{table} begins with the columns {header}", f"expected {' and '.join(COLUMNS)}, tab-separated")
    for where, line in source:
        if not (fields := _fields(line, header)):
            problems.note("bad row", where)
        elif path := images.find(fields[1], where):
            rows.add(f"{fields[0]}\t{path}".encode())
        else:
            problems.note("missing image", f"{where} {fields[1]}")
    dataset = CC3M(table.parent, rows, problems, instruct_every if split == "train" else 0, seed)
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
