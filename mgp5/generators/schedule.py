"""The noise schedule that a diffusion model was trained with.

Letters: B batch, n steps; at timestep t in [0, num_train_timesteps) noisy latents are
`alpha_t * latents + sigma_t * noise` with alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import Mgp5Error

# Schedulers of diffusers with the same configuration fields; the schedule is read from these, the sampler is not.
UNDERSTOOD = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDPM",
        "PNDM",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "LMSDiscrete",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "UniPCMultistep",
    )
)
# Settings that change the samplers or the schedule, with the values that are implemented here.
ACCEPTED = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": (None, "leading", "trailing", "linspace"),
    "use_karras_sigmas": (None, False),
    "use_exponential_sigmas": (None, False),
    "use_beta_sigmas": (None, False),
    "use_lu_lambdas": (None, False),
    "use_flow_sigmas": (None, False),
    "thresholding": (None, False),
    "timestep_type": (None, "discrete"),
    "interpolation_type": (None, "linear"),
    "final_sigmas_type": (None, "zero"),
}
Level = tuple[float, float]  # (alpha, sigma)


class Route(NamedTuple):
    """The timesteps and noise levels of a sampler."""

    timesteps: np.ndarray  # (n,), at which the model is called
    levels: list[Level]  # n + 1, of the latents before each step and after the last, which is (1, 0)
    noise_scale: float = 1.0  # standard deviation of the initial noise


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """A variance-preserving noise schedule; the fields are those of diffusers' scheduler configurations.

    `timestep_spacing` and `set_alpha_to_one` may be None: then each sampler uses the default of the diffusers scheduler
    of its name, as `Scheduler.from_config` does. Raises Mgp5Error, which names all values that are not supported.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None

    samplers: ClassVar[tuple[str, ...]] = ("dpm++", "ddim", "euler", "pndm")

    def __post_init__(self) -> None:
        values = vars(self)
        problems = disagreements({name: values[name] for name in ACCEPTED if name in values}, ACCEPTED)
        if not 0 < self.beta_start <= self.beta_end < 1:
            problems.append(f"betas run from {self.beta_start} to {self.beta_end}, expected 0 < start <= end < 1")
        if problems:
            raise Mgp5Error("scheduler: " + "; ".join(problems), "take a Stable Diffusion 1.x or 2.x scheduler config")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Build the schedule from the contents of `scheduler_config.json`, or the `config` of a diffusers scheduler.

        As in StableDiffusionPipeline, `steps_offset` is 1 whatever an old file says, and `clip_sample` is ignored, as
        latents are not in [-1, 1]. Raises
        Mgp5Error for a scheduler of another kind (such as flow matching) or settings that are not implemented here.
        """
        settings = without_defaults(config)
        problems = disagreements(settings, ACCEPTED)
        if settings.get("_class_name", "DDIMScheduler") not in UNDERSTOOD:
            expected = ", ".join(sorted(UNDERSTOOD))
            problems.append(f"_class_name is {settings['_class_name']}, expected one of {expected}")
        if problems:
            raise Mgp5Error("scheduler config: " + "; ".join(problems), "take a Stable Diffusion 1.x or 2.x config")
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in settings.items() if name in known} | {"steps_offset": 1}
        if values.get("trained_betas") is not None:
            values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
        return cls(**values)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:  # (num_train_timesteps,)
        """Return alpha_t^2 in float64, falling with t; the last is exactly 0 with `rescale_betas_zero_snr`."""
        alpha_bar = np.cumprod(1 - self._betas())
        if self.rescale_betas_zero_snr:  # Lin et al., arXiv 2305.08891, algorithm 1
            root = np.sqrt(alpha_bar)
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return alpha_bar

    def _betas(self) -> np.ndarray:  # (num_train_timesteps,)
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, dtype=np.float64)
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, self.num_train_timesteps)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        # Cosine (Nichol and Dhariwal, arXiv 2102.09672), capped at 0.999.
        steps = np.arange(self.num_train_timesteps + 1) / self.num_train_timesteps
        level = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - level[1:] / level[:-1], 0.999)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:  # (B,)
        """Draw `count` timesteps to train on, uniform in [0, num_train_timesteps), int64 on the CPU."""
        return torch.randint(self.num_train_timesteps, (count,), generator=generator)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # (B, ...)
        """Return noisy latents (B, Z, h, w) at timesteps (B,) int64; on the CPU they need no wait for the device."""
        alpha, sigma = self._levels(timesteps, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # (B, ...)
        """Return the training target (B, Z, h, w): the noise, the velocity or the latents, by `prediction_type`.
        The velocity is alpha * noise - sigma * latents (Salimans and Ho, arXiv 2202.00512)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        alpha, sigma = self._levels(timesteps, latents)
        return alpha * noise - sigma * latents

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:  # (B,) -> (B,)
        """Return the min-SNR weights of the loss in float32 (Hang et al., arXiv 2303.09556, section 3.4).
        They are min(SNR, gamma) for a loss on the clean latents, converted to the model's `prediction_type`."""
        alpha_bar = torch.from_numpy(self.alphas_cumprod)[timesteps.cpu()]
        snr = (alpha_bar / (1 - alpha_bar)).to(timesteps.device, torch.float32)
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1)
        return snr.clamp(max=gamma) / (snr + 1 if self.prediction_type == "v_prediction" else 1)

    def euler_route(self, steps: int) -> Route:
        """Return the route of Euler's method in a number of steps; its timesteps are not rounded."""
        timesteps = self.spaced_timesteps(steps, default="linspace", rounded=False)
        levels = [self._ratio_level(t) for t in timesteps] + [(1.0, 0.0)]
        leading = (self.timestep_spacing or "linspace") == "leading"
        return Route(timesteps, levels, noise_scale=1.0 if leading else levels[0][1])

    def dpm_route(self, steps: int) -> Route:
        """Return the route of DPM-Solver++: the timesteps of `steps` + 1 steps without the last."""
        spacing, total = self.timestep_spacing or "linspace", self.num_train_timesteps
        if spacing == "linspace":
            timesteps = np.linspace(0, total - 1, steps + 1).round()[:0:-1].astype(np.int64)
        elif spacing == "leading":
            timesteps = np.arange(1, steps + 1)[::-1] * (total // (steps + 1)) + self.steps_offset
        else:
            timesteps = self.spaced_timesteps(steps, default="trailing")
        return Route(timesteps, [self._ratio_level(t) for t in timesteps] + [(1.0, 0.0)])

    def spaced_timesteps(self, steps: int, default: str, rounded: bool = True) -> np.ndarray:  # (steps,)
        """Return falling timesteps of the schedule's spacing, or else of `default` (Lin et al., arXiv 2305.08891, table
        2); those of "linspace" are integers if `rounded`."""
        spacing, total = self.timestep_spacing or default, self.num_train_timesteps
        if spacing == "linspace":
            timesteps = np.linspace(0, total - 1, steps)[::-1]
            return timesteps.round().astype(np.int64) if rounded else timesteps
        if spacing == "leading":
            return np.arange(steps)[::-1] * (total // steps) + self.steps_offset
        return (total - np.arange(steps) * (total / steps)).round().astype(np.int64) - 1

    def _ratio_level(self, t: float) -> Level:
        """Return (alpha, sigma) at a fractional timestep, by interpolation of the ratio sigma / alpha."""
        alpha_bar = self.alphas_cumprod.copy()
        if self.rescale_betas_zero_snr:
            alpha_bar[-1] = 2.0**-24  # as diffusers: the ratio must stay finite
        if t > len(alpha_bar) - 1:
            raise IndexError(t)
        ratio = np.interp(t, np.arange(len(alpha_bar)), np.sqrt((1 - alpha_bar) / alpha_bar))
        return 1 / np.sqrt(1 + ratio**2), ratio / np.sqrt(1 + ratio**2)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:  # two of (B, 1, ...)
        alpha_bar = torch.from_numpy(self.alphas_cumprod)[timesteps.cpu()]
        alpha_bar = alpha_bar.view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().to(like.device, like.dtype), (1 - alpha_bar).sqrt().to(like.device, like.dtype)


def without_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler configuration without the values that diffusers lists as filled in by default."""
    filled_in = config.get("_use_default_values", [])
    return {name: value for name, value in config.items() if name not in filled_in}


def disagreements(values: Mapping[str, Any], accepted: Mapping[str, tuple]) -> list[str]:
    """Return a line of text for each setting whose value is not accepted."""
    return [
        f"{name} is {values[name]!r}, expected {' or '.join(str(choice) for choice in choices if choice is not None)}"
        for name, choices in accepted.items()
        if name in values and values[name] not in choices
    ]
