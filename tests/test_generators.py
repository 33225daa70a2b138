"""Stable Diffusion 1, 2, 3 and 3.5 on tiny models of the real classes, against diffusers' pipelines and the papers."""

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from tiny import LENGTH, SIZE, conditions_of
from tiny_sd3 import GENERATORS, POOLED, ROWS, WIDTH
from torch.nn.functional import pad

from mgp5 import Mgp5Error
from mgp5.generators import load_generator

SCHEDULERS = {
    "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler,
    "pndm": PNDMScheduler,
}  # fmt: skip
TEXTS = ["a red fox", "", "a very long text that goes on and on beyond the end of what clip can read"]
unet_only = pytest.mark.parametrize("folder", ["epsilon", "v_prediction"], indirect=True)
sd3_only = pytest.mark.parametrize("folder", ["sd3", "sd3.5"], indirect=True)
one_of_each = pytest.mark.parametrize("folder", ["epsilon", "sd3"], indirect=True)


@pytest.fixture(scope="module", params=GENERATORS)
def folder(request, generator_folder):
    return generator_folder(request.param)


@pytest.fixture(scope="module")
def model(folder):
    return load_generator(str(folder))


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


class Unrounded(DPMSolverMultistepScheduler):
    """The scheduler without rounding timesteps of flow matching down, which ours does not do either."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(rows: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, pad(pooled[:, None], (0, WIDTH - POOLED))], dim=1)


def embeds(model, condition: torch.Tensor, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return a condition as arguments of the pipeline."""
    if not model.pooled_width:
        return {f"{prefix}prompt_embeds": condition}
    pooled = condition[:, -1, :POOLED]
    return {f"{prefix}prompt_embeds": condition[:, :-1], f"{prefix}pooled_prompt_embeds": pooled}


def encoded(pipeline) -> torch.Tensor:
    """Return the conditions of TEXTS as the pipeline makes them."""
    if not hasattr(pipeline, "transformer"):
        return pipeline.encode_prompt(TEXTS, "cpu", 1, False)[0]
    rows, _, pooled, _ = pipeline.encode_prompt(TEXTS, None, None, "cpu", 1, False)
    return packed(rows, pooled)


