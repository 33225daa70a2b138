"""Stable Diffusion 3 on tiny models of the real classes, against diffusers' pipeline and the paper's loss."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline
from tiny import LENGTH, SIZE
from tiny_sd3 import CHANNELS, POOLED, ROWS, WIDTH, save_sd3
from torch.nn.functional import pad

from mgp5 import Mgp5Error
from mgp5.generators import load_generator
from mgp5.generators.sd3 import StableDiffusion3

TEXTS = ["a red fox", "", "a very long text that goes on and on beyond the end of what clip can read"]


@pytest.fixture(scope="module", params=["3", "3.5"])
def folder(request, tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("sd3"), sd35=request.param == "3.5")


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def model(folder):
    return load_generator(str(folder))


class Unrounded(DPMSolverMultistepScheduler):
    """The scheduler without rounding timesteps of flow matching down, which ours does not do either."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(rows: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, pad(pooled[:, None], (0, WIDTH - POOLED))], dim=1)


def embeds(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    return torch.randn(count, ROWS, WIDTH, generator=generator), torch.randn(count, POOLED, generator=generator)


def last(steps):
    *_, result = steps
    return result


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("sampler", "steps"), [("euler", 1), ("flow-euler", 7), ("dpm++", 6)])
def test_same_images_as_the_pipeline(model, folder, sampler, steps):
    pipeline = quiet(StableDiffusion3Pipeline.from_pretrained(folder))
    if sampler == "dpm++":
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
        pipeline.scheduler = Unrounded(**flow)
    (rows, pooled), (free_rows, free_pooled) = embeds(2, 1), embeds(1, 2)
    noise = torch.stack([torch.randn(CHANNELS, SIZE, SIZE, generator=seeded(seed)) for seed in range(2)])
    expected = {
        kind: pipeline(
            prompt_embeds=rows,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=free_rows.expand(2, -1, -1),
            negative_pooled_prompt_embeds=free_pooled.expand(2, -1),
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=4.0,
            output_type=kind,
        ).images
        for kind in ("latent", "pt")
    }
    generators = [seeded(seed) for seed in range(2)]
    conditions = packed(rows, pooled), packed(free_rows, free_pooled)
    latents = last(model.draw(*conditions, steps=steps, guidance=4.0, sampler=sampler, generators=generators))
    torch.testing.assert_close(latents, expected["latent"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((model.decode(latents) + 1) / 2, expected["pt"], rtol=0, atol=1e-5)
    assert expected["pt"].std() > 0.01


def test_text_is_encoded_as_the_pipeline_does(sd3_folder):
    model = StableDiffusion3.load(str(sd3_folder))
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    rows, _, pooled, _ = pipeline.encode_prompt(TEXTS, None, None, "cpu", 1, False)
    actual = model.encode_text(TEXTS)
    assert actual.shape == (3, *model.condition_shape) == (3, ROWS + 1, WIDTH)
    assert model.pooled_width == POOLED
    torch.testing.assert_close(actual, packed(rows, pooled))
    assert not torch.equal(actual[0, LENGTH], actual[1, LENGTH])  # T5 reads


@pytest.mark.parametrize("listed", [True, False])
def test_without_t5_its_rows_are_zeros(sd3_folder, tmp_path, listed):
    folder = tmp_path / "model"
    shutil.copytree(sd3_folder, folder)
    pipeline = quiet(StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None))
    shutil.rmtree(folder / "text_encoder_3")
    if not listed:
        pipeline.save_pretrained(folder)
    model = load_generator(str(folder))
    rows, _, pooled, _ = pipeline.encode_prompt(TEXTS, None, None, "cpu", 1, False)
    torch.testing.assert_close(model.encode_text(TEXTS), packed(rows, pooled))
    assert not rows[:, LENGTH:].any()


def test_loss_is_flow_matching(model):
    rows, pooled = embeds(3, 1)
    condition = packed(rows, pooled).requires_grad_()
    latents = torch.randn(3, CHANNELS, SIZE, SIZE, generator=seeded(3))
    loss = model.loss(latents, condition, seeded(4))
    generator = seeded(4)
    time = torch.randn(3, generator=generator).sigmoid()
    time = 3 * time / (1 + 2 * time)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, time.view(3, 1, 1, 1))
    prediction = model.transformer(noisy, rows, pooled, 1000 * time).sample
    torch.testing.assert_close(loss, (prediction - (noise - latents)).square().mean((1, 2, 3)))
    loss.sum().backward()
    assert condition.grad[:, :-1].abs().amax((1, 2)).all()
    assert condition.grad[:, -1, :POOLED].all()
    assert not condition.grad[:, -1, POOLED:].any()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(Mgp5Error, match="min_snr is 5, but this diffusion model is trained by flow matching") as caught:
        model.loss(latents, condition, seeded(4), min_snr=5)
    assert caught.value.exit_code == 2


