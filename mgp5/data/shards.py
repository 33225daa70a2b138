"""WebDataset shards as img2dataset writes them: captioned images in tar files, streamed from disk or over http.

The members of one name make an entry: an image, and its caption in a .txt file or as "caption" of a .json file.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException, IncompleteRead
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.request import urlopen

from torch.utils.data import IterableDataset, get_worker_info

from ..errors import Mgp5Error
from ..messages import Conversation, Image
from ..prompts import CAPTION_INSTRUCTIONS, caption_to_image
from .cc3m import clean_caption, num_samples
from .files import SPLITS, SUFFIXES, Problems, Skipped, pick

Sample = tuple[str, Conversation] | Skipped
Member = tuple[str, str, tarfile.TarInfo]  # name of its entry, suffix, and where its contents are
Entry = tuple[str, tarfile.TarFile, list[Member]]
NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # WebDataset's rule: a suffix begins at the first dot
TRIES, PAUSE, TIMEOUT = 4, 2.0, 60  # of a download; seconds
LARGEST = 100_000_000  # bytes of a member
UNREADABLE = (tarfile.TarError, HTTPException, OSError, ValueError)


class Shards:
    """Captioned images of many shards; an entry that cannot be used stays in the stream, as a `Skipped`.

    Attributes:
        names: paths or URLs of the shards.
        problems: empty, since shards are read while training goes on.
        buffer: number of samples that are shuffled together.
    """

    def __init__(self, names: Sequence[str], instruct_every: int, seed: int, buffer: int) -> None:
        self.names, self.problems, self.buffer = tuple(names), Problems(), buffer
        self._every, self._seed = instruct_every, seed

    @property
    def size(self) -> int | None:
        """Number of samples of an epoch; None for URLs."""
        return None if any(map(_is_url, self.names)) else sum(map(self.size_of, self.names))

    def size_of(self, name: str) -> int:
        """Return how many samples a shard has by img2dataset's stats file; without one, headers are counted."""
        entries = _declared(name)
        return sum(map(len, self.blocks(name))) if entries is None else num_samples(entries, self._every)

    def __iter__(self) -> Iterator[Sample]:
        """Yield every sample once, in the order of the files."""
        return (sample for name in self.names for sample in self.samples(name))

    def samples(self, name: str) -> Iterator[Sample]:
        """Yield the samples of one shard in order."""
        return (read() for block in self.blocks(name) for read in block)

    def blocks(self, name: str, first: int = 0, step: int = 1) -> Iterator[list[Callable[[], Sample]]]:
        """Yield every `step`-th sample of a shard from the `first` one on, in blocks of `buffer`.

        A sample is a function that reads it while its block is the last one: samples that are passed over cost headers.
        """
        with ExitStack() as files:
            samples = islice(self._samples(_entries(name, files)), first, None, step)
            while block := list(islice(samples, self.buffer)):
                yield block

    def stream(self, **position: int) -> Stream:
        """Return a `Stream` of the samples; `position` has its rank, world, batch, first and seed."""
        return Stream(shards=self, **position)

    def _samples(self, entries: Iterator[Entry | Skipped]) -> Iterator[Callable[[], Sample]]:
        for number, entry in enumerate(entries, 1):
            yield partial(self._sample, entry)
            if self._every and number % self._every == 0:
                yield partial(self._sample, entry, instruct=True)

    def _sample(self, entry: Entry | Skipped, instruct: bool = False) -> Sample:
        if isinstance(entry, Skipped):
            return entry
        key, archive, members = entry
        if any(member.size > LARGEST for _, _, member in members):
            return Skipped("too large", key)
        try:
            parts = {suffix: archive.extractfile(member).read() for _, suffix, member in members}
        except UNREADABLE as error:
            return Skipped("broken sample", f"{key} ({error})")
        data = next((parts[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in parts), None)
        if data is None:
            return Skipped("missing image", key)
        try:
            caption = clean_caption(parts["txt"].decode() if "txt" in parts else json.loads(parts["json"])["caption"])
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            caption = ""
        if not caption:
            return Skipped("no caption", key)
        if not instruct:
            return key, caption_to_image(Image(data=data, caption=caption))
        choice = pick(len(CAPTION_INSTRUCTIONS), self._seed, key)
        return f"{key}#instruction", caption_to_image(Image(data=data, caption=caption), choice)


@dataclass(eq=False, kw_only=True)
class Stream(IterableDataset):
    """Samples without end for `DataLoader(stream, batch_size=batch, num_workers=W)`, shuffled anew in every epoch.

    Each of the world x W readers takes shards of its own, or, where there are fewer shards, its share of each. A reader
    shuffles its shards, and the samples of a shard in blocks of `shards.buffer`.

    Args:
        rank, world: number of this process, and of all.
        first: batches that this rank has had before; with the same W, exactly those that follow them are given.
        seed: of the shuffling.
    """

    shards: Shards
    rank: int
    world: int
    batch: int
    first: int
    seed: int

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # A DataLoader takes batches from its workers in turn: the first worker goes on where it would be next.
        turn = (worker + self.first) % workers
        skip = len(range(turn, self.first, workers)) * self.batch
        return self._read(self.rank * workers + turn, self.world * workers, skip)

    def _read(self, reader: int, readers: int, skip: int) -> Iterator[Sample]:
        """Yield what a reader takes, epoch after epoch, without its first `skip` samples."""
        names, last, useless = self.shards.names, Skipped("no sample", ""), set[str]()
        first, step = (0, 1) if len(names) >= readers else (reader, readers)
        for epoch in count():
            order = self._shuffled(names, epoch)
            for name in order[reader::readers] if step == 1 else order:
                useless.add(name)
                passed = len(range(first, self.shards.size_of(name), step)) if skip else 0
                if 0 < passed <= skip:
                    skip -= passed
                    useless.clear()
                    continue
                for number, block in enumerate(self.shards.blocks(name, first, step)):
                    for read in self._shuffled(block, name, epoch, reader, number)[skip:]:
                        if isinstance(item := read(), Skipped):
                            last = item
                        else:
                            useless.clear()
                        yield item
                    skip = max(0, skip - len(block))
                if len(useless) == len(names):
                    who, reason = f"reader {reader} of {readers}", f"{last.kind}: {last.where}"
                    raise Mgp5Error(f"no usable sample for {who} ({reason})", "use fewer workers")

    def _shuffled(self, items: Sequence[Any], *key: Any) -> list[Any]:
        return random.Random(repr((self.seed, *key))).sample(items, len(items))


def load(path: Path, split: str = "train", *, instruct_every: int = 100, seed: int = 0, buffer: int = 1000) -> Shards:
    """Find the shards at a path, and check that one of them has a usable sample.

    Args:
        path: a folder of .tar files (or with folders "train" and "val" of them), one .tar file, or a path or
            http(s) URL with ranges in it, as in "https://host/cc3m/{00000..00331}.tar".
        split: "train", "val" or "test"; the last two stand in for each other.
        instruct_every: after how many training samples of a shard one is repeated as an instruction; 0 = never.
        seed: chooses among the wordings of the instruction.
        buffer: number of samples that are shuffled together, per data worker.

    Raises:
        Mgp5Error: the path is of another kind, holds no shard, or has no usable sample.
    """
    if instruct_every < 0 or buffer < 1:
        found = f"instruct_every is {instruct_every} and buffer is {buffer}"
        raise Mgp5Error(found, "expected 0 or more, and 1 or more", usage=True)
    names = _find(path, split)
    shards = Shards(names, instruct_every if split == "train" else 0, seed, buffer)
    problems = Problems()
    for sample in shards:
        if not isinstance(sample, Skipped):
            return shards
        problems.note(*sample)
    raise Mgp5Error(f"{names[0]} and {len(names) - 1} more have no usable sample", f"skipped: {problems}")


def _find(path: Path, split: str) -> list[str]:
    """Return the names of the shards, in order."""
    text = re.sub(r"^(https?):/+", r"\1://", str(path))  # a Path has one slash there
    if split not in SPLITS:
        raise Mgp5Error(f"unknown split {split!r}", f"expected one of {', '.join(SPLITS)}", usage=True)
    for folder in (path, *(path / name for name in SPLITS[split])):
        if names := sorted(str(file) for file in folder.glob("*.tar")):
            return names
    names = [] if path.is_dir() else _expand(text)
    if not any(_is_url(name) or Path(name).is_file() for name in names):
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


class _Header(tarfile.TarInfo):
    """A member's header; raises where tarfile would take a damaged or missing one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise  # a block of zeros, the regular end
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def _entries(name: str, files: ExitStack) -> Iterator[Entry | Skipped]:
    """Yield the entries of a shard, which `files` keeps open: as many as the stats file says, where there is one."""
    number, note, expected = 0, Skipped("missing sample", name), _declared(name)
    try:
        file = files.enter_context(_open(name))
        archive = files.enter_context(tarfile.open(fileobj=file, mode="r:", tarinfo=_Header))  # noqa: SIM115
        for key, members in groupby(_members(archive), itemgetter(0)):
            entry = f"{Path(name).name}/{key}", archive, list(members)
            number += 1
            yield entry
    except UNREADABLE as error:
        gone = isinstance(error, FileNotFoundError) or (isinstance(error, HTTPError) and error.code < 500)
        note = Skipped("missing shard" if gone else "broken shard", f"{name} ({error})")
        expected = number + 1 if expected is None else expected
    if expected is not None and number > expected:
        raise Mgp5Error(f"{name} has {number} samples, its stats file says {expected}", "remove the stats file")
    yield from [note] * ((expected or 0) - number)


def _members(archive: tarfile.TarFile) -> Iterator[Member]:
    """Yield the regular files that are not hidden: no links, whose targets would have to be searched for."""
    while member := archive.next():
        archive.members.clear()  # a list of all members is of no use, and long
        if member.isreg() and (match := NAME.fullmatch(member.name)):
            yield match[1], match[2].lower(), member


def _declared(name: str) -> int | None:
    """Return the number of entries that the stats file of a shard says, None without one."""
    path = name.removesuffix(".tar") + "_stats.json"
    try:
        with urlopen(path, timeout=TIMEOUT) if _is_url(name) else open(path, "rb") as file:
            return int(json.load(file)["successes"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return None


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _open(name: str) -> BinaryIO:
    """Open a shard; one at a URL is downloaded to a temporary file first."""
    if not _is_url(name):
        return open(name, "rb")
    for left in reversed(range(TRIES)):
        file = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            with urlopen(name, timeout=TIMEOUT) as response:
                shutil.copyfileobj(response, file)
            if response.length:
                raise IncompleteRead(b"", response.length)
            file.seek(0)
            return file
        except (HTTPException, OSError) as error:
            file.close()
            if not left or (isinstance(error, HTTPError) and error.code < 500):
                raise
            time.sleep(PAUSE)
    raise AssertionError("unreachable")
