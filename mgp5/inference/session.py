"""What the LLM has read of a conversation: tokens, images and their keys and values, kept across turns.

Letters: T tokens, k new tokens, S slots of one image, D LLM width, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..files import digest
from ..heads import ImageContext
from ..messages import Conversation, Image
from ..model import InterleavedModel
from ..prompts import check_length, prompt
from .decoder import Decoder

Key = tuple[int, str]  # a token, and the image that it stands for, "" for text


def full(hidden: int) -> str:
    """Return a line on a conversation that is longer than what a model can be shown."""
    return f"the model's context is full: it does not see the {hidden} oldest of your messages any more"


@dataclass(frozen=True)
class EncodedImage:
    """A context image as the LLM gets it."""

    image: Image  # held, so that its id() is not used again
    key: str  # tells the same image from another one
    context: ImageContext  # of this one
    grid: Tensor | None  # (1, 3) patches in time, height and width, for backbones of any resolution

    @property
    def tokens(self) -> Tensor:  # (S, E)
        """Return the embeddings in its slots."""
        return self.context.tokens[0]

    def keys(self, slot: int) -> list[Key]:
        """Return the keys of its S positions; tokens have those that they have in text, so that a reply's own fit."""
        ids = self.context.ids
        return [(slot, self.key)] * len(self.tokens) if ids is None else [(i, "") for i in ids[0].tolist()]


