"""Sampler tables against the diffusers schedulers of the same names."""

import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from mgp5 import Mgp5Error
from mgp5.generators.denoising import PlainDenoiser, advance, begin, linear_update
from mgp5.generators.flow import FlowSchedule
from mgp5.generators.sampler import SAMPLERS, sampler_table
from mgp5.generators.schedule import NoiseSchedule

# NumPy 2 about numpy.array(tensor), inside diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

REFERENCE = {
    "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler,
    "pndm": PNDMScheduler,
}  # fmt: skip
# As in scheduler_config.json of Stable Diffusion 2.1-base; 2.1 differs in the class and in prediction_type.
SD21 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.10.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None,
}  # fmt: skip
CONDITION = torch.linspace(-1, 1, 12).view(2, 3, 2)
UNCONDITIONAL = torch.full((1, 3, 2), 0.3)
NOISE = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))


class Double:
    """Replace float32 of a module by float64; diffusers' schedulers then compute in float64."""

    def __init__(self, module: object) -> None:
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


@pytest.fixture
def diffusers_in_float64(monkeypatch):
    for scheduler in (*REFERENCE.values(), FlowMatchEulerDiscreteScheduler):
        module = sys.modules[scheduler.__module__]
        monkeypatch.setattr(module, "torch", Double(torch))
        monkeypatch.setattr(module, "np", Double(np))


def toy(latents, timestep, condition):
    """Return the prediction of a smooth model that is linear neither in the latents nor in time."""
    bias = condition.to(latents).mean((1, 2)).view(-1, 1, 1, 1)
    return torch.tanh(0.6 * latents + 0.3 * latents.roll(1, -1) + torch.sin(timestep / 200) + bias)


