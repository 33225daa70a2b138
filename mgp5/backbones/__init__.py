"""Multimodal LLMs behind one protocol, `Backbone`.

Letters: B batch, T tokens, D LLM width, N images, S slots of one image, V vocabulary, E embedding width.

E equals D, except for images of Qwen3-VL: there E is D (1 + k). The first D features are the embedding, the others are
DeepStack features of k vision layers, which `forward` adds to the states of the first k layers of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import Tensor, nn

    from .kv_cache import KVCache


class SideInputs(NamedTuple):
    """Features that layers of the LLM attend to besides the sequence (MM-Interleaved: those of all earlier images)."""

    features: Tensor  # (B, N, ...), of N images in each row, padded with zeros
    visible: Tensor  # (B, T) int64, how many of these images, counted from the first, each token may attend to
    first: Tensor | None = None  # (B, T) int64, but not to so many of them, which are of documents before its own


class Backbone(Protocol):
    """The interface of a multimodal LLM; `hf.HFBackbone` implements it."""

    tokenizer: Any  # with a chat template
    width: int  # D
    vision_width: int  # V, width of the vision tower's tokens
    vision_tower: nn.Module | None  # None where there is none that a head can look into
    lm_head: nn.Module  # projection from D to V
    device: torch.device  # of the computation, also while weights are offloaded
    image_token: str  # text that stands for one image in a chat template
    image_token_id: int  # id of the token that is repeated once per slot of an image
    context_length: int  # longest sequence, in tokens
    stop_ids: frozenset[int]  # ids of tokens that end a reply
    biases: dict[int, Callable[[], Tensor]]  # of tokens: what heads add to their logits
    vocabulary: int  # ids below it are tokens; rows of the LM head from there on are padding
    compiled: bool  # whether tokens are decoded by compiled code
    packable: bool  # whether a mask keeps samples apart that are in one row
    engine: Any  # an `engines.decode.FusedDecode` that runs the forward of a few tokens, None: `forward` does
    capturable: bool  # whether the forward of one token can be captured as a CUDA graph

    def preprocess(self, images: list[PIL.Image.Image]) -> dict[str, Tensor]:
        """Convert N images to the tensors that `encode_images` takes; runs in data workers, without weights."""

    def slots(self, inputs: dict[str, Tensor]) -> list[int]:
        """Return S, the number of token slots, of each of N preprocessed images."""

    def encode_images(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Encode N preprocessed images to features, one tensor (S, E) each."""

    def vision_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the vision tower's own tokens (N, S, V) of N preprocessed images of one size, before its last norm."""

    def embed(self, ids: Tensor, features: list[Tensor]) -> Tensor:
        """Return the embeddings (B, T, E) of tokens (B, T), with image features in their slots, in reading order."""

    def positions(self, ids: Tensor, grids: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Return position ids of complete sequences, (B, T) or (3, B, T); `grids` (N, 3) is `image_grid_thw`."""

    def side_inputs(
        self, ids: Tensor, slots: Sequence[int], features: Tensor | None, begins: Tensor | None = None
    ) -> SideInputs | None:
        """Return the side inputs of complete sequences (B, T) with N images, of S slots and features (N, ...)."""

    def forward(
        self,
        embeds: Tensor,  # (B, T, E)
        positions: Tensor,  # (B, T) or (3, B, T)
        mask: Tensor | None = None,  # (B, T) of 1 and 0, or (B, 1, T, attended slots), which is added to the scores
        cache: Any = None,
        side: SideInputs | None = None,
    ) -> Tensor:
        """Return the last hidden states (B, T, D), after the final norm; a cache is read and written."""

    def add_after_attention(self, layer: int, read: Callable[[Tensor], Tensor]) -> None:
        """Let a layer add `read` of its states (B, T, D) to them, between self-attention and MLP."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""

    def new_cache(self, rows: int = 1) -> KVCache:
        """Return an empty key-value cache for a number of conversations; a trained prefix is in it already."""

    def add_tokens(self, tokens: list[str]) -> list[int]:
        """Add special tokens, whose rows of embedding and LM head start at the mean of the others; return their ids."""