def last(steps):
    *_, result = steps
    return result


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_same_images_as_the_pipeline(model, pipeline):
    condition, unconditional = conditions_of(model, 1, 3), conditions_of(model, 2, 1)
    shape, own = model.latent_shape(model.native_size, model.native_size), pipeline.scheduler
    noise = torch.stack([torch.randn(shape, generator=seeded(seed)) for seed in range(3)])
    for sampler, num_steps in [("euler", 1), *((name, 6) for name in model.schedule.samplers)]:
        if not model.pooled_width:
            pipeline.scheduler = SCHEDULERS[sampler].from_config(own.config, clip_sample=False)
        elif sampler == "dpm++":
            pipeline.scheduler = Unrounded(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
        else:
            pipeline.scheduler = own
        expected = pipeline(
            **embeds(model, condition),
            **embeds(model, unconditional.expand_as(condition), "negative_"),
            latents=noise,
            num_inference_steps=num_steps,
            guidance_scale=4.0,
            output_type="pt",
        ).images
        options = {"steps": num_steps, "guidance": 4.0, "sampler": sampler}
        steps = model.draw(condition, unconditional, generators=[seeded(seed) for seed in range(3)], **options)
        torch.testing.assert_close((model.decode(last(steps)) + 1) / 2, expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.01


def test_a_batch_equals_single_runs(model):
    condition, unconditional = conditions_of(model, 1, 3), conditions_of(model, 2, 1)
    options = {"steps": 4, "guidance": 3.0, "height": 24, "width": 16, "sampler": "euler"}
    batch = last(model.draw(condition, unconditional, generators=[seeded(seed) for seed in range(3)], **options))
    assert batch.shape == (3, *model.latent_shape(24, 16))
    for seed in range(3):
        single = last(model.draw(condition[seed : seed + 1], unconditional, generators=[seeded(seed)], **options))
        torch.testing.assert_close(batch[seed : seed + 1], single, rtol=1e-5, atol=1e-5)


@unet_only
def test_loss_is_plain_or_weighted_by_min_snr(model):
    condition = conditions_of(model, 1, 3).requires_grad_()
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


@sd3_only
def test_loss_is_flow_matching(model):
    condition = conditions_of(model, 1, 3).requires_grad_()
    latents = torch.randn(3, *model.latent_shape(16, 16), generator=seeded(3))
    loss = model.loss(latents, condition, seeded(4))
    generator = seeded(4)
    time = torch.randn(3, generator=generator).sigmoid()
    time = 3 * time / (1 + 2 * time)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, time.view(3, 1, 1, 1))
    prediction = model.transformer(noisy, condition[:, :-1], condition[:, -1, :POOLED], 1000 * time).sample
    torch.testing.assert_close(loss, (prediction - (noise - latents)).square().mean((1, 2, 3)))
    loss.sum().backward()
    assert condition.grad[:, :-1].abs().amax((1, 2)).all()
    assert condition.grad[:, -1, :POOLED].all() and not condition.grad[:, -1, POOLED:].any()
    with pytest.raises(Mgp5Error, match="min_snr is 5, but this diffusion model is trained by flow matching") as caught:
        model.loss(latents, condition, seeded(4), min_snr=5)
    assert caught.value.exit_code == 2


def test_checkpointing_computes_again_and_gives_the_same_gradients(model):
    latents = torch.randn(2, *model.latent_shape(16, 16), generator=seeded(3))
    calls, counts, gradients = [], [], []
    blocks = model.denoiser if model.pooled_width else model.unet.down_blocks[0].attentions[0]
    hook = blocks.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (False, True):
        condition = conditions_of(model, 1, 2).requires_grad_()
        model.checkpointing(on)
        model.train()  # as the trainer does: it stays frozen and in evaluation mode
        model.loss(latents, condition, seeded(4)).sum().backward()
        gradients.append(condition.grad)
        counts.append(len(calls))
    hook.remove()
    model.checkpointing(False)
    assert counts == [1, 1 + 2] and gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@one_of_each
def test_text_is_encoded_as_the_pipeline_does(model, pipeline):
    actual = model.encode_text(TEXTS)
    assert actual.shape == (3, *model.condition_shape)
    torch.testing.assert_close(actual, encoded(pipeline))
    if model.pooled_width:
        assert model.condition_shape == (ROWS + 1, WIDTH) and model.pooled_width == POOLED
        assert not torch.equal(actual[0, LENGTH], actual[1, LENGTH])  # T5 reads


@pytest.mark.parametrize("folder", ["epsilon"], indirect=True)
def test_weights_in_float16_alone_are_read(copied, model):
    for file in copied.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    halves = load_generator(str(copied))
    torch.testing.assert_close(halves.encode_text(TEXTS), model.encode_text(TEXTS))
    assert all(map(torch.equal, halves.denoiser.parameters(), model.denoiser.parameters()))


@pytest.mark.parametrize("folder", ["epsilon"], indirect=True)
def test_a_cut_text_encoder_is_one_line(copied):
    file = copied / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Mgp5Error, match="cannot load text_encoder of "):
        load_generator(str(copied)).encode_text(["a fox"])


@pytest.mark.parametrize("folder", ["epsilon"], indirect=True)
def test_steps_of_an_old_schedulers_file_are_those_of_the_pipeline(copied):
    file = copied / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps_offset": 0}))
    pipeline = DiffusionPipeline.from_pretrained(copied)
    assert load_generator(str(copied)).schedule.steps_offset == pipeline.scheduler.config.steps_offset == 1


@pytest.mark.parametrize(
    "change, told", [({"in_channels": 9}, "9 channels"), ({"class_embed_type": "timestep"}, "4 .*class")]
)
@pytest.mark.parametrize("folder", ["epsilon"], indirect=True)
def test_a_denoiser_that_takes_more_than_latents_is_refused(copied, change, told):
    unet = UNet2DConditionModel.load_config(copied / "unet")
    UNet2DConditionModel.from_config(unet | change).save_pretrained(copied / "unet")
    with pytest.raises(Mgp5Error, match=f"the unet takes {told}.*expected the 4 channels"):
        load_generator(str(copied))


@one_of_each
def test_text_encoders_are_read_when_a_text_is_encoded(folder):
    model, names = load_generator(str(folder)), {"text_encoder", "text_encoder_2", "text_encoder_3"}
    shape = model.condition_shape
    with torch.inference_mode():  # as sample pages of a training run do
        empty = model.encode_text([""])
    assert not empty.is_inference() and model.encode_text([""]) is empty
    assert not names & dict(model.named_children()).keys()  # not kept for the empty text
    torch.testing.assert_close(model.encode_text(["", "a fox"])[:1], empty)
    assert names & dict(model.named_children()).keys() == model.readers.keys()
    model.drop_text_encoders()
    assert not names & dict(model.named_children()).keys() and model.condition_shape == shape == empty.shape[1:]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("folder", ["sd3"], indirect=True)
