"""Fused layers against diffusers' UNet and VAE: what a card runs, with the references of its kernels on a CPU."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from test_engines import NEAR, difference, draw, stable_diffusion
from tiny import tiny_vae

from mgp5 import engines
from mgp5.engines import autoencoder
from mgp5.engines.autoencoder import FusedAutoencoder
from mgp5.engines.engine import operations
from mgp5.engines.precomputed import precompute
from mgp5.generators.latent_diffusion import LatentDiffusion

CPU = torch.device("cpu")
NEAREST = {torch.float64: 1e-12, torch.float32: NEAR}  # in units of the greatest value
ODD = {"block_out_channels": (12, 20), "norm_num_groups": 4, "attention_head_dim": 4}  # no multiples of 8


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def fused_ops(dtype):
    return operations("triton", CPU, dtype)  # on a CPU the references, behind the layers of the kernels


@pytest.fixture
def on_a_card(monkeypatch):
    """Engines choose as on a card on which kernels run."""
    monkeypatch.setattr(engines, "_triton_refusal", lambda device, dtype: "")


@pytest.mark.parametrize(
    ("config", "rows", "sides"),
    [
        ({}, 2, (8, 8)),
        ({"use_linear_projection": False}, 1, (6, 10)),
        (ODD, 9, (7, 5)),  # enlarged to odd sides
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, 3, (4, 6)),
    ],
)
@torch.no_grad()
def test_a_fused_unet(config, rows, sides):
    for dtype, near in NEAREST.items():
        unet = stable_diffusion(**config).unet.to(dtype)
        latents, condition = normal(rows, 4, *sides).to(dtype), normal(rows, 11, 16).to(dtype)
        expected = unet(latents, 7, condition).sample
        model = precompute(unet, fused_ops(dtype), packed=False, layout=torch.channels_last)
        times, context = model.constants(torch.tensor([7.0]), condition)
        found, deep = model(latents, times[0], context)
        reused, _ = model(latents, times[0], context, deep.contiguous())
        assert difference([found, reused, unet(latents, 7, condition).sample], [expected] * 3) < near


@pytest.mark.parametrize(
    ("config", "rows", "sides"),
    [
        ({}, 1, (8, 8)),
        ({"block_out_channels": (12, 20), "norm_num_groups": 4, "latent_channels": 3}, 9, (3, 5)),
        ({"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}, 2, (2, 3)),
    ],
)
@torch.no_grad()
def test_a_fused_vae(config, rows, sides, monkeypatch):
    config = {"block_out_channels": (8, 16), "norm_num_groups": 8, "layers_per_block": 1} | config
    for dtype, near in NEAREST.items():
        torch.manual_seed(0)
        vae = tiny_vae_of(**config).to(dtype)
        latents = normal(rows, vae.config.latent_channels, *sides).to(dtype)
        pixels = normal(rows, 3, *(2 * side for side in sides)).to(dtype)

        def both(vae, latents=latents, pixels=pixels):
            return [vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters]

        expected, fused = both(vae), FusedAutoencoder(vae, fused_ops(dtype), graphed=False)
        assert difference(both(fused()), expected) < near
        monkeypatch.setattr("mgp5.engines.fused.FAST", 4)  # scores are written out
        assert difference(both(fused()), expected) < near
        vae.enable_tiling()  # later than the fused one was made
        vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 8
        assert difference(both(fused()), both(vae)) < near


def tiny_vae_of(**config):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks | config)


def test_an_engine_brings_the_vae_and_takes_it_away(on_a_card):
    diffusion = stable_diffusion()
    latents, pixels = normal(2, 4, 8, 8).float(), normal(2, 3, 16, 16).float()

    def results():
        return [draw(diffusion, 1, count=2), diffusion.decode(latents), diffusion.moments(pixels)]

    before, weights = results(), [p.stride() for p in diffusion.parameters()]
    assert engines.apply(diffusion, "triton").name == "triton" and diffusion.coder is not None
    assert difference(results(), before) < NEAR
    engines.remove(diffusion)
    assert diffusion.coder is None and [p.stride() for p in diffusion.parameters()] == weights
    assert all(torch.equal(one, other) for one, other in zip(results(), before, strict=True))


def test_a_size_that_comes_again_is_replayed(on_a_card, monkeypatch):
    """And a size that does not, or weights that moved, are not recorded. On a CPU a replay runs the same code."""
    recorded = []

    def record(work, pool):
        recorded.append(work())
        return lambda made=recorded[-1]: made.copy_(work()), recorded[-1]

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(autoencoder, "record", record)
    diffusion = stable_diffusion()
    small, large = normal(1, 4, 8, 8).float(), normal(1, 4, 8, 12).float()
    expected = [diffusion.decode(latents) for latents in (small, large, -small)]
    assert engines.fuse_vae(diffusion, graphed=True)
    for count, latents, image in [(0, small, 0), (0, large, 1), (1, small, 0), (1, -small, 2), (2, large, 1)]:
        with torch.inference_mode():
            found = diffusion.decode(latents)
        assert len(recorded) == count and difference([found], [expected[image]]) < NEAR
    for parameter in diffusion.vae.parameters():
        parameter.data = parameter.data.clone()
    assert difference([diffusion.decode(small)], expected[:1]) < NEAR and len(recorded) == 2
    monkeypatch.setattr(autoencoder, "LARGEST", 63)
    kept = list(diffusion.coder.parts["decoder"].graphs)
    assert difference([diffusion.decode(small)], expected[:1]) < NEAR
    assert list(diffusion.coder.parts["decoder"].graphs) == kept


def test_another_vae_stays_as_it_is(on_a_card):
    diffusion = stable_diffusion()
    diffusion.vae = tiny_vae(act_fn="relu")
    assert not engines.fuse_vae(diffusion) and diffusion.coder is LatentDiffusion.coder is None


def test_weights_that_are_not_plain_keep_their_layers(on_a_card):
    """Quantized ones, here of a subclass of tensors; and what is joined takes no memory of its own."""
    diffusion = stable_diffusion()
    block, other = (diffusion.unet.down_blocks[0].attentions[0].transformer_blocks[i] for i in (0, 1))
    linear = other.attn1.to_q
    linear.weight = torch.nn.Parameter(linear.weight.data.as_subclass(type("Quantized", (torch.Tensor,), {})))
    engines.apply(diffusion, "triton")
    kinds = [type(m).__name__ for m in diffusion.engine.model.model.inner.down_blocks[0].attentions[0].blocks]
    assert kinds == ["FusedBlock", "Block"]
    query, value = (layer.weight.untyped_storage().data_ptr() for layer in (block.attn1.to_q, block.attn1.to_v))
    assert query == value


@pytest.mark.gpu
@torch.no_grad()
def test_a_fused_vae_on_a_gpu():
    diffusion = stable_diffusion()
    latents, pixels = normal(2, 4, 8, 8).float(), normal(2, 3, 16, 16).float()
    expected = [diffusion.decode(latents)] * 3 + [diffusion.moments(pixels)]
    assert engines.apply(diffusion.to("cuda"), "triton").name == "triton"
    found = [diffusion.decode(latents.cuda()) for _ in range(3)] + [diffusion.moments(pixels.cuda())]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=2e-2, atol=2e-2)
