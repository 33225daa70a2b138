"""Image heads: how the states of an LLM become an image, one file a paper, behind one seam.

A head says how an image stands in the sequence, what the LLM has to do after the trigger token, what is trained, and
how an image is drawn step by step. The scheduler serves what `Head.draw` asks for and never knows which head it has.

Letters: B batch, T and k tokens, D width of the LLM, E width of embeddings, N context images, P target images, H and W
pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import Mgp5Error
from ..options import ImageOptions
from .losses import Losses

if TYPE_CHECKING:
    import PIL.Image

    from ..backbones import Backbone
    from ..config import ModelConfig, TrainConfig
    from .batch import Batch

# Name of a head, as configurations have it -> module and class. Whoever adds a head adds a line.
HEADS: dict[str, tuple[str, str]] = {"minigpt5": ("mgp5.heads.minigpt5", "MiniGPT5Head")}


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What a head is, in values.

    Args:
        name: key of HEADS.
        new_tokens: special tokens that it adds to the vocabulary; the first is the trigger, by which the LLM begins an
            image.
        positions: how many positions of the sequence one drawn image takes.
        stages: names of the training stages, in order.
        losses: names of its loss terms, beside "text".
        image_options: class of the options that it draws with.
        reads_prefix: whether it asks for `Prefix`; only then the states of all tokens are kept.
        reads_side: whether layers of the LLM attend to what `Head.side` makes of the context images.
    """

    name: str
    new_tokens: tuple[str, ...]
    positions: int
    stages: tuple[str, ...]
    losses: tuple[str, ...]
    image_options: type[ImageOptions]
    reads_prefix: bool = False
    reads_side: bool = False


class Part(NamedTuple):
    """A part of a model that is loaded, counted, moved or saved as one.

    Attributes:
        module: with its weights.
        phase: when it computes: "encode", "read", "draw" or "decode"; "" for what may stay where it was loaded.
        saved: whether it is trained and stored in checkpoints; frozen parts are loaded from their own repository.
    """

    module: nn.Module
    phase: str
    saved: bool


class TrainRule(NamedTuple):
    """What happens to the parameters whose names match.

    Attributes:
        pattern: regular expression, searched in the parameter's name.
        lr: peak learning rate; None: they do not train.
        weight_decay: of AdamW.
    """

    pattern: str
    lr: float | None
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Forced:
    """Read these tokens in one forward (MiniGPT-5: the run of vokens)."""

    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """Sample `count` tokens one by one inside the decoding loop, beside the text of other replies (SEED: 32 codes).

    Args:
        count: how many.
        allowed: for each of them, the ids that it may be.
        temperature: 0 takes the most likely.
        top_p: in (0, 1].
        rng: on the CPU.
    """

    count: int
    allowed: Sequence[Sequence[int]]
    rng: torch.Generator
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, eq=False)
class Embeds:
    """Read these embeddings (1, k, E) in one forward (VARGPT: one scale of its decoder)."""

    embeds: Tensor


@dataclass(frozen=True)
class Prefix:
    """Give the states of all tokens so far; nothing is read (MM-Interleaved: context of its image decoder)."""


@dataclass(frozen=True, eq=False)
class Step:
    """Run `Head.step` on `inputs`, together with all Steps of other images that have the same key.

    Args:
        key: what inputs must agree in to share a call: a name, shapes, a kind of step.
        inputs: of one image; what `step` returns for it is the response's `output`.
    """

    key: Hashable
    inputs: Any


@dataclass(frozen=True, eq=False)
class Preview:
    """Tell how far the image is; no work is asked for.

    Args:
        step: from 1 to total.
        total: number of previews that will come.
        latents: (1, C, h, w) of the image so far, or None.
    """

    step: int
    total: int
    latents: Tensor | None = None


Request = Forced | Sample | Embeds | Prefix | Step | Preview


@dataclass(frozen=True, eq=False)
class Response:
    """What was done for a request.

    Attributes:
        hidden: (1, k, D). Forced and Embeds: the state after each token. Sample: the state that predicted each. Prefix:
            the state after each token so far.
        ids: tokens that were read or sampled. The last sampled one has not been read yet: it goes before whatever is
            read next.
        output: of a Step.
    """

    hidden: Tensor | None = None
    ids: tuple[int, ...] = ()
    output: Any = None


@dataclass(frozen=True)
class DrawContext:
    """What is known when an image begins.

    Attributes:
        state: (1, 1, D) the state that predicted the trigger. The trigger itself has not been read.
        options: of the image.
        rng: makes the generator (on the CPU) of one use of random numbers in this image: `rng("noise")`.
    """

    state: Tensor
    options: ImageOptions
    rng: Callable[[str], torch.Generator] = field(compare=False)


