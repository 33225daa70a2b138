"""The schedule of flow matching: straight lines from the latents to noise (B batch, n steps).

Letters: at time t in [0, 1], noisy latents are `(1 - t) * latents + t * noise`, so alpha = 1 - t and sigma = t.
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

# Settings of FlowMatchEulerDiscreteScheduler that change the times: the values we do the right thing for.
ACCEPTED = {
    "_class_name": (None, "FlowMatchEulerDiscreteScheduler"),
    "use_dynamic_shifting": (None, False),
    "shift_terminal": (None, 0),
    "invert_sigmas": (None, False),
    "use_karras_sigmas": (None, False),
    "use_exponential_sigmas": (None, False),
    "use_beta_sigmas": (None, False),
    "stochastic_sampling": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """Rectified flow (Esser et al., arXiv 2403.03206): the model predicts the velocity, noise less latents.

    Args:
        num_train_timesteps: what the model is told at t = 1; in between t * num_train_timesteps, not rounded.
        shift: s of t -> s t / (1 + (s - 1) t), which goes to more noise for larger pictures (section 5.3.2);
            3 for Stable Diffusion 3 at 1024 pixels.

    Raises:
        Mgp5Error: a value that cannot be.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0

    prediction_type: ClassVar[str] = "flow_prediction"
    samplers: ClassVar[tuple[str, ...]] = ("dpm++", "euler", "flow-euler")

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 2 or self.shift <= 0:
            found = f"num_train_timesteps is {self.num_train_timesteps} and shift {self.shift}"
            raise Mgp5Error(f"scheduler: {found}, expected at least 2 and above 0", "take a Stable Diffusion 3 config")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowSchedule:
        """The schedule in the `scheduler_config.json` of a FlowMatchEulerDiscreteScheduler, or in its `config`.

        Raises:
            Mgp5Error: the config is of another family or has settings we would get wrong.
        """
        given = without_defaults(config)
        if problems := disagreements(given, ACCEPTED):
            raise Mgp5Error("scheduler config: " + "; ".join(problems), "take a Stable Diffusion 3 config")
        return cls(**{name: given[name] for name in ("num_train_timesteps", "shift") if name in given})

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:  # (B,)
        """Timesteps to train on, float32 on the CPU: logit-normal (0, 1), section 3.1's best density, then shifted.

        The shift is that of sampling, as in section 5.3.2, so that the frozen model meets the times it was trained on.
        """
        return self._shifted(torch.randn(count, generator=generator).sigmoid()) * self.num_train_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # (B, ...)
        """Noisy latents at `timesteps`, fractions allowed."""
        time = (timesteps / self.num_train_timesteps).view(-1, *[1] * (latents.ndim - 1)).to(latents)
        return (1 - time) * latents + time * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # (B, ...)
        """What the model should predict, the same at all times: the way from the latents to the noise."""
        return noise - latents

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """There is none: the density of `draw_timesteps` is the weighting. Always raises Mgp5Error."""
        raise Mgp5Error(
            f"min_snr is {gamma}, but this diffusion model is trained by flow matching, which has its own weighting",
            "leave min_snr out",
            usage=True,
        )

    def euler_route(self, steps: int) -> Route:
        """From t = 1; the smallest training time is shifted twice, as FlowMatchEulerDiscreteScheduler does."""
        smallest = self._shifted(1 / self.num_train_timesteps)
        return self._route(np.linspace(1, smallest, steps))

    def dpm_route(self, steps: int) -> Route:
        """The levels of DPMSolverMultistepScheduler with `use_flow_sigmas`: not from t = 1, where no SNR is left.

        Its timesteps are rounded down; ours are not, as the model was trained on fractions.
        """
        return self._route(1 - np.linspace(1 / self.num_train_timesteps, 1, steps + 1)[:-1])

    def _route(self, times: np.ndarray) -> Route:
        times = self._shifted(times)
        return Route(times * self.num_train_timesteps, [(1 - t, t) for t in times] + [(1.0, 0.0)])

    def _shifted(self, time: Any) -> Any:
        return self.shift * time / (1 + (self.shift - 1) * time)
