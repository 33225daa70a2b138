"""Residuals of a UNet from pyramids of earlier images: where they are added, batches, guidance, engines, training."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny import LENGTH, SIZE, WIDTH, tiny_unet, tiny_vae

from mgp5 import engines
from mgp5.errors import Mgp5Error
from mgp5.generators.denoising import PlainDenoiser
from mgp5.generators.mmfs import UNetMMFS, skip_maps
from mgp5.generators.schedule import NoiseSchedule
from mgp5.generators.stable_diffusion import StableDiffusion
from mgp5.options import DiffusionOptions

SHAPES, PIXELS, FEATURES = [(8, 8), (4, 4), (2, 2), (1, 1)], 85, 16
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def diffusion():
    torch.manual_seed(0)
    return StableDiffusion(tiny_unet(), tiny_vae(), NoiseSchedule())


@pytest.fixture
def mmfs(diffusion):
    layers = UNetMMFS(diffusion.unet.config, FEATURES, SHAPES, heads=2, points=2)
    layers.attach(diffusion.unet)
    return layers


@pytest.fixture
def trained(mmfs):
    with torch.no_grad():
        for block in mmfs.blocks:
            block.conv.weight.normal_(std=0.3)
    return mmfs


def call(diffusion, residuals=None, **options):
    latents, condition = torch.randn(2, 4, SIZE, SIZE), torch.randn(2, LENGTH, WIDTH)
    extra = {} if residuals is None else {"residuals": residuals}
    return diffusion.unet(latents, torch.tensor([7.0, 90.0]), condition, return_dict=False, **extra, **options)[0]


def context(images, batch=1, seed=1):
    features = torch.randn(batch, images, PIXELS, FEATURES, generator=torch.Generator().manual_seed(seed))
    return features, torch.ones(batch, images, dtype=torch.bool)


def test_the_maps_of_stable_diffusion_are_the_release_s():
    config = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
    *skips, mid = skip_maps(config)
    assert [width for width, _ in skips] == [320] * 4 + [640] * 3 + [1280] * 5 and mid == (1280, 3)
    assert [level for _, level in skips] == [index // 3 for index in range(12)]
    maps = []
    unet = tiny_unet()
    for layer in unet.up_blocks:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: maps.insert(0, kwargs["res_hidden_states_tuple"]), with_kwargs=True
        )
    unet(torch.randn(1, 4, SIZE, SIZE), 1, torch.randn(1, LENGTH, WIDTH))
    shapes = [(x.shape[1], SIZE // x.shape[2]) for group in maps for x in group]
    assert shapes == [(width, 2**level) for width, level in list(skip_maps(unet.config))[:-1]]


@torch.no_grad()
def test_residuals_are_added_where_controlnet_adds_them(diffusion, mmfs):
    """Each block's residual is made a constant map of its own."""
    torch.manual_seed(1)
    base = call(diffusion)
    residuals = mmfs(*context(2, batch=2))
    torch.manual_seed(1)
    assert torch.equal(call(diffusion, residuals), base)  # convolutions of zeros
    for block in mmfs.blocks:
        block.conv.bias.normal_()
    torch.manual_seed(1)
    assert torch.equal(call(diffusion), base)
    *maps, mid = [block.conv.bias[None, :, None, None].expand(2, -1, 1, 1) for block in mmfs.blocks]
    torch.manual_seed(1)
    expected = call(diffusion, down_block_additional_residuals=maps, mid_block_additional_residual=mid)
    torch.manual_seed(1)
    torch.testing.assert_close(call(diffusion, residuals), expected, **NEAR)
    assert not torch.allclose(expected, base)


def draw(diffusion, mmfs, contexts, *, together, guidance=3.0, **options):
    """Latents of images after three steps; together, the last is a step ahead of the others."""
    chosen = DiffusionOptions(guidance=guidance, steps=3, height=2 * SIZE, width=2 * SIZE, sampler="ddim", **options)
    conditions = torch.randn(len(contexts) + 1, 1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))
    states = [
        diffusion.begin(condition, conditions[-1], chosen, torch.Generator().manual_seed(i), mmfs(*images))
        for i, (condition, images) in enumerate(zip(conditions, contexts, strict=False))
    ]
    assert len({state.key for state in states}) == 1
    if together:
        diffusion.step(states[-1:])
    for group in [states] if together else [[state] for state in states]:
        while group := [state for state in group if not state.done]:
            diffusion.step(group)
    return torch.cat([state.latents for state in states])


