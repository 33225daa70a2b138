"""Reading tar shards: members by name only, of local files or over http(s); damage is told, not taken for the end."""

from __future__ import annotations

import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from itertools import groupby
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import urlopen

from .files import SUFFIXES, Skipped

TRIES, PAUSE, TIMEOUT = 4, 2.0, 60  # of a download; seconds
LARGEST = 100_000_000  # bytes of a member
KINDS = {*(suffix[1:] for suffix in SUFFIXES), "txt", "json"}


@dataclass(frozen=True)
class Entry:
    """The members of one sample: contents by suffix; None for one that is too large."""

    key: str
    parts: dict[str, bytes | None]


class _Header(tarfile.TarInfo):
    """A member. Where tarfile would take a damaged or missing header for the end of the archive, this raises."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise  # a block of zeros, the regular end
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def is_url(name: str) -> bool:
    """Whether a shard is to be downloaded."""
    return name.startswith(("http://", "https://"))


def read_entries(name: str, wanted: Callable[[int], bool]) -> Iterator[Entry | Skipped | None]:
    """The entries of a shard by number, None for those that are not wanted, which are not read.

    img2dataset's stats file says how many there are: if the shard has fewer, a `Skipped` stands for each missing one.
    Without it, a damaged shard ends in one `Skipped`.
    """
    entries = _entries(name, wanted)
    count = _declared(name)
    if count is None:
        yield from entries
        return
    for number in range(count):
        entry = next(entries, Skipped("missing sample", name))
        if number == count - 1 and not isinstance(next(entries, Skipped("", "")), Skipped):
            entry = Skipped("wrong stats file", f"{name} has more than {count} samples")
        yield entry


def count_entries(name: str) -> int:
    """How many entries `read_entries` gives; takes the stats file's word where it can, else reads headers."""
    count = _declared(name)
    return sum(1 for _ in _entries(name, lambda _: False)) if count is None else count


def _declared(name: str) -> int | None:
    """What the stats file says, if there is one and a local shard does not break off; else None."""
    try:
        if not is_url(name):
            with open(name, "rb") as file:
                file.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
                if file.read().strip(b"\0"):
                    return None
        with _open(name.removesuffix(".tar") + "_stats.json") as file:
            return int(json.load(file)["successes"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return None


def _entries(name: str, wanted: Callable[[int], bool]) -> Iterator[Entry | Skipped | None]:
    done = 0
    for left in reversed(range(TRIES if is_url(name) else 1)):
        try:
            for number, entry in enumerate(_read(name, lambda number, done=done: number >= done and wanted(number))):
                if number >= done:
                    done += 1
                    yield entry
            return
        except (tarfile.TarError, HTTPException, OSError, ValueError) as error:
            gone = isinstance(error, FileNotFoundError) or (isinstance(error, HTTPError) and error.code < 500)
            if gone or not left:
                yield Skipped("missing shard" if gone else "broken shard", f"{name} ({error})")
                return
            time.sleep(PAUSE)


def _read(name: str, wanted: Callable[[int], bool]) -> Iterator[Entry | None]:
    mode = "r|" if is_url(name) else "r:"
    with _open(name) as file, tarfile.open(fileobj=file, mode=mode, tarinfo=_Header) as archive:
        for number, (key, members) in enumerate(groupby(_members(archive), lambda member: _split(member.name)[0])):
            if not wanted(number):
                for _ in members:
                    pass
                yield None
                continue
            parts = {}
            for member in members:
                if (suffix := _split(member.name)[1]) in KINDS:
                    parts[suffix] = archive.extractfile(member).read() if member.size <= LARGEST else None
            yield Entry(key, parts)


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files; no links, whose targets would have to be looked for, and nothing hidden."""
    while member := archive.next():
        archive.members.clear()  # a list of all members is of no use, and long
        if member.isreg() and _split(member.name)[0].rpartition("/")[2]:
            yield member


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key of a sample reaches to the first dot behind the folder, the rest is the suffix."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def _open(name: str) -> BinaryIO:
    return urlopen(name, timeout=TIMEOUT) if is_url(name) else open(name, "rb")
