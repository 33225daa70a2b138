"""Results of frozen parts on disk, so that training does not compute them again.

P pictures to be drawn, S slots and E width of a picture's features, C, h and w of latents, L and D of conditions.

A cache is a folder KIND-FINGERPRINT with shards of a few hundred items, each a tensor under its item's key, and a
manifest that says what the items were made by. Nothing but a model of the same fingerprint reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..device import DTYPES
from ..errors import Mgp5Error
from ..files import digest, lock, read_json, remove_leftovers, write_bytes, write_json
from ..messages import Image
from .fingerprint import CacheKey, origin

if TYPE_CHECKING:
    from ..model import InterleavedModel
    from .batch import Batch

KINDS = ("latents", "captions", "features")
MANIFEST = "manifest.json"
SHARD_ITEMS, SHARD_BYTES = 512, 2**28

Item = tuple[Tensor, dict[str, Tensor]]  # what was computed, and what else the LLM needs of a picture (Qwen: its grid)


class Reader:
    """The items of some shards by key. The index is two flat arrays, which forked data workers share."""

    def __init__(self, folder: Path, shards: Sequence[str]) -> None:
        self.paths = [folder / shard for shard in shards]
        keys, self.extras = [np.empty(0, dtype="S32")], ()
        for path in self.paths:
            names = _open(path).keys()
            keys.append(np.array([name for name in names if "/" not in name], dtype="S32"))
            self.extras = tuple(sorted({name.partition("/")[2] for name in names} - {""}))
        self._keys = np.concatenate(keys)
        order = self._keys.argsort()
        self._keys = self._keys[order]
        self._shards = np.repeat(np.arange(len(shards), dtype=np.uint32), [len(own) for own in keys[1:]])[order]

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def get(self, key: str) -> Item | None:
        """An item, or None. Raises Mgp5Error when its shard is gone or broken."""
        at = self._find(key)
        if at is None:
            return None
        file = _open(self.paths[self._shards[at]])
        return file.get_tensor(key), {name: file.get_tensor(f"{key}/{name}") for name in self.extras}

    def _find(self, key: str) -> int | None:
        at = int(np.searchsorted(self._keys, key.encode()))
        return at if at < len(self._keys) and self._keys[at] == key.encode() else None


@lru_cache(maxsize=64)
def _open(path: Path) -> Any:
    """A shard, memory-mapped. A data set of millions has too many to keep all their headers in memory."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise Mgp5Error(f"{path} cannot be read ({error})", "remove it, and run mgp5 data cache again") from None


class Writer:
    """Adds items to a cache; what is there is kept. A process that is killed loses what was not in a shard yet.

    Raises Mgp5Error when another process writes to the cache, or when it is of another dtype.
    """

    def __init__(self, root: Path, origin: CacheKey, dtype: str) -> None:
        self.origin, self.dtype, self.itemsize = origin, dtype, DTYPES[dtype].itemsize
        self.folder = root / f"{origin.kind}-{origin.fingerprint[:12]}"
        self._lock = lock(self.folder / ".lock")
        manifest = read_manifest(self.folder)
        if manifest and manifest.get("dtype") != dtype:
            found = f"{self.folder} holds {manifest.get('dtype')}, not {dtype}"
            raise Mgp5Error(found, "choose another --out", usage=True)
        remove_leftovers(self.folder)
        self.shards = sorted(path.name for path in self.folder.glob("*.safetensors"))
        self.done = Reader(self.folder, self.shards)
        self.count = len(self.done)
        self.bytes = sum((self.folder / shard).stat().st_size for shard in self.shards)
        self._fresh: dict[str, Tensor] = {}
        self._new: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._new or key in self.done

    def add(self, key: str, item: Item) -> None:
        """Take an item; writes a shard when there is enough for one."""
        value = item[0].to("cpu", DTYPES[self.dtype])
        if not value.isfinite().all():
            raise Mgp5Error(f"{self.origin.kind} do not fit into {self.dtype}", "choose --dtype bf16 and another --out")
        own = {key: value} | {f"{key}/{name}": extra.cpu() for name, extra in item[1].items()}
        self._fresh |= {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in own.items()}
        self._new.add(key)
        self.count += 1
        if len(self._fresh) >= SHARD_ITEMS or len(self._fresh) * value.nbytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added as one more shard, and the manifest."""
        if not self._fresh:
            return
        if not self.shards:
            self._write_manifest()  # so that a shard never stands without its dtype
        last = int(self.shards[-1].partition(".")[0]) if self.shards else -1
        self.shards.append(f"{last + 1:05}.safetensors")
        contents, self._fresh = save(self._fresh), {}
        self.bytes += len(contents)
        write_bytes(self.folder / self.shards[-1], contents, durable=True)
        self._write_manifest()

    def close(self) -> None:
        """Write the rest, and let others write."""
        try:
            self.flush()
            if self.shards:
                self._write_manifest()
        finally:
            self._lock.close()

    def _write_manifest(self) -> None:
        facts = asdict(self.origin) | {"fingerprint": self.origin.fingerprint, "dtype": self.dtype, "count": self.count}
        write_json(self.folder / MANIFEST, facts | {"shards": self.shards}, durable=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, {} when there is none. Raises Mgp5Error when it cannot be read."""
    file = folder / MANIFEST
    return read_json(file, "remove the folder and cache again") if file.exists() else {}


