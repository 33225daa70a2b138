"""What the LLM has read of a conversation: tokens, pictures and the key-value cache, kept across turns.

T tokens, k new tokens, S slots of one picture, D width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .messages import Conversation, Image
from .prompt import check_length, prompt

if TYPE_CHECKING:
    from .backbones import Backbone


@dataclass(frozen=True)
class Seen:
    """A picture as the LLM sees it; `key` tells the same picture from another one."""

    image: Image
    key: str
    features: Tensor  # (S, D)
    grid: Tensor | None  # (1, 3) time, height and width in patches, for backbones of any resolution


@dataclass
class Session:
    """The state of one conversation. `read` prefills only what is new since the last turn."""

    backbone: Backbone
    reuse: bool = True  # False: forget the cache at every turn (for tests and for comparison)
    keys: list[tuple[int, str]] = field(default_factory=list)  # what the cache holds: (token, picture or "")
    prefilled: int = 0  # tokens that the last `read` had to run
    state: Tensor | None = None  # (1, 1, D) state after the last token read
    _cache: Any = None
    _states: list[Tensor] = field(default_factory=list)  # of what the cache holds, in pieces (1, k, D)
    _seen: dict[int, Seen] = field(default_factory=dict)
    _next: int = 0  # next rotary position
    _axes: tuple[int, ...] = ()  # (3,) where positions have time, height and width

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
        hidden = self.backbone(embeds[:, kept:], positions[..., kept:], None, self._cache)
        self.keys, self.prefilled = keys, len(ids) - kept
        self._next, self._axes = int(positions.max()) + 1, positions.shape[:-2]
        self._states.append(hidden)
        self.state = hidden[:, -1:]
        return self.state

    def feed(self, ids: tuple[int, ...]) -> Tensor:  # (1, k, D)
        """Read tokens in one forward; returns the state after each."""
        tokens = torch.tensor([ids], device=self.backbone.device)
        return self.feed_embeds(self.backbone.embed(tokens, []), ids)

    @torch.inference_mode()
    def feed_embeds(self, embeds: Tensor, ids: tuple[int, ...] | None = None) -> Tensor:  # (1, k, D)
        """Read embeddings (1, k, D) in one forward; returns the state after each."""
        length = embeds.shape[1]
        positions = torch.arange(self._next, self._next + length, device=embeds.device)
        positions = positions.expand(*self._axes, 1, length)
        hidden = self.backbone(embeds, positions, None, self._cache)
        self._next += length
        self.keys += [(i, "") for i in ids] if ids is not None else [(-1, "embeds")] * length
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
        kept = 0
        if self.reuse and self._cache is not None:
            limit = min(len(self.keys), len(keys) - 1)
            kept = next((i for i in range(limit) if self.keys[i] != keys[i]), limit)
        if kept == 0:
            self._cache, self._states = self.backbone.new_cache(), []
        elif kept < len(self.keys):
            self._cache.crop(kept - len(self.keys))
            self._states = [self.states[:, :kept]]
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