def test_checkpointing_computes_again_and_gives_the_same_gradients(model):
    latents = torch.randn(2, CHANNELS, SIZE, SIZE, generator=seeded(3))
    calls, counts, gradients = [], [], []
    hook = model.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (False, True):
        condition = packed(*embeds(2, 1)).requires_grad_()
        model.checkpointing(on)
        model.train()  # as the trainer does: it stays in eval mode
        model.loss(latents, condition, seeded(4)).sum().backward()
        gradients.append(condition.grad)
        counts.append(len(calls))
    hook.remove()
    model.checkpointing(False)
    assert counts == [1, 1 + 2]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_pixels_to_latents_and_back(sd3_folder):
    model = StableDiffusion3.load(str(sd3_folder))
    pixels = torch.rand(2, 3, 16, 24, generator=seeded(5)) * 2 - 1
    posterior = model.vae.encode(pixels).latent_dist
    moments = model.moments(pixels)
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], dim=1))
    sampled = model.sample(moments, seeded(6))
    torch.testing.assert_close(sampled, (posterior.sample(generator=seeded(6)) - 0.0609) * 1.5305)
    torch.testing.assert_close(model.encode(pixels, seeded(6)), sampled, rtol=0, atol=0)
    assert sampled.shape == (2, *model.latent_shape(16, 24))
    expected = model.vae.decode(sampled / 1.5305 + 0.0609).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode(sampled), expected)


def test_bfloat16_without_text_encoders(sd3_folder, tmp_path):
    shutil.copytree(sd3_folder, tmp_path / "model")
    for part in tmp_path.glob("model/t*er*"):
        if part.name != "transformer":
            shutil.rmtree(part)
    model = load_generator(str(tmp_path / "model"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.condition_shape == (77 + 256 + 1, WIDTH)
    assert model.native_size == 2 * SIZE
    latents = last(model.draw(packed(*embeds(1, 1)), steps=2, guidance=1.0, generators=[seeded(0)]))
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()
    with pytest.raises(Mgp5Error, match="no text encoder"):
        model.encode_text(["a fox"])


def test_errors_say_what_was_expected(sd3_folder, tmp_path):
    model = load_generator(str(sd3_folder))
    options = {"guidance": 1.0, "generators": [seeded(0)]}
    condition = packed(*embeds(1, 1))
    with pytest.raises(Mgp5Error, match="14x16, expected multiples of 4"):
        model.draw(condition, height=14, **options)
    with pytest.raises(Mgp5Error, match="16x36, expected at most 32"):
        model.draw(condition, width=36, **options)
    with pytest.raises(Mgp5Error, match=r"no sampler 'ddim' for a model with flow_prediction, expected one of dpm\+\+"):
        model.draw(condition, sampler="ddim", **options)
    shutil.copytree(sd3_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer_3")
    with pytest.raises(Mgp5Error, match="no folder tokenizer_3"):
        load_generator(str(tmp_path / "model"))
    DPMSolverMultistepScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    with pytest.raises(Mgp5Error, match="expected FlowMatchEulerDiscreteScheduler"):
        load_generator(str(tmp_path / "model"))
