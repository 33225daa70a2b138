"""Engines against diffusers' own UNet in float32: one call, ten guided steps; a VAE that overflows in float16."""

from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_engines import smallest
from tiny import LENGTH, SIZE, WIDTH, tiny_vae
from torch import Tensor

import mgp5
from mgp5 import engines
from mgp5.generators import load_generator
from mgp5.generators.denoising import PlainDenoiser, advance, begin
from mgp5.generators.sampler import SamplerTable
from mgp5.generators.schedule import NoiseSchedule
from mgp5.generators.stable_diffusion import StableDiffusion

DEMO = Path(mgp5.__file__).parent / "demo" / "diffusion"
GUIDANCE = 3.0
# A step whose result is the guided prediction itself.
PROBE = SamplerTable(
    timesteps=torch.tensor([500.0]), coefficients=torch.tensor([[0.0, 1.0]]), conversion=torch.zeros(1, 2)
)


def demo() -> StableDiffusion:
    return StableDiffusion.load(str(DEMO))


def narrow_sd21() -> StableDiffusion:
    """Stable Diffusion 2.1's UNet with a tenth of its channels and random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIZE, block_out_channels=(32, 64, 128, 128), cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4, 8, 8), use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusion(unet, tiny_vae(), NoiseSchedule.from_config({"prediction_type": "v_prediction"}))


@torch.inference_mode()
def run(diffusion: StableDiffusion) -> dict[str, Tensor]:
    """A guided prediction, and what ten DDIM steps from there end with."""
    seeded = torch.Generator().manual_seed(0)
    condition = torch.randn(2, LENGTH, diffusion.unet.config.cross_attention_dim, generator=seeded)
    noise = torch.randn(1, *diffusion.latent_shape(diffusion.native_size, diffusion.native_size), generator=seeded)
    model = diffusion.engine.model if diffusion.engine else PlainDenoiser(diffusion.predict)
    probe = begin(model, noise, condition[1:], condition[:1], PROBE, GUIDANCE)
    advance([probe])
    settings = {"steps": 10, "guidance": GUIDANCE, "sampler": "ddim", "generators": [seeded]}
    *_, latents = diffusion.draw(condition[1:], condition[:1], **settings)
    return {"prediction": probe.latents, "latents": latents, "image": diffusion.decode(latents)}


@cache
def reference(make) -> dict[str, Tensor]:
    return run(make())


def measure(make, backend: str, dtype: torch.dtype) -> dict[str, float]:
    """PSNR of each result in dB, of the range that the float32 reference has."""
    diffusion, values = make().to(dtype), {}
    assert engines.apply(diffusion, backend).name == backend
    found = run(diffusion)
    for name, true in reference(make).items():
        error = (found[name] - true).double().square().mean()
        values[name] = round(float(10 * torch.log10((true.max() - true.min()).square() / error)), 1)
    return values


SLOW = pytest.mark.slow  # most CPUs emulate bf16


@pytest.mark.parametrize(
    ("make", "backend", "dtype"),
    [
        (demo, "eager", torch.float32),
        (narrow_sd21, "eager", torch.float32),
        pytest.param(narrow_sd21, "eager", torch.bfloat16, marks=SLOW),
        pytest.param(demo, "eager", torch.bfloat16, marks=SLOW),
        pytest.param(demo, "compile", torch.float32, marks=SLOW),
        pytest.param(demo, "compile", torch.bfloat16, marks=SLOW),
        pytest.param(smallest, "compile", torch.float32, marks=SLOW),
        pytest.param(smallest, "compile", torch.bfloat16, marks=SLOW),
    ],
)
def test_ten_steps(make, backend, dtype):
    values = measure(make, backend, dtype)
    torch.compiler.reset()
    least = (40, 50, 45) if dtype == torch.bfloat16 else (120,) * 3
    assert all(value > limit for value, limit in zip(values.values(), least, strict=True)), values


def test_a_vae_that_overflows_in_half_precision_decodes_in_float32(generator_folder):
    model = load_generator(str(generator_folder("epsilon")))
    for parameter in model.vae.decoder.conv_in.parameters():
        parameter.mul_(3e4 / parameter.abs().max())
    latents = torch.ones(1, 4, 4, 4)
    expected = model.decode(latents)
    model.vae.half()
    assert not model.vae.decode(latents.half() / model.vae.config.scaling_factor).sample.isfinite().all()
    torch.testing.assert_close(model.decode(latents), expected, rtol=0, atol=0.02)
    assert model.vae.dtype == torch.float16