def test_without_t5_its_rows_are_zeros(copied, listed):
    pipeline = DiffusionPipeline.from_pretrained(copied, text_encoder_3=None, tokenizer_3=None)
    shutil.rmtree(copied / "text_encoder_3")
    if not listed:
        pipeline.save_pretrained(copied)
    actual = load_generator(str(copied)).encode_text(TEXTS)
    torch.testing.assert_close(actual, encoded(pipeline))
    assert not actual[:, LENGTH:-1].any()


@one_of_each
def test_pixels_to_latents_and_back(model):
    pixels = torch.rand(2, 3, 16, 24, generator=seeded(5)) * 2 - 1
    shift, scale = (0.0609, 1.5305) if model.pooled_width else (0, model.vae.config.scaling_factor)
    posterior = model.vae.encode(pixels).latent_dist
    moments = model.moments(pixels)
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], dim=1))
    torch.testing.assert_close(model.encode(pixels), (posterior.mean - shift) * scale)
    sampled = model.sample(moments, seeded(6))
    torch.testing.assert_close(sampled, (posterior.sample(generator=seeded(6)) - shift) * scale)
    torch.testing.assert_close(model.encode(pixels, seeded(6)), sampled, rtol=0, atol=0)
    assert sampled.shape == (2, *model.latent_shape(16, 24))
    torch.testing.assert_close(model.decode(sampled), model.vae.decode(sampled / scale + shift).sample.clamp(-1, 1))


@one_of_each
def test_bfloat16_without_text_encoders_and_with_a_tiny_autoencoder(copied):
    for part in (*copied.glob("text_encoder*"), *copied.glob("tokenizer*")):
        shutil.rmtree(part)
    sd3 = (copied / "transformer").is_dir()
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 16 if sd3 else 4}
    shutil.rmtree(copied / "vae")
    AutoencoderTiny(**channels, **blocks).save_pretrained(copied / "vae")
    model = load_generator(str(copied), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.native_size == 2 * SIZE and model.condition_shape[0] == (77 + 256 + 1 if sd3 else 77)
    pixels = torch.zeros(1, 3, 16, 16)
    latents = model.encode(pixels, seeded(0))
    assert latents.dtype == torch.float32 and torch.equal(latents, model.encode(pixels))
    assert model.decode(latents).shape == pixels.shape
    condition = conditions_of(model, 1, 1)
    latents = last(model.draw(condition, steps=2, guidance=1.0, generators=[seeded(0)]))
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    with pytest.raises(Mgp5Error, match="no text encoder"):
        model.encode_text(["a fox"])


@one_of_each
def test_errors_of_draw_come_at_the_call(model):
    condition, unconditional = conditions_of(model, 1, 3), conditions_of(model, 2, 1)
    generators = [seeded(seed) for seed in range(3)]
    cases = [
        ({"generators": generators[:2]}, "2 generators for 3 images"),
        ({"height": 15}, "15x16, expected multiples of 4" if model.pooled_width else "15x16, expected multiples of 2"),
        ({"unconditional": None}, "without an unconditional"),
        ({"sampler": "none"}, "no sampler 'none' for a model with"),
    ]
    if model.pooled_width:
        cases += [
            ({"width": 36}, "16x36, expected at most 32"),
            ({"sampler": "ddim"}, r"flow_prediction, .* of dpm\+\+"),
        ]
    for options, message in cases:
        with pytest.raises(Mgp5Error, match=message):
            model.draw(condition, **{"unconditional": unconditional, "generators": generators} | options)


@pytest.mark.parametrize(
    ("folder", "part"),
    [*(("epsilon", part) for part in ("unet", "vae", "scheduler", "tokenizer")), ("sd3", "tokenizer_3")],
    indirect=["folder"],
)
def test_a_missing_part_is_named(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(Mgp5Error, match=f"no folder {part}"):
        load_generator(str(copied))


@one_of_each
def test_other_models_are_refused(copied, tmp_path):
    def refused(message):
        with pytest.raises(Mgp5Error, match=message):
            load_generator(str(copied))

    sd3 = (copied / "transformer").is_dir()
    denoiser = "transformer" if sd3 else "unet"
    (copied / denoiser / "diffusion_pytorch_model.safetensors").unlink()
    refused(f"cannot load {denoiser}")
    other = "DPMSolverMultistepScheduler" if sd3 else "FlowMatchEulerDiscreteScheduler"
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": other}))
    refused("expected FlowMatchEulerDiscreteScheduler" if sd3 else f"_class_name is {other}")
    (copied / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    refused("holds a FluxPipeline, expected one of StableDiffusionPipeline")
    (copied / "model_index.json").unlink()
    refused(r"no readable model_index\.json")
