"""Token sampling for rows that differ in temperature and all else, the same on any device.

Letters: r rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SamplingParams:
    """How a row of the decoder samples its tokens."""

    temperature: float  # 0 takes the most likely token
    top_p: float  # in (0, 1]
    penalty: float  # divides the logits of `generated_ids`; 1 is off
    rng: torch.Generator  # on the CPU; one number for each token, whatever the batch and tokens_per_sync are
    generated_ids: set[int] = field(default_factory=set)  # of the reply so far; whoever records the reply adds to it
    top_k: int = 0  # the most likely tokens that may be taken; 0: all
    _drawn: list[float] = field(default_factory=list)

    def numbers(self, count: int) -> list[float]:
        """Return the next numbers in [0, 1). They stay the next until they are `used`: not all tokens may be taken."""
        if self.temperature == 0:
            return [0.0] * count
        while len(self._drawn) < count:
            self._drawn.append(float(torch.rand((), generator=self.rng)))
        return self._drawn[:count]

    def used(self) -> None:
        """Drop the number of a token that was taken."""
        del self._drawn[:1]


COLDEST = 1e-6  # temperature at which logits still are finite, and the most likely token is certain
PAUSED = SamplingParams(temperature=0, top_p=1, penalty=1, rng=torch.Generator())  # of a row that takes no part


def penalise(logits: Tensor, generated: Tensor, penalty: Tensor) -> Tensor:  # (r, V)
    """Make generated tokens (r, V) less likely by penalties (r, 1): divide positive logits, multiply negative ones
    (Keskar et al., arXiv 1909.05858)."""
    penalty = torch.where(generated, penalty, 1.0)
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, numbers: Tensor, top_k: Tensor) -> Tensor:  # (r,)
    """Sample a token of each row from the smallest set that reaches top_p (Holtzman et al., arXiv 1904.09751), at most
    top_k tokens; 0 is no limit.

    Logits (r, V), the others (r, 1). Temperature and top_p may be 0 in single precision. Numbers in [0, 1) say where to
    look in the cumulative distribution of the set, likely tokens first.
    """
    values, order = torch.softmax(logits / temperature.clamp(min=COLDEST), dim=-1).sort(descending=True, stable=True)
    reached = values.cumsum(-1)
    last = (torch.searchsorted(reached - values, top_p) - 1).clamp(min=0)  # the token that reaches top_p is of the set
    last = torch.where(top_k > 0, torch.minimum(last, top_k.long() - 1), last)
    index = torch.searchsorted(reached, numbers * reached.gather(1, last), right=True)
    return order.gather(1, torch.minimum(index, last))[:, 0]  # minimum: sums are rounded
