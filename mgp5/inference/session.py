"""What the LLM has read of a conversation: tokens, pictures and their keys and values, kept across turns.

T tokens, k new tokens, S slots of one picture, D width of the LLM, E of embeddings.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..messages import Conversation, Image
from ..prompts import check_length, prompt
from .decoder import Decoder

if TYPE_CHECKING:
    from ..backbones import Backbone


@dataclass(frozen=True)
class Seen:
    """A picture as the LLM sees it; `key` tells the same picture from another one."""

    image: Image
    key: str
    features: Tensor  # (S, D)
    grid: Tensor | None  # (1, 3) time, height and width in patches, for backbones of any resolution


@dataclass
class Session:
    """The state of one conversation, on a row of a decoder. `read` prefills only what is new since the last turn."""

    backbone: Backbone
    reuse: bool = True  # False: forget the cache at every turn (for tests and for comparison)
    decoder: Decoder | None = None  # None: one of its own
    row: int = 0
    keys: list[tuple[int, str]] = field(default_factory=list)  # what the cache holds: (token, picture or "")
    prefilled: int = 0  # tokens that the last `read` had to run
    state: Tensor | None = None  # (1, 1, D) state after the last token read
    _states: list[Tensor] = field(default_factory=list)  # of what the cache holds, in pieces (1, k, D)
    _seen: dict[int, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.decoder = self.decoder or Decoder(self.backbone)

    @torch.inference_mode()
    def read(self, conversation: Conversation, reply: int = 0) -> Tensor:  # (1, 1, D)
        """Read up to where the assistant's reply begins; returns the state that predicts its first token.

        Args:
            reply: how many tokens the reply may take, to check that both fit the context.
        """
        asked = prompt(self.backbone, conversation)
        seen = self._look(asked.images)
        ids = asked.expand(self.backbone.image_token_id, [len(s.features) for s in seen])
        check_length(self.backbone, len(ids), reply)
        keys = self._keys(ids, seen)
        kept = self._rewind(keys)
        device = self.backbone.device
        whole = torch.tensor([ids], device=device)
        grids = torch.cat([s.grid for s in seen]) if seen and seen[0].grid is not None else None
        positions = self.backbone.positions(whole, grids)
        # Pictures whose slots are all kept need no features; a picture cut in two is embedded whole and then sliced.
        embeds = self.backbone.embed(whole, [s.features for s in seen])
        self.took(self.decoder.read(self.row, embeds[:, kept:], positions[..., kept:]), keys[kept:])
        self.prefilled = len(ids) - kept
        return self.state

    @torch.inference_mode()
    def feed(self, ids: tuple[int, ...]) -> Tensor:  # (1, k, D)
        """Read tokens in one forward; returns the state after each."""
        embeds, keys = self.embed(ids)
        return self.took(self.decoder.feed([self.row], embeds), keys)

    def embed(self, ids: tuple[int, ...]) -> tuple[Tensor, list[tuple[int, str]]]:  # (1, k, E)
        """Embeddings of text tokens, and their keys."""
        tokens = torch.tensor([ids], device=self.backbone.device)
        return self.backbone.embed(tokens, []), [(token, "") for token in ids]

    def took(self, hidden: Tensor, keys: list[tuple[int, str]]) -> Tensor:  # (1, k, D)
        """Note what the decoder has read: the state (1, k, D) after each token, and their keys."""
        self.keys += keys
        self._states.append(hidden)
        self.state = hidden[:, -1:]
        return hidden

    @property
    def states(self) -> Tensor:  # (1, T, D)
        """The states of all tokens so far."""
        self._states = [torch.cat(self._states, dim=1)]
        return self._states[0]

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self.keys)

    def _rewind(self, keys: list[tuple[int, str]]) -> int:
        """Cut the cache back to the longest common beginning; returns its length, at least one token short of all."""
        limit = min(len(self.keys), len(keys) - 1) if self.reuse else 0
        kept = next((i for i in range(limit) if self.keys[i] != keys[i]), limit)
        self._states = [self.states[:, :kept]] if kept else []
        self.keys = self.keys[:kept]
        self.decoder.cut(self.row, kept)
        return kept

    def _keys(self, ids: list[int], seen: list[Seen]) -> list[tuple[int, str]]:
        names = iter([s.key for s in seen for _ in range(len(s.features))])
        return [(i, next(names) if i == self.backbone.image_token_id else "") for i in ids]

    def _look(self, images: tuple[Image, ...]) -> list[Seen]:
        """Encode the pictures that were not seen before, one by one (their sizes may differ)."""
        for image in images:
            if id(image) not in self._seen:
                picture = image.load()
                inputs = self.backbone.preprocess([picture])
                (features,) = self.backbone.encode_images(inputs)
                key = hashlib.sha1(picture.tobytes() + repr(picture.size).encode()).hexdigest()
                self._seen[id(image)] = Seen(image, key, features, inputs.get("image_grid_thw"))
        return [self._seen[id(image)] for image in images]
