"""WebDataset shards (tar files) as img2dataset writes them: captioned pictures in a stream, never unpacked to disk.

A shard holds for each sample a picture, and its caption in a .txt file or as "caption" of a .json file, of one name.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import Mgp5Error
from ..messages import Conversation, Image
from ..prompts import CAPTION_INSTRUCTIONS, caption_to_image
from .cc3m import clean_caption
from .files import SPLITS, SUFFIXES, Problems, Skipped, pick
from .tars import Entry, count_entries, is_url, read_entries

Sample = tuple[str, Conversation] | Skipped
ALL = range(sys.maxsize)


class Shards:
    """Samples of many shards; one that cannot be used keeps its place in the stream, as a `Skipped`.

    Attributes:
        names: the shards, paths or URLs.
        problems: empty: shards are read while training goes on, so what is skipped stands in the stream.
    """

    def __init__(self, names: Sequence[str], instruct_every: int, seed: int, buffer: int) -> None:
        self.names = tuple(names)
        self.problems = Problems()
        self.buffer = buffer
        self._every = instruct_every
        self._seed = seed
        self._sizes: dict[str, int] = {}

    @property
    def size(self) -> int | None:
        """Samples of an epoch, or None for URLs. Without img2dataset's stats files the tars' headers are counted."""
        return None if any(map(is_url, self.names)) else sum(map(self.size_of, self.names))

    def size_of(self, name: str) -> int:
        """Samples of a shard."""
        if name not in self._sizes:
            self._sizes[name] = self._begin(name, count_entries(name))
        return self._sizes[name]

    def __iter__(self) -> Iterator[Sample]:
        """Every sample once, in the order of the files."""
        return itertools.chain.from_iterable(map(self.samples, self.names))

    def samples(self, name: str, wanted: range = ALL) -> Iterator[Sample]:
        """Those samples of a shard whose numbers are wanted; of the others only headers are read."""
        entry = -1

        def needed(entry: int) -> bool:
            return any(number in wanted for number in self._numbers(name, entry))

        for entry, found in enumerate(read_entries(name, needed)):
            for copy, number in enumerate(self._numbers(name, entry)):
                if number in wanted and found is not None:
                    yield self._sample(name, found, bool(copy))
        self._sizes[name] = self._begin(name, entry + 1)

    def stream(self, *, rank: int, world: int, batch: int, first: int, seed: int) -> IterableDataset:
        """Samples without end for `DataLoader(stream, batch_size=batch, num_workers=W)`, shuffled anew every epoch.

        Each of the world x W readers takes shards of its own, or, where there are not enough, its share of all, and
        shuffles them in blocks of `buffer` samples.

        Args:
            rank, world: this process and how many there are.
            first: batches that this rank has had before. With the same W, the loader gives exactly the batches that
                an uninterrupted one would have given after them.
        """
        return _Stream(self, rank, world, batch, first, seed)

    def _numbers(self, name: str, entry: int) -> range:
        """Samples that are made of an entry: one, or two where one is an instruction."""
        return range(self._begin(name, entry), self._begin(name, entry + 1))

    def _begin(self, name: str, entry: int) -> int:
        """Number of the first sample of an entry: every `instruct_every`-th entry before it had two."""
        if not self._every:
            return entry
        return entry + (entry + pick(self._every, self._seed, Path(name).name)) // self._every

    def _sample(self, name: str, entry: Entry | Skipped, instruct: bool) -> Sample:
        """A sample, or why there is none."""
        if isinstance(entry, Skipped):
            return entry
        key = f"{Path(name).name}/{entry.key}"
        if None in entry.parts.values():
            return Skipped("too large", key)
        data = next((entry.parts[s] for suffix in SUFFIXES if (s := suffix[1:]) in entry.parts), None)
        if data is None:
            return Skipped("missing image", key)
        if not (caption := _caption(entry.parts)):
            return Skipped("no caption", key)
        image = Image(data=data, caption=caption)
        if instruct:
            return f"{key}#instruction", caption_to_image(image, pick(len(CAPTION_INSTRUCTIONS), self._seed, entry.key))
        return key, caption_to_image(image)


def _caption(parts: dict[str, bytes]) -> str:
    try:
        text = parts["txt"].decode() if "txt" in parts else json.loads(parts["json"])["caption"]
        return clean_caption(text)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return ""


class _Stream(IterableDataset):
    """See `Shards.stream`."""

    def __init__(self, shards: Shards, rank: int, world: int, batch: int, first: int, seed: int) -> None:
        self.shards, self.rank, self.world, self.batch = shards, rank, world, batch
        self.first, self.seed = first, seed

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # A DataLoader takes batches from its workers in turn: the first worker goes on where it would be next.
        reader = (worker + self.first) % workers
        batches = len(range(reader, self.first, workers))
        return self._read(self.rank * workers + reader, self.world * workers, batches * self.batch)

    def _read(self, reader: int, readers: int, position: int) -> Iterator[Sample]:
        """What a reader gives from its `position`-th sample on."""
        barren: set[str] = set()
        last = Skipped("no sample", self.shards.names[0])
        for epoch in itertools.count():
            names, taken = self._deal(epoch, reader, readers)
            useful = position > 0
            ends = itertools.accumulate(map(self.shards.size_of, names))
            if position and not any(end > taken[position] for end in ends):  # a past epoch
                total = len(range(taken.start, sum(map(self.shards.size_of, names)), taken.step))
                position, useful = position - total, total > 0
            else:
                for item in self._epoch(epoch, reader, names, taken, position):
                    last, useful = (item, useful) if isinstance(item, Skipped) else (last, True)
                    yield item
                position = 0
            barren = set() if useful else barren | set(names)
            if len(barren) == len(self.shards.names):
                reason = f"{last.kind}: {last.place}"
                raise Mgp5Error(f"no usable sample for reader {reader} of {readers} ({reason})", "use fewer workers")

    def _deal(self, epoch: int, reader: int, readers: int) -> tuple[list[str], range]:
        """The shards of a reader in an epoch, and which of their samples it takes."""
        names = self.shards.names
        order = [names[i] for i in self._permutation(len(names), epoch)]
        if len(names) >= readers:
            return order[reader::readers], ALL
        return order, range(reader, sys.maxsize, readers)

    def _epoch(self, epoch: int, reader: int, names: list[str], taken: range, position: int) -> Iterator[Sample]:
        """A reader's epoch from a position on: blocks of samples in file order, each shuffled."""
        block, done = divmod(position, self.shards.buffer)
        samples = self._in_order(names, taken[block * self.shards.buffer :])
        while held := list(itertools.islice(samples, self.shards.buffer)):
            order = self._permutation(len(held), epoch, reader, block)
            yield from (held[i] for i in order[done:])
            block, done = block + 1, 0

    def _in_order(self, names: list[str], taken: range) -> Iterator[Sample]:
        """Samples whose numbers, counted over all shards, are taken; shards before the first are not opened."""
        base = 0
        for name in names:
            if not (taken.start > base and taken.start >= base + self.shards.size_of(name)):
                start = taken.start - base
                wanted = range(start if start > 0 else start % taken.step, sys.maxsize, taken.step)
                yield from self.shards.samples(name, wanted)
            base += self.shards.size_of(name)

    def _permutation(self, size: int, *key: Any) -> list[int]:
        generator = torch.Generator().manual_seed(pick(2**63, self.seed, *key))
        return torch.randperm(size, generator=generator).tolist()