@dataclass
class Session:
    """The state of one conversation, on a row of a decoder. `read` prefills only what is new since the last turn."""

    model: InterleavedModel
    reuse: bool = True  # False forgets the cache at every turn
    decoder: Decoder | None = None  # None makes one of its own
    row: int = 0  # of the decoder
    keys: list[Key] = field(default_factory=list)  # what the cache holds
    prefilled: int = 0  # tokens that the last `read` had to run
    prefilled_images: int = 0  # of these, slots of images
    state: Tensor | None = None  # (1, 1, D), after the last token read
    pyramids: list[Tensor] = field(default_factory=list)  # `ImageContext.pyramid` of all images so far, (1, ...)
    _states: list[Tensor] = field(default_factory=list)  # of what the cache holds, (1, k, D); where the head reads it
    _encoded: dict[int, EncodedImage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backbone, self.head = self.model.backbone, self.model.head
        self.decoder = self.decoder or Decoder(self.backbone)

    @torch.inference_mode()
    def read(self, conversation: Conversation, reply: int = 0) -> Tensor:  # (1, 1, D)
        """Read up to where the assistant's reply begins; return the state that predicts its first token. Raises
        Mgp5Error if the conversation and `reply` more tokens do not fit the context, or an image cannot be read."""
        ids, images = self._render(conversation)
        slots = [len(image.tokens) for image in images]
        check_length(self.backbone, len(ids), reply)
        keys = self._keys(ids, images)
        kept = self._rewind(keys)
        tokens = torch.tensor([ids], device=self.backbone.device)
        grids = torch.cat([image.grid for image in images]) if images and images[0].grid is not None else None
        positions = self.backbone.positions(tokens, grids)
        # Images whose slots are all kept need no features; an image cut in two is embedded whole and then sliced.
        embeds = self.backbone.embed(tokens, [image.tokens for image in images])
        row = self.decoder.rows[self.row]
        row.side, self.pyramids = None, []
        for image in images:
            self.see(image)
        if side := self.backbone.side_inputs(tokens, slots, row.side):
            side = side._replace(visible=side.visible[:, kept:])
        hidden = self.decoder.read(self.row, embeds[:, kept:], positions[..., kept:], side)
        self.append(hidden, keys[kept:])
        self.prefilled, self.prefilled_images = len(ids) - kept, sum(bool(image) for _, image in keys[kept:])
        return self.state

    def recent(self, conversation: Conversation, max_tokens: int) -> tuple[Conversation, int]:
        """Return what the model is shown of a conversation, and how many of the user's messages do not fit any more.

        The oldest turns are left out until there is room for a reply of `max_tokens` (a quarter of the context at most)
        and an image.
        """
        asked = conversation.recent(self.model.config.history)
        reply = min(max_tokens, self.backbone.context_length // 4) + self.head.spec.positions
        for shown in asked.tails():
            if self.fits(shown, reply):
                break
        return shown, asked.turns - shown.turns

    @torch.inference_mode()
    def fits(self, conversation: Conversation, reply: int) -> bool:
        """Whether a conversation and `reply` more tokens fit the context; new images are encoded."""
        return len(self._render(conversation)[0]) + reply <= self.backbone.context_length

    def embed(self, ids: tuple[int, ...]) -> tuple[Tensor, list[Key]]:  # (1, k, E)
        """Return the embeddings of text tokens, and their keys."""
        tokens = torch.tensor([ids], device=self.backbone.device)
        return self.backbone.embed(tokens, []), [(token, "") for token in ids]

    def append(self, hidden: Tensor, keys: list[Key]) -> None:
        """Note what the decoder has read: the state (1, k, D) after each token, and their keys."""
        self.keys += keys
        if self.head.spec.reads_prefix:
            self._states.append(hidden)
        self.state = hidden[:, -1:]

    def see(self, image: EncodedImage) -> None:
        """Let what is read from now on, and the generator, attend to one more image."""
        row, side, pyramid = self.decoder.rows[self.row], image.context.side, image.context.pyramid
        if side is not None:
            row.side = side if row.side is None else torch.cat([row.side, side])
        self.pyramids += [] if pyramid is None else [pyramid]

    @property
    def states(self) -> Tensor:  # (1, T, D)
        """Return the states of all tokens so far; only for a head that reads them."""
        self._states = [torch.cat(self._states, dim=1)]
        return self._states[0]

    @property
    def length(self) -> int:
        """Return the number of tokens in the cache."""
        return len(self.keys)

    def add(self, image: Image, context: ImageContext) -> list[Key]:
        """Remember and see a drawn image; return the keys of its positions."""
        self.remember(image, context)
        encoded = self._encoded[id(image)]
        self.see(encoded)
        return encoded.keys(self.backbone.image_token_id)

    def remember(self, image: Image, context: ImageContext, grid: Tensor | None = None) -> None:
        """Keep what an image is for the LLM: it is not encoded again."""
        picture = image.load()
        key = digest(picture.tobytes() + repr(picture.size).encode())
        self._encoded[id(image)] = EncodedImage(image, key, context, grid)

    def _render(self, conversation: Conversation) -> tuple[list[int], list[EncodedImage]]:
        """Return the tokens up to where the reply begins, and the images in their slots."""
        rendered = prompt(self.backbone, conversation)
        images = self._encode(rendered.images)
        return rendered.expand(self.backbone.image_token_id, [len(image.tokens) for image in images]), images

    def _rewind(self, keys: list[Key]) -> int:
        """Cut the cache back to the longest common beginning; return its length, at least one token short of all."""
        limit = min(len(self.keys), len(keys) - 1) if self.reuse else 0
        kept = next((i for i in range(limit) if self.keys[i] != keys[i]), limit)
        self._states = [self.states[:, :kept]] if kept and self._states else []
        self.keys = self.keys[:kept]
        self.decoder.cut(self.row, kept)
        return kept

    def _keys(self, ids: list[int], images: list[EncodedImage]) -> list[Key]:
        keys = iter([key for image in images for key in image.keys(self.backbone.image_token_id)])
        return [next(keys) if i == self.backbone.image_token_id else (i, "") for i in ids]

    def _encode(self, images: tuple[Image, ...]) -> list[EncodedImage]:
        """Encode the images that were not seen before, one by one (their sizes may differ)."""
        for image in images:
            if id(image) not in self._encoded:
                inputs = self.backbone.preprocess([image.load()])
                context = self.head.encode_images(self.backbone, inputs)
                self.remember(image, context, inputs.get("image_grid_thw"))
        return [self._encoded[id(image)] for image in images]
