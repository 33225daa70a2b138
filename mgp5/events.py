"""Events of a generation under way, in the order in which they happen; views consume these and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .messages import Image, Message

SceneKind = Literal["given", "narrated", "illustrated", "continued"]


@dataclass(frozen=True)
class SceneStart:
    """A scene of a story begins. In a scene that is "given", text and image are the user's; "narrated", the model
    writes the text; "illustrated", the model draws the image; "continued", both are the model's."""

    scene: int  # index of the scene, from 0
    kind: SceneKind
    total: int  # scenes in the story


@dataclass(frozen=True)
class Note:
    """A line for the user beside the reply: what words the model has never met."""

    text: str


@dataclass(frozen=True)
class TextChunk:
    """The next piece of a text, to be joined to the one before without a blank or line break."""

    text: str


@dataclass(frozen=True)
class ImageStep:
    """One step of drawing an image is done."""

    image: int  # index of the image in this reply, from 0
    step: int  # from 1 to total
    total: int
    preview: Image | None = field(default=None, compare=False, repr=False)  # so far, at the steps where it is wanted


@dataclass(frozen=True)
class ImageDone:
    """An image is finished, or the user's image of a scene was read.
    `image.meta` of a generated image holds prompt, seed and options; `image.path` names its file where it has one."""

    index: int  # of the image in this reply, from 0
    image: Image


@dataclass(frozen=True)
class Finished:
    """The reply is complete."""

    message: Message  # as it becomes part of the conversation
    reason: Literal["stop", "length", "interrupted"]  # an end token, a limit of tokens or context, or an interruption
    # JSON-ready: seed, tokens, prefilled (tokens of the prompt that were computed), prefilled_images (those of these in
    # slots of images), seconds
    meta: dict[str, Any] = field(default_factory=dict)


Event = SceneStart | Note | TextChunk | ImageStep | ImageDone | Finished
