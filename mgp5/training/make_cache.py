"""Fill feature caches: find what is new in the data, compute it by the frozen parts, write it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..config import DataConfig
from ..data import Keyed, Problems, Skipped, Source, check_sources, load_sources
from ..data.shards import Shards
from ..device import DTYPES, limit_threads_for_small_models, pick_device
from ..errors import Mgp5Error
from ..files import digest
from ..generators import load_generator
from ..heads.minigpt5 import to_pixels
from ..hub import Parts, resolve
from ..loading import load_backbone
from ..messages import Conversation, Image
from ..options import override
from .feature_cache import KINDS, FrozenPart, Item, Writer, cache_key
from .run import token_counter

PROBES = 32  # samples from which sizes are estimated
Cacheable = Image | str  # an image, or a caption
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CacheRequest:
    """What to cache, of which data, for which model.

    Args:
        model: whose frozen parts compute it: as train is given it, or a folder that it has written.
        data: format and path of each data source.
        out: folder for the caches.
        split: "train", "val" or "test".
        kinds: some of "latents", "captions" and "features" (of context images).
        dtype: of the items: "fp32", "bf16" or "fp16".
        batch: samples at a time.
        workers: processes that read images.
        overrides: settings of the data that replace the defaults.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        Mgp5Error: all that is wrong in it.
    """

    model: str
    data: tuple[Source, ...]
    out: Path
    split: str = "train"
    kinds: tuple[str, ...] = KINDS
    dtype: str = "fp16"
    batch: int = 16
    workers: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"

    def __post_init__(self) -> None:
        problems = []
        if unknown := sorted({*self.kinds} - {*KINDS}):
            problems.append(f"--kinds has {', '.join(unknown)}, expected some of {','.join(KINDS)}")
        if self.dtype not in DTYPES:
            problems.append(f"--dtype is {self.dtype}, expected one of {', '.join(DTYPES)}")
        problems += check_sources(self.data)
        if self.batch < 1 or self.workers < 0:
            problems.append(f"--batch is {self.batch} and --workers {self.workers}, expected at least 1 and 0")
        if problems:
            raise Mgp5Error("; ".join(problems), usage=True)


@dataclass(frozen=True)
class CacheProgress:
    """How far a cache is: samples read of `total` (None: unknown), items computed, bytes on disk."""

    samples: int
    total: int | None
    items: int
    bytes: int


def make_cache(request: CacheRequest, tell: Tell = lambda line: None) -> Iterator[CacheProgress]:
    """Cache what the data needs of the frozen parts; what is cached already is not computed again.

    Args:
        tell: is given lines for the user: what will be written, what was, and what was left out.

    Yields:
        After each batch of samples.

    Raises:
        Mgp5Error: data that cannot be used, a full disk, or a cache that others write to.
    """
    parts, kinds = resolve(request.model), request.kinds
    config = override(DataConfig(instruct_every=0), dict(request.overrides))  # all of the history, no sample twice
    data = load_sources(request.data, config, request.split, count=token_counter(request.model), tell=tell)
    models = _load(parts, kinds, request.device)
    names = {kind: parts.mllm if kind == "features" else parts.diffusion for kind in kinds}
    needed, probes = _survey(data, kinds)
    if not any(needed.values()):
        raise Mgp5Error(f"the data has no {' and no '.join(kinds)}", "choose other --kinds or data", usage=True)
    keys = {kind: cache_key(kind, models[kind], names[kind]) for kind in kinds if needed[kind]}
    writers = {kind: Writer(request.out, key, request.dtype) for kind, key in keys.items()}
    problems = Problems()
    try:
        sizes = {}
        for kind, writer in writers.items():
            done, size = _probe(kind, probes[kind], writer, models[kind])
            sizes[kind] = size * max(needed[kind] * (1 - done), 0)
        _check_disk(sizes, request.out, tell)
        yield from _compute(data, writers, models, request, problems)
    finally:
        for writer in writers.values():
            writer.close()
    for kind, writer in writers.items():
        tell(f"{writer.count:,} {kind}, {_decimal(writer.bytes)}, in {writer.folder}")
    if problems:
        tell(f"left out {problems}")


def _load(parts: Parts, kinds: Sequence[str], name: str) -> dict[str, FrozenPart]:
    """Return for each kind the model that computes it, on its device; one that no kind needs is not loaded."""
    device, dtype = pick_device(name)
    models: dict[str, FrozenPart] = {}
    if {*kinds} - {"features"}:
        models |= dict.fromkeys(("latents", "captions"), load_generator(parts.diffusion, dtype).to(device))
    if "features" in kinds:
        backbone = load_backbone(parts.mllm, dtype)
        backbone.language.layers = nn.ModuleList()  # the largest part of all, and not needed to encode images
        models["features"] = backbone.to(device)
    for model in models.values():
        limit_threads_for_small_models(model)
    return models


def cacheables(conversation: Conversation) -> Iterator[tuple[str, Cacheable]]:
    """Yield what of a sample can be cached, each with its kind."""
    *context, target = conversation.messages
    for image in target.images:
        yield "latents", image
        if image.caption:
            yield "captions", image.caption
    yield from (("features", image) for message in context for image in message.images)


def key_of(value: Cacheable) -> str:
    """Return the key of an item. Raises Mgp5Error for an image that cannot be read."""
    return digest(value) if isinstance(value, str) else value.digest()


def prepare(kind: str, value: Cacheable, model: FrozenPart) -> Any:
    """Return what a model is given of an image or caption. Raises Mgp5Error or ValueError for a broken image."""
    if kind == "captions":
        return value
    image = value.load()
    return to_pixels(image, (model.native_size,) * 2) if kind == "latents" else model.preprocess([image])


def collate(kind: str, values: list[Any]) -> Any:
    """Return prepared values as one batch."""
    if kind == "features":
        return {name: torch.cat([value[name] for value in values]) for name in values[0]}
    return torch.stack(values) if kind == "latents" else values


@torch.no_grad()
def compute(kind: str, batch: Any, model: FrozenPart) -> list[Item]:
    """Return the items of a batch."""
    if kind == "features":
        others = {name: value for name, value in batch.items() if name != "pixel_values"}
        features = model.encode_images(batch)
        return [(own, {name: value[i] for name, value in others.items()}) for i, own in enumerate(features)]
    results = model.moments(batch) if kind == "latents" else model.encode_text(batch)
    return [(result, {}) for result in results]


class CacheCollator:
    """Collates samples to what is new in them, ready to be computed; runs in data workers, which use no weights."""

    def __init__(self, done: dict[str, Container[str]], models: dict[str, FrozenPart]) -> None:
        self.done, self.models = done, models
        self.begun: set[tuple[str, str]] = set()

    def __call__(self, samples: Sequence[Any]) -> tuple[int, dict[str, tuple[list[str], Any]], list[Skipped]]:
        """Return how many samples there were, keys and batch of what is new of each kind, and what cannot be used."""
        new: dict[str, dict[str, Any]] = {kind: {} for kind in self.done}
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        for where, conversation in (sample for sample in samples if not isinstance(sample, Skipped)):
            for kind, value in cacheables(conversation):
                try:
                    if kind in self.done and (key := self._claim(kind, value)):
                        new[kind][key] = prepare(kind, value, self.models[kind])
                except (Mgp5Error, ValueError) as error:
                    skipped.append(Skipped("broken image", f"{value.path or where} ({error})"))
        batches = {kind: ([*values], collate(kind, [*values.values()])) for kind, values in new.items() if values}
        return len(samples), batches, skipped

    def _claim(self, kind: str, value: Cacheable) -> str | None:
        """Return the key, unless this has been done or begun. Raises Mgp5Error."""
        key = key_of(value)
        if key in self.done[kind] or (kind, key) in self.begun:
            return None
        self.begun.add((kind, key))
        return key


class _Once(IterableDataset):
    """Every sample of shards once; data workers share the shards out."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        names = self.shards.names[info.id :: info.num_workers] if info else self.shards.names
        for name in names:
            yield from self.shards.samples(name)


