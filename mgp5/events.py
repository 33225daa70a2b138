"""What generation says while it works; views consume these and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .messages import Image, Message

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SceneStart:
    """A scene of a story begins: given by the user, narrated, illustrated or continued by the model."""

    scene: int  # from 0
    kind: Literal["given", "narrated", "illustrated", "continued"]
    total: int


@dataclass(frozen=True)
class TextChunk:
    """A piece of text as it comes, ready to print (no newline is implied)."""

    text: str


@dataclass(frozen=True)
class ImageStep:
    """One denoising step of one image is done."""

    image: int  # index of the image in this reply, from 0
    step: int  # from 1 to total
    total: int
    latents: Tensor | None = field(default=None, compare=False, repr=False)  # (1, C, h, w)


@dataclass(frozen=True)
class ImageDone:
    """An image is finished (or, in a scene of kind given, was read); `image.meta` holds seed, prompt and options."""

    index: int
    image: Image


@dataclass(frozen=True)
class Finished:
    """The reply is complete. `message` is what becomes history; `reason` says why it ended."""

    message: Message
    reason: Literal["stop", "length", "interrupted"]
    meta: dict[str, Any] = field(default_factory=dict)  # seed, tokens, seconds


Event = SceneStart | TextChunk | ImageStep | ImageDone | Finished
