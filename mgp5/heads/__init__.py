"""Image heads: how the states of an LLM become an image, one file a paper, behind one seam.

A head says how an image stands in the sequence, what the LLM has to do after the trigger token, what is trained, and
how an image is drawn step by step. The scheduler serves what `Head.draw` asks for and never knows which head it has.

Letters: B batch, T tokens, D LLM width, E embedding width, N context images, P target images, S slots of one image, H
and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import Mgp5Error
from ..files import digest
from ..generators import load_generator
from ..options import ImageOptions
from .losses import Losses

if TYPE_CHECKING:
    import PIL.Image

    from ..backbones import Backbone
    from ..config import ModelConfig, TrainConfig
    from ..messages import Conversation
    from .batch import Batch

# Name of a head, as configurations have it -> module and class. Whoever adds a head adds a line.
HEADS: dict[str, tuple[str, str]] = {
    "minigpt5": ("mgp5.heads.minigpt5", "MiniGPT5Head"),
    "seed": ("mgp5.heads.seed", "SeedHead"),
    "vargpt": ("mgp5.heads.vargpt", "VARGPTHead"),
    "mm-interleaved": ("mgp5.heads.mm_interleaved", "MMInterleavedHead"),
}


class Stage(NamedTuple):
    """One stage of a head's training."""

    name: str
    data: Literal["captions", "conversations"]  # what its samples are
    llm: bool = True  # whether the LLM reads them; else the head trains alone, from target images and captions
    adapter: bool = False  # whether LoRA or a prefix may be put into the LLM
    cached: bool = True  # whether caches may have its images; else it needs their pixels


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The constants of a head."""

    name: str  # key of HEADS
    new_tokens: tuple[str, ...]  # special tokens that it adds; the first is the trigger, which begins an image
    positions: int  # number of positions in the sequence that one drawn image takes
    losses: tuple[str, ...]  # names of its loss terms, without "text"
    image_options: type[ImageOptions]
    reads_prefix: bool = False  # whether it yields `Prefix`; only then the states of all tokens are kept
    reads_side: bool = False  # whether layers of the LLM attend to `ImageContext.side` of the images so far
    opens: bool = True  # whether the LLM learns to begin a text with an image


class Part(NamedTuple):
    """A part of a model that is loaded, counted, moved or saved as one."""

    module: nn.Module
    phase: str  # when it computes: "encode", "read", "draw" or "decode"; "": it stays where it was loaded
    saved: bool  # whether it is trained and stored in checkpoints; frozen parts are loaded from their own repository


class TrainRule(NamedTuple):
    """How the parameters whose names match a pattern are trained."""

    pattern: str  # regular expression, searched in the parameter's name
    lr: float | None  # peak learning rate; None: they do not train
    weight_decay: float = 0.0  # of AdamW


@dataclass(frozen=True)
class Forced:
    """Read these tokens in one forward (MiniGPT-5: the run of vokens; others: one that begins or ends an image).

    `then` makes the response's `output` of the states (r, 1 + T, D) before the first and after each token of r images.
    On a GPU both are one CUDA graph, where `capturable` says that `then` neither waits for the host nor copies to it.
    """

    ids: tuple[int, ...]
    then: Callable[[Tensor], Tensor] | None = None
    capturable: bool = True


@dataclass(frozen=True, eq=False)
class Sample:
    """Sample `count` tokens one by one inside the decoding loop, batched with the text of other replies (SEED)."""

    count: int  # 32 codes for SEED
    allowed: Sequence[Sequence[int]]  # for each token, the ids that may be sampled
    rng: torch.Generator  # on the CPU
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # nucleus sampling, in (0, 1]
    top_k: int = 0  # the most likely tokens that may be taken; 0: all


@dataclass(frozen=True, eq=False)
class Embeds:
    """Read these embeddings (1, T, E) in one forward (VARGPT: one scale of its decoder)."""

    embeds: Tensor


@dataclass(frozen=True)
class Prefix:
    """Return the states of all tokens so far; nothing is read (MM-Interleaved: context of its image decoder)."""


@dataclass(frozen=True, eq=False)
class Step:
    """Run `Head.step` on `inputs`, together with all Steps of other images that have the same key."""

    key: tuple[Any, ...]  # name of the step, then whatever must agree for inputs to share a call, such as shapes
    inputs: Any  # of one image; what `step` returns for it is the response's `output`


@dataclass(frozen=True, eq=False)
class Preview:
    """Report the progress of an image; the scheduler computes nothing."""

    step: int  # 1 to total
    total: int  # number of previews of this image
    pixels: Tensor | None = None  # (3, H, W) in [-1, 1], the image so far, where `DrawContext.shows` this step


Request = Forced | Sample | Embeds | Prefix | Step | Preview


@dataclass(frozen=True, eq=False)
class Response:
    """The scheduler's answer to a request.

    Forced and Embeds get the state after each of T tokens, Sample the state that predicted each, Prefix the state after
    each token so far. The last sampled token has not been read yet: it goes before whatever is read next.
    """

    hidden: Tensor | None = None  # (1, T, D)
    ids: tuple[int, ...] = ()  # tokens that were read or sampled
    output: Any = None  # of a Step, or of `Forced.then`


@dataclass(frozen=True)
class DrawContext:
    """The inputs of `Head.draw`."""

    state: Tensor  # (1, 1, D), the state that predicted the trigger; the trigger itself has not been read
    options: ImageOptions
    rng: Callable[[str], torch.Generator] = field(compare=False)  # "noise" -> a generator on the CPU for this use
    previews: int = 0  # how many images of unfinished steps are wanted
    pyramids: tuple[Tensor, ...] = field(default=(), compare=False)  # `ImageContext.pyramid` of all images so far

    def shows(self, step: int, total: int) -> bool:
        """Whether the image so far is wanted after this step, 1 to total; never after the last, which ends it."""
        wanted = {round(total * (i + 1) / (self.previews + 1)) for i in range(self.previews)}
        return 0 < step < total and step in wanted


class ImageContext(NamedTuple):
    """N context images as the LLM gets them."""

    tokens: list[Tensor]  # N tensors (S, E), the embeddings in the S slots of each image
    side: Tensor | None = None  # (N, ...), features that layers of the LLM attend to besides the sequence
    ids: list[Tensor] | None = None  # N tensors (S,), tokens whose embeddings `tokens` are, which training goes through
    pyramid: Tensor | None = None  # (N, ...), features that the generator attends to


class Drawn(NamedTuple):
    """A drawn image, and what it is as a context image, where it need not be encoded again."""

    pixels: Tensor  # (3, H, W) in [-1, 1]
    context: ImageContext | None = None  # of this one image


class Head(nn.Module):
    """The base class of all heads, with defaults that fit most of them."""

    stages: ClassVar[tuple[Stage, ...]]  # in order
    target_cache: ClassVar[tuple[str, str] | None] = None  # cache that has target images: its kind, name in `targets`
    context_cache: ClassVar[str] = "features"  # kind of cache that has context images; "": none has
    config_type: ClassVar[type]  # dataclass of `ModelConfig.head_config`
    spec: HeadSpec
    ids: tuple[int, ...] = ()  # of `spec.new_tokens`, set by `install`

    def __init__(self, generator: Any = None, config: Any = None) -> None:
        """Build the head of a configuration with a frozen generator and fresh trained parts."""
        super().__init__()

    @classmethod
    def load(cls, config: ModelConfig, dtype: torch.dtype) -> Head:
        """Build the head of `config.head_config`: the generator in `dtype` from disk or the hub, trained parts fresh.

        Raises Mgp5Error if a part is missing or does not fit.
        """
        return cls(load_generator(config.diffusion, dtype), config.head_config)

    @classmethod
    def configure(cls, backbone: Backbone, generator: Any, **shape: Any) -> Any:
        """Return the configuration of a fresh head for an LLM and a generator; `shape` is `TrainConfig.shape`."""
        raise NotImplementedError

    @staticmethod
    def spec_of(config: Any) -> HeadSpec:
        """Return the constants of a head of this configuration."""
        raise NotImplementedError

    @classmethod
    def stage(cls, name: str) -> Stage:
        """Return the stage of a name. Raises Mgp5Error for an unknown one."""
        known = {stage.name: stage for stage in cls.stages}
        if name not in known:
            raise Mgp5Error(f"unknown stage {name!r}", f"expected {' or '.join(known)}", usage=True)
        return known[name]

    def install(self, backbone: Backbone) -> None:
        """Add the new tokens, and layer hooks where a head has them, to the LLM; called once, before adapters."""
        self.ids = tuple(backbone.add_tokens(list(self.spec.new_tokens)))

    @property
    def description(self) -> str:
        """Return a short text that identifies the frozen parts; a checkpoint is refused for other ones."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Return the device on which images are drawn."""
        return next(self.parameters()).device

    def parts(self) -> dict[str, Part]:
        """Return the parts by name; loading, memory estimates, offload and doctor read this table."""
        return {"head": Part(self, "draw", True)}

    def train_plan(self, config: TrainConfig) -> tuple[TrainRule, ...]:
        """Return what a stage trains: the first rule that matches a parameter's name applies; the rest is frozen."""
        raise NotImplementedError

    def prepare(self, config: TrainConfig) -> None:
        """Prepare the head for a training stage; called before `train_plan` is applied."""

    # --- context images ---

    def context_slots(self, backbone: Backbone, inputs: dict[str, Tensor]) -> list[int]:
        """Return how many positions each context image takes, preprocessed or, as "features", from a cache."""
        return list(map(len, inputs["features"])) if "features" in inputs else backbone.slots(inputs)

    @torch.no_grad()
    def encode_images(self, backbone: Backbone, inputs: dict[str, Tensor]) -> ImageContext:
        """Encode N preprocessed context images for the LLM."""
        return ImageContext(backbone.encode_images(inputs))

    def cached_images(self, backbone: Backbone, items: Sequence[Tensor]) -> ImageContext:
        """Return N context images as the LLM gets them, from the items of a cache of the kind `context_cache`."""
        return ImageContext(list(items))

    def codes(self, backbone: Backbone, inputs: dict[str, Tensor]) -> Tensor:
        """Return the codes (N, K) of N preprocessed images, which caches of the kind "codes" hold."""
        raise NotImplementedError(f"the head {self.spec.name} has no codes")

    @property
    def encoder(self) -> nn.Module | None:
        """Return what makes `codes` of the vision tower's tokens; None: `generator.encode` makes them of pixels."""
        raise NotImplementedError(f"the head {self.spec.name} has no codes")

    # --- training ---

    def target(self, image: PIL.Image.Image) -> dict[str, Tensor]:
        """Convert a target image to tensors, which batches stack by name; runs in data workers, without weights."""
        raise NotImplementedError

    def arrange(self, sample: Conversation, config: TrainConfig) -> Conversation:
        """Return a sample as a stage of this head learns it; runs in data workers."""
        return sample

    def cached_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what caches can have of a target image and its caption, by the names of batches."""
        return {}

    def layout(self, target: dict[str, Tensor], config: TrainConfig | None = None) -> tuple[list[int], list[int]]:
        """Return ids and labels of a target image in the sequence (labels may be IGNORE); the trigger comes first."""
        raise NotImplementedError

    def complete(self, backbone: Backbone, batch: Batch, config: TrainConfig, rng: torch.Generator) -> Batch:
        """Fill in what only weights can tell of target images (codes of a tokenizer), in ids, labels, `targets` and
        `context_images`."""
        return batch

    def embed_targets(self, embeds: Tensor, batch: Batch) -> Tensor:
        """Replace the embeddings (B, T, E) of target images by what the head makes of them (teacher forcing)."""
        return embeds

    def losses(self, hidden: Tensor | None, batch: Batch, config: TrainConfig, rng: torch.Generator) -> Losses:
        """Return the named, weighted loss terms of a batch with P >= 1 target images, from the LLM's last states
        (B, T, D), None in a stage without the LLM; `rng` is on the CPU."""
        raise NotImplementedError

    # --- inference ---

    def check(self, options: ImageOptions) -> None:
        """Raise Mgp5Error for options that the head cannot draw with; called before anything is computed."""
        expected = self.spec.image_options
        if not isinstance(options, expected):
            found = f"options are {type(options).__name__}, expected {expected.__name__}"
            raise Mgp5Error(found, "use the head's own")

    def draw(self, context: DrawContext) -> Generator[Request, Response, Tensor | Drawn]:
        """Draw one image: yield requests, receive their responses, return pixels (3, H, W) in [-1, 1]."""
        raise NotImplementedError
        yield

    def step(self, key: tuple[Any, ...], inputs: list[Any]) -> list[Any]:
        """Run all Steps with equal keys in one call; return an output for each."""
        raise NotImplementedError(f"no step {key}")

    def commit(self, drawn: Drawn) -> Forced | Embeds | None:
        """Return what the LLM reads after an image: nothing, a closing token, or embeddings of the image."""
        return None


def head_class(name: str) -> type[Head]:
    """Return the class of a head by its name in a configuration. Raises Mgp5Error for an unknown one."""
    if name not in HEADS:
        raise Mgp5Error(f"no head {name!r}, expected one of {', '.join(HEADS)}", "update mgp5, or take another model")
    module, attribute = HEADS[name]
    return getattr(import_module(module), attribute)


def rng(seed: int, image: int, use: str) -> torch.Generator:
    """Return a random generator on the CPU for one use in a reply; no two uses share random numbers.

    `seed` is that of the reply's text or of its first image, `image` the index of the image in the reply. "text" and
    "noise" have the plain seeds `seed` and `seed + image`, which image files note so that other programs can repeat
    them; all other uses hash the three arguments.
    """
    if use in ("text", "noise"):
        return torch.Generator().manual_seed(seed + image)
    return torch.Generator().manual_seed(int(digest(f"{seed} {image} {use}", size=8), 16) >> 1)
