"""Outputs of frozen parts on disk, so that training does not compute them again.

A cache is a folder KIND-FINGERPRINT with shards of a few hundred items, each a tensor under its item's key, and a
manifest that says what made the items. Only a model of the same fingerprint reads it.

P target images, S slots and E width of a context image, Z, h and w of latents, L and C of a condition.
"""

from __future__ import annotations

import hashlib
from collections import Counter
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

from ..device import DTYPES
from ..errors import Mgp5Error
from ..files import Claim, digest, read_json, remove_folder, remove_leftovers, write_bytes, write_json
from ..hub import REPOS
from ..messages import Image

if TYPE_CHECKING:
    from ..heads.batch import Batch
    from ..model import InterleavedModel

KINDS = ("latents", "captions", "features", "codes")
MANIFEST = "manifest.json"
SHARD_ITEMS, SHARD_BYTES = 512, 2**28
VERSION = 1  # of our own code: to be raised with every change that changes what is computed
HASHED_VALUES = 256  # of each weight
# Of configurations: what differs between versions of the libraries, or between precisions.
VOLATILE = {"dtype", "torch_dtype", "transformers_version", "architectures", "id2label", "label2id"}

Item = tuple[
    Tensor, dict[str, Tensor]
]  # (2Z, h, w), (L, C), (S, E) or (K,); what else the LLM needs of an image (its grid)
FrozenPart = Any  # a backbone, a generator, or for codes a whole model


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What made the items of a cache: the parts that its kind depends on, and no others."""

    kind: str
    model: str  # hub id or folder, for people; the same weights may lie elsewhere
    revision: str | None  # commit of a model on the hub that mgp5 reads
    config: str  # hash of the configuration
    weights: str  # hash of the weights in bfloat16, so that the precision in which they are loaded does not count
    transform: dict[str, Any]  # what was done to an image or text before
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """Hash of all fields but the model's name, in 32 hexadecimal digits."""
        return digest({name: value for name, value in asdict(self).items() if name != "model"})

    def explain_mismatch(self, manifest: dict[str, Any]) -> str:
        """Say how the manifest of another cache differs from this key."""
        names = [name for name, value in asdict(self).items() if name != "model" and manifest.get(name) != value]
        old, new = manifest.get("transform") or {}, self.transform
        steps = [f"{k} {old.get(k)}, not {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
        details = f" ({'; '.join(steps)})" if steps else ""
        return f"made by {manifest.get('model')}, not by {self.model}: it differs in {', '.join(names)}{details}"


def cache_key(kind: str, part: FrozenPart, model: str, encoder: nn.Module | None = None) -> CacheKey:
    """Return the key of a kind for the generator (latents, captions, maybe codes) or the LLM; `model` is its id or
    folder, `encoder` makes codes of what the LLM's vision tower gives."""
    transform: dict[str, Any]
    if kind == "latents" or (kind == "codes" and encoder is None):
        vae = part.vae if kind == "latents" else part
        named = [pair for pair in vae.named_parameters() if not pair[0].startswith(("decoder.", "post_quant_"))]
        transform = {"size": [part.native_size] * 2, "fit": "centre", "resample": "Lanczos"}
        config = dict(vae.config) if kind == "latents" else asdict(vae.config)
    elif kind == "captions":
        part.read_text_encoders()
        encoders = {name: module for name, module in part.named_children() if name.startswith("text_encoder")}
        named = nn.ModuleDict(encoders).named_parameters()
        transform = dict(zip(("rows", "width"), part.condition_shape, strict=True))
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
        config = {name: encoder.config.to_dict() for name, encoder in encoders.items()}
        config |= {name: digest(getattr(part, name).get_vocab()) for name in tokenizers}
    else:
        text = {id(p) for module in (part.language, part.lm_head) for p in module.parameters()}
        named = [(name, value) for name, value in part.core.named_parameters() if id(value) not in text]
        named += [(f"encoder.{name}", value) for name, value in encoder.named_parameters()] if encoder else []
        transform = part.image_processor.to_dict() | part.size
        words = ("vision", "projector", "qformer", "query")
        config = {name: v for name, v in part.core.config.to_dict().items() if any(word in name for word in words)}
    revision = next((repo.revision for repo in REPOS.values() if repo.id == model), None)
    hashes = {"config": digest(_plain(config)), "weights": _hash_weights(named)}
    return CacheKey(kind=kind, model=model, revision=revision, transform=_plain(transform), **hashes)


def code_parts(model: InterleavedModel) -> tuple[FrozenPart, str, nn.Module | None]:
    """Return what `cache_key` takes of a model with codes: of its vision tower, or of a generator that makes them."""
    if (encoder := model.head.encoder) is None:
        return model.head.generator, model.config.diffusion, None
    return model.backbone, model.config.mllm, encoder


def _plain(value: Any) -> Any:
    """Return a configuration as JSON gives it back, without what does not change results."""
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
    """The items of a cache by key; the index is two flat arrays, which forked data workers share."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("[0-9]*.safetensors"))
        names = [_open(path).keys() for path in self.paths]
        keys = [np.array([name for name in of_shard if "/" not in name], dtype="S32") for of_shard in names]
        self.extras = {name.partition("/")[2] for of_shard in names[:1] for name in of_shard} - {""}
        self._keys = np.concatenate([np.empty(0, dtype="S32"), *keys])
        order = self._keys.argsort()
        self._keys = self._keys[order]
        self._shards = np.repeat(np.arange(len(keys), dtype=np.uint32), [len(of_shard) for of_shard in keys])[order]

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def get(self, key: str) -> Item | None:
        """Return an item, or None. Raises Mgp5Error when its shard is gone or broken."""
        if (at := self._find(key)) is None:
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
    """Add items to a cache. A process that is killed loses what was not in a shard yet.

    Raises Mgp5Error when another process writes to the cache, or when it holds another dtype.
    """

    def __init__(self, root: Path, key: CacheKey, dtype: str) -> None:
        self.kind, self.dtype = key.kind, dtype
        self.folder = root / f"{key.kind}-{key.fingerprint[:12]}"
        self._claim = Claim(self.folder)
        remove_leftovers(self.folder)
        self.done = Reader(self.folder)
        if self.done and (old := _manifest(self.folder).get("dtype")) != dtype:
            raise Mgp5Error(f"{self.folder} holds {old}, not {dtype}", "choose another --out", usage=True)
        facts = asdict(key) | {"fingerprint": key.fingerprint, "dtype": dtype}
        write_json(self.folder / MANIFEST, facts, durable=True)
        self._old, self.added = sum(path.stat().st_size for path in self.done.paths), 0  # bytes
        self._next = 1 + max((int(path.stem) for path in self.done.paths), default=-1)
        self._fresh: dict[str, Tensor] = {}
        self._new: set[str] = set()

    def __len__(self) -> int:
        return len(self.done) + len(self._new)

    @property
    def bytes(self) -> int:
        """Size of all items."""
        return self._old + self.added

    def add(self, key: str, item: Item) -> bool:
        """Add an item and return whether it is new. Raises Mgp5Error for infinite values and a full disk."""
        if key in self._new or key in self.done:
            return False
        value = item[0].to("cpu", DTYPES[self.dtype] if item[0].is_floating_point() else None)
        if not value.isfinite().all():
            raise Mgp5Error(f"{self.kind} do not fit into {self.dtype}", "choose --dtype bf16 and another --out")
        tensors = {key: value} | {f"{key}/{name}": extra.cpu() for name, extra in item[1].items()}
        self._fresh |= {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        self._new.add(key)
        self.added += sum(tensor.nbytes for tensor in tensors.values())
        if len(self._fresh) >= SHARD_ITEMS or len(self._fresh) * value.nbytes >= SHARD_BYTES:
            self._flush()
        return True

    def close(self) -> None:
        """Write the last shard, remove a cache without items, and let other processes write."""
        try:
            self._flush()
            if not len(self):
                remove_folder(self.folder)
        finally:
            self._claim.close()

    def _flush(self) -> None:
        if self._fresh:
            contents, self._fresh = save(self._fresh), {}
            write_bytes(self.folder / f"{self._next:05}.safetensors", contents, durable=True)
            self._next += 1


def _manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST, "remove the folder and cache again")


class Caches:
    """What one or more folders of caches hold for a model; used by the collator in data workers."""

    def __init__(self, readers: dict[str, list[Reader]], target: tuple[str, str], context: str) -> None:
        self._readers = readers
        self._target, self._context = target, context  # as `Head.target_cache` and `Head.context_cache`
        self._needed, self._found = Counter[str](), Counter[str]()  # items of each kind

    @classmethod
    def open(cls, folders: Sequence[Path], model: InterleavedModel) -> Caches:
        """Open the caches in these folders.

        Raises Mgp5Error for a folder without caches, or with caches of a kind of which none is this model's.
        """
        target, context = model.head.target_cache or ("", ""), model.head.context_cache
        taken = {target[0], "captions", context}
        parts: dict[str, tuple[Any, ...]] = {"features": (model.backbone, model.config.mllm)}
        if "codes" in taken:
            parts["codes"] = code_parts(model)
        if hasattr(generator := getattr(model.head, "generator", None), "encode_text"):
            parts |= dict.fromkeys(("latents", "captions"), (generator, model.config.diffusion))
        readers: dict[str, list[Reader]] = {}
        for folder in folders:
            manifests = {path.parent: _manifest(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))}
            if not manifests:
                raise Mgp5Error(f"{folder} holds no cache", "make one with mgp5 data cache --out", usage=True)
            kinds = {str(manifest.get("kind")) for manifest in manifests.values()}
            if not kinds & taken & parts.keys():
                found = f"{folder} holds {' and '.join(sorted(kinds))}"
                found += f", which the head {model.head.spec.name} has no use for"
                raise Mgp5Error(found, f"make one with mgp5 data cache --kinds {','.join(sorted(taken - {''}))}")
            for kind in sorted(kinds & taken & parts.keys()):
                key = cache_key(kind, *parts[kind])
                of_kind = {path: manifest for path, manifest in manifests.items() if manifest.get("kind") == kind}
                fit = [path for path, manifest in of_kind.items() if manifest.get("fingerprint") == key.fingerprint]
                if not fit:
                    path, manifest = next(iter(of_kind.items()))
                    hint = "make one for this model with mgp5 data cache, or leave this --cache out"
                    raise Mgp5Error(f"{path} was {key.explain_mismatch(manifest)}", hint)
                readers.setdefault(kind, []).extend(map(Reader, fit))
        return cls(readers, target, context)

    def targets(self, images: Iterable[Image]) -> dict[int, Item]:
        """Return what is stored of target images by their `id()`: of all, or of none when one is missing."""
        return self._images(self._target[0], images)

    def context(self, images: Iterable[Image]) -> dict[int, Item]:
        """Return what is stored of context images by their `id()`: of all, or of none when one is missing."""
        return self._images(self._context, images)

    def _images(self, kind: str, images: Iterable[Image]) -> dict[int, Item]:
        try:
            keys = {id(image): image.digest() for image in images if kind in self._readers}
        except Mgp5Error:
            return {}  # who reads the image will say so
        items = {number: self._get(kind, key) for number, key in keys.items()}
        return {} if None in items.values() else items

    def encodings(self, captions: Sequence[str]) -> Tensor | None:  # (P, L, C)
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
        """Count what a batch needed, and what it took from the caches; called where the batches arrive."""
        inputs = batch.context_images
        num_context = len(batch.features or inputs.get("image_grid_thw", inputs.get("pixel_values", ())))
        for kind, number, cached in (
            (self._target[0], batch.num_targets, self._target[1] in batch.targets),
            ("captions", sum(map(bool, batch.captions)), "encodings" in batch.targets),
            (self._context, num_context, bool(batch.features)),
        ):
            if kind in self._readers:
                self._needed[kind] += number
                self._found[kind] += number * cached

    def __str__(self) -> str:
        """Return the shares that were found, as in "100.0 % of 4 latents, 50.0 % of 2 captions"."""
        needed = [(kind, self._needed[kind]) for kind in KINDS if self._needed[kind]]
        shares = (f"{100 * self._found[kind] / number:.1f} % of {number:,} {kind}" for kind, number in needed)
        return ", ".join(shares) or "nothing"
