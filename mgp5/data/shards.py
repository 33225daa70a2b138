"""Captioned images in WebDataset shards as img2dataset writes them: tar files on disk or at http(s) URLs.

Members of one name make an entry: an image, and its caption in a .txt file or as "caption" of a .json file.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, IncompleteRead
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

from torch.utils.data import IterableDataset, get_worker_info

from ..errors import Mgp5Error
from ..messages import Conversation, Image
from .cc3m import Captions, captions_of, clean_caption
from .files import SUFFIXES, Problems, Skipped, split_names

Sample = tuple[str, Conversation] | Skipped
Member = tuple[str, str, int, int]  # name of its entry, suffix, offset and size in bytes
NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # WebDataset's rule: a suffix begins at the first dot
URL = ("http://", "https://")
S = TypeVar("S", bound="Shards")
TRIES, PAUSE, TIMEOUT = 4, 2.0, 60  # of a download; seconds


class Shards(IterableDataset):
    """Yield every sample of the shards once, in order; data workers share the shards out."""

    def __init__(self, names: Sequence[str], captions: Captions) -> None:
        self.names, self.problems = tuple(names), Problems()  # shards are read while training goes on
        self._captions = captions

    @property
    def size(self) -> int | None:
        """Number of samples of an epoch; None for URLs."""
        return None if any(name.startswith(URL) for name in self.names) else sum(map(self.size_of, self.names))

    def size_of(self, name: str) -> int:
        """Return how many samples a shard has by img2dataset's stats file; without one, headers are counted."""
        entries = _declared(name)
        if entries is not None:
            return self._captions.count(entries)
        with self.open(name) as shard:
            return len(shard)

    def open(self, name: str) -> closing[Shard]:
        """Return a context manager that gives the samples of a shard."""
        return closing(Shard(name, self._captions))

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        for name in self.names[worker.id :: worker.num_workers] if worker else self.names:
            with self.open(name) as shard:
                yield from map(shard.sample, range(len(shard)))

    def stream(self, **position: int) -> Stream:
        """Return a `Stream` of the samples; `position` has its rank, world, batch, first and seed."""
        return Stream(shards=self, **position)


@dataclass(eq=False, kw_only=True)
class Stream(IterableDataset):
    """Samples without end for `DataLoader(stream, batch_size=batch, num_workers=W)`, shuffled anew in every epoch.
    Each of the world x W readers takes shards of its own, or, where there are fewer shards, its share of each."""

    shards: Shards
    rank: int
    world: int  # number of processes
    batch: int
    first: int  # batches that this rank has had before; with the same W, exactly those that follow them are given
    seed: int  # of the shuffling

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # A DataLoader takes batches from its workers in turn: the first worker goes on where it would be next.
        turn = (worker + self.first) % workers
        skip = len(range(turn, self.first, workers)) * self.batch
        return self._read(self.rank * workers + turn, self.world * workers, skip)

    def _read(self, reader: int, readers: int, skip: int) -> Iterator[Sample]:
        """Yield what a reader takes, epoch after epoch, without its first `skip` samples."""
        names, own, everything = self.shards.names, slice(reader, None, readers), slice(None)
        some, share = (own, everything) if len(names) >= readers else (everything, own)  # of shards, of each shard
        for epoch in count():
            usable, last, ahead = False, Skipped("no sample", ""), skip
            for name in self._shuffled(names, epoch)[some]:
                if skip and skip >= (size := len(range(self.shards.size_of(name))[share])):
                    skip -= size
                    continue
                with self.shards.open(name) as shard:
                    for number in self._shuffled(range(len(shard)), epoch, Path(name).name)[share][skip:]:
                        sample = shard.sample(number)
                        last, usable = (sample, usable) if isinstance(sample, Skipped) else (last, True)
                        yield sample
                skip = 0
            if not usable and skip == ahead:
                who, reason = f"reader {reader} of {readers}", f"{last.kind}: {last.where}"
                raise Mgp5Error(f"no usable sample for {who} ({reason})", "use fewer workers")

    def _shuffled(self, items: Sequence[Any], *key: Any) -> list[Any]:
        return random.Random(repr((self.seed, *key))).sample(items, len(items))


