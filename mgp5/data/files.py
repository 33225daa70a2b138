"""What the formats share: finding tables and image files, reading lines, and counting what was skipped."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..errors import Mgp5Error
from ..files import digest
from ..messages import Conversation, inside
from ..messages import Skipped as Skipped

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")  # of images
SPLITS = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}


class Problems(dict[str, int]):
    """Number of skipped samples by kind of problem; `first` says where each kind was met first."""

    def __init__(self, skipped: Iterable[Skipped] = ()) -> None:
        super().__init__()
        self.first: dict[str, str] = {}
        for kind, where in skipped:
            self.note(kind, where)

    def note(self, kind: str, where: str) -> None:
        """Count one more of a kind."""
        self[kind] = self.get(kind, 0) + 1
        self.first.setdefault(kind, where)

    def merge(self, other: Problems) -> None:
        """Add the counts of another data source."""
        for kind, count in other.items():
            self[kind] = self.get(kind, 0) + count
            self.first.setdefault(kind, other.first[kind])

    def __str__(self) -> str:
        return "; ".join(f"{count} x {kind} (first: {self.first[kind]})" for kind, count in self.items()) or "none"


class Dataset(Protocol):
    """A map-style data set, as a torch DataLoader reads it; the last message of a sample is the target."""

    problems: Problems  # samples that were skipped when it was loaded

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...

    def key(self, index: int) -> str:
        """Return a name of the sample that stays the same, for reports."""


class Records:
    """Records in one buffer, which forked data workers share where they would copy objects, and the samples of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.problems = root, Problems()
        self._buffer, self._ends = bytearray(), array("Q")  # each record as the JSON of [name, content]
        self._record_of, self._number_of = array("I"), array("I")  # per sample

    def add(self, name: str, content: Any, numbers: Iterable[int]) -> None:
        """Add a record, and a sample of it for each number (of a turn, say)."""
        for number in numbers:
            self._record_of.append(len(self._ends))
            self._number_of.append(number)
        self._buffer += json.dumps([name, content], separators=(",", ":")).encode()
        self._ends.append(len(self._buffer))

    def __len__(self) -> int:
        return len(self._number_of)

    def record(self, index: int) -> tuple[str, Any, int]:
        """Return name and content of a sample's record, and the sample's number in it. Raises IndexError."""
        record, number = self._record_of[index], self._number_of[index]
        start = self._ends[record - 1] if record else 0
        name, content = json.loads(self._buffer[start : self._ends[record]])
        return name, content, number

    def key(self, index: int) -> str:
        """Return the name of the record and the number of the sample, as in "17/3"."""
        name, _, number = self.record(index)
        return f"{name}/{number}"


class ImageFiles:
    """The image files below a folder: each directory is listed once, not looked into once per image."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._directories: dict[str, dict[str, bool]] = {}

    def find(self, name: str, where: str) -> str | None:
        """Return the path relative to the folder, None when there is no such file.
        Raises Mgp5Error that begins with `where` for a path that leaves the folder (absolute, "..", or by a link)."""
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
            raise Mgp5Error(f"{where}: {error.message}", error.hint) from None
        except ValueError:  # a NUL or half a character: no file can be called so
            return None
        return None if is_link is None else name


def _listing(directory: Path) -> dict[str, bool]:
    """Return the files in a directory, each with whether it is a link; none when it cannot be read."""
    try:
        with os.scandir(directory) as entries:
            return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except OSError:
        return {}


def split_names(split: str) -> tuple[str, ...]:
    """Return the names of a split in files: "val" and "test" stand in for each other. Raises Mgp5Error for others."""
    if split not in SPLITS:
        raise Mgp5Error(f"unknown split {split!r}", f"expected one of {', '.join(SPLITS)}", usage=True)
    return SPLITS[split]


def find_table(path: Path, split: str, *patterns: str) -> Path:
    """Return `path` itself when it is a file, else the first pattern, with {split} in it, that exists below it.
    "val" and "test" stand in for each other. Raises Mgp5Error for an unknown split, or no such file."""
    names = split_names(split)
    if path.is_file():
        return path
    for name in names:
        for pattern in patterns:
            if (table := path / pattern.format(split=name)).is_file():
                return table
    raise Mgp5Error(f"no {path / patterns[0].format(split=split)}", "give the folder that holds this file as data")


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the lines of a file that are not blank, each behind "name:number". Raises Mgp5Error."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip(b"\r\n")
                if line.strip():
                    yield f"{path.name}:{number}", line
    except OSError as error:
        raise Mgp5Error(f"{path} cannot be read ({error.strerror})", "check the file") from None


def parse(line: bytes) -> Any:
    """Return the value of a line of JSON. Raises ValueError, also for an object with one key twice, RecursionError."""
    return json.loads(line, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r:.40} twice in one object")
    return value


def check_usable(dataset: Dataset, table: Path) -> None:
    """Raise Mgp5Error when nothing is left to train on."""
    if not len(dataset):
        raise Mgp5Error(f"{table} has no usable sample", f"skipped: {dataset.problems}")


def pick(count: int, *key: object) -> int:
    """Return a number below `count` that depends on the key only: the same in every run, process and Python."""
    return int(digest(repr(key), size=8), 16) % count
