"""Deterministic samplers as tables of coefficients, which denoising.py applies.

Letters: n model calls, M kept predictions, x latents (B, Z, h, w), p the guided prediction, alpha and sigma as in
schedule.py.

With a fixed schedule each sampler is linear. One step is
    x' = c0 x + c1 p + c2 m1 + ... + c(M+1) mM        (coefficients, one row per step)
    m  = d0 x + d1 p                                  (conversion; it is m1 in the next step)
where m is what a multistep method keeps of a step (the clean latents for DPM-Solver++, the prediction for PNDM).
All samplers, Euler too, work on the latents that the model gets: no sampler has to scale the model's input, and the
latents after any step can be previewed. Flow matching needs no samplers of its own: Euler and DPM-Solver++ depend only
on the levels (alpha, sigma) and on the prediction type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import Mgp5Error
from .flow import FlowSchedule
from .schedule import Level, NoiseSchedule

Schedule = NoiseSchedule | FlowSchedule


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerTable:
    """The coefficients of one sampler, schedule and number of steps, on the CPU in float64."""

    timesteps: Tensor  # (n,), at which the model is called; PNDM makes one call more than it has steps
    coefficients: Tensor  # (n, 2 + M), of latents, prediction and M kept predictions, newest first, in the next latents
    conversion: Tensor  # (n, 2), of latents and prediction in the prediction to keep
    noise_scale: float = 1.0  # standard deviation of the initial noise

    def __len__(self) -> int:
        """Return n, the number of model calls."""
        return len(self.timesteps)

    @property
    def history(self) -> int:
        """Return M, how many predictions are kept."""
        return self.coefficients.shape[1] - 2


def sampler_table(name: str, schedule: Schedule, steps: int) -> SamplerTable:
    """Return the table of a sampler for a schedule and 1 to `num_train_timesteps` steps; tables are cached.
    Raises Mgp5Error if the sampler is unknown, or cannot sample this schedule in so many steps."""
    if name not in schedule.samplers:
        names = ", ".join(schedule.samplers)
        error = f"no sampler {name!r} for a model with {schedule.prediction_type}, expected one of {names}"
        raise Mgp5Error(error, "choose one of these", usage=True)
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise Mgp5Error(f"{steps} steps, expected 1 to {schedule.num_train_timesteps}", "change --steps")
    return _cached_table(name, schedule, steps)


@lru_cache(maxsize=64)
def _cached_table(name: str, schedule: Schedule, steps: int) -> SamplerTable:
    hint = "take fewer steps or another sampler"
    try:
        # Impossible tables have inf or nan (a zero SNR with epsilon prediction, a timestep twice in DPM-Solver++).
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            table = SAMPLERS[name](schedule, steps)
    except IndexError as error:
        raise Mgp5Error(f"{name} with {steps} steps leaves the range of timesteps", hint) from error
    if not (table.coefficients.isfinite().all() and table.conversion.isfinite().all()):
        raise Mgp5Error(f"{name} with {steps} steps has no finite coefficients for this schedule", hint)
    return table


def ddim(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Return the table of deterministic DDIM (Song et al., arXiv 2010.02502, eq. 12 with eta 0)."""
    timesteps = schedule.spaced_timesteps(steps, default="leading")
    final = _final_alpha_bar(schedule, default=True)
    rows = []
    for t in timesteps:
        target = t - schedule.num_train_timesteps // steps
        rows.append(_first_order(schedule, _level(schedule, t), _level(schedule, target, final)))
    return _table(timesteps, rows)


def euler(schedule: Schedule, steps: int) -> SamplerTable:
    """Return the table of Euler's method (Karras et al., arXiv 2206.00364) for variance-preserving latents.

    With the latents divided by sqrt(1 + s^2), where s is the noise level sigma / alpha, it is a first-order step like
    DDIM's that ends without noise, and the latents are the model's scaled input. With flow matching the same step is
    x' = x + (sigma' - sigma) p (Esser et al., arXiv 2403.03206).
    """
    timesteps, levels, noise_scale = schedule.euler_route(steps)
    rows = [_first_order(schedule, source, target) for source, target in pairwise(levels)]
    return _table(timesteps, rows, noise_scale=noise_scale)


