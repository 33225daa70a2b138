"""Stable unCLIP on a tiny pipeline of the real classes, against diffusers' pipeline."""

import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from tiny import LENGTH, SIZE, VISION, WIDTH, picture, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from mgp5 import Mgp5Error
from mgp5.generators import load_generator

IMAGE = 12  # P


def unclip_unet(**options) -> UNet2DConditionModel:
    kind = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * IMAGE}
    return tiny_unet(**kind | options)


def save_unclip(folder, unet):
    torch.manual_seed(0)
    normalizer = StableUnCLIPImageNormalizer(IMAGE)
    nn.init.normal_(normalizer.mean)
    nn.init.uniform_(normalizer.std, 0.5, 2.0)
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28),
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=IMAGE)),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        unet=unet,
        scheduler=PNDMScheduler(prediction_type="v_prediction", skip_prk_steps=True, **scheduler),
        vae=tiny_vae(),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_unclip(tmp_path_factory.mktemp("unclip"), unclip_unet())


@pytest.fixture(scope="module")
def model(folder):
    return load_generator(str(folder))


@pytest.fixture
def pipeline(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeds(count: int = 1) -> torch.Tensor:
    return torch.randn(count, IMAGE, generator=seeded(5))


@pytest.mark.parametrize(("sampler", "scheduler"), [("ddim", DDIMScheduler), ("euler", EulerDiscreteScheduler)])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_same_image_as_the_pipeline(model, pipeline, sampler, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    noise = torch.randn(1, 4, SIZE, SIZE, generator=seeded(7))
    options = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "pt"}
    pipeline.scheduler.set_timesteps(5)
    start = noise * pipeline.scheduler.init_noise_sigma  # this pipeline takes given latents as they are
    expected = pipeline(image_embeds=embeds(), generator=seeded(8), latents=start, **options).images
    condition, unconditional = model.image_condition(embeds(), seeded(8)), model.encode_text([""])
    options = {"steps": 5, "guidance": 4.0, "sampler": sampler}
    *_, latents = model.draw(condition, unconditional, generators=[seeded(7)], **options)
    torch.testing.assert_close((model.decode(latents) + 1) / 2, expected, rtol=0, atol=1e-4)
    *_, other = model.draw(model.image_condition(-embeds()), unconditional, generators=[seeded(7)], **options)
    assert (other - latents).abs().max() > 1e-2  # the embedding is seen


def test_condition(model, pipeline):
    assert model.condition_shape == (LENGTH + 2, WIDTH) and model.image_width == IMAGE
    with pytest.raises(Mgp5Error, match="expected multiples of"):
        model.latent_shape(7, 8)
    text = model.encode_text(["a fox"])
    torch.testing.assert_close(text[:, :-2], pipeline.encode_prompt(["a fox"], "cpu", 1, False)[0])
    assert not text[:, -2:].any()  # no image
    condition = model.image_condition(embeds(2))
    torch.testing.assert_close(condition[:, :-2], model.encode_text([""])[:, :-2].expand(2, -1, -1))
    assert not condition[:, -2:, IMAGE:].any()
    torch.testing.assert_close(condition[:, -2, :IMAGE], embeds(2), atol=1e-3, rtol=0)  # level 0 is almost no noise
    noised = pipeline.noise_image_embeddings(embeds(2), noise_level=0, generator=seeded(3))
    torch.testing.assert_close(model.image_condition(embeds(2), seeded(3))[:, -2:, :IMAGE].flatten(1), noised)
    gradient = embeds(2).requires_grad_()
    model.image_condition(gradient)[:, -2].sum().backward()
    assert (gradient.grad > 0.9).all()


def test_images_are_encoded_as_the_pipeline_does(folder, model, pipeline, tmp_path):
    images = [picture("red"), picture("blue", (60, 28))]
    pixels = pipeline.feature_extractor(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = pipeline.image_encoder(pixels).image_embeds
    torch.testing.assert_close(model.preprocess_images(images), pixels)
    torch.testing.assert_close(model.embed_pixels(pixels), expected)
    assert not any(value.requires_grad for value in model.parameters())
    copy = shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(copy / "image_encoder")
    without = load_generator(str(copy))
    with pytest.raises(Mgp5Error, match="has no image encoder"):
        without.embed_pixels(pixels)
    shutil.rmtree(copy / "image_normalizer")
    with pytest.raises(Mgp5Error, match="no folder image_normalizer"):
        load_generator(str(copy))


@pytest.mark.parametrize("change", [{"class_embed_type": "timestep"}, {"projection_class_embeddings_input_dim": 40}])
def test_another_kind_of_unet_is_refused(folder, change, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    unclip_unet(**change).save_pretrained(copy / "unet")
    with pytest.raises(Mgp5Error, match=r"the unet takes \d+ numbers of an image by"):
        load_generator(str(copy))
