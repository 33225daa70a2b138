"""The noise schedule a diffusion model was trained with (T training timesteps, B batch).

Letters: at timestep t, noisy latents are `alpha_t * latents + sigma_t * noise` with alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import Mgp5Error

# Schedulers of diffusers that share one family of configs; ours takes the schedule from it, not the sampler.
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
# Settings that change the samplers or the schedule: the values we do the right thing for.
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


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Betas, what the model predicts, and which timesteps a sampler visits; the fields are those of diffusers' configs.

    `timestep_spacing` and `set_alpha_to_one` may be None: then each sampler takes the default that the diffusers
    scheduler of its name has, just as `Scheduler.from_config` does with a config that leaves them out.

    Raises:
        Mgp5Error: a value that is not understood; all of them are named.
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

    def __post_init__(self) -> None:
        values = vars(self)
        problems = _problems({name: values[name] for name in ACCEPTED if name in values})
        if not 0 < self.beta_start <= self.beta_end < 1:
            problems.append(f"betas run from {self.beta_start} to {self.beta_end}, expected 0 < start <= end < 1")
        if problems:
            raise Mgp5Error("scheduler: " + "; ".join(problems), "take a Stable Diffusion 1.x or 2.x scheduler config")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule in a diffusers `scheduler_config.json`, or in the `config` of a diffusers scheduler.

        `clip_sample` is not used: StableDiffusionPipeline turns it off too, as latents are not in [-1, 1].

        Raises:
            Mgp5Error: the config is of another family (flow matching, say) or has settings we would get wrong.
        """
        used_defaults = config.get("_use_default_values", [])
        given = {name: value for name, value in config.items() if name not in used_defaults}
        problems = _problems(given)
        if given.get("_class_name", "DDIMScheduler") not in UNDERSTOOD:
            problems.append(f"_class_name is {given['_class_name']}, expected one of {', '.join(sorted(UNDERSTOOD))}")
        if problems:
            raise Mgp5Error("scheduler config: " + "; ".join(problems), "take a Stable Diffusion 1.x or 2.x config")
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in given.items() if name in known}
        if values.get("trained_betas") is not None:
            values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
        return cls(**values)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:  # (T,)
        """alpha_t^2 in float64, falling; exactly 0 at the end with `rescale_betas_zero_snr`."""
        alpha_bar = np.cumprod(1 - self._betas())
        if self.rescale_betas_zero_snr:  # Lin et al., arXiv 2305.08891, algorithm 1
            root = np.sqrt(alpha_bar)
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return alpha_bar

    def _betas(self) -> np.ndarray:  # (T,)
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

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # (B, ...)
        """Noisy latents at `timesteps`, int64 in [0, T); timesteps on the CPU spare a wait for the device."""
        alpha, sigma = self._levels(timesteps, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # (B, ...)
        """What the model should predict: the noise, the velocity (Salimans and Ho, arXiv 2202.00512) or the latents."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        alpha, sigma = self._levels(timesteps, latents)
        return alpha * noise - sigma * latents

    def snr(self, timesteps: Tensor) -> Tensor:  # (B,) -> (B,)
        """Signal-to-noise ratio alpha^2 / sigma^2 in float32, on the device of `timesteps`."""
        alpha_bar = torch.from_numpy(self.alphas_cumprod)[timesteps.cpu()]
        return (alpha_bar / (1 - alpha_bar)).to(timesteps.device, torch.float32)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:  # two of (B, 1, ...)
        alpha_bar = torch.from_numpy(self.alphas_cumprod)[timesteps.cpu()]
        alpha_bar = alpha_bar.view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().to(like.device, like.dtype), (1 - alpha_bar).sqrt().to(like.device, like.dtype)


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Say which settings have a value outside ACCEPTED."""
    return [
        f"{name} is {values[name]!r}, expected {' or '.join(str(choice) for choice in choices if choice is not None)}"
        for name, choices in ACCEPTED.items()
        if name in values and values[name] not in choices
    ]
