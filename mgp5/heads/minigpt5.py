"""The head of MiniGPT-5: n generative vokens, a feature mapper, a latent-diffusion model.

P pictures to be drawn, n vokens of a picture, T tokens, D width of the LLM, L and C of a condition.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import Mgp5Error
from ..generators.sampler import sampler_table
from . import Context, Forced, Reply, Request
from .mapper import FeatureMapper

if TYPE_CHECKING:
    from ..generators import LatentDiffusion
    from ..options import Options

MAX_VOKENS = 16  # the paper's ablation goes from 1 to 16 (MiniGPT-5 2023, appendix C.2)


def voken_tokens(num_vokens: int) -> tuple[str, ...]:
    """The special tokens [IMG0]..[IMGn-1]; the first is the trigger."""
    if not 1 <= num_vokens <= MAX_VOKENS:
        raise Mgp5Error(f"num_vokens is {num_vokens}, expected 1 to {MAX_VOKENS}", "the paper's number is 8")
    return tuple(f"[IMG{index}]" for index in range(num_vokens))


def predicting_states(
    hidden: Tensor,  # (B, T, D)
    rows: Sequence[int],  # (P,) batch row of each run of vokens
    starts: Sequence[int],  # (P,) position of the first voken of each run, at least 1
    num_vokens: int,
) -> Tensor:  # (P, n, D)
    """The states that predict the vokens: one position to the left of each (last text token, then all but the last).

    The one place that picks them, for training and inference alike; taking the states *of* the vokens instead is the
    most likely bug of this method.
    """
    return torch.stack(
        [hidden[row, start - 1 : start - 1 + num_vokens] for row, start in zip(rows, starts, strict=True)]
    )


class MiniGPT5Head(nn.Module):
    """Draws a picture from the states that predict a run of vokens (MiniGPT-5, section 3.2).

    Args:
        ids: of the vokens, in order.
        empty_text: guidance takes the generator's own encoding of the empty text for its other half, not the mapper
            at zeros: for models trained without guidance dropout.
    """

    def __init__(
        self, mapper: FeatureMapper, diffusion: LatentDiffusion, ids: Sequence[int], empty_text: bool = False
    ) -> None:
        super().__init__()
        self.empty_text = empty_text
        self.mapper = mapper
        self.tokens = voken_tokens(len(ids))
        self.ids = tuple(ids)
        self._diffusion = (diffusion,)  # in a tuple: its weights belong to the model, not to the head
        self._zeros: Tensor | None = None

    @property
    def diffusion(self) -> LatentDiffusion:
        """The frozen generator that conditions are made for."""
        return self._diffusion[0]

    @property
    def num_vokens(self) -> int:
        """n, how many vokens stand for one image."""
        return len(self.ids)

    def allowed(self, step: int) -> tuple[int, ...]:
        """Exactly one token at every step: a run of vokens is forced once the trigger is there."""
        return (self.ids[step],)

    def condition(self, context: Context) -> Generator[Request, Reply, Tensor]:
        """Read the whole run in one forward, then map the states that predict it: -> (1, L, C)."""
        reply = yield Forced(self.ids)
        hidden = torch.cat([context.state, reply.hidden], dim=1)  # (1, 1 + n, D): the trigger stands at 1
        return self.mapper(predicting_states(hidden, [0], [1], self.num_vokens))

    def unconditional(self, condition: Tensor) -> Tensor:
        """The other half of guidance (1, L, C), computed once and kept until the mapper trains again."""
        if self._zeros is None or self._zeros.device != condition.device or self.training:
            zeros = self.diffusion.encode_text([""]) if self.empty_text else self.mapper.unconditional(self.num_vokens)
            self._zeros = zeros.to(condition)
        return self._zeros

    def train(self, mode: bool = True) -> MiniGPT5Head:
        """Training changes the mapper, so what was computed from it is forgotten."""
        self._zeros = None
        return super().train(mode)

    def num_steps(self, options: Options) -> int:
        """How many latents `draw` yields (PNDM makes one step more than asked)."""
        return len(sampler_table(options.image.sampler, self.diffusion.schedule, options.image.steps))

    def draw(self, condition: Tensor, options: Options, generators: list[torch.Generator]) -> Iterator[Tensor]:
        """Latents (P, C, h, w) after each denoising step of conditions (P, L, C), one generator each."""
        return self.diffusion.draw(
            condition,
            self.unconditional(condition),
            steps=options.image.steps,
            guidance=options.image.guidance,
            sampler=options.image.sampler,
            height=options.image.height,
            width=options.image.width,
            guidance_until=options.image.guidance_until,
            reuse=options.image.reuse,
            generators=generators,
        )

    def finish(self, canvas: Tensor) -> Tensor:
        """Latents -> pixels (P, 3, H, W) in [-1, 1]."""
        return self.diffusion.decode(canvas)
