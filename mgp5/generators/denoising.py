"""Guided denoising: the state of one image, and one model call for several images at different steps; and the losses
of many images with the memory of a few.

Letters: B images, n steps, R guidance rows of a call (an image has two at a guided step, else one), M kept predictions,
Z latent channels, h and w latents, L condition length, C condition width, S width of a step's time embedding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .sampler import SamplerTable


class Denoiser(Protocol):
    """A denoising model in two parts: what is computed once for an image, and one step."""

    deep: int  # channels of the deep feature (DeepCache) that a step can reuse; 0 for a model without it
    per_image: bool  # whether a time embedding holds something of the image, as SD 3's holds its pooled text

    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute from timesteps (n,) float32 and a condition (R, L, C) what does not depend on the latents: time
        embeddings (n, 1 or R, S), and the inputs of cross-attention, tensors (R, ...)."""

    def __call__(
        self,
        latents: Tensor,  # (R, Z, h, w), any float dtype
        time_embedding: Tensor,  # (1 or R, S), rows of what `constants` returned
        cross_attention: list[Tensor],  # tensors (R, ...), from `constants`
        deep: Tensor | None = None,  # (R, `deep`, h, w) of an earlier step: the layers that compute it are skipped
    ) -> tuple[Tensor, Tensor | None]:
        """Run one step; return the prediction (R, Z, h, w) and its deep feature (R, `deep`, h, w), or None."""


class DenoisingEngine(Protocol):
    """A faster implementation of a denoiser, see `mgp5.engines`; it is attached to a generator from outside."""

    model: Denoiser
    decode: Callable[[Tensor], Tensor] | None  # scaled latents (B, Z, h, w) to pixels (B, 3, H, W); None: by the VAE

    def model_for(self, reuse: int) -> Denoiser:
        """Return the denoiser for the steps of an image with this `reuse`."""

    def advance(self, states: Sequence[DenoisingState]) -> None:
        """Advance images with equal `key` by one step each; see the function `advance`."""


