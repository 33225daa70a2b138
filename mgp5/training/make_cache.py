"""Fill feature caches: find what is new in the data, compute it by the frozen parts, write it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.filesize import decimal
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import DataConfig, ModelConfig
from ..data import Problems, Skipped, Source, check_sources, load_sources
from ..data.shards import Shards
from ..device import DTYPES, limit_threads_for_small_models, pick_device
from ..engines import fuse_vae
from ..errors import Mgp5Error, raise_all
from ..files import digest
from ..generators import load_generator
from ..heads.minigpt5 import to_pixels
from ..heads.settings import model_config_from
from ..hub import Parts, read_config, resolve
from ..loading import CONFIG, load_backbone, load_checkpoint
from ..messages import Conversation, Image
from ..options import override
from .batch import LEAST
from .feature_cache import KINDS, CacheKey, FrozenPart, Item, Reader, Writer, cache_key, code_parts
from .run import token_counter

CHECKED = 8  # batches, after which it is known what the whole data will need
Cacheable = Image | str  # an image, or a caption
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CacheRequest:
    """What to cache, of which data, for which model. Raises Mgp5Error that names all that is wrong in it."""

    model: str  # whose frozen parts compute it: as train is given it, or a folder that it has written
    data: tuple[Source, ...]
    out: Path  # folder for the caches
    split: str = "train"
    kinds: tuple[str, ...] = KINDS[:3]  # features are those of context images, codes of a head that has them
    dtype: str = "fp16"
    batch: int = 16  # samples at a time
    workers: int = 0  # processes that read images
    overrides: Mapping[str, Any] = field(default_factory=dict)  # settings of the data
    device: str = "auto"

    def __post_init__(self) -> None:
        problems = []
        if unknown := sorted({*self.kinds} - {*KINDS}):
            problems.append(f"--kinds has {', '.join(unknown)}, expected some of {','.join(KINDS)}")
        if self.dtype not in DTYPES:
            problems.append(f"--dtype is {self.dtype}, expected one of {', '.join(DTYPES)}")
        if self.batch < 1 or self.workers < 0:
            problems.append(f"--batch is {self.batch} and --workers {self.workers}, expected at least 1 and 0")
        raise_all(problems + check_sources(self.data), ())


class CacheProgress(NamedTuple):
    """How far a cache is."""

    samples: int  # that were read
    total: int | None  # samples; None: unknown
    items: int  # that were computed
    bytes: int  # on disk


def make_cache(request: CacheRequest, tell: Tell = lambda line: None) -> Iterator[CacheProgress]:
    """Cache what the data needs of the frozen parts and is not cached yet; yield after each batch of samples.

    `tell` takes lines about what will be written, what was, and what was left out. Raises Mgp5Error for data that
    cannot be used, a full disk, or a cache that others write to.
    """
    parts, kinds = resolve(request.model), request.kinds
    config = override(DataConfig(instruct_every=0), dict(request.overrides))  # all of the history, no sample twice
    data = load_sources(request.data, config, request.split, count=token_counter(request.model), tell=tell)
    models = _load(parts, kinds, request.device, config.max_pixels)
    samples, items, total = 0, 0, data.size if isinstance(data, Shards) else len(data)
    skipped: dict[Skipped, None] = {}
    with ExitStack() as stack:
        keys = (_key(kind, models[kind], parts) for kind in kinds)
        writers = {key.kind: stack.enter_context(closing(Writer(request.out, key, request.dtype))) for key in keys}
        loader = DataLoader(
            data,
            request.batch,
            collate_fn=CacheCollator({kind: writer.done for kind, writer in writers.items()}, models),
            num_workers=request.workers,
            multiprocessing_context="fork" if request.workers else None,  # the models stay where they are
        )
        for position, (number, batches, unusable) in enumerate(loader, 1):
            for kind, (names, batch) in batches.items():
                new = zip(names, compute(kind, batch, models[kind]), strict=True)
                items += sum(writers[kind].add(name, item) for name, item in new)
            skipped |= dict.fromkeys(unusable)
            samples += number
            if position == CHECKED and total:
                _check_disk(writers, total / samples - 1, request.out, tell)
            yield CacheProgress(samples, total, items, sum(writer.bytes for writer in writers.values()))
    for kind, writer in writers.items():
        if len(writer):
            tell(f"{len(writer):,} {kind}, {decimal(writer.bytes)}, in {writer.folder}")
    if skipped:
        tell(f"left out {Problems(skipped)}")
    if not any(map(len, writers.values())):
        raise Mgp5Error(f"the data has no {' and no '.join(kinds)}", "choose other --kinds or data", usage=True)


def _key(kind: str, model: Any, parts: Parts) -> CacheKey:
    if kind == "codes":
        return cache_key(kind, *(code_parts(model) if _of_tokens(model) else (model, parts.diffusion)))
    return cache_key(kind, model, parts.mllm if kind == "features" else parts.diffusion)


def _load(parts: Parts, kinds: Sequence[str], name: str, max_pixels: int | None) -> dict[str, FrozenPart]:
    """Return for each kind the model that computes it, on its device; one that no kind needs is not loaded."""
    device, dtype = pick_device(name)
    models: dict[str, FrozenPart] = {}
    if {*kinds} & {"latents", "captions"}:
        generator = load_generator(parts.diffusion, dtype).to(device)
        if device.type == "cuda":
            fuse_vae(generator)
        models |= dict.fromkeys(("latents", "captions"), generator)
    if "features" in kinds:
        backbone = load_backbone(parts.mllm, dtype)
        backbone.limit_pixels(max_pixels or _max_pixels(parts))
        backbone.language.layers = nn.ModuleList()  # the largest part of all, and not needed to encode images
        models["features"] = backbone.to(device)
    if "codes" in kinds:
        models["codes"] = _load_coder(parts, dtype).to(device)
    for model in models.values():
        limit_threads_for_small_models(model)
    return models


def _load_coder(parts: Parts, dtype: torch.dtype) -> FrozenPart:
    """Return what makes codes: a model with a tokenizer over its vision tower, or a generator that has codes itself."""
    if parts.trained is None:
        generator = load_generator(parts.diffusion, dtype)
        if hasattr(generator, "quantizer"):
            return generator
        hint = "give a run of its tokenizer: mgp5 train --head seed --stage tokenizer"
        raise Mgp5Error(f"--kinds codes of {parts.name}, in which no tokenizer was trained", hint, usage=True)
    model = load_checkpoint(parts, dtype=dtype)
    if "codes" not in (model.head.target_cache or ())[:1]:
        found = f"--kinds codes of {parts.name}, whose head {model.head.spec.name} has none"
        raise Mgp5Error(found, "choose other --kinds", usage=True)
    model.backbone.language.layers = nn.ModuleList()
    return model.head.generator if model.head.encoder is None else model


def _of_tokens(model: FrozenPart) -> bool:
    """Return whether codes are made of the vision tower's tokens, and so of context images too."""
    return hasattr(model, "backbone")