class Caches:
    """What one or more folders of caches hold for a model; used by the collator in data workers."""

    def __init__(self, readers: dict[str, list[Reader]]) -> None:
        self._readers = readers
        self._hits = {kind: [0, 0] for kind in KINDS if kind in readers}  # found, needed

    @classmethod
    def open(cls, folders: Sequence[Path], model: InterleavedModel) -> Caches:
        """The caches in these folders.

        Raises Mgp5Error for a folder without caches, or with one of a kind of which none is this model's.
        """
        readers: dict[str, list[Reader]] = {}
        for folder in folders:
            found = [(path.parent, read_manifest(path.parent)) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
            if not found:
                raise Mgp5Error(f"{folder} holds no cache", "make one with mgp5 data cache --out", usage=True)
            for kind in sorted({str(manifest.get("kind")) for _, manifest in found} & {*KINDS}):
                if kind == "features":
                    expected = origin(kind, model.backbone, model.config.mllm)
                else:
                    expected = origin(kind, model.head.generator, model.config.diffusion)
                own = [(place, facts) for place, facts in found if facts.get("kind") == kind]
                fit = [pair for pair in own if pair[1].get("fingerprint") == expected.fingerprint]
                if not fit:
                    place, facts = own[0]
                    hint = "make one for this model with mgp5 data cache, or leave this --cache out"
                    raise Mgp5Error(f"{place} was {expected.difference(facts)}", hint)
                readers.setdefault(kind, []).extend(Reader(place, facts["shards"]) for place, facts in fit)
        return cls(readers)

    def pictures(self, kind: str, images: Iterable[Image]) -> dict[int, Item]:
        """Latents or features of pictures by their `id()`: of all, or of none when one is missing."""
        if kind not in self._readers:
            return {}
        found = {}
        for image in images:
            try:
                key = image.digest()
            except Mgp5Error:
                return {}  # who reads the picture will say so
            if (item := self._get(kind, key)) is None:
                return {}
            found[id(image)] = item
        return found

    def encodings(self, captions: Sequence[str]) -> Tensor | None:  # (P, L, D)
        """Encodings of all captions, or None when one is missing; zeros for "", which no loss uses."""
        if "captions" not in self._readers or not any(captions):
            return None
        found = {caption: self._get("captions", digest(caption)) for caption in {*captions} - {""}}
        if None in found.values():
            return None
        values = {caption: item[0] for caption, item in found.items()}
        values[""] = torch.zeros_like(next(iter(values.values())))
        return torch.stack([values[caption] for caption in captions])

    def _get(self, kind: str, key: str) -> Item | None:
        return next((item for reader in self._readers[kind] if (item := reader.get(key)) is not None), None)

    def note(self, batch: Batch) -> None:
        """Count what a batch took from the caches; called where the batches arrive."""
        inputs = batch.context_images
        seen = len(batch.features or inputs.get("image_grid_thw", inputs.get("pixel_values", ())))
        told = sum(map(bool, batch.captions))
        needed = {
            "latents": (batch.num_targets, "moments" in batch.targets),
            "captions": (told, "encodings" in batch.targets),
            "features": (seen, bool(batch.features)),
        }
        for kind, hits in self._hits.items():
            number, found = needed[kind]
            hits[0] += number * found
            hits[1] += number

    def __str__(self) -> str:
        shares = [
            f"{100 * found / needed:.1f} % of {needed:,} {kind}"
            for kind, (found, needed) in self._hits.items()
            if needed
        ]
        return ", ".join(shares) or "nothing"
