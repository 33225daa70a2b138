"""The encoder of MM-Interleaved: sizes, the tower as it was, fine detail in the pyramid, gradients, resamplers."""

import pytest
import torch
from tiny import VISION
from transformers import CLIPVisionConfig, CLIPVisionModel

from mgp5.backbones.resampler import Resampler, VisualTokens
from mgp5.backbones.vit_adapter import VitAdapter

OPTIONS = {"heads": 2, "points": 2, "stem": 8}
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def tower_of(layers=3, size=28) -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(**VISION | {"num_hidden_layers": layers, "image_size": size})
    return CLIPVisionModel(config).eval().requires_grad_(False)


def adapter_of(layers=3, trained=False, **options) -> VitAdapter:
    torch.manual_seed(1)
    adapter = VitAdapter(16, layers, **OPTIONS | options).eval()
    if trained:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


@pytest.mark.parametrize(
    ("size", "patch", "resized", "sides"),
    [
        (224, 14, True, [64, 32, 16, 8]),  # released
        (224, 14, False, [56, 28, 14, 7]),  # paper
        (448, 14, True, [128, 64, 32, 16]),
        (96, 16, True, [24, 12, 6, 3]),  # the demo's tower
    ],
)
def test_sizes_of_the_levels(size, patch, resized, sides):
    assert adapter_of(resized=resized).shapes(size, size, patch) == [(side, side) for side in sides]


@pytest.mark.parametrize(("layers", "interactions"), [(1, 4), (3, 4), (5, 4), (4, 2)])
@pytest.mark.parametrize("resized", [True, False])
@torch.no_grad()
def test_any_tower_stays_as_it_was(layers, interactions, resized):
    """With gamma 0 the ViT's states are its own; images may be of another size than it was trained for."""
    tower, pixels = tower_of(layers), torch.randn(2, 3, 28, 42)
    adapter = adapter_of(layers, resized=resized, interactions=interactions)
    found = adapter(tower, pixels)
    expected = tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(found.states, expected, **NEAR)
    pixels_of_levels = sum(h * w for h, w in adapter.shapes(28, 42, 14))
    assert found.pyramid.shape == (2, pixels_of_levels, 16) and found.pyramid.isfinite().all()
    assert sum(len(tower.encoder.layers[group]) for group in adapter.groups) == layers


@torch.no_grad()
def test_an_image_is_encoded_as_if_alone():
    tower, pixels = tower_of(), torch.randn(3, 3, 28, 28)
    for options in ({}, {"channel_norm": True}):
        adapter = adapter_of(trained=True, **options).train()
        together, alone = adapter(tower, pixels), adapter(tower, pixels[1:2])
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[1:2], other, **NEAR)


@torch.no_grad()
def test_detail_reaches_its_place_in_the_finest_level():
    """A dot changes the finest level most around itself, though the ViT sees four patches only."""
    tower, adapter, pixels = tower_of(), adapter_of(), torch.zeros(1, 3, 28, 28)
    dotted = pixels.clone()
    dotted[..., 20:22, 5:7] = 3.0
    (height, width), *_ = adapter.shapes(28, 28, 14)
    change = (adapter(tower, dotted).pyramid - adapter(tower, pixels).pyramid)[0, : height * width].norm(dim=-1)
    row, column = divmod(int(change.argmax()), width)
    assert abs(row - 21 / 28 * height) <= 1.5 and abs(column - 6 / 28 * width) <= 1.5


def test_everything_but_the_tower_learns_with_and_without_checkpoints():
    tower, pixels = tower_of(), torch.randn(2, 3, 28, 28)
    adapter = adapter_of(trained=True)

    def gradients():
        pyramid, states = adapter(tower, pixels)
        return torch.autograd.grad(pyramid.square().mean() + states.square().mean(), list(adapter.parameters()))

    plain = gradients()
    still = [name for (name, _), grad in zip(adapter.named_parameters(), plain, strict=True) if not grad.any()]
    assert not still
    adapter.checkpointing = True
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other, **NEAR)


@torch.no_grad()
def test_half_precision_is_near():
    tower, adapter, pixels = tower_of(), adapter_of(trained=True), torch.randn(1, 3, 28, 28)
    expected = adapter(tower, pixels)
    found = adapter.bfloat16()(tower.bfloat16(), pixels)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16 and (one.float() - other).norm() < 0.05 * other.norm()


def test_visual_tokens():
    states = torch.randn(2, 1 + 4, 16, requires_grad=True)
    torch.manual_seed(0)
    visual = VisualTokens(16, 24, queries=6, inner=8, layers=2, heads=2)
    tokens = visual(states, (2, 2))
    assert tokens.shape == (2, 6, 24) and 0 < tokens.std() < 1e-2  # small at first: the LLM is frozen
    moved = visual(states.roll(1, dims=1), (2, 2))
    assert not torch.allclose(moved, tokens, rtol=1e-3)  # positions count
    norms = [module for module in visual.resampler.modules() if isinstance(module, torch.nn.Sequential)]
    assert len(norms) == 2 * (2 + 1)  # query and key: two of self-attention, one of cross-attention
    assert len(norms[0][1].weight) == 4  # of a head
    tokens.square().sum().backward()
    assert states.grad.any(dim=-1).all()
    assert all(p.grad is not None and p.grad.any() for n, p in visual.named_parameters() if not n.endswith("key.bias"))


def test_what_the_mask_of_a_resampler_hides_changes_nothing():
    torch.manual_seed(0)
    resampler, states = Resampler(16, queries=5, width=8, layers=1, heads=2).eval(), torch.randn(2, 7, 16)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    found = resampler(states, mask)
    torch.testing.assert_close(resampler(states[1:, :3]), found[1:], **NEAR)
    other = states.clone()
    other[1, 3:] = 100.0
    torch.testing.assert_close(resampler(other, mask), found, **NEAR)
    assert found.shape == (2, 5, 8) and not torch.allclose(resampler(other), found)