def guide(latents, timestep, guidance=3.0):
    """Return the guided prediction as StableDiffusionPipeline computes it."""
    condition = torch.cat([UNCONDITIONAL.expand_as(CONDITION), CONDITION])
    unconditional, conditional = toy(torch.cat([latents] * 2), timestep, condition).chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def reference(name, config, steps, dtype):
    """Return all latents and the timesteps of a diffusers scheduler, those of Euler made variance-preserving."""
    scheduler = REFERENCE[name].from_config(config, clip_sample=False, skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas if name == "euler" else torch.zeros(2 * steps)
    return follow(scheduler, scheduler.timesteps, NOISE.to(dtype) * scheduler.init_noise_sigma, sigmas)


def flow_reference(name, shift, steps, dtype):
    """Return all latents and the timesteps of a diffusers scheduler for flow matching, whose model gets fractions."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "dpm++":
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        scheduler = DPMSolverMultistepScheduler(**flow)
    scheduler.set_timesteps(steps)
    return follow(scheduler, 1000 * scheduler.sigmas.to(dtype), NOISE.to(dtype), torch.zeros(2 * steps))


def follow(scheduler, times, latents, sigmas):
    all_latents, dtype = [], latents.dtype
    for i, t in enumerate(scheduler.timesteps):
        scaled = latents if hasattr(scheduler, "scale_noise") else scheduler.scale_model_input(latents, t)
        latents = scheduler.step(guide(scaled, times[i].to(dtype)), t, latents, return_dict=False)[0]
        all_latents.append(latents / (1 + sigmas[i + 1] ** 2) ** 0.5)
    assert latents.dtype == dtype
    return torch.stack(all_latents), scheduler.timesteps


def run_table(table):
    """Return all latents of a table, as `denoise` computes them, in float64."""
    latents, history, all_latents = NOISE.double() * table.noise_scale, [], []
    for t, row, conversion in zip(table.timesteps, table.coefficients.tolist(), table.conversion.tolist(), strict=True):
        latents, kept = linear_update(latents, guide(latents, t), history, row, conversion, 1.0)
        history = [kept, *history][: table.history]
        all_latents.append(latents)
    return torch.stack(all_latents)


def denoise(predict, unconditional, table, guidance):
    """Return the latents of both images after each step of the package's loop, in float32."""
    parts = zip(NOISE.split(1), CONDITION.split(1), strict=True)
    states = [begin(PlainDenoiser(predict), *part, unconditional, table, guidance) for part in parts]
    steps = []
    while not states[0].done:
        advance(states)
        steps.append(torch.cat([state.latents for state in states]))
    return torch.stack(steps)


def difference(actual, expected):
    """Return the largest difference of a step, relative to the largest value of that step, over all steps."""
    return ((actual - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)).max().item()


@pytest.mark.parametrize("steps", [1, 2, 5, 14, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NoiseSchedule.samplers)
def test_stable_diffusion_2_1_in_float64(name, prediction, steps, diffusers_in_float64):
    config = SD21 | {"prediction_type": prediction}
    table = sampler_table(name, NoiseSchedule.from_config(config), steps)
    expected, timesteps = reference(name, config, steps, torch.float64)
    assert table.timesteps.tolist() == timesteps.tolist()
    assert len(table) == steps + (name == "pndm" and steps > 1)
    assert difference(run_table(table), expected) < 1e-13


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", NoiseSchedule.samplers)
def test_other_schedules_in_float64(name, betas, spacing, diffusers_in_float64):
    for prediction in ("epsilon", "v_prediction") if name == "pndm" else ("epsilon", "v_prediction", "sample"):
        config = {"beta_schedule": betas, "timestep_spacing": spacing, "prediction_type": prediction}
        table = sampler_table(name, NoiseSchedule.from_config(config), 12)
        expected, timesteps = reference(name, config, 12, torch.float64)
        assert table.timesteps.tolist() == timesteps.tolist()
        assert difference(run_table(table), expected) < 1e-9


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler"])
def test_zero_terminal_snr_in_float64(name, diffusers_in_float64):
    config = SD21 | {
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
    }  # fmt: skip
    table = sampler_table(name, NoiseSchedule.from_config(config), 20)
    expected, _ = reference(name, config, 20, torch.float64)
    assert difference(run_table(table), expected) < 1e-13


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NoiseSchedule.samplers)
def test_denoise_in_float32(name, prediction, steps):
    config = SD21 | {"prediction_type": prediction}
    table = sampler_table(name, NoiseSchedule.from_config(config), steps)
    actual = denoise(toy, UNCONDITIONAL, table, 3.0)
    expected, _ = reference(name, config, steps, torch.float32)
    assert actual.dtype == torch.float32
    assert difference(actual, expected) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FlowSchedule.samplers)
def test_flow_matching_in_float64(name, shift, diffusers_in_float64):
    for steps in (1, 2, 5, 14, 20, 50):
        table = sampler_table(name, FlowSchedule(shift=shift), steps)
        expected, timesteps = flow_reference(name, shift, steps, torch.float64)
        actual = table.timesteps.floor() if name == "dpm++" else table.timesteps
        torch.testing.assert_close(actual, timesteps.double(), rtol=1e-12, atol=0)
        assert difference(run_table(table), expected) < 1e-11


@pytest.mark.parametrize("name", FlowSchedule.samplers)
def test_flow_matching_with_denoise_in_float32(name):
    for steps in (1, 2, 3, 7, 20, 50):
        table = sampler_table(name, FlowSchedule.from_config({"shift": 3.0}), steps)
        actual = denoise(toy, UNCONDITIONAL, table, 3.0)
        expected, _ = flow_reference(name, 3.0, steps, torch.float32)
        assert difference(actual, expected) < 1e-5


def test_config_of_a_scheduler_is_read_as_from_config_reads_it():
    """Defaults that another scheduler class filled in do not count as settings of the model."""
    schedule = NoiseSchedule.from_config(PNDMScheduler.from_config(SD21).config)
    assert schedule.timestep_spacing is None
    assert schedule == NoiseSchedule.from_config(SD21)
    assert sampler_table("ddim", schedule, 7) is sampler_table("ddim", NoiseSchedule.from_config(SD21), 7)  # cached


