"""Guided denoising step by step: the state of one image, and one call for images at steps of their own.

Letters: B images, n steps, R rows of a call (two of an image that is guided at its step), K kept predictions, C, h and
w of the latents, L and D of a condition, S columns of a step's row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .sampler import SamplerTable

# Latents (R, C, h, w), timesteps (R,) or (1,), condition (R, L, D) -> (R, C, h, w)
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class Denoiser(Protocol):
    """A denoising model in two parts: what is constant over the steps, and a step."""

    deep: int  # channels of the feature that a step can take from an earlier one; 0 where it cannot

    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return a table (n, 1 or R, S) with a row for each of (n,) timesteps, and what (R, L, D) turns into."""
        ...

    def __call__(
        self, latents: Tensor, row: Tensor, context: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the prediction (R, C, h, w) of a step and its deep feature.

        Args:
            row: (1 or R, S), of the table.
            context: tensors (R, ...).
            deep: (R, `deep`, h, w) of an earlier step; then the layers that make it are not run.
        """
        ...


class DenoisingEngine(Protocol):
    """What runs a denoiser faster, see `mgp5.engines`; it is put onto a generator from outside."""

    model: Denoiser
    decode: Callable[[Tensor], Tensor] | None  # latents as the VAE's decoder takes them -> pixels; None: the VAE does

    def model_for(self, reuse: int) -> Denoiser:
        """Return what runs the steps of an image with this `reuse`."""
        ...

    def advance(self, states: Sequence[Any], contexts: dict[Any, list[Tensor]]) -> None:
        """Advance images by one step each, as `advance` does."""
        ...


@dataclass(frozen=True)
class PlainDenoiser:
    """A model without constants: its rows are timesteps (S = 1), its context is the condition."""

    predict: Predict
    deep: ClassVar[int] = 0

    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return timesteps and condition as they are."""
        return timesteps[:, None, None], [condition]

    def __call__(
        self, latents: Tensor, row: Tensor, context: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Call the model."""
        return self.predict(latents, row[:, 0], context[0]), None


@dataclass(eq=False)
class DenoisingState:
    """An image that is being drawn.

    Attributes:
        latents: (1, C, h, w), float32.
        table: of its sampler, n steps.
        times: (n, 1 or r, S), see `Denoiser.constants`; r is 2 with guidance, else 1.
        context: tensors (r, ...), the unconditional half first.
        guidance: scale.
        guided: how many steps are guided, the first.
        reuse: only one of so many steps runs the whole UNet.
        model: that runs its steps.
        step: steps done.
        history: at most K kept predictions (1, C, h, w), newest first.
        deep: (r, channels, h, w) deep feature of the last whole step.
    """

    latents: Tensor
    table: SamplerTable
    times: Tensor
    context: list[Tensor]
    guidance: float
    guided: int
    reuse: int
    model: Denoiser
    step: int = 0
    history: list[Tensor] = field(default_factory=list)
    deep: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows of the next call are its own."""
        return 2 if self.step < self.guided else 1

    @property
    def done(self) -> bool:
        """Whether the latents are the result."""
        return self.step == len(self.table)

    @property
    def takes_deep(self) -> bool:
        """Whether the next step takes the deep feature of an earlier one."""
        return self.deep is not None and self.step % self.reuse > 0

    @property
    def key(self) -> tuple[Any, ...]:
        """What states must agree in to share a call."""
        return tuple(self.latents.shape), self.takes_deep, self.reuse > 1, self.model

    def advance(self, prediction: Tensor) -> None:
        """Take a prediction (r, C, h, w), the unconditional half first, by the coefficients of its own step."""
        coefficients, conversion = self.table.coefficients[self.step], self.table.conversion[self.step]
        self.latents, kept = linear_update(
            self.latents, prediction, self.history, coefficients.tolist(), conversion.tolist(), self.guidance
        )
        self.history = [kept, *self.history][: self.table.history]
        self.step += 1


@torch.no_grad()
def begin(
    model: Denoiser,
    noise: Tensor,
    condition: Tensor,
    unconditional: Tensor | None,
    table: SamplerTable,
    guidance: float,
    guided: int | None = None,
    reuse: int = 1,
) -> DenoisingState:
    """Return the state of an image before its first step.

    Args:
        noise: (1, C, h, w) standard normal.
        condition: (1, L, D).
        unconditional: (1, L, D), the condition of classifier-free guidance; not needed with guidance 1.
        guidance: scale; 1.0 runs the conditional half alone.
        guided: how many steps are guided, the first; None: all. At low noise guidance is hardly needed (Kynkaanniemi
            et al., arXiv 2404.07724).
        reuse: see DenoisingState.
    """
    batch = guidance_batch(condition, unconditional, guidance)
    guided = 0 if batch is condition else len(table) if guided is None else guided
    times, context = model.constants(table.timesteps.to(noise.device, torch.float32), batch)
    return DenoisingState(noise.float() * table.noise_scale, table, times, context, guidance, guided, reuse, model)


Members = tuple[tuple[DenoisingState, int], ...]  # images of one call, and the rows of each
Contexts = dict[Members, list[Tensor]]  # joined contexts of calls, kept while the same images go on together


@torch.no_grad()
def advance(states: Sequence[DenoisingState], contexts: Contexts | None = None) -> None:
    """Advance images with one `key` by one step each, in one call of their model.

    Args:
        contexts: of the calls before; that of this call is added, and those of finished images are dropped.
    """
    first, rows = states[0], [state.rows for state in states]
    context = _joined(states, {} if contexts is None else contexts)
    latents = torch.cat([state.latents.expand(state.rows, -1, -1, -1) for state in states])
    if first.times.shape[1] == 1 and all((s.table, s.step) == (first.table, first.step) for s in states):
        row = first.times[first.step]
    else:
        row = torch.cat([state.times[state.step, -state.rows :].expand(state.rows, -1) for state in states])
    deep = torch.cat([state.deep[-state.rows :] for state in states]) if first.takes_deep else None
    prediction, made = first.model(latents, row, context, deep)
    if first.reuse > 1 and deep is None:
        for state, part in zip(states, made.split(rows), strict=True):
            state.deep = part
    for state, part in zip(states, prediction.split(rows), strict=True):
        state.advance(part)


def _joined(states: Sequence[DenoisingState], contexts: Contexts) -> list[Tensor]:
    members = tuple((state, state.rows) for state in states)
    if members not in contexts:
        for old in [key for key in contexts if any(state.done for state, _ in key)]:
            contexts.pop(old, None)
        parts = zip(*([part[-state.rows :] for part in state.context] for state in states), strict=True)
        contexts[members] = [torch.cat(part) if len(part) > 1 else part[0] for part in parts]
    return contexts[members]


def denoise(
    predict: Predict,
    noise: Tensor,
    condition: Tensor,
    unconditional: Tensor | None,
    table: SamplerTable,
    guidance: float,
    guided: int | None = None,
) -> Iterator[Tensor]:
    """Yield the latents (B, C, h, w) after each of the `len(table)` steps of B images; the last are the result.

    Args:
        predict: the model; called with the unconditional half of an image before its conditional one.
        noise: (B, C, h, w) standard normal.
        condition: (B, L, D).
        unconditional: (1 or B, L, D); None with guidance 1.
        guidance, guided: see `begin`.
    """
    model = PlainDenoiser(predict)
    states = [
        begin(model, noise[i : i + 1], condition[i : i + 1], pick(unconditional, i), table, guidance, guided)
        for i in range(len(noise))
    ]
    yield from run(states)


def run(states: Sequence[DenoisingState]) -> Iterator[Tensor]:
    """Yield the latents (B, C, h, w) of images that begin together, after each step."""
    contexts: Contexts = {}
    while not states[0].done:
        advance(states, contexts)
        yield torch.cat([state.latents for state in states])


def pick(unconditional: Tensor | None, image: int) -> Tensor | None:
    """Return the unconditional condition (1, L, D) of one image of (1 or B, L, D)."""
    if unconditional is None or len(unconditional) == 1:
        return unconditional
    return unconditional[image : image + 1]


def guidance_batch(condition: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
    """Return conditions (B, L, D) behind as many unconditional ones (1 or B, L, D); guidance 1 needs none of these."""
    if guidance == 1.0 or unconditional is None:
        return condition
    return torch.cat([unconditional.expand_as(condition).to(condition), condition])


def linear_update(
    latents: Tensor,
    prediction: Tensor,
    history: Sequence[Tensor],
    coefficients: Sequence[float],
    conversion: Sequence[float],
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """Apply one step of a sampler's table with guidance: the next latents, and what is kept of this prediction.

    Args:
        latents: (B, C, h, w).
        prediction: (B or 2B, C, h, w), the unconditional half first.
        history: at most K of (B, C, h, w), newest first.
        coefficients: (2 + K).
        conversion: (2).
        guidance: scale.
    """
    prediction = prediction.to(latents.dtype)
    if len(prediction) == 2 * len(latents):
        without, guided = prediction.chunk(2)
        prediction = torch.lerp(without, guided, guidance)
    kept = conversion[0] * latents + conversion[1] * prediction if any(conversion) else prediction
    latents = coefficients[0] * latents + coefficients[1] * prediction
    # While the history is short, the coefficients it lacks are zero.
    for coefficient, past in zip(coefficients[2:], history, strict=False):
        if coefficient:
            latents = latents + coefficient * past
    return latents, kept
