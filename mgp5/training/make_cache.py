"""What `mgp5 data cache` does: find what is new in the data, compute it by the frozen parts, write it to caches.

H and W pixels.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..backbones.hf import HFBackbone
from ..config import DataConfig
from ..data import Keyed, Problems, Skipped, load_sources
from ..data.shards import Shards
from ..device import limit_threads_for_small_models, pick_device, quiet_libraries
from ..errors import Mgp5Error
from ..files import digest
from ..generators import load_generator
from ..generators.latent_diffusion import LatentDiffusion
from ..hub import Parts, resolve
from ..loading import load_backbone
from ..messages import Conversation, Image
from ..options import override, parse_settings
from .batch import to_pixels
from .feature_cache import KINDS, Item, Writer
from .fingerprint import origin
from .run import token_counter

PROBES = 32  # samples from which sizes are estimated
Thing = Image | str  # a picture, or a caption
Part = HFBackbone | LatentDiffusion


def run(flags: dict[str, Any]) -> None:
    """Cache what the data needs of the frozen parts, and tell how it goes.

    Raises Mgp5Error for unknown kinds, data that cannot be used, a full disk, or a cache that others write to.
    """
    quiet_libraries()
    kinds = flags["kinds"].split(",")
    if unknown := sorted({*kinds} - {*KINDS}):
        raise Mgp5Error(f"--kinds has {', '.join(unknown)}", f"expected some of {','.join(KINDS)}", usage=True)
    parts = resolve(flags["model"])
    data = _data(flags)
    models = _load(parts, kinds, flags["device"])
    names = {kind: parts.mllm if kind == "features" else parts.diffusion for kind in kinds}
    needed, probes = _survey(data, kinds)
    if not any(needed.values()):
        raise Mgp5Error(f"the data has no {' and no '.join(kinds)}", "choose other --kinds or data", usage=True)
    origins = {kind: origin(kind, models[kind], names[kind]) for kind in kinds if needed[kind]}
    writers = {kind: Writer(flags["out"], own, flags["dtype"]) for kind, own in origins.items()}
    try:
        _check_disk(writers, models, needed, probes, flags["out"])
        problems = _compute(data, writers, models, flags["batch"], flags["workers"])
    finally:
        for writer in writers.values():
            writer.close()
    for kind, writer in writers.items():
        click.echo(f"{writer.count:,} {kind}, {_size(writer.bytes)}, in {writer.folder}", err=True)
    if problems:
        click.echo(f"left out {problems}", err=True)


def _data(flags: dict[str, Any]) -> Keyed | Shards:
    """The data with all of its history: what training may need, and no sample twice."""
    data = override(DataConfig(instruct_every=0), parse_settings(flags["settings"]))
    pairs = tuple(zip(flags["formats"], flags["sources"], strict=True))
    tell = partial(click.echo, err=True)
    return load_sources(pairs, data, flags.get("split", "train"), count=token_counter(flags["model"]), tell=tell)


def _load(parts: Parts, kinds: Sequence[str], device: str) -> dict[str, Part]:
    """For each kind the model that computes it, on its device; one that no kind needs is not loaded."""
    place, dtype = pick_device(device)
    models: dict[str, Part] = {}
    if {*kinds} - {"features"}:
        models |= dict.fromkeys(("latents", "captions"), load_generator(parts.diffusion, dtype).to(place))
    if "features" in kinds:
        backbone = load_backbone(parts.mllm, dtype)
        backbone.language.layers = nn.ModuleList()  # the largest part of all, and not needed to see
        models["features"] = backbone.to(place)
    for model in models.values():
        limit_threads_for_small_models(model)
    return models


def things(conversation: Conversation) -> Iterator[tuple[str, Thing]]:
    """What of a sample can be cached, each with its kind."""
    *context, target = conversation.messages
    for image in target.images:
        yield "latents", image
        if image.caption:
            yield "captions", image.caption
    yield from (("features", image) for message in context for image in message.images)


def key_of(thing: Thing) -> str:
    """The key of an item. Raises Mgp5Error for a picture that cannot be read."""
    return digest(thing) if isinstance(thing, str) else thing.digest()


def prepare(kind: str, thing: Thing, model: Part) -> Any:
    """What a model is given of a picture or caption. Raises Mgp5Error or ValueError for a picture that is broken."""
    if kind == "captions":
        return thing
    picture = thing.load()
    return to_pixels(picture, (model.native_size,) * 2) if kind == "latents" else model.preprocess([picture])


def merge(kind: str, values: list[Any]) -> Any:
    """Prepared things as one batch."""
    if kind == "features":
        return {name: torch.cat([value[name] for value in values]) for name in values[0]}
    return torch.stack(values) if kind == "latents" else values


@torch.no_grad()
def compute(kind: str, batch: Any, model: Part) -> list[Item]:
    """The items of a batch."""
    if kind == "features":
        others = {name: value for name, value in batch.items() if name != "pixel_values"}
        features = model.encode_images(batch)
        return [(own, {name: value[i] for name, value in others.items()}) for i, own in enumerate(features)]
    results = model.moments(batch) if kind == "latents" else model.encode_text(batch)
    return [(result, {}) for result in results]


class Gather:
    """Samples -> what is new in them, ready to be computed; runs in data workers, which do not use the weights."""

    def __init__(self, done: dict[str, Container[str]], models: dict[str, Part]) -> None:
        self.done, self.models = done, models
        self.begun: set[tuple[str, str]] = set()

    def __call__(self, samples: Sequence[Any]) -> tuple[int, dict[str, tuple[list[str], Any]], list[Skipped]]:
        """How many samples there were, keys and batch of what is new of each kind, and what cannot be used."""
        new: dict[str, dict[str, Any]] = {kind: {} for kind in self.done}
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        for place, conversation in (sample for sample in samples if not isinstance(sample, Skipped)):
            for kind, thing in things(conversation):
                try:
                    if kind in self.done and (key := self._claim(kind, thing)):
                        new[kind][key] = prepare(kind, thing, self.models[kind])
                except (Mgp5Error, ValueError) as error:
                    skipped.append(Skipped("broken image", f"{thing.path or place} ({error})"))
        merged = {kind: ([*found], merge(kind, [*found.values()])) for kind, found in new.items() if found}
        return len(samples), merged, skipped

    def _claim(self, kind: str, thing: Thing) -> str | None:
        """The key, unless this has been done or begun. Raises Mgp5Error."""
        key = key_of(thing)
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


def _survey(data: Keyed | Shards, kinds: Sequence[str]) -> tuple[dict[str, int], dict[str, list[Thing]]]:
    """How many different things of each kind the data has, and some of them; of shards about, and the first."""
    probes: dict[str, list[Thing]] = {kind: [] for kind in KINDS}
    if isinstance(data, Shards):
        first = next(sample for sample in data if not isinstance(sample, Skipped))
        for kind, thing in things(first[1]):
            probes[kind].append(thing)
        return {kind: (data.size or 1) * len(probes[kind]) for kind in kinds}, probes
    found: dict[str, set[int]] = {kind: set() for kind in KINDS}
    step = max(1, len(data) // PROBES)
    for index in range(len(data)):
        for kind, thing in things(data[index][1]):
            found[kind].add(hash(thing if isinstance(thing, str) else thing.path))
            probes[kind] += [] if index % step else [thing]
    return {kind: len(found[kind]) for kind in kinds}, probes


def _check_disk(
    writers: dict[str, Writer],
    models: dict[str, Part],
    needed: dict[str, int],
    probes: dict[str, list[Thing]],
    out: Path,
) -> None:
    """Tell how much is to be written, about. Raises Mgp5Error when the disk cannot hold it."""
    sizes = {}
    for kind, writer in writers.items():
        done, size = _probe(kind, probes[kind], writer, models[kind])
        sizes[kind] = size * max(needed[kind] * (1 - done), 0)
    free = shutil.disk_usage(out).free
    plan = ", ".join(f"{kind} {_size(size)}" for kind, size in sizes.items())
    click.echo(f"to be written, about: {plan or 'nothing'}; {_size(free)} free in {out}", err=True)
    if sum(sizes.values()) > free:
        raise Mgp5Error(
            f"{out} has {_size(free)} free, the cache needs about {_size(sum(sizes.values()))} more ({plan})",
            "choose another disk, --dtype fp16, or fewer --kinds",
        )


def _probe(kind: str, probes: Sequence[Thing], writer: Writer, model: Part) -> tuple[float, float]:
    """Which share of the things is done, and bytes of an item."""
    done, sizes = 0, []
    for thing in probes:
        try:
            if key_of(thing) in writer:
                done += 1
            elif len(sizes) < 4:
                value, others = compute(kind, merge(kind, [prepare(kind, thing, model)]), model)[0]
                sizes.append(value.numel() * writer.itemsize + sum(other.nbytes for other in others.values()))
        except (Mgp5Error, ValueError):
            continue  # a broken picture is told when its turn comes
    size = sum(sizes) / len(sizes) if sizes else writer.bytes / max(1, writer.count)
    return done / max(1, len(probes)), size


def _compute(
    data: Keyed | Shards, writers: dict[str, Writer], models: dict[str, Part], batch: int, workers: int
) -> Problems:
    """Compute and write all that is not there yet; returns what could not be used."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    gather = Gather({kind: writer.done for kind, writer in writers.items()}, models)
    stream = isinstance(data, Shards)
    fork = "fork" if workers else None  # the models stay where they are
    source = _Once(data) if stream else data
    loader = DataLoader(source, batch, collate_fn=gather, num_workers=workers, multiprocessing_context=fork)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    problems, noted, items, start = Problems(), set(), 0, time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=data.size if stream else len(data))
        for samples, new, skipped in loader:
            for kind, (keys, prepared) in new.items():
                for key, item in zip(keys, compute(kind, prepared, models[kind]), strict=True):
                    if key not in writers[kind]:  # two workers may find the same
                        writers[kind].add(key, item)
                        items += 1
            for note in {*skipped} - noted:
                problems.note(*note)
            noted.update(skipped)
            size = sum(writer.bytes for writer in writers.values())
            text = f"{items / (time.monotonic() - start):.1f} items/s  {_size(size)} on disk"
            bar.update(task, advance=samples, description=text)
    return problems


def _size(number: float) -> str:
    """Bytes for people."""
    from rich.filesize import decimal

    return decimal(int(number))