class ImageContext(NamedTuple):
    """What the LLM gets of N context images.

    Attributes:
        tokens: N tensors (S, E), the embeddings in the S slots of each image.
        side: (N, ...) what layers of the LLM attend to beside, or None.
    """

    tokens: list[Tensor]
    side: Tensor | None = None


class Head(nn.Module):
    """Base of all heads: the seam, with defaults where most heads agree.

    Attributes:
        spec: see HeadSpec.
        ids: of `spec.new_tokens` in the LLM's vocabulary, once installed.
    """

    spec: HeadSpec
    ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, config: ModelConfig, dtype: torch.dtype) -> Head:
        """Build the head of a configuration: frozen parts from disk or the hub, trained parts fresh.

        Args:
            config: `config.head_config` is the head's own.
            dtype: of frozen weights.

        Raises:
            Mgp5Error: a part is missing or does not fit.
        """
        raise NotImplementedError

    def install(self, backbone: Backbone) -> None:
        """Add the new tokens, and whatever else the LLM needs (layer hooks); called once, before adapters."""
        self.ids = tuple(backbone.add_tokens(list(self.spec.new_tokens)))

    @property
    def description(self) -> str:
        """A short text by which a checkpoint is matched to the frozen parts that it was trained with."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where images are drawn."""
        return next(self.parameters()).device

    def parts(self) -> dict[str, Part]:
        """Return the parts by name: what loading, memory estimates, offload and doctor read."""
        return {"head": Part(self, "draw", True)}

    def train_plan(self, config: TrainConfig) -> tuple[TrainRule, ...]:
        """Return what a stage trains: the first rule that matches a parameter's name holds; others do not train."""
        raise NotImplementedError

    def prepare(self, config: TrainConfig) -> None:
        """Get ready for a stage, before its plan is applied."""

    # --- context images ---

    def context_slots(self, backbone: Backbone, inputs: dict[str, Tensor]) -> list[int]:
        """Return how many positions each preprocessed context image takes."""
        return backbone.slots(inputs)

    def encode_images(self, backbone: Backbone, inputs: dict[str, Tensor]) -> ImageContext:
        """Encode N preprocessed context images for the LLM."""
        return ImageContext(backbone.encode_images(inputs))

    # --- training ---

    def target(self, image: PIL.Image.Image) -> dict[str, Tensor]:
        """Turn a target image into tensors, in the data worker, without weights; batches stack them by name."""
        raise NotImplementedError

    def layout(self, target: dict[str, Tensor], config: TrainConfig | None = None) -> tuple[list[int], list[int]]:
        """Return ids and labels of a target image in the sequence (labels may be IGNORE); the trigger comes first."""
        raise NotImplementedError

    def losses(self, hidden: Tensor, batch: Batch, config: TrainConfig, rng: torch.Generator) -> Losses:
        """Return the named, weighted image terms of a batch.

        Args:
            hidden: (B, T, D) last states of the LLM.
            batch: with P target images, at least one.
            rng: on the CPU.
        """
        raise NotImplementedError

    # --- inference ---

    def check(self, options: ImageOptions) -> None:
        """Raise Mgp5Error for options with which no image can be drawn; called before anything is computed."""

    def draw(self, context: DrawContext) -> Generator[Request, Response, Tensor]:
        """Draw one image: yield requests, take their responses, return pixels (3, H, W) in [-1, 1]."""
        raise NotImplementedError
        yield

    def step(self, key: Hashable, inputs: list[Any]) -> list[Any]:
        """Do all Steps of one key in one call; returns an output for each."""
        raise NotImplementedError(f"no step {key}")

    def commit(self, pixels: Tensor) -> Forced | Embeds | None:
        """Return what the LLM has to read after an image: nothing, a closing token, or the image encoded again."""
        return None


def head_class(name: str) -> type[Head]:
    """Return the class of a head by its name in a configuration. Raises Mgp5Error for an unknown one."""
    if name not in HEADS:
        raise Mgp5Error(f"no head {name!r}, expected one of {', '.join(HEADS)}", "update mgp5, or take another model")
    module, attribute = HEADS[name]
    return getattr(import_module(module), attribute)


def rng(seed: int, image: int, use: str) -> torch.Generator:
    """Return the generator of one use of random numbers in a reply, on the CPU; no two uses share their numbers.

    Args:
        seed: of the reply's text, or of its first image.
        image: index of the image in the reply, from 0.
        use: what the numbers are for. Text and noise take plain seeds, as image files note them and other programs
            repeat them: "text" `seed`, "noise" `seed + image`. All other uses mix all three.
    """
    if use in ("text", "noise"):
        return torch.Generator().manual_seed(seed + image)
    mixed = int.from_bytes(hashlib.blake2b(f"{seed} {image} {use}".encode(), digest_size=8).digest(), "big")
    return torch.Generator().manual_seed(mixed >> 1)