def _survey(data: Keyed | Shards, kinds: Sequence[str]) -> tuple[dict[str, int], dict[str, list[Cacheable]]]:
    """Return how many different items of each kind the data has, and some of them; of shards about, and the first."""
    probes: dict[str, list[Cacheable]] = {kind: [] for kind in KINDS}
    if isinstance(data, Shards):
        first = next(sample for sample in data if not isinstance(sample, Skipped))
        for kind, value in cacheables(first[1]):
            probes[kind].append(value)
        return {kind: (data.size or 1) * len(probes[kind]) for kind in kinds}, probes
    found: dict[str, set[int]] = {kind: set() for kind in KINDS}
    step = max(1, len(data) // PROBES)
    for index in range(len(data)):
        for kind, value in cacheables(data[index][1]):
            found[kind].add(hash(value if isinstance(value, str) else value.path))
            probes[kind] += [] if index % step else [value]
    return {kind: len(found[kind]) for kind in kinds}, probes


def _probe(kind: str, probes: Sequence[Cacheable], writer: Writer, model: FrozenPart) -> tuple[float, float]:
    """Return which share of the items is done, and the bytes of one."""
    done, sizes = 0, []
    for value in probes:
        try:
            if key_of(value) in writer:
                done += 1
            elif len(sizes) < 4:
                result, others = compute(kind, collate(kind, [prepare(kind, value, model)]), model)[0]
                sizes.append(result.numel() * writer.itemsize + sum(other.nbytes for other in others.values()))
        except (Mgp5Error, ValueError):
            continue  # a broken image is told when its turn comes
    size = sum(sizes) / len(sizes) if sizes else writer.bytes / max(1, writer.count)
    return done / max(1, len(probes)), size


def _check_disk(sizes: dict[str, float], out: Path, tell: Tell) -> None:
    """Tell how much is to be written, about. Raises Mgp5Error when the disk cannot hold it."""
    free, total = shutil.disk_usage(out).free, sum(sizes.values())
    plan = ", ".join(f"{kind} {_decimal(size)}" for kind, size in sizes.items())
    tell(f"to be written, about: {plan or 'nothing'}; {_decimal(free)} free in {out}")
    if total > free:
        raise Mgp5Error(
            f"{out} has {_decimal(free)} free, the cache needs about {_decimal(total)} more ({plan})",
            "choose another disk, --dtype fp16, or fewer --kinds",
        )


def _compute(
    data: Keyed | Shards,
    writers: dict[str, Writer],
    models: dict[str, FrozenPart],
    request: CacheRequest,
    problems: Problems,
) -> Iterator[CacheProgress]:
    """Compute and write all that is not there yet; `problems` counts what could not be used."""
    stream = isinstance(data, Shards)
    loader = DataLoader(
        _Once(data) if stream else data,
        request.batch,
        collate_fn=CacheCollator({kind: writer.done for kind, writer in writers.items()}, models),
        num_workers=request.workers,
        multiprocessing_context="fork" if request.workers else None,  # the models stay where they are
    )
    noted, samples, items, total = set(), 0, 0, data.size if stream else len(data)
    for count, batches, skipped in loader:
        for kind, (keys, batch) in batches.items():
            for key, item in zip(keys, compute(kind, batch, models[kind]), strict=True):
                if key not in writers[kind]:  # two workers may find the same
                    writers[kind].add(key, item)
                    items += 1
        for note in {*skipped} - noted:
            problems.note(*note)
        noted.update(skipped)
        samples += count
        yield CacheProgress(samples, total, items, sum(writer.bytes for writer in writers.values()))


def _decimal(number: float) -> str:
    """Return a number of bytes as disks are sold, in powers of 1000."""
    from rich.filesize import decimal

    return decimal(int(number))