@dataclass(frozen=True)
class PlainDenoiser:
    """A denoising model with nothing precomputed; it implements Denoiser."""

    predict: Callable[..., Tensor]  # as LatentDiffusion.predict
    deep: ClassVar[int] = 0
    per_image: ClassVar[bool] = False

    def constants(self, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return timesteps (n,) as (n, 1, 1), so that S is 1, and the condition (R, L, C) as it is."""
        return timesteps[:, None, None], [condition]

    def __call__(
        self, latents: Tensor, time_embedding: Tensor, cross_attention: list[Tensor], deep: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return the prediction (R, Z, h, w) of `predict` for timesteps (1 or R, 1), and no deep feature."""
        condition, *residuals = cross_attention
        options = {"residuals": residuals} if residuals else {}
        return self.predict(latents, time_embedding[:, 0], condition, **options), None


@dataclass(eq=False)
class DenoisingState:
    """The state of one image between two denoising steps; r is 2 with classifier-free guidance, else 1."""

    latents: Tensor  # (1, Z, h, w), float32
    table: SamplerTable  # n steps
    time_embeddings: Tensor  # (n, 1 or r, S), see `Denoiser.constants`
    cross_attention: list[Tensor]  # tensors (r, ...), the unconditional row first; then residuals (r, N, ...)
    guidance: float  # scale
    guided: int  # number of steps that are guided, counted from the first
    reuse: int  # every `reuse`-th step runs the full UNet; the others take its deep feature (DeepCache)
    model: Denoiser
    step: int = 0  # number of steps done
    history: list[Tensor] = field(default_factory=list)  # at most M kept predictions (1, Z, h, w), newest first
    deep: Tensor | None = None  # (r, channels, h, w), deep feature of the last full step
    # The images of the last call that this one was the first of, their rows, and their concatenated inputs of
    # cross-attention; kept as long as the same images share their calls.
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
    def clean(self) -> Tensor:  # (1, Z, h, w)
        """Return the clean latents as far as they are known: DPM-Solver++'s own prediction, else the noisy ones."""
        return self.history[0] if self.history and self.table.conversion.any() else self.latents

    @property
    def takes_deep(self) -> bool:
        """Return whether the next step reuses the deep feature of an earlier one."""
        return self.deep is not None and self.step % self.reuse > 0

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key; states with equal keys can share a model call."""
        return tuple(self.latents.shape), self.takes_deep, self.reuse > 1, self.model, len(self.cross_attention)

    def advance(self, prediction: Tensor) -> None:
        """Update the latents by one step of the sampler with a prediction (r, Z, h, w), the unconditional row first."""
        coefficients, conversion = self.table.coefficients[self.step], self.table.conversion[self.step]
        self.latents, kept = linear_update(
            self.latents, prediction, self.history, coefficients.tolist(), conversion.tolist(), self.guidance
        )
        self.history = [kept, *self.history][: self.table.history]
        self.step += 1


@torch.no_grad()
def begin(
    model: Denoiser,
    noise: Tensor,  # (1, Z, h, w), standard normal
    condition: Tensor,  # (1, L, C)
    unconditional: Tensor | None,  # (1, L, C); not needed with guidance 1
    table: SamplerTable,
    guidance: float,
    guided: int | None = None,
    reuse: int = 1,
    residuals: Sequence[Tensor] = (),  # tensors (1, N, ...), the same in both halves of guidance
) -> DenoisingState:
    """Return the state of an image before its first step.

    The first `guided` steps are guided, None means all: at low noise guidance is hardly needed (Kynkaanniemi et al.,
    arXiv 2404.07724). With guidance 1 only the conditional row is computed.
    """
    batch = guidance_batch(condition, unconditional, guidance)
    guided = 0 if batch is condition else len(table) if guided is None else guided
    embeddings, inputs = model.constants(table.timesteps.to(noise.device, torch.float32), batch)
    inputs = [*inputs, *(part.expand(len(batch), *part.shape[1:]) for part in residuals)]
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
    """Return the inputs of cross-attention (R, ...) of a call, those of fewer images padded with zeros; kept where
    these images shared the last call."""
    first, *others = states
    members = [(weakref.ref(state), state.rows) for state in states]
    if first.joined is None or first.joined[0] != members:
        parts = zip(*([part[-state.rows :] for part in state.cross_attention] for state in states), strict=True)
        first.joined = members, [_padded_cat(part) if len(part) > 1 else part[0] for part in parts]
    for state in others:
        state.joined = None
    return first.joined[1]


def _padded_cat(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors (r, N, ...) to (R, N, ...), with zeros before the first of fewer than N."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (*(0, 0) * (part.ndim - 2), longest - part.shape[1], 0)) for part in parts])


def guidance_batch(condition: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
    """Return the condition of both guidance branches: (B, L, C) and (1 or B, L, C) to (2B, L, C), the unconditional
    rows first; (B, L, C) with guidance 1."""
    if guidance == 1.0 or unconditional is None:
        return condition
    return torch.cat([unconditional.expand_as(condition).to(condition), condition])


def linear_update(
    latents: Tensor,  # (B, Z, h, w)
    prediction: Tensor,  # (B or 2B, Z, h, w), the unconditional rows first
    history: Sequence[Tensor],  # at most M tensors (B, Z, h, w), newest first
    coefficients: Sequence[float],  # (2 + M,), of latents, prediction and history
    conversion: Sequence[float],  # (2,), of latents and prediction
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """Apply classifier-free guidance (Ho and Salimans, arXiv 2207.12598) and one step of a sampler's table; return the
    next latents and the prediction to keep, both (B, Z, h, w)."""
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


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Turn autocast off."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def in_parts(losses: Callable[[slice, Tensor], Tensor], condition: Tensor, size: int) -> Tensor:  # (B,)
    """Return the losses (b,) of parts of B images, at most `size` at a time, of which each depends on one row of a
    condition (B, L, C) and on nothing else that trains.

    The gradient of a part is computed with it, which frees its activations: the largest pass of the LLM and the mapper
    then needs no more memory for the denoiser than a small one, and nothing is computed twice.
    """
    if len(condition) <= size or not condition.requires_grad:
        return torch.cat([losses(part, condition[part]) for part in _parts(len(condition), size)])
    return _InParts.apply(condition, losses, size)


def _parts(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]


class _InParts(torch.autograd.Function):
    SCALE = 2.0**14  # of gradients while they are in the denoiser: means over a latent image are too small for float16

    @staticmethod
    def forward(ctx: Any, condition: Tensor, losses: Callable[[slice, Tensor], Tensor], size: int) -> Tensor:
        values, gradients = [], []
        for part in _parts(len(condition), size):
            with torch.enable_grad():
                rows = condition[part].detach().requires_grad_()
                value = losses(part, rows)
                with without_autocast(rows.device):  # as in a backward pass
                    gradients += torch.autograd.grad(_InParts.SCALE * value.sum(), rows)
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # (B,)
        (rows,) = ctx.saved_tensors
        return (rows * (gradient / _InParts.SCALE)[:, None, None]).to(rows.dtype), None, None
