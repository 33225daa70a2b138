"""What decides the results of the frozen parts, as a fingerprint by which a cache is matched to a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..backbones.hf import HFBackbone
from ..files import digest
from ..generators.latent_diffusion import LatentDiffusion
from ..hub import REPOS

VERSION = 1  # of our own code: to be raised with every change that changes what is computed
SAMPLE = 256  # values of each weight that are hashed
# Of configurations: what differs between versions of the libraries, or between precisions.
VOLATILE = {"dtype", "torch_dtype", "transformers_version", "architectures", "id2label", "label2id"}


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What the items of a cache were made by.

    Args:
        model: hub id or folder, for people; the same weights may lie elsewhere.
        revision: that mgp5 reads of a model on the hub.
        config, weights: hashes of the configuration and the weights of the parts that a kind depends on, and of no
            others: another UNet leaves latents valid. Weights are hashed in bfloat16, so that the precision in which
            they are loaded does not count (but float16 made from float32).
        transform: what was done to a picture or text before.
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
        """A hash of all this but the model's name, in 32 hexadecimal digits."""
        return digest({name: value for name, value in asdict(self).items() if name != "model"})

    def difference(self, found: dict[str, Any]) -> str:
        """In words, how the manifest of another cache differs from this."""
        names = [name for name, value in asdict(self).items() if name != "model" and found.get(name) != value]
        old, new = found.get("transform") or {}, self.transform
        steps = [f"{k} {old.get(k)}, not {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
        details = f" ({'; '.join(steps)})" if steps else ""
        return f"made by {found.get('model')}, not by {self.model}: it differs in {', '.join(names)}{details}"


def origin(kind: str, part: HFBackbone | LatentDiffusion, model: str) -> CacheKey:
    """What decides the items of a kind, of the loaded diffusion model (latents, captions) or LLM (features)."""
    config, weights, transform = {"latents": _vae, "captions": _encoders, "features": _vision}[kind](part)
    return CacheKey(
        kind=kind,
        model=model,
        revision=next((repo.revision for repo in REPOS.values() if repo.id == model), None),
        config=digest(_plain(config)),
        weights=_hash_weights(weights),
        transform=_plain(transform),
    )


Facts = tuple[dict[str, Any], Iterable[tuple[str, Tensor]], dict[str, Any]]


def _vae(diffusion: LatentDiffusion) -> Facts:
    vae, side = diffusion.vae, diffusion.native_size
    weights = [pair for pair in vae.named_parameters() if not pair[0].startswith(("decoder.", "post_quant_conv."))]
    return dict(vae.config), weights, {"size": [side, side], "fit": "centre", "resample": "Lanczos"}


def _encoders(diffusion: LatentDiffusion) -> Facts:
    encoders = nn.ModuleDict({name: m for name, m in diffusion.named_children() if name.startswith("text_encoder")})
    names = [name.replace("text_encoder", "tokenizer") for name in encoders]
    config = {name: encoder.config.to_dict() for name, encoder in encoders.items()}
    config |= {name: digest(getattr(diffusion, name).get_vocab()) for name in names}
    return config, encoders.named_parameters(), dict(zip(("rows", "width"), diffusion.condition_shape, strict=True))


def _vision(backbone: HFBackbone) -> Facts:
    core = backbone.core
    text = {id(p) for part in (backbone.language, backbone.lm_head) for p in part.parameters()}
    weights = [(name, value) for name, value in core.named_parameters() if id(value) not in text]
    words = ("vision", "projector", "qformer", "query")
    config = {name: value for name, value in core.config.to_dict().items() if any(word in name for word in words)}
    return config, weights, backbone.image_processor.to_dict()


def _plain(value: Any) -> Any:
    """A configuration as JSON gives it back, without what does not change the results."""
    if isinstance(value, dict):
        kept = {str(k): v for k, v in value.items() if v is not None and k not in VOLATILE}
        return {k: _plain(v) for k, v in kept.items() if not k.startswith("_")}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _hash_weights(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLE)].bfloat16().float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()
