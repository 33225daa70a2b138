"""Image heads: from LLM states to an image, one file per paper, behind one protocol that fits all four.

MiniGPT-5, SEED, MM-Interleaved and VARGPT differ in what the LLM has to do after the trigger token. A head says so as
a generator of requests (`condition`): the generation loop serves them and never asks which head it has.
B batch, k tokens of one request, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..options import Options


@dataclass(frozen=True)
class Forced:
    """Read these tokens in one forward (MiniGPT-5: the whole run of vokens)."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """Sample `count` tokens one by one, the step-th among `allowed(step)` of the head (SEED: 32 codes)."""

    count: int


@dataclass(frozen=True)
class Embeds:
    """Read these continuous embeddings in one forward (VARGPT: one scale of its decoder)."""

    embeds: Tensor  # (1, k, D)


@dataclass(frozen=True)
class Prefix:
    """Nothing to read: give the states of all tokens so far (MM-Interleaved: context for its own attention)."""


Request = Forced | Sample | Embeds | Prefix


@dataclass(frozen=True)
class Reply:
    """What the LLM did for a request."""

    hidden: Tensor  # (1, k, D) states after reading each token; of all tokens so far for Prefix
    ids: tuple[int, ...] = ()  # the tokens read or sampled


@dataclass(frozen=True)
class Context:
    """What is known when an image begins."""

    state: Tensor  # (1, 1, D) the state that predicted the trigger


class Head(Protocol):
    """What an image head has to say; see `vokens.MiniGPT5Head`."""

    tokens: tuple[str, ...]  # special tokens it adds, the trigger first

    def allowed(self, step: int) -> tuple[int, ...]:
        """Ids that the step-th token of an image may be, the trigger being step 0."""
        ...

    def condition(self, context: Context) -> Generator[Request, Reply, Any]:
        """Ask the LLM for what it needs and return a condition."""
        ...

    def unconditional(self, condition: Any) -> Any:
        """The other half of the guidance batch."""
        ...

    def num_steps(self, options: Options) -> int:
        """How many canvases `draw` yields."""
        ...

    def draw(self, condition: Any, options: Options, generators: list[torch.Generator]) -> Iterator[Tensor]:
        """Canvases while they are drawn (here: latents); the last is the image, ready for `finish`."""
        ...

    def finish(self, canvas: Tensor) -> Tensor:
        """The last canvas as pixels (B, 3, H, W) in [-1, 1]."""
        ...
