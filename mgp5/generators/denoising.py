"""Guided denoising: the state of one image, and one model call for several images at different steps.

Letters: B images, n steps, R guidance rows of a call (an image has two at a guided step, else one), M kept predictions,
Z latent channels, h and w latents, L condition length, C condition width, S width of a step's time embedding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .sampler import SamplerTable

# Latents (R, Z, h, w), timesteps (R,) or (1,), condition (R, L, C) -> prediction (R, Z, h, w)
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class Denoiser(Protocol):
    """A denoising model in two parts: what is computed once for an image, and one step."""

    deep: int  # channels of the deep feature (DeepCache) that a step can reuse; 0 for a model without it
    per_image: bool  # whether a time embedding holds something of the image, as SD 3's holds its pooled text

    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute everything that does not depend on the latents.

        Args:
            timesteps: (n,) float32.
            condition: (R, L, C).

        Returns:
            Time embeddings (n, 1 or R, S), and the inputs of cross-attention, tensors (R, ...).
        """
        ...

    def __call__(
        self, latents: Tensor, time_embedding: Tensor, cross_attention: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run one step; return the prediction (R, Z, h, w) and its deep feature (R, `deep`, h, w), or None.

        Args:
            latents: (R, Z, h, w), any float dtype.
            time_embedding: (1 or R, S), rows of what `constants` returned.
            cross_attention: tensors (R, ...), from `constants`.
            deep: (R, `deep`, h, w), the deep feature of an earlier step; the layers that compute it are then skipped.
        """
        ...


class DenoisingEngine(Protocol):
    """A faster implementation of a denoiser, see `mgp5.engines`; it is attached to a generator from outside.

    Attributes:
        model: the denoiser.
        decode: decodes scaled latents (B, Z, h, w) to pixels (B, 3, H, W); None: the VAE of the generator does.
    """

    model: Denoiser
    decode: Callable[[Tensor], Tensor] | None

    def model_for(self, reuse: int) -> Denoiser:
        """Return the denoiser for the steps of an image with this `reuse`."""
        ...

    def advance(self, states: Sequence[DenoisingState]) -> None:
        """Advance images with equal `key` by one step each; see the function `advance`."""
        ...


@dataclass(frozen=True)
class PlainDenoiser:
    """A denoising model with nothing precomputed.

    Args:
        predict: the model: latents (R, Z, h, w), timesteps (R,) or (1,), condition (R, L, C) -> (R, Z, h, w).
    """

    predict: Predict
    deep: ClassVar[int] = 0
    per_image: ClassVar[bool] = False

    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return timesteps (n,) as (n, 1, 1), so that S is 1, and the condition (R, L, C) as it is."""
        return timesteps[:, None, None], [condition]

    def __call__(
        self, latents: Tensor, time_embedding: Tensor, cross_attention: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return the model's prediction (R, Z, h, w) and no deep feature.

        Args:
            latents: (R, Z, h, w).
            time_embedding: (1 or R, 1), timesteps.
            cross_attention: the condition (R, L, C) alone.
            deep: not used.
        """
        return self.predict(latents, time_embedding[:, 0], cross_attention[0]), None


@dataclass(eq=False)
class DenoisingState:
    """The state of one image between two denoising steps.

    Attributes:
        latents: (1, Z, h, w), float32.
        table: the sampler's coefficients, n steps.
        time_embeddings: (n, 1 or r, S), see `Denoiser.constants`; r is 2 with guidance, else 1.
        cross_attention: tensors (r, ...), the unconditional row first.
        guidance: scale of classifier-free guidance.
        guided: number of steps that are guided, counted from the first.
        reuse: every `reuse`-th step runs the full UNet; the others take its deep feature (DeepCache).
        model: the denoiser.
        step: number of steps done.
        history: at most M kept predictions (1, Z, h, w), newest first.
        deep: (r, channels, h, w), deep feature of the last full step.
        joined: the images of the last call that this one was the first of, their rows, and their concatenated inputs
            of cross-attention; kept as long as the same images share their calls.
    """

    latents: Tensor
    table: SamplerTable
    time_embeddings: Tensor
    cross_attention: list[Tensor]
    guidance: float
    guided: int
    reuse: int
    model: Denoiser
    step: int = 0
    history: list[Tensor] = field(default_factory=list)
    deep: Tensor | None = None
    joined: tuple[list[tuple[weakref.ref[DenoisingState], int]], list[Tensor]] | None = None

    @property
    def rows(self) -> int:
        """Return how many rows this image has in the next call: 2 while it is guided, else 1."""
        return 2 if self.step < self.guided else 1

    @property
    def done(self) -> bool:
        """Return whether all steps are done, so that `latents` is the result."""
        return self.step == len(self.table)

    @property
    def takes_deep(self) -> bool:
        """Return whether the next step reuses the deep feature of an earlier one."""
        return self.deep is not None and self.step % self.reuse > 0

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key; states with equal keys can share a model call."""
        return tuple(self.latents.shape), self.takes_deep, self.reuse > 1, self.model

    def advance(self, prediction: Tensor) -> None:
        """Update the latents by one step of the sampler.

        Args:
            prediction: (r, Z, h, w), the unconditional row first.
        """
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
        model: the denoiser.
        noise: (1, Z, h, w), standard normal.
        condition: (1, L, C).
        unconditional: (1, L, C), the unconditional condition of classifier-free guidance; not needed with guidance 1.
        table: coefficients of the sampler.
        guidance: scale; with 1.0 only the conditional row is computed.
        guided: number of guided steps, counted from the first; None: all. At low noise guidance is hardly needed
            (Kynkaanniemi et al., arXiv 2404.07724).
        reuse: see DenoisingState.
    """
    batch = guidance_batch(condition, unconditional, guidance)
    guided = 0 if batch is condition else len(table) if guided is None else guided
    embeddings, inputs = model.constants(table.timesteps.to(noise.device, torch.float32), batch)
    return DenoisingState(noise.float() * table.noise_scale, table, embeddings, inputs, guidance, guided, reuse, model)


@torch.no_grad()
def advance(states: Sequence[DenoisingState]) -> None:
    """Advance images with equal `key` by one step each, in one model call; they may be at different steps."""
    first, rows = states[0], [state.rows for state in states]
    cross_attention = _join(states)
    latents = torch.cat([state.latents.expand(state.rows, -1, -1, -1) for state in states])
    same = all((s.table, s.step, s.time_embeddings.shape[1]) == (first.table, first.step, 1) for s in states)
    if same and not first.model.per_image:
        embedding = first.time_embeddings[first.step]
    else:
        embedding = torch.cat(
            [state.time_embeddings[state.step, -state.rows :].expand(state.rows, -1) for state in states]
        )
    deep = torch.cat([state.deep[-state.rows :] for state in states]) if first.takes_deep else None
    prediction, new_deep = first.model(latents, embedding, cross_attention, deep)
    if first.reuse > 1 and deep is None:
        for state, part in zip(states, new_deep.split(rows), strict=True):
            state.deep = part
    for state, part in zip(states, prediction.split(rows), strict=True):
        state.advance(part)


def _join(states: Sequence[DenoisingState]) -> list[Tensor]:
    """Return the inputs of cross-attention (R, ...) of a call; kept where these images shared the last call."""
    first, *others = states
    members = [(weakref.ref(state), state.rows) for state in states]
    if first.joined is None or first.joined[0] != members:
        parts = zip(*([part[-state.rows :] for part in state.cross_attention] for state in states), strict=True)
        first.joined = members, [torch.cat(part) if len(part) > 1 else part[0] for part in parts]
    for state in others:
        state.joined = None
    return first.joined[1]


def denoise(
    predict: Predict,
    noise: Tensor,
    condition: Tensor,
    unconditional: Tensor | None,
    table: SamplerTable,
    guidance: float,
    guided: int | None = None,
) -> Iterator[Tensor]:
    """Yield the latents (B, Z, h, w) of B images after each of the `len(table)` steps; the last ones are the result.

    Args:
        predict: the model; the unconditional row of an image comes before its conditional one.
        noise: (B, Z, h, w), standard normal.
        condition: (B, L, C).
        unconditional: (1 or B, L, C); None with guidance 1.
        table, guidance, guided: see `begin`.
    """
    model = PlainDenoiser(predict)
    states = [
        begin(model, noise[i : i + 1], condition[i : i + 1], pick(unconditional, i), table, guidance, guided)
        for i in range(len(noise))
    ]
    yield from run(states)


def run(states: Sequence[DenoisingState]) -> Iterator[Tensor]:
    """Yield the latents (B, Z, h, w) of B images after each step; all of them begin and end together."""
    while not states[0].done:
        advance(states)
        yield torch.cat([state.latents for state in states])


def pick(unconditional: Tensor | None, image: int) -> Tensor | None:
    """Return the unconditional condition (1, L, C) of one image from that of a batch, (1 or B, L, C)."""
    if unconditional is None or len(unconditional) == 1:
        return unconditional
    return unconditional[image : image + 1]


def guidance_batch(condition: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
    """Return the condition of both guidance branches (R, L, C), the B unconditional rows first; guidance 1: (B, L, C).

    Args:
        condition: (B, L, C).
        unconditional: (1 or B, L, C), or None.
        guidance: scale of classifier-free guidance.
    """
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
    """Apply classifier-free guidance (Ho and Salimans, arXiv 2207.12598) and one step of a sampler's table.

    Args:
        latents: (B, Z, h, w).
        prediction: (B or 2B, Z, h, w), the unconditional rows first.
        history: at most M tensors (B, Z, h, w), newest first.
        coefficients: (2 + M,), of latents, prediction and history.
        conversion: (2,), of latents and prediction.
        guidance: scale.

    Returns:
        The next latents and the prediction to keep, both (B, Z, h, w).
    """
    prediction = prediction.to(latents.dtype)
    if len(prediction) == 2 * len(latents):
        unconditional, conditional = prediction.chunk(2)
        prediction = torch.lerp(unconditional, conditional, guidance)
    kept = conversion[0] * latents + conversion[1] * prediction if any(conversion) else prediction
    latents = coefficients[0] * latents + coefficients[1] * prediction
    # While the history is short, the coefficients it lacks are zero.
    for coefficient, past in zip(coefficients[2:], history, strict=False):
        if coefficient:
            latents = latents + coefficient * past
    return latents, kept