def _max_pixels(parts: Parts) -> int:
    """Return the most pixels that a context image of a model takes."""
    path = parts.trained and parts.trained / CONFIG
    return model_config_from(read_config(path), str(path)).max_pixels if path else ModelConfig.max_pixels


def cacheables(conversation: Conversation, context_kinds: Sequence[str]) -> Iterator[tuple[str, Cacheable]]:
    """Yield what of a sample can be cached, each with its kind; of context images these kinds."""
    *context, target = conversation.messages
    for image in target.images:
        yield from (("latents", image), ("codes", image))
        if image.caption:
            yield "captions", image.caption
    yield from ((kind, image) for message in context for image in message.images for kind in context_kinds)


def _check_disk(writers: dict[str, Writer], ahead: float, out: Path, tell: Tell) -> None:
    """Tell how much is still to be written: `ahead` times what was. Raises Mgp5Error when the disk cannot hold it."""
    sizes = {kind: int(writer.added * ahead) for kind, writer in writers.items()}
    free, total = shutil.disk_usage(out).free, sum(sizes.values())
    plan = ", ".join(f"{kind} {decimal(size)}" for kind, size in sizes.items() if size)
    tell(f"still to be written, about: {plan or 'nothing'}; {decimal(free)} free in {out}")
    if total > free:
        problem = f"{out} has {decimal(free)} free, the cache needs about {decimal(total)} more ({plan})"
        raise Mgp5Error(problem, "choose another disk, --dtype fp16, or fewer --kinds")


def prepare(kind: str, value: Cacheable, model: FrozenPart) -> Any:
    """Return what a model is given of an image or caption. Raises Mgp5Error or ValueError for a broken image."""
    if kind == "captions":
        return value
    image = value.load(LEAST)
    if kind == "latents" or (kind == "codes" and not _of_tokens(model)):
        return to_pixels(image, (model.native_size,) * 2)
    return (model.backbone if kind == "codes" else model).preprocess([image])


def collate(values: list[Any]) -> Any:
    """Return prepared values as one batch."""
    if isinstance(values[0], dict):
        return {name: torch.cat([value[name] for value in values]) for name in values[0]}
    return torch.stack(values) if isinstance(values[0], Tensor) else values


@torch.no_grad()
def compute(kind: str, batch: Any, model: FrozenPart) -> list[Item]:
    """Return the items of a batch."""
    if kind == "codes":
        if _of_tokens(model):
            made = model.head.codes(model.backbone, batch)
        else:
            made = model.encode(batch.to(next(model.parameters()).device))
        return [(codes.int(), {}) for codes in made]
    if kind == "features":
        others = {name: value for name, value in batch.items() if name != "pixel_values"}
        features = model.encode_images(batch)
        return [(own, {name: value[i] for name, value in others.items()}) for i, own in enumerate(features)]
    results = model.moments(batch) if kind == "latents" else model.encode_text(batch)
    return [(result, {}) for result in results]


class CacheCollator:
    """Collate samples to what is new in them, ready to be computed; runs in data workers, which use no weights."""

    def __init__(self, done: dict[str, Reader], models: dict[str, FrozenPart]) -> None:
        self.done, self.models = done, models
        self.context_kinds = ["features", *(["codes"] if _of_tokens(models.get("codes")) else [])]
        self.begun: dict[str, set[str]] = {kind: set() for kind in done}

    def __call__(self, samples: Sequence[Any]) -> tuple[int, dict[str, tuple[list[str], Any]], list[Skipped]]:
        """Return how many samples there were, keys and batch of what is new of each kind, and what cannot be used."""
        new: dict[str, dict[str, Any]] = {kind: {} for kind in self.done}
        skipped = [sample for sample in samples if isinstance(sample, Skipped)]
        for where, conversation in (sample for sample in samples if not isinstance(sample, Skipped)):
            for kind, value in (pair for pair in cacheables(conversation, self.context_kinds) if pair[0] in self.done):
                try:
                    key = digest(value) if isinstance(value, str) else value.digest()
                    if key not in self.done[kind] and key not in self.begun[kind]:
                        self.begun[kind].add(key)
                        new[kind][key] = prepare(kind, value, self.models[kind])
                except (Mgp5Error, ValueError) as error:
                    skipped.append(Skipped("broken image", f"{value.path or where} ({error})"))
        batches = {kind: ([*values], collate([*values.values()])) for kind, values in new.items() if values}
        return len(samples), batches, skipped
