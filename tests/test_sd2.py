"""Stable Diffusion 1 and 2 on tiny models of the real classes, against diffusers' pipeline and the paper's loss."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from tiny import LENGTH, SIZE, WIDTH, save_pipeline

from mgp5 import Mgp5Error
from mgp5.generators import load_generator
from mgp5.generators.stable_diffusion import StableDiffusion

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "pndm": PNDMScheduler,
}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request, tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def epsilon_folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model"), "epsilon")


@pytest.fixture(scope="module")
def model(folder):
    return StableDiffusion.load(str(folder))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conditions() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, LENGTH, WIDTH, generator=seeded(1)), torch.randn(1, LENGTH, WIDTH, generator=seeded(2))


def last(steps):
    *_, result = steps
    return result


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_same_images_as_the_pipeline(model, folder, sampler):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = SCHEDULERS[sampler].from_config(pipeline.scheduler.config, clip_sample=False)
    condition, unconditional = conditions()
    noise = torch.stack([torch.randn(4, SIZE, SIZE, generator=seeded(seed)) for seed in range(3)])
    expected = pipeline(
        prompt_embeds=condition,
        negative_prompt_embeds=unconditional.expand(3, -1, -1),
        latents=noise,
        num_inference_steps=6,
        guidance_scale=4.0,
        output_type="pt",
    ).images
    generators = [seeded(seed) for seed in range(3)]
    steps = model.draw(condition, unconditional, steps=6, guidance=4.0, sampler=sampler, generators=generators)
    actual = (model.decode(last(steps)) + 1) / 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


def test_a_batch_equals_single_runs(model):
    condition, unconditional = conditions()
    options = {"steps": 4, "guidance": 3.0, "height": 24, "width": 16}
    batch = last(model.draw(condition, unconditional, generators=[seeded(seed) for seed in range(3)], **options))
    assert batch.shape == (3, 4, 12, 8)
    for seed in range(3):
        single = last(model.draw(condition[seed : seed + 1], unconditional, generators=[seeded(seed)], **options))
        torch.testing.assert_close(batch[seed : seed + 1], single, rtol=1e-5, atol=1e-5)


def test_loss_is_plain_or_weighted_by_min_snr(model):
    condition, _ = conditions()
    condition.requires_grad_()
    latents = torch.randn(3, 4, SIZE, SIZE, generator=seeded(3))
    loss = model.loss(latents, condition, seeded(4))
    generator = seeded(4)
    timesteps = torch.randint(1000, (3,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    scheduler = DDIMScheduler.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    prediction = model.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, condition).sample
    epsilon = model.schedule.prediction_type == "epsilon"
    target = noise if epsilon else scheduler.get_velocity(latents, noise, timesteps)
    expected = (prediction - target).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected)
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    weight = snr.clamp(max=5) / (snr if epsilon else snr + 1)
    torch.testing.assert_close(model.loss(latents, condition, seeded(4), min_snr=5), expected * weight)
    loss.sum().backward()
    assert condition.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checkpointing_computes_again_and_gives_the_same_gradients(model):
    latents = torch.randn(3, 4, SIZE, SIZE, generator=seeded(3))
    calls, counts, gradients = [], [], []
    block = model.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    hook = block.register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (False, True):
        condition = conditions()[0].requires_grad_()
        model.checkpointing(on)
        model.loss(latents, condition, seeded(4)).sum().backward()
        gradients.append(condition.grad)
        counts.append(len(calls))
    hook.remove()
    model.checkpointing(False)
    assert counts == [1, 1 + 2]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_text_is_encoded_as_the_pipeline_does(model, folder):
    texts = ["a red fox", "", "a very long text that goes on and on beyond the end"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    expected, _ = pipeline.encode_prompt(texts, "cpu", 1, False)
    actual = model.encode_text(texts)
    assert actual.shape == (3, *model.condition_shape)
    torch.testing.assert_close(actual, expected)


def test_pixels_to_latents_and_back(epsilon_folder):
    model = StableDiffusion.load(str(epsilon_folder))
    pixels = torch.rand(2, 3, 16, 16, generator=seeded(5)) * 2 - 1
    posterior = model.vae.encode(pixels).latent_dist
    scale = model.vae.config.scaling_factor
    torch.testing.assert_close(model.encode(pixels), posterior.mean * scale)
    moments = model.moments(pixels)
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], dim=1))
    sampled = model.encode(pixels, seeded(6))
    torch.testing.assert_close(model.sample(moments, seeded(6)), sampled, rtol=0, atol=0)
    torch.testing.assert_close(sampled, posterior.sample(generator=seeded(6)) * scale)
    assert sampled.shape == (2, *model.latent_shape(16, 16))
    decoded = model.decode(sampled)
    torch.testing.assert_close(decoded, model.vae.decode(sampled / scale).sample.clamp(-1, 1))
    model.vae.register_to_config(shift_factor=0.25)
    torch.testing.assert_close(model.encode(pixels), (posterior.mean - 0.25) * scale)
    torch.testing.assert_close(model.decode(sampled - 0.25 * scale), decoded, rtol=1e-4, atol=1e-5)


def test_autoencoder_tiny_in_bfloat16_without_text_encoder(epsilon_folder, tmp_path):
    shutil.copytree(epsilon_folder, tmp_path / "model")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(tmp_path / "model" / part)
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**channels, **blocks).save_pretrained(tmp_path / "model" / "vae")
    model = load_generator(str(tmp_path / "model"), dtype=torch.bfloat16)
    assert isinstance(model.vae, AutoencoderTiny)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.native_size == 2 * SIZE
    assert model.condition_shape == (77, WIDTH)
    pixels = torch.zeros(1, 3, 16, 16)
    latents = model.encode(pixels, seeded(0))
    assert latents.dtype == torch.float32
    assert torch.equal(latents, model.encode(pixels))
    assert model.decode(latents).shape == pixels.shape
    condition = conditions()[0][:1]
    latents = last(model.draw(condition, steps=2, guidance=1.0, generators=[seeded(0)]))
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()
    with pytest.raises(Mgp5Error, match="no text encoder"):
        model.encode_text(["a fox"])


def test_stays_frozen_and_in_eval_mode(model):
    model.train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_errors_of_draw_come_at_the_call(model):
    condition, unconditional = conditions()
    generators = [seeded(seed) for seed in range(3)]
    with pytest.raises(Mgp5Error, match="2 generators for 3 images"):
        model.draw(condition, unconditional, generators=generators[:2])
    with pytest.raises(Mgp5Error, match="15x16, expected multiples of 2"):
        model.draw(condition, unconditional, height=15, generators=generators)
    with pytest.raises(Mgp5Error, match="without an unconditional"):
        model.draw(condition, generators=generators)
    with pytest.raises(Mgp5Error, match="no sampler 'none' for a model with"):
        model.draw(condition, unconditional, sampler="none", generators=generators)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "tokenizer"])
def test_a_missing_part_is_named(epsilon_folder, tmp_path, part):
    shutil.copytree(epsilon_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(Mgp5Error, match=f"no folder {part}"):
        load_generator(str(tmp_path / "model"))


def test_other_models_are_refused(epsilon_folder, tmp_path):
    with pytest.raises(Mgp5Error, match=r"no readable model_index\.json"):
        load_generator(str(tmp_path))
    shutil.copytree(epsilon_folder, tmp_path / "model")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(Mgp5Error, match="cannot load unet"):
        load_generator(str(tmp_path / "model"))
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    with pytest.raises(Mgp5Error, match="_class_name is FlowMatchEulerDiscreteScheduler"):
        load_generator(str(tmp_path / "model"))
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(Mgp5Error, match="holds a FluxPipeline, expected one of StableDiffusionPipeline"):
        load_generator(str(tmp_path / "model"))