@pytest.mark.parametrize("until", [1.0, 0.5])
def test_images_with_any_number_of_earlier_ones_share_their_steps(diffusion, trained, until):
    contexts = [context(0), context(1), context(3)]
    alone = draw(diffusion, trained, contexts, together=False, guidance_until=until)
    torch.testing.assert_close(draw(diffusion, trained, contexts, together=True, guidance_until=until), alone, **NEAR)
    masked = context(3)[0], torch.tensor([[False, True, True]])
    fewer = masked[0][:, 1:], masked[1][:, 1:]
    expected = draw(diffusion, trained, [masked], together=False)
    torch.testing.assert_close(draw(diffusion, trained, [fewer], together=False), expected, **NEAR)
    assert (draw(diffusion, trained, [context(0)], together=False) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_both_halves_of_guidance_keep_the_features(diffusion, trained):
    condition = torch.randn(1, LENGTH, WIDTH)
    options = DiffusionOptions(guidance=2.0, steps=2, height=2 * SIZE, width=2 * SIZE, sampler="ddim")
    rows = []
    for seed in (1, 2):
        rng = torch.Generator().manual_seed(0)
        state = diffusion.begin(condition, 0 * condition, options, rng, trained(*context(2, seed=seed)))
        latents = state.latents.expand(2, -1, -1, -1)
        rows.append(state.model(latents, state.time_embeddings[0], state.cross_attention)[0])
    assert ((rows[0] - rows[1]).abs().amax((1, 2, 3)) > 1e-4).all()


def test_engines_step_aside(diffusion, trained):
    contexts = [context(1), context(2)]
    expected = draw(diffusion, trained, contexts, together=True)
    engines.apply(diffusion, "eager")
    torch.testing.assert_close(draw(diffusion, trained, contexts, together=True), expected, **NEAR)
    with pytest.raises(Mgp5Error, match="reuse 2"):
        draw(diffusion, trained, contexts, together=False, reuse=2)
    condition, options = torch.randn(1, LENGTH, WIDTH), DiffusionOptions(guidance=1.0, steps=2)
    state = diffusion.begin(condition, None, options, torch.Generator())
    assert not isinstance(state.model, PlainDenoiser)
    state.model(state.latents, state.time_embeddings[0], state.cross_attention)  # a copy of the UNet with its hooks


def test_training_reaches_features_blocks_and_unet(diffusion, trained):
    diffusion.unet.requires_grad_(True)
    features, visible = context(2, batch=2)
    visible[1, 0] = False
    parameters = [*trained.parameters(), *diffusion.unet.down_blocks[0].parameters()]
    latents, condition = torch.randn(2, 4, SIZE, SIZE), torch.randn(2, LENGTH, WIDTH)

    def gradients():
        leaf = features.clone().requires_grad_()
        residuals = trained(leaf, visible)
        loss = diffusion.loss(latents, condition, torch.Generator().manual_seed(0), residuals=residuals).mean()
        return torch.autograd.grad(loss, [leaf, *parameters])

    plain = gradients()
    assert plain[0][0].any() and plain[0][1, 1].any() and not plain[0][1, 0].any()
    reached = {name: grad.any() for (name, _), grad in zip(trained.named_parameters(), plain[1:], strict=False)}
    assert all(reached.values()), [name for name, found in reached.items() if not found]
    diffusion.checkpointing(True)
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other, **NEAR)


def test_a_denoiser_without_skip_connections_is_refused(mmfs):
    transformer = SD3Transformer2DModel(num_layers=1, num_attention_heads=1, caption_projection_dim=64)
    with pytest.raises(Mgp5Error, match="SD3Transformer2DModel without 4 skip connections"):
        mmfs.attach(transformer)