class Shard:
    """The samples of an open shard by number, as many as its stats file says; a lost one is a `Skipped`."""

    def __init__(self, name: str, captions: Captions) -> None:
        self.name, self._captions, self._file = name, captions, BytesIO()
        entries: list[tuple[str, dict[str, list[int]]] | Skipped] = []  # name, and offset and size by suffix
        begun: dict[str, dict[str, list[int]]] = {}
        lost, expected = "fewer samples than its stats file says", _declared(name)
        try:
            self._file = _open(name)
            for entry, suffix, *place in _members(self._file):
                if suffix in begun.get(entry, (suffix,)):  # members of a name need not be side by side
                    begun[entry] = {}
                    entries.append((entry, begun[entry]))
                begun[entry][suffix] = place
        except (tarfile.TarError, HTTPException, OSError, ValueError) as error:
            del entries[-1:]  # nobody knows whether it is whole
            lost, expected = str(error), len(entries) + 1 if expected is None else expected
        missing = 0 if expected is None else expected - len(entries)
        if missing < 0:
            problem = f"{name} has {len(entries)} samples, its stats file says {expected}"
            raise Mgp5Error(problem, "remove the stats file")
        entries += [Skipped("broken shard", f"{name} ({lost})")] * missing
        self._samples = [(entry, again) for row, entry in enumerate(entries, 1) for again in captions.numbers(row)]

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, number: int) -> Sample:
        """Return a sample with its key, or why there is none."""
        entry, again = self._samples[number]
        if isinstance(entry, Skipped):
            return entry
        name, parts = entry
        key = f"{Path(self.name).name}/{name}"
        asked = self._captions
        suffixes = [asked.image_column.lower()] if asked.image_column else [suffix[1:] for suffix in SUFFIXES]
        image = next((parts[suffix] for suffix in suffixes if suffix in parts), None)
        if image is None:
            return Skipped("missing image", f"{key} has {', '.join(sorted(parts))}")
        try:
            data = self._read(*image)
            suffixes = [asked.caption_column.lower()] if asked.caption_column else ["txt", "json"]
            caption = next(filter(None, (self._caption(suffix, parts) for suffix in suffixes)), "")
        except OSError as error:
            return Skipped("broken sample", f"{key} ({error})")
        if not caption:
            return Skipped("no caption", f"{key} has {', '.join(sorted(parts))}")
        return captioned(asked, key, data, caption, again)

    def _caption(self, suffix: str, parts: dict[str, list[int]]) -> str:
        """Return the cleaned caption in a member, "" without one. Raises OSError."""
        try:
            text = self._read(*parts[suffix]).decode("utf-8-sig")
            return clean_caption(json.loads(text)["caption"] if suffix.endswith("json") else text)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            return ""

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()


OPTIONS = Captions


def load(path: Path, split: str = "train", **options: Any) -> Shards:
    """Find the shards at a path, and check that one of them has a usable sample. Raises Mgp5Error.

    `path` is a folder of .tar files (or with folders "train" and "val" of them), one .tar file, or a path or http(s)
    URL with ranges in it, as in "https://host/cc3m/{00000..00331}.tar". Options are those of `Captions`.
    """
    return check_stream(Shards(_find(path, split), captions_of(split, options)))


def check_stream(shards: S) -> S:
    """Return shards of which one has a usable sample. Raises Mgp5Error."""
    problems = Problems()
    for sample in shards:
        if not isinstance(sample, Skipped):
            return shards
        problems.note(*sample)
    names = shards.names
    found = f"{names[0]} and {len(names) - 1} more have no usable sample" if names else "there are no rows"
    raise Mgp5Error(found, f"skipped: {problems}")


def captioned(captions: Captions, key: str, data: bytes, caption: str, again: int) -> Sample:
    """Return a sample from a caption to its image, with its key; as an instruction where it comes again."""
    return key + "#instruction" * again, captions.sample(Image(data=data, caption=caption), key, again)


def _find(path: Path, split: str) -> list[str]:
    """Return the names of the shards, in order. Raises Mgp5Error where there is none."""
    text = re.sub(r"^(https?):/+", r"\1://", str(path))  # a Path has one slash there
    for folder in (path, *(path / name for name in split_names(split))):
        if names := sorted(str(file) for file in folder.glob("*.tar")):
            return names
    names = [] if path.is_dir() else _expand(text)
    if not any(name.startswith(URL) or Path(name).is_file() for name in names):
        hint = "give a folder of shards, or a path or http(s) URL like DIR/{00000..00012}.tar"
        raise Mgp5Error(f"no .tar file at {text}", hint, usage=True)
    return names


def _expand(text: str) -> list[str]:
    """Return every name of a pattern with ranges like {00..12}."""
    if not (match := re.search(r"\{(\d+)\.\.(\d+)\}", text)):
        return [text]
    numbers = range(int(match[1]), int(match[2]) + 1)
    names = (f"{text[: match.start()]}{number:0{len(match[1])}}{text[match.end() :]}" for number in numbers)
    return [name for each in names for name in _expand(each)]


def _members(file: BinaryIO) -> Iterator[Member]:
    """Yield the regular files that are not hidden. Raises tarfile.TarError where the archive is damaged."""
    if file.read(2) == b"\x1f\x8b":
        raise tarfile.ReadError("it is compressed: gunzip it")
    file.seek(0)
    archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    while member := archive.next():
        archive.members.clear()  # a list of all members is of no use, and long
        if member.isreg() and (match := NAME.fullmatch(member.name)):
            yield match[1], match[2].lower(), member.offset_data, member.size
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError("bad header")


def _declared(name: str) -> int | None:
    """Return the number of entries that the stats file of a shard says, None without one."""
    path = name.removesuffix(".tar") + "_stats.json"
    try:
        with urlopen(path, timeout=TIMEOUT) if name.startswith(URL) else open(path, "rb") as file:
            return int(json.load(file)["successes"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return None


def _open(name: str, tries: int = TRIES) -> BinaryIO:
    """Open a shard; one at a URL is downloaded to a temporary file first."""
    if not name.startswith(URL):
        return open(name, "rb")
    file = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with urlopen(name, timeout=TIMEOUT) as response:
            shutil.copyfileobj(response, file)
        if response.length:
            raise IncompleteRead(b"", response.length)
    except (HTTPException, OSError) as error:
        file.close()
        if tries == 1 or (isinstance(error, HTTPError) and error.code < 500):
            raise
        time.sleep(PAUSE)
        return _open(name, tries - 1)
    file.seek(0)
    return file
