"""Multimodal LLMs behind one protocol, `Backbone`.

Letters: B batch, T tokens, D LLM width, N images, S slots of one image, V vocabulary, E embedding width.

E equals D, except for images of Qwen3-VL: there E is D (1 + k). The first D features are the embedding, the others are
DeepStack features of k vision layers, which `forward` adds to the states of the first k layers of the LLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import Tensor

    from .kv_cache import KVCache


class SideInputs(NamedTuple):
    """Features that layers of the LLM attend to besides the sequence (MM-Interleaved: those of all earlier images).

    Attributes:
        features: (B, N, ...), of N images in each row, padded with zeros.
        visible: (B, T) int64, how many of these images, counted from the first, each token may attend to.
    """

    features: Tensor
    visible: Tensor


class Backbone(Protocol):
    """The interface of a multimodal LLM; `hf.HFBackbone` implements it.

    Attributes:
        tokenizer: tokenizer with a chat template.
        width: D.
        image_token: text that stands for one image in a chat template.
        image_token_id: id of the token that is repeated once per slot of an image.
        context_length: longest sequence, in tokens.
        stop_ids: ids of tokens that end a reply.
        compiled: whether tokens are decoded by compiled code.
        capturable: whether the forward of one token can be captured as a CUDA graph.
    """

    tokenizer: Any
    width: int
    image_token: str
    image_token_id: int
    context_length: int
    stop_ids: frozenset[int]
    compiled: bool
    capturable: bool

    def preprocess(self, images: list[PIL.Image.Image]) -> dict[str, Tensor]:
        """Convert N images to the tensors that `encode_images` takes; runs in data workers, without weights."""
        ...

    def slots(self, inputs: dict[str, Tensor]) -> list[int]:
        """Return S, the number of token slots, of each of N preprocessed images."""
        ...

    def encode_images(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Encode N preprocessed images to features, one tensor (S, E) each."""
        ...

    def embed(self, ids: Tensor, features: list[Tensor]) -> Tensor:
        """Return the embeddings (B, T, E) of tokens (B, T), with image features in their slots, in reading order."""
        ...

    def positions(self, ids: Tensor, grids: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Return position ids of complete sequences, (B, T) or (3, B, T); `grids` (N, 3) is `image_grid_thw`."""
        ...

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Any = None,
        side: SideInputs | None = None,
    ) -> Tensor:
        """Return the last hidden states (B, T, D), after the final norm, of embeddings (B, T, E).

        Args:
            embeds: (B, T, E).
            positions: (B, T) or (3, B, T).
            mask: (B, T), 1 for tokens, 0 for padding; with a cache (B, 1, T, attended slots), added to the scores.
            cache: keys and values that the tokens attend to, and that theirs are written to.
            side: see SideInputs.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        ...

    def new_cache(self, rows: int = 1) -> KVCache:
        """Return an empty key-value cache for a number of conversations; a trained prefix is in it already."""
        ...

    def to(self, device: torch.device) -> Backbone:
        """Move the weights to a device."""
        ...