def test_guidance_one_runs_the_conditional_row_only():
    batches = []

    def predict(latents, timestep, condition):
        batches.append((len(latents), len(condition)))
        return toy(latents, timestep, condition)

    table = sampler_table("dpm++", NoiseSchedule.from_config(SD21), 4)
    plain = denoise(predict, UNCONDITIONAL, table, 1.0)[-1]
    assert batches == [(2, 2)] * 4
    guided = denoise(predict, UNCONDITIONAL, table, 1.0 + 1e-6)[-1]
    assert batches[4:] == [(4, 4)] * 4
    torch.testing.assert_close(plain, guided, rtol=1e-4, atol=1e-4)


def test_denoise_keeps_float32_of_a_bfloat16_model():
    table = sampler_table("pndm", NoiseSchedule.from_config(SD21), 4)
    steps = denoise(lambda x, t, c: toy(x, t, c).bfloat16(), None, table, 1.0)
    assert len(steps) == 5 and steps.dtype == torch.float32


def test_training_targets_agree_with_diffusers():
    timesteps = torch.tensor([3, 700])
    clean = NOISE.flip(0)
    for prediction in ("epsilon", "v_prediction"):
        scheduler = DDIMScheduler.from_config(SD21, prediction_type=prediction)
        schedule = NoiseSchedule.from_config(scheduler.config)
        noisy = scheduler.add_noise(clean, NOISE, timesteps)
        torch.testing.assert_close(schedule.add_noise(clean, NOISE, timesteps), noisy)
        velocity = scheduler.get_velocity(clean, NOISE, timesteps)
        target = NOISE if prediction == "epsilon" else velocity
        torch.testing.assert_close(schedule.target(clean, NOISE, timesteps), target)


def test_flow_targets_and_times():
    """Noisy latents are those of diffusers' scheduler; timesteps are logit-normal before the shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = FlowSchedule.from_config(scheduler.config)
    timesteps = scheduler.timesteps[[3, 700]]
    noisy = schedule.add_noise(NOISE.flip(0), NOISE, timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(NOISE.flip(0), timesteps, NOISE))
    clean = noisy - (timesteps / 1000).view(2, 1, 1, 1) * schedule.target(NOISE.flip(0), NOISE, timesteps)
    torch.testing.assert_close(clean, NOISE.flip(0))
    times = schedule.draw_timesteps(20000, torch.Generator().manual_seed(0)) / 1000
    normal = (times / (3 - 2 * times)).logit()
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02


def test_errors_say_what_was_expected():
    schedule = NoiseSchedule.from_config(SD21)
    with pytest.raises(Mgp5Error, match="no sampler 'heun' for a model with epsilon, expected one of dpm"):
        sampler_table("heun", schedule, 5)
    for name in SAMPLERS.keys() - set(FlowSchedule.samplers):
        with pytest.raises(Mgp5Error, match=f"no sampler '{name}' for a model with flow_prediction"):
            sampler_table(name, FlowSchedule(), 5)
    with pytest.raises(Mgp5Error, match="0 steps, expected 1 to 1000"):
        sampler_table("ddim", schedule, 0)
    with pytest.raises(Mgp5Error, match="leaves the range"):
        sampler_table("ddim", schedule, 1000)  # leading with an offset of 1 asks for timestep 1000
    with pytest.raises(Mgp5Error, match="finite"):
        zero = NoiseSchedule(rescale_betas_zero_snr=True, timestep_spacing="trailing")
        sampler_table("ddim", zero, 5)
    with pytest.raises(Mgp5Error, match=r"use_karras_sigmas is True.*FlowMatchEulerDiscreteScheduler"):
        NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True})
    with pytest.raises(Mgp5Error, match=r"_class_name is 'DDIM.*use_dynamic_shifting is True, expected False"):
        FlowSchedule.from_config({"_class_name": "DDIMScheduler", "use_dynamic_shifting": True})
    with pytest.raises(Mgp5Error, match=r"shift 0.*expected at least 2 and above 0"):
        FlowSchedule(shift=0)
    with pytest.raises(Mgp5Error, match=r"beta_schedule is 'sigmoid'.*betas run from 1"):
        NoiseSchedule(beta_schedule="sigmoid", beta_start=1)
