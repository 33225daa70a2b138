"""CC3M (Sharma et al., 2018): single captioned images, for the pretraining stage."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import Mgp5Error
from ..messages import Conversation, Image
from ..prompts import CAPTION_INSTRUCTIONS, caption_to_image
from .files import ImageFiles, Records, check_usable, find_table, lines, pick

NOTHING = ("nan", "null", "none", "n/a")  # what programs write where there is no caption
_DROPPED = re.compile(r'[.!"()*#:;~]')


def clean_caption(caption: str) -> str:
    """Return a caption in lower case with single blanks, without . ! " ( ) * # : ; ~ and "" for words of NOTHING."""
    words = " ".join(_DROPPED.sub(" ", caption.lower()).split())
    return "" if words in NOTHING else words


@dataclass(frozen=True, kw_only=True)
class Captions:
    """How captioned images become samples, in all formats that have them. Raises Mgp5Error.

    Attributes:
        instruct_every: after how many training rows one is repeated as an instruction; 0 = never. Other splits have
            none, so that every image counts once in an evaluation.
        bare_captions: ask for an image by its caption without the chat template.
        caption_column, image_column: names of the columns, if others; of shards suffixes, as "outputs.txt".
        seed: chooses among the wordings of the instruction.
    """

    instruct_every: int = 100
    bare_captions: bool = False
    caption_column: str | None = None
    image_column: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.instruct_every < 0:
            raise Mgp5Error(f"instruct_every is {self.instruct_every}", "expected 0 or more", usage=True)

    def numbers(self, row: int) -> tuple[int, ...]:
        """Return the sample numbers of a row, counted from 1: every `instruct_every`-th is an instruction (1) too."""
        return (0, 1) if self.instruct_every and row % self.instruct_every == 0 else (0,)

    def count(self, rows: int) -> int:
        """Return the number of samples of so many rows."""
        return rows + (rows // self.instruct_every if self.instruct_every else 0)

    def sample(self, image: Image, name: str, number: int) -> Conversation:
        """Return a sample, from the caption of an image of this name to the image."""
        choice = pick(len(CAPTION_INSTRUCTIONS), self.seed, name) if number else None
        return caption_to_image(image, choice, self.bare_captions)


def captions_of(split: str, options: dict[str, Any]) -> Captions:
    """Return the `Captions` of a split with these options."""
    asked = Captions(**options)
    return asked if split == "train" else replace(asked, instruct_every=0)


class CC3M(Records):
    """Samples from a caption to its image; after every `instruct_every`-th row, the row again as an instruction."""

    def __init__(self, root: Path, captions: Captions) -> None:
        super().__init__(root)
        self._captions = captions

    def __getitem__(self, index: int) -> Conversation:
        name, caption, number = self.record(index)
        return self._captions.sample(Image(path=self.root / name, caption=caption), name, number)

    def key(self, index: int) -> str:
        """Return the path of the image, relative to the folder; that of an instruction ends in "#instruction"."""
        name, _, number = self.record(index)
        return name + "#instruction" * number


OPTIONS = Captions


def load(path: Path, split: str = "train", **options: Any) -> CC3M:
    """Read captioned images from `cc3m_<split>.tsv`: a header "caption<TAB>image_path", then a row for each image.

    `path` is the table or its folder; image paths are relative to the folder. A quoted caption may have tabs and
    newlines, as the csv module writes them; case and blanks around the names of columns do not count. Options are those
    of `Captions`. Raises Mgp5Error for a missing table, a wrong header, a path that leaves the folder, no usable row.
    """
    captions = captions_of(split, options)
    table = find_table(path, split, "cc3m_{split}.tsv")
    dataset, images, source = CC3M(table.parent, captions), ImageFiles(table.parent), lines(table)
    count, named = 0, (captions.caption_column or "caption", captions.image_column or "image_path")
    header = [name.strip().lower() for name in next(source, ("", b""))[1].decode(errors="replace").split("\t")]
    columns = [name.lower() for name in named]
    if not set(columns) <= set(header):
        hint = f"expected {' and '.join(columns)}, tab-separated, or set data.caption_column and data.image_column"
        raise Mgp5Error(f"{table} begins with the columns {header}", hint)
    places = [header.index(name) for name in columns]
    for where, row in _rows(source, len(header)):
        if not (fields := _fields(row, places)):
            dataset.problems.note("bad row", where)
        elif path := images.find(fields[1], where):
            count += 1
            dataset.add(path, fields[0], captions.numbers(count))
        else:
            dataset.problems.note("missing image", f"{where} {fields[1]}")
    check_usable(dataset, table)
    return dataset


def _rows(source: Iterator[tuple[str, bytes]], width: int) -> Iterator[tuple[str, list[str]]]:
    """Yield where each row begins, and its fields; none of what is no row of `width` fields.
    A line with an open quote goes on in the next ones, until they end a row, or one of them is a row by itself."""
    begun, text = "", ""
    for where, line in source:
        fields = _split(line, width)
        if text and (not fields or any(f.count('"') % 2 and not f.startswith('"') for f in fields)):
            line = f"{text}\n".encode() + line
            where, fields = begun, _split(line, width)
        elif text:
            yield begun, []
        last = line.decode(errors="replace").rpartition("\t")[2] if not fields else ""
        begun, text = (where, line.decode(errors="replace")) if last[:1] == '"' and last.count('"') % 2 else ("", "")
        if not text:
            yield where, fields
    if text:
        yield begun, []


def _split(line: bytes, width: int) -> list[str]:
    """Return the fields of a line, [] when there are not `width` of them."""
    try:
        text = line.decode()
        fields = text.split("\t")
        if len(fields) != width or "\n" in text:  # a tab or a newline in quotes
            (fields,) = csv.reader([text], delimiter="\t", strict=True)
    except (UnicodeDecodeError, ValueError, csv.Error):
        return []
    return fields if len(fields) == width else []


def _fields(row: list[str], places: list[int]) -> tuple[str, str] | None:
    """Return the cleaned caption and the image path of a row, None when either is missing."""
    caption, name = (row[place] for place in places) if row else ("", "")
    caption, name = clean_caption(caption), name.strip().strip('"')  # a spreadsheet may have put quotes around fields
    return (caption, name) if caption and name else None
