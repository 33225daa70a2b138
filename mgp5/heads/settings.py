"""The settings of heads: how they are shaped and trained, and how a checkpoint's configuration is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from ..config import ModelConfig, TrainConfig, unknown_words
from ..errors import Mgp5Error, raise_all
from ..generators.seed_stages import WEIGHTS, SeedTokenizerConfig
from ..generators.var import ClassMode, VARConfig
from ..options import kinds_of
from . import HEADS, head_class


@dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """The configuration of the head of SEED."""

    tokenizer: SeedTokenizerConfig
    # Source of the unconditional condition: zeros, the encoding of the empty text, or the codes that the LLM says
    # without a prompt (all in the released code).
    unconditional: Literal["zeros", "text", "codes"] = "text"
    text_tokenizer: str = ""  # folder or hub id of the contrastive stage's; "": the LLM's own


@dataclass(frozen=True, kw_only=True)
class SeedTrainConfig(TrainConfig):
    """The settings of the head of SEED; those after `text_tokens` shape a fresh head, see SeedTokenizerConfig."""

    norms: bool = False  # also train the norms of the LLM, as the release does
    both_ways: bool = False  # of captions half are learnt whole as caption and image, half as image and caption
    tokenizer_weights: tuple[float, float, float] = WEIGHTS  # of its losses: quantizer, reconstruction, condition
    text_tokens: int = 32  # to which captions are cut in the contrastive stage
    unconditional: Literal["zeros", "text", "codes"] = "text"
    text_tokenizer: str = ""
    # Widths of features and condition are those of the parts.
    tokenizer: SeedTokenizerConfig = field(default_factory=SeedTokenizerConfig)

    @property
    def shape(self) -> dict[str, Any]:
        """Return the tokenizer's shape and the source of the unconditional condition."""
        return {name: getattr(self, name) for name in ("tokenizer", "unconditional", "text_tokenizer")}


@dataclass(frozen=True, kw_only=True)
class VARGPTConfig:
    """The configuration of the head of VARGPT."""

    llm_width: int  # D
    var: VARConfig
    norms: bool = False  # LayerNorms before the projectors; the release has them, but never calls them
    classes: ClassMode = "trained"  # see `VARDecoder.sampling_classes`
    unconditional: Literal["noise", "learned"] = "noise"  # LLM states for guidance; noise as released


@dataclass(frozen=True, kw_only=True)
class VARGPTTrainConfig(TrainConfig):
    """The settings of the head of VARGPT; those from `var` on shape a fresh head. Sizes of codes are the VQVAE's."""

    codes_weight: float = 1.0
    learn_prompts: bool = False  # the text loss is also over what users say, as in the release
    train_decoder: bool = False  # in "align" too, where no trained decoder begins
    var: VARConfig = field(default_factory=VARConfig)
    norms: bool = False
    classes: ClassMode = "trained"
    unconditional: Literal["noise", "learned"] = "noise"

    @property
    def shape(self) -> dict[str, Any]:
        """Return the decoder's shape and the kinds of projectors, classes and unconditional states."""
        return {name: getattr(self, name) for name in ("var", "norms", "classes", "unconditional")}


@dataclass(frozen=True, kw_only=True)
class MMInterleavedSizes:
    """The shape of what MM-Interleaved adds to an LLM and a Stable Diffusion; the defaults are the paper's.

    Raises Mgp5Error that names all bad values.
    """

    queries: int = 64  # S, visual tokens of an image; 32 in the paper's ablations
    token_width: int = 768  # of the resampler that makes them
    token_layers: int = 12
    token_heads: int = 12
    token_every: int = 2  # one layer in so many reads the image
    interactions: int = 4  # of the ViT-Adapter
    adapter_heads: int = 16
    adapter_points: int = 4
    stem: int = 64  # channels of its first convolutions
    resized: bool = False  # pyramids as released, of images with 16 pixels a patch
    channel_norm: bool = False  # in these convolutions, as released
    every: int = 4  # one layer of the LLM in so many has MMFS; 0: none has
    heads: int = 16  # of MMFS in LLM and UNet
    points: int = 8
    images: int = 50  # most images that MMFS tells apart
    context_layers: int = 1  # of the resampler that makes the condition
    context_heads: int = 16
    context_inner: int = 0  # width of its feed-forward layers, 3072 as released; 0: four times that of the condition
    earlier: Literal["all", "last", "none"] = "all"  # images that the UNet attends to; "last" as released
    unet: Literal["full", "adapter", "frozen"] = "full"  # what trains in it; an adapter is small
    unet_rank: int = 8  # of the adapter

    def __post_init__(self) -> None:
        least = {"every": 0, "context_inner": 0}
        problems = [
            f"{name} is {value}, expected at least {least.get(name, 1)}"
            for name, value in vars(self).items()
            if type(value) is int and value < least.get(name, 1)
        ]
        raise_all(f"sizes: {problem}" for problem in problems + unknown_words(self))


@dataclass(frozen=True, kw_only=True)
class MMInterleavedConfig:
    """The configuration of the head of MM-Interleaved: its sizes, and those of the parts around it."""

    sizes: MMInterleavedSizes
    llm_width: int  # D
    llm_layers: int
    vision_width: int  # V
    vision_layers: int
    patch: int  # pixels of the vision tower
    image_size: tuple[int, int]  # (H, W) of a preprocessed image
    condition: tuple[int, int]  # (L, C)


@dataclass(frozen=True, kw_only=True)
class MMInterleavedTrainConfig(TrainConfig):
    """The settings of the head of MM-Interleaved."""

    ldm_weight: float = 10.0
    both_ways: bool = False  # of captions half are learnt as caption and image, half as image and caption
    unet_lr: float = 1e-5  # of the UNet, or of its adapter
    offsets_lr: float = 1e-5  # of MMFS's and the ViT-Adapter's offsets, which have no weight decay
    min_snr: float | None = None
    sizes: MMInterleavedSizes = field(default_factory=MMInterleavedSizes)  # of a fresh head

    @property
    def shape(self) -> dict[str, Any]:
        """Return the sizes of a fresh head."""
        return {"sizes": self.sizes}


def model_config_from(raw: dict[str, Any], path: str) -> ModelConfig:
    """Return the configuration of a checkpoint's JSON file, also of versions in which heads had no names.

    Raises Mgp5Error, which names the file, if fields are missing or unknown, or the head is unknown.
    """
    raw = dict(raw)
    if "head_config" not in raw:
        raw["head_config"] = {name: raw.pop(name) for name in ("num_vokens", "mapper", "unconditional") if name in raw}
        raw["head_kind"] = raw.pop("diffusion_kind", "")
    kind = raw.get("head", "minigpt5")
    if kind not in HEADS:
        known = ", ".join(HEADS)
        raise Mgp5Error(f"{path} is of a model with the head {kind!r}, expected one of {known}", "update mgp5")
    try:
        raw["head_config"] = _from_dict(head_class(kind).config_type, raw["head_config"])
        return _from_dict(ModelConfig, raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise Mgp5Error(f"{path} is not a configuration of mgp5 ({error})", "train or copy the model again") from None


def _from_dict(kind: type, raw: dict[str, Any]) -> Any:
    """Build a dataclass from the dictionary that `asdict` returned and JSON stored."""
    values = dict(raw)
    for name, hint in get_type_hints(kind).items():
        kinds = [kind for kind in kinds_of(hint) if dataclasses.is_dataclass(kind)]
        if kinds and isinstance(values.get(name), dict):
            values[name] = _from_dict(kinds[0], values[name])
        elif isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    return kind(**values)
