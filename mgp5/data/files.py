"""What the loaders share: finding tables and pictures, reading lines, and keeping count of what was skipped."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..errors import Mgp5Error
from ..files import digest
from ..heads.batch import Skipped as Skipped
from ..messages import Conversation, inside

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")  # of pictures
SPLITS = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}


class Problems(dict[str, int]):
    """How often something was skipped, by kind; `first` names the first place of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}

    def note(self, kind: str, place: str) -> None:
        """Count one more of a kind."""
        self[kind] = self.get(kind, 0) + 1
        self.first.setdefault(kind, place)

    def merge(self, other: Problems) -> None:
        """Add the counts of another."""
        for kind, count in other.items():
            self[kind] = self.get(kind, 0) + count
            self.first.setdefault(kind, other.first[kind])

    def __str__(self) -> str:
        return "; ".join(f"{count} x {kind} (first: {self.first[kind]})" for kind, count in self.items()) or "none"


class Dataset(Protocol):
    """Samples by position, as a torch DataLoader wants them."""

    problems: Problems

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation:
        """A conversation whose last message, by the assistant, is the target."""

    def key(self, index: int) -> str:
        """A stable name of the sample, for reports."""


class Rows:
    """Many short byte strings in one buffer.

    Forked DataLoader workers share it, whereas millions of Python objects would be copied as their counts change.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ends = array("Q")

    def add(self, row: bytes) -> None:
        """Append a row."""
        self._buffer += row
        self._ends.append(len(self._buffer))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        """Row `index`, counted from 0."""
        return bytes(self._buffer[self._ends[index - 1] if index else 0 : self._ends[index]])


class Pictures:
    """The picture files below a folder: each directory is listed once, not looked into once per picture."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._directories: dict[str, dict[str, bool]] = {}

    def find(self, name: str, place: str) -> str | None:
        """The path relative to the folder, or None when there is no such file.

        Raises Mgp5Error, naming `place`, when the path leaves the folder (absolute, "..", or through a link).
        """
        name = name.replace("\\", "/")
        directory, _, file = name.rpartition("/")
        try:
            if name.startswith("/") or file == "..":
                inside(self.root, name)
            if directory not in self._directories:
                self._directories[directory] = _listing(inside(self.root, directory or "."))
            is_link = self._directories[directory].get(file)
            if is_link:
                inside(self.root, name)
        except Mgp5Error as error:
            raise Mgp5Error(f"{place}: {error.message}", error.hint) from None
        except ValueError:  # a NUL or half a character: no file can be called so
            return None
        return None if is_link is None else name


def _listing(directory: Path) -> dict[str, bool]:
    """Names of the files in a directory, each with whether it is a link; empty when it cannot be read."""
    try:
        with os.scandir(directory) as entries:
            return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except OSError:
        return {}


def find_table(path: Path, split: str, *patterns: str) -> Path:
    """The file of a split: `path` itself when it is a file, else the first pattern that exists below it.

    Args:
        path: what `--data` was given.
        split: "train", "val" or "test"; the last two stand in for each other.
        patterns: file names with "{split}" in them, the usual one first.

    Raises Mgp5Error that names the expected file.
    """
    if split not in SPLITS:
        raise Mgp5Error(f"unknown split {split!r}", f"expected one of {', '.join(SPLITS)}", usage=True)
    if path.is_file():
        return path
    for name in SPLITS[split]:
        for pattern in patterns:
            if (table := path / pattern.format(split=name)).is_file():
                return table
    raise Mgp5Error(f"no {path / patterns[0].format(split=split)}", "give the folder that holds this file as data")


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not blank, each with its place ("name:number"). Raises Mgp5Error."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip(b"\r\n")
                if line.strip():
                    yield f"{path.name}:{number}", line
    except OSError as error:
        raise Mgp5Error(f"{path} cannot be read ({error.strerror})", "check the file") from None


def check_usable(dataset: Dataset, table: Path) -> None:
    """Raise Mgp5Error when nothing is left to train on."""
    if not len(dataset):
        raise Mgp5Error(f"{table} has no usable sample", f"skipped: {dataset.problems}")


def pick(count: int, *key: object) -> int:
    """A number below `count` that depends on the key only: the same in every run, process and Python version."""
    return int(digest(repr(key), size=8), 16) % count
