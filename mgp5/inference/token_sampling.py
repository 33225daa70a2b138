"""How the next token is chosen, for rows that differ in temperature and all else, on any device alike.

r rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SamplingParams:
    """How a row chooses its tokens.

    Args:
        temperature: 0 takes the most likely token.
        top_p: in (0, 1].
        penalty: divides the logits of tokens in `said`; 1 is off.
        generator: on the CPU; one number for each token, so that a reply depends on neither batch nor piece.
        said: text tokens of the reply; whoever speaks adds to it.
    """

    temperature: float
    top_p: float
    penalty: float
    generator: torch.Generator
    said: set[int] = field(default_factory=set)
    _drawn: list[float] = field(default_factory=list)

    def numbers(self, count: int) -> list[float]:
        """The next numbers in [0, 1). They stay the next until they are `used`: a piece may end early."""
        if self.temperature == 0:
            return [0.0] * count
        while len(self._drawn) < count:
            self._drawn.append(float(torch.rand((), generator=self.generator)))
        return self._drawn[:count]

    def used(self) -> None:
        """One token was chosen and taken."""
        del self._drawn[:1]

    def choose(self, logits: Tensor) -> int:
        """An index of logits (1, V), without penalty."""
        if self.temperature == 0:
            return int(logits.argmax())
        settings = torch.tensor([self.temperature, self.top_p, *self.numbers(1)], device=logits.device)
        self.used()
        return int(sample(logits, *settings.view(3, 1, 1)))


COLDEST = 1e-6  # temperature, with which logits still are finite, and the likeliest token is certain
PAUSED = SamplingParams(temperature=0, top_p=1, penalty=1, generator=torch.Generator())  # of a row that pauses


def penalise(logits: Tensor, said: Tensor, penalty: Tensor) -> Tensor:  # (r, V)
    """Make tokens that were said (r, V) less likely, by penalties (r, 1) (Keskar et al., 2019: divide if positive,
    multiply if negative)."""
    penalty = torch.where(said, penalty, 1.0)
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, numbers: Tensor) -> Tensor:  # (r,)
    """Nucleus sampling (Holtzman et al., arXiv 1904.09751): the smallest set of tokens that reaches top_p.

    Args:
        logits: (r, V).
        temperature, top_p: (r, 1), 0 or more: what is above 0 for the one who asked may be 0 in single precision.
        numbers: (r, 1) in [0, 1): where to look in the cumulative distribution of the set, likely tokens first.
    """
    values, order = torch.softmax(logits / temperature.clamp(min=COLDEST), dim=-1).sort(descending=True, stable=True)
    reached = values.cumsum(-1)
    last = (torch.searchsorted(reached - values, top_p) - 1).clamp(min=0)  # the token that reaches top_p is of the set
    index = torch.searchsorted(reached, numbers * reached.gather(1, last), right=True)
    return order.gather(1, torch.minimum(index, last))[:, 0]  # minimum: sums are rounded