def load(path: Path, split: str = "train", *, instruct_every: int = 100, seed: int = 0, buffer: int = 1000) -> Shards:
    """The shards at a place; one usable sample is looked for at once.

    Args:
        path: a folder of .tar files (or with folders "train" and "val" of them), one .tar file, or a path or
            http(s) URL with ranges in it, as in "https://host/cc3m/{00000..00331}.tar".
        split: "train", "val" or "test"; the last two stand in for each other.
        instruct_every: after how many training samples one is repeated as an instruction; 0 = never.
        seed: chooses among the wordings of the instruction, and which samples are repeated.
        buffer: samples that are shuffled together, per data worker.

    Raises Mgp5Error for a place of another kind, no shard, or if no sample is usable.
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
    """Names of the shards, in order."""
    if split not in SPLITS:
        raise Mgp5Error(f"unknown split {split!r}", f"expected one of {', '.join(SPLITS)}", usage=True)
    text = re.sub(r"^(https?):/+", r"\1://", str(path))  # a Path has one slash there
    scheme = re.match(r"([a-z][a-z0-9+]+):", text)
    if scheme and not is_url(text):
        raise Mgp5Error(f"shards cannot be read through {scheme[1]}", "give a folder, tar files or http(s)", usage=True)
    for folder in (path, *(path / name for name in SPLITS[split])):
        if names := sorted(str(file) for file in folder.glob("*.tar")):
            return names
    names = [] if path.is_dir() else list(_expand(text))
    if not any(is_url(name) or Path(name).is_file() for name in names):
        raise Mgp5Error(f"no .tar file at {text}", "give a folder of shards, or a path like DIR/{00000..00012}.tar")
    return names


def _expand(text: str) -> Iterator[str]:
    """Every name of a pattern with ranges like {00..12}."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not match:
        yield text
        return
    width = len(match[1]) if match[1].startswith("0") else 0
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _expand(f"{text[: match.start()]}{number:0{width}d}{text[match.end() :]}")