def dpm_solver(schedule: Schedule, steps: int) -> SamplerTable:
    """Return the table of DPM-Solver++ 2M with the midpoint rule (Lu et al., arXiv 2211.01095, algorithm 2).
    The first and the last step are of first order."""
    timesteps, levels, _ = schedule.dpm_route(steps)
    logs = [np.log(alpha) - np.log(sigma) for alpha, sigma in levels]
    rows, conversion = [], []
    for i, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(pairwise(levels)):
        clean, _ = _clean_and_noise(schedule, alpha, sigma)
        gain = next_alpha - next_sigma * alpha / sigma
        middle = 0 < i < steps - 1
        extra = 0.5 * (logs[i + 1] - logs[i]) / (logs[i] - logs[i - 1]) if middle else 0.0
        x, p = gain * (1 + extra) * clean + (next_sigma / sigma, 0.0)
        rows.append((x, p, -gain * extra))
        conversion.append(clean)
    return _table(timesteps, rows, conversion)


def pndm(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Return the table of PLMS, the variant of PNDM without Runge-Kutta steps (Liu et al., arXiv 2202.09778).

    The second call repeats the first step with a better slope, so there are steps + 1 calls. It starts from the first
    latents x0 again, which are the current latents minus the first update, so nothing more has to be kept.

    Raises:
        Mgp5Error: the model predicts the clean latents ("sample").
    """
    if schedule.prediction_type == "sample":
        raise Mgp5Error("pndm cannot sample a model with prediction_type 'sample'", "choose another sampler")
    stride = schedule.num_train_timesteps // steps
    final = _final_alpha_bar(schedule, default=False)
    timesteps = schedule.spaced_timesteps(steps, default="leading")
    moves = [(t, t - stride) for t in timesteps]
    if steps > 1:
        timesteps = np.insert(timesteps, 1, timesteps[1])
        moves.insert(1, (timesteps[1] + stride, timesteps[1]))
    # Adams-Bashforth weights in 24ths, newest first. The repeated call does not count later: its weight is zero.
    start = [[24], [12, 12], [36, 0, -12], [46, -32, 0, 10], [55, -59, 37, 0, -9]]
    rows = []
    for i, (t, target) in enumerate(moves):
        x, p = _first_order(schedule, _level(schedule, t), _level(schedule, target, final))
        weights = start[i] if i < 5 else [55, -59, 37, -9]
        row = np.zeros(6)
        row[0], row[1 : 1 + len(weights)] = x, p * np.array(weights) / 24
        if i == 1:  # x0 = (x1 - p' m1) / x', of the first row x', p'
            row[0], row[2] = x / rows[0][0], row[2] - x * rows[0][1] / rows[0][0]
        rows.append(row)
    return _table(timesteps, rows, conversion=[(0.0, 1.0)] * len(rows))


SAMPLERS: dict[str, Callable[[Any, int], SamplerTable]] = {
    "dpm++": dpm_solver,
    "ddim": ddim,
    "euler": euler,
    "pndm": pndm,
    "flow-euler": euler,  # the same as "euler", but only models with flow matching accept it
}


def _table(
    timesteps: np.ndarray,  # (n,)
    rows: Sequence[Sequence[float]],  # (n, 2 + M)
    conversion: Sequence[Sequence[float]] | None = None,  # (n, 2)
    noise_scale: float = 1.0,
) -> SamplerTable:
    conversion = np.zeros((len(rows), 2)) if conversion is None else conversion
    arrays = {"timesteps": timesteps, "coefficients": rows, "conversion": conversion}
    tensors = {key: torch.from_numpy(np.array(value, dtype=np.float64)) for key, value in arrays.items()}
    return SamplerTable(noise_scale=float(noise_scale), **tensors)


def _clean_and_noise(schedule: Schedule, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the clean latents and the noise that a prediction stands for, each as two coefficients, of x and p."""
    if schedule.prediction_type == "epsilon":
        return np.array([1, -sigma]) / alpha, np.array([0.0, 1.0])
    if schedule.prediction_type == "v_prediction":
        return np.array([alpha, -sigma]), np.array([sigma, alpha])
    if schedule.prediction_type == "flow_prediction":
        return np.array([1, -sigma]), np.array([1, alpha])
    return np.array([0.0, 1.0]), np.array([1, -alpha]) / sigma


def _first_order(schedule: Schedule, source: Level, target: Level) -> np.ndarray:  # (2,)
    """Return the coefficients of x and p of a first-order step from one level (alpha, sigma) to another."""
    clean, noise = _clean_and_noise(schedule, *source)
    return target[0] * clean + target[1] * noise


def _level(schedule: NoiseSchedule, t: int, final_alpha_bar: float = 1.0) -> Level:
    """Return (alpha, sigma) at an integer timestep; below 0 it is the final level."""
    alpha_bar = schedule.alphas_cumprod[t] if t >= 0 else final_alpha_bar
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def _final_alpha_bar(schedule: NoiseSchedule, default: bool) -> float:
    to_one = default if schedule.set_alpha_to_one is None else schedule.set_alpha_to_one
    return 1.0 if to_one else schedule.alphas_cumprod[0]
