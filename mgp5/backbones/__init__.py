"""Multimodal LLMs behind one protocol. B batch, T tokens, D width, S slots of one picture, V vocabulary.

E is the width of embeddings: D, or for pictures of Qwen3-VL D (1 + k), where the features that k of its vision layers
give to the first layers of the LLM stand behind the D features that every model has. Nothing else looks into them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import Tensor

    from .kv_cache import KVCache


class SideInputs(NamedTuple):
    """What layers of the LLM attend to beside the sequence (MM-Interleaved: features of all earlier images).

    Attributes:
        features: (B, N, ...) of the N images of each row, padded with zeros.
        visible: (B, T) how many of them, from the first, each token may attend to.
    """

    features: Tensor
    visible: Tensor


class Backbone(Protocol):
    """All that the rest of mgp5 asks of a multimodal LLM; `hf.HFBackbone` is the implementation."""

    tokenizer: Any
    width: int
    image_token: str  # what stands for one picture in the text of a chat template
    image_token_id: int  # the token that is repeated once per slot
    context_length: int
    stop_ids: frozenset[int]
    compiled: bool  # whether tokens are decoded by compiled code
    capturable: bool  # whether the forward of a token can be a CUDA graph

    def preprocess(self, pictures: list[PIL.Image.Image]) -> dict[str, Tensor]:
        """Pictures -> tensors for `encode_images`; runs in data workers, needs no weights."""
        ...

    def slots(self, inputs: dict[str, Tensor]) -> list[int]:
        """How many token slots each preprocessed picture takes."""
        ...

    def encode_images(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """One (S, E) tensor of features per picture."""
        ...

    def embed(self, ids: Tensor, features: list[Tensor]) -> Tensor:
        """ids (B, T) -> embeddings (B, T, E), with picture features in the image slots, in reading order."""
        ...

    def positions(self, ids: Tensor, grids: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Position ids of whole sequences, (B, T) or (3, B, T); `grids` is `image_grid_thw` where there is one."""
        ...

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Any = None,
        side: SideInputs | None = None,
    ) -> Tensor:
        """embeddings (B, T, E) -> last hidden states (B, T, D) after the final norm.

        Args:
            mask: (B, T) 1 for tokens, 0 for padding; with a cache (B, 1, T, W), what is added to attention scores.
            cache: what the tokens see, and are written to.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> (..., V)."""
        ...

    def new_cache(self, rows: int = 1) -> KVCache:
        """A key-value cache of conversations that holds no token yet, only the prefix where there is one."""
        ...

    def to(self, device: torch.device) -> Backbone:
        """Move the weights."""
        ...
