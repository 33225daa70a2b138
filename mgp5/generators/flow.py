"""The noise schedule of flow matching, which goes from latents to noise on a straight line.

Letters: B batch, n steps; at time t in [0, 1] noisy latents are `(1 - t) * latents + t * noise`, so alpha is 1 - t and
sigma is t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import Mgp5Error
from .schedule import Route, disagreements, without_defaults

# Settings of FlowMatchEulerDiscreteScheduler that change the timesteps, with the values that are implemented here.
ACCEPTED = {
    "_class_name": (None, "FlowMatchEulerDiscreteScheduler"),
    "shift_terminal": (None, 0),
    **dict.fromkeys(
        ("use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
        (None, False),
    ),
    "stochastic_sampling": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """The schedule of rectified flow (Esser et al., arXiv 2403.03206), whose model predicts noise - latents.

    The time shift t -> s t / (1 + (s - 1) t) puts larger images at more noise (section 5.3.2). Raises Mgp5Error for a
    value out of range.
    """

    num_train_timesteps: int = 1000  # the model gets `t * num_train_timesteps`, not rounded
    shift: float = 1.0  # s; 3 for Stable Diffusion 3 at 1024 pixels

    prediction_type: ClassVar[str] = "flow_prediction"
    samplers: ClassVar[tuple[str, ...]] = ("dpm++", "euler", "flow-euler")

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 2 or self.shift <= 0:
            values = f"num_train_timesteps is {self.num_train_timesteps} and shift {self.shift}"
            raise Mgp5Error(f"scheduler: {values}, expected at least 2 and above 0", "take a Stable Diffusion 3 config")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowSchedule:
        """Build the schedule from the contents of `scheduler_config.json`, or the `config` of a diffusers scheduler.
        Raises Mgp5Error if it is no FlowMatchEulerDiscreteScheduler, or has settings that are not implemented here."""
        settings = without_defaults(config)
        if problems := disagreements(settings, ACCEPTED):
            raise Mgp5Error("scheduler config: " + "; ".join(problems), "take a Stable Diffusion 3 config")
        return cls(**{name: settings[name] for name in ("num_train_timesteps", "shift") if name in settings})

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:  # (B,)
        """Draw `count` timesteps to train on, float32 on the CPU, in [0, num_train_timesteps].

        Their density is logit-normal (0, 1), the best of section 3.1. The shift is applied as in sampling (section
        5.3.2), so that the frozen model gets the noise levels that it was trained on.
        """
        return self._shifted(torch.randn(count, generator=generator).sigmoid()) * self.num_train_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # (B, ...)
        """Return noisy latents (B, Z, h, w) at timesteps (B,) in [0, num_train_timesteps], fractions allowed."""
        time = (timesteps / self.num_train_timesteps).view(-1, *[1] * (latents.ndim - 1)).to(latents)
        return (1 - time) * latents + time * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # (B, ...)
        """Return the training target (B, Z, h, w), the velocity noise - latents; it is the same at all timesteps."""
        return noise - latents

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Raise Mgp5Error: the density of `draw_timesteps` is the weighting of flow matching."""
        raise Mgp5Error(
            f"min_snr is {gamma}, but this diffusion model is trained by flow matching, which has its own weighting",
            "leave min_snr out",
            usage=True,
        )

    def euler_route(self, steps: int) -> Route:
        """Return the route of Euler's method, which starts at t = 1; as in FlowMatchEulerDiscreteScheduler the smallest
        training time is shifted twice."""
        smallest = self._shifted(1 / self.num_train_timesteps)
        return self._route(np.linspace(1, smallest, steps))

    def dpm_route(self, steps: int) -> Route:
        """Return the route of DPM-Solver++: the levels of DPMSolverMultistepScheduler with `use_flow_sigmas`.
        It starts below t = 1, where the SNR is zero. Timesteps are not rounded: the model was trained on fractions."""
        return self._route(1 - np.linspace(1 / self.num_train_timesteps, 1, steps + 1)[:-1])

    def _route(self, times: np.ndarray) -> Route:
        times = self._shifted(times)
        return Route(times * self.num_train_timesteps, [(1 - t, t) for t in times] + [(1.0, 0.0)])

    def _shifted(self, time: Any) -> Any:
        return self.shift * time / (1 + (self.shift - 1) * time)
