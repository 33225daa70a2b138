"""Results of frozen parts on disk, so that training does not compute them again.

A cache is a folder KIND-FINGERPRINT with shards of a few hundred items, each a tensor under its item's key, and a
manifest that says what the items were made by. Only a model of the same fingerprint reads it.

P target images, S slots and E width of a context image, C, h and w of latents, L and D of a condition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..backbones.hf import HFBackbone
from ..device import DTYPES
from ..errors import Mgp5Error
from ..files import digest, lock, read_json, remove_leftovers, write_bytes, write_json
from ..generators.latent_diffusion import LatentDiffusion
from ..hub import REPOS
from ..messages import Image

if TYPE_CHECKING:
    from ..heads.batch import Batch
    from ..model import InterleavedModel

KINDS = ("latents", "captions", "features")
MANIFEST = "manifest.json"
SHARD_ITEMS, SHARD_BYTES = 512, 2**28
VERSION = 1  # of our own code: to be raised with every change that changes what is computed
HASHED_VALUES = 256  # of each weight
# Of configurations: what differs between versions of the libraries, or between precisions.
VOLATILE = {"dtype", "torch_dtype", "transformers_version", "architectures", "id2label", "label2id"}

Item = tuple[Tensor, dict[str, Tensor]]  # what was computed, and what else the LLM needs of an image (Qwen: its grid)
FrozenPart = HFBackbone | LatentDiffusion


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What the items of a cache were made by.

    Args:
        kind: one of KINDS.
        model: hub id or folder, for people; the same weights may lie elsewhere.
        revision: commit of a model on the hub that mgp5 reads.
        config, weights: hashes of the configuration and the weights of the parts that a kind depends on, and of no
            others: another UNet leaves latents valid. Weights are hashed in bfloat16, so that the precision in which
            they are loaded does not count (but float16 made from float32).
        transform: what was done to an image or text before.
        version: of our own code that does it.
    """

    kind: str
    model: str
    revision: str | None
    config: str
    weights: str
    transform: dict[str, Any]
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """A hash of all fields but the model's name, in 32 hexadecimal digits."""
        return digest({name: value for name, value in asdict(self).items() if name != "model"})

    def explain_mismatch(self, manifest: dict[str, Any]) -> str:
        """Say how the manifest of another cache differs from this key."""
        names = [name for name, value in asdict(self).items() if name != "model" and manifest.get(name) != value]
        old, new = manifest.get("transform") or {}, self.transform
        steps = [f"{k} {old.get(k)}, not {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
        details = f" ({'; '.join(steps)})" if steps else ""
        return f"made by {manifest.get('model')}, not by {self.model}: it differs in {', '.join(names)}{details}"


def cache_key(kind: str, part: FrozenPart, model: str) -> CacheKey:
    """Return what decides the items of a kind.

    Args:
        kind: one of KINDS.
        part: the loaded generator (latents, captions) or LLM (features).
        model: its hub id or folder.
    """
    transform: dict[str, Any]
    if kind == "latents":
        named = [pair for pair in part.vae.named_parameters() if not pair[0].startswith(("decoder.", "post_quant_"))]
        transform = {"size": [part.native_size] * 2, "fit": "centre", "resample": "Lanczos"}
        config = dict(part.vae.config)
    elif kind == "captions":
        encoders = {name: module for name, module in part.named_children() if name.startswith("text_encoder")}
        named = nn.ModuleDict(encoders).named_parameters()
        transform = dict(zip(("rows", "width"), part.condition_shape, strict=True))
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
        config = {name: encoder.config.to_dict() for name, encoder in encoders.items()}
        config |= {name: digest(getattr(part, name).get_vocab()) for name in tokenizers}
    else:
        text = {id(p) for module in (part.language, part.lm_head) for p in module.parameters()}
        named = [(name, value) for name, value in part.core.named_parameters() if id(value) not in text]
        transform = part.image_processor.to_dict()
        words = ("vision", "projector", "qformer", "query")
        config = {name: v for name, v in part.core.config.to_dict().items() if any(word in name for word in words)}
    revision = next((repo.revision for repo in REPOS.values() if repo.id == model), None)
    hashes = {"config": digest(_plain(config)), "weights": _hash_weights(named)}
    return CacheKey(kind=kind, model=model, revision=revision, transform=_plain(transform), **hashes)


def _plain(value: Any) -> Any:
    """Return a configuration as JSON gives it back, without what does not change the results."""
    if isinstance(value, dict):
        kept = {str(k): v for k, v in value.items() if v is not None and k not in VOLATILE}
        return {k: _plain(v) for k, v in kept.items() if not k.startswith("_")}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _hash_weights(named: Iterable[tuple[str, Tensor]]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // HASHED_VALUES)].bfloat16().float().cpu()
        total.update(f"{name} {tuple(tensor.shape)} ".encode() + values.numpy().tobytes())
    return total.hexdigest()


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
        """Return an item, or None. Raises Mgp5Error when its shard is gone or broken."""
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
    """Open a shard, memory-mapped; a data set of millions has too many to keep all their headers in memory."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise Mgp5Error(f"{path} cannot be read ({error})", "remove it, and run mgp5 data cache again") from None


class Writer:
    """Adds items to a cache; what is there is kept. A process that is killed loses what was not in a shard yet.

    Raises Mgp5Error when another process writes to the cache, or when it is of another dtype.
    """

    def __init__(self, root: Path, key: CacheKey, dtype: str) -> None:
        self.key, self.dtype, self.itemsize = key, dtype, DTYPES[dtype].itemsize
        self.folder = root / f"{key.kind}-{key.fingerprint[:12]}"
        self._lock = lock(self.folder / ".lock")
        manifest = read_manifest(self.folder)
        if manifest and manifest.get("dtype") != dtype:
            found = f"{self.folder} holds {manifest.get('dtype')}, not {dtype}"
            raise Mgp5Error(found, "choose another --out", usage=True)
        remove_leftovers(self.folder)
        self.shards = sorted(path.name for path in self.folder.glob("[0-9]*.safetensors"))
        self.done = Reader(self.folder, self.shards)
        self.count = len(self.done)
        self.bytes = sum((self.folder / shard).stat().st_size for shard in self.shards)
        self._fresh: dict[str, Tensor] = {}
        self._new: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._new or key in self.done

    def add(self, key: str, item: Item) -> None:
        """Take an item; writes a shard when there is enough for one. Raises Mgp5Error for what the dtype cannot hold
        and for a full disk."""
        value = item[0].to("cpu", DTYPES[self.dtype])
        if not value.isfinite().all():
            raise Mgp5Error(f"{self.key.kind} do not fit into {self.dtype}", "choose --dtype bf16 and another --out")
        tensors = {key: value} | {f"{key}/{name}": extra.cpu() for name, extra in item[1].items()}
        self._fresh |= {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        self._new.add(key)
        self.count += 1
        if len(self._fresh) >= SHARD_ITEMS or len(self._fresh) * value.nbytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added as one more shard; the manifest, with its dtype, is there before the first."""
        if not self._fresh:
            return
        if not self.shards:
            self._write_manifest()
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
        facts = {"fingerprint": self.key.fingerprint, "dtype": self.dtype, "count": self.count, "shards": self.shards}
        write_json(self.folder / MANIFEST, asdict(self.key) | facts, durable=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a cache, {} when there is none. Raises Mgp5Error when it cannot be read."""
    file = folder / MANIFEST
    return read_json(file, "remove the folder and cache again") if file.exists() else {}


class Caches:
    """What one or more folders of caches hold for a model; used by the collator in data workers."""

    def __init__(self, readers: dict[str, list[Reader]]) -> None:
        self._readers = readers
        self._hits = {kind: [0, 0] for kind in KINDS if kind in readers}  # found, needed

    @classmethod
    def open(cls, folders: Sequence[Path], model: InterleavedModel) -> Caches:
        """Return the caches in these folders.

        Raises:
            Mgp5Error: a folder without caches, or with caches of a kind of which none is this model's.
        """
        parts = {"features": (model.backbone, model.config.mllm)}
        if (generator := getattr(model.head, "generator", None)) is not None:
            parts |= dict.fromkeys(("latents", "captions"), (generator, model.config.diffusion))
        readers: dict[str, list[Reader]] = {}
        for folder in folders:
            manifests = [(path.parent, read_manifest(path.parent)) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
            if not manifests:
                raise Mgp5Error(f"{folder} holds no cache", "make one with mgp5 data cache --out", usage=True)
            for kind in sorted({str(manifest.get("kind")) for _, manifest in manifests} & parts.keys()):
                key = cache_key(kind, *parts[kind])
                of_kind = [(path, manifest) for path, manifest in manifests if manifest.get("kind") == kind]
                fit = [pair for pair in of_kind if pair[1].get("fingerprint") == key.fingerprint]
                if not fit:
                    path, manifest = of_kind[0]
                    hint = "make one for this model with mgp5 data cache, or leave this --cache out"
                    raise Mgp5Error(f"{path} was {key.explain_mismatch(manifest)}", hint)
                readers.setdefault(kind, []).extend(Reader(path, manifest["shards"]) for path, manifest in fit)
        return cls(readers)

    def pictures(self, kind: str, images: Iterable[Image]) -> dict[int, Item]:
        """Return latents or features of images by their `id()`: of all, or of none when one is missing."""
        if kind not in self._readers:
            return {}
        items = {}
        for image in images:
            try:
                key = image.digest()
            except Mgp5Error:
                return {}  # who reads the image will say so
            if (item := self._get(kind, key)) is None:
                return {}
            items[id(image)] = item
        return items

    def encodings(self, captions: Sequence[str]) -> Tensor | None:  # (P, L, D)
        """Return the encodings of all captions, or None when one is missing; zeros for "", which no loss uses."""
        if "captions" not in self._readers or not any(captions):
            return None
        items = {caption: self._get("captions", digest(caption)) for caption in {*captions} - {""}}
        if None in items.values():
            return None
        values = {caption: item[0] for caption, item in items.items()}
        values[""] = torch.zeros_like(next(iter(values.values())))
        return torch.stack([values[caption] for caption in captions])

    def _get(self, kind: str, key: str) -> Item | None:
        return next((item for reader in self._readers[kind] if (item := reader.get(key)) is not None), None)

    def note(self, batch: Batch) -> None:
        """Count what a batch took from the caches; called where the batches arrive."""
        inputs = batch.context_images
        num_context = len(batch.features or inputs.get("image_grid_thw", inputs.get("pixel_values", ())))
        needed = {
            "latents": (batch.num_targets, "moments" in batch.targets),
            "captions": (sum(map(bool, batch.captions)), "encodings" in batch.targets),
            "features": (num_context, bool(batch.features)),
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
