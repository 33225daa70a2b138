"""MMFS: its mask and its slot for nothing, gates of zero, the release's form, gradients in float64."""

import math
from functools import partial

import pytest
import torch
from mgp5.kernels import hub_deformable
from mgp5.kernels.deformable import deformable_reference
from mgp5.kernels.hub_deformable import exact
from mgp5.kernels.registry import select_kernel

from mgp5.backbones.positions import pixel_centers, sincos_2d
from mgp5.errors import Mgp5Error
from mgp5.generators.mmfs import MMFS, GatedMMFS, MMFSBlock, image_ranks, null_softmax

SHAPES = [(8, 8), (4, 4), (2, 2), (1, 1)]
PIXELS = 85
OPTIONS = {"levels": 4, "base": 8, "heads": 2, "points": 2, "images": 4}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(module):
    """The module with weights that no longer are those of a start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def inputs(tokens=5, images=3, width=12):
    features, visible = torch.randn(2, images, PIXELS, 16), torch.rand(2, tokens, images) < 0.6
    return torch.randn(2, tokens, width), features, visible


def test_gates_of_zero_leave_the_base_model():
    hidden, features, visible = inputs()
    layer, block = GatedMMFS(12, 16, **OPTIONS), MMFSBlock(12, 16, **OPTIONS)
    assert torch.equal(layer(hidden, layer.values(features), visible, SHAPES), hidden)
    x = torch.randn(2, 12, 4, 6)
    assert not block(x, block.values(features), visible[:, 0], SHAPES).any()
    moved = trained(layer)(hidden, layer.values(features), visible, SHAPES) - hidden
    assert moved.abs().amin((1, 2)).min() > 0


@pytest.mark.parametrize("images", [0, 3])
def test_where_nothing_is_visible_only_the_bias_is_left(images):
    hidden, features, _ = inputs(images=images)
    layer = trained(GatedMMFS(12, 16, **OPTIONS))
    mmfs, nothing = layer.mmfs, torch.zeros(2, 5, images, dtype=torch.bool)
    assert torch.equal(mmfs(hidden, mmfs.values(features), nothing, SHAPES), mmfs.output.bias.expand(2, 5, 12))
    alone = layer(hidden, None, None, SHAPES)
    torch.testing.assert_close(layer(hidden, layer.values(features), nothing, SHAPES), alone)


def test_a_masked_image_changes_nothing():
    """Neither what it shows nor that it is there: the nearest visible image has rank 1."""
    hidden, features, visible = inputs()
    visible[:, :, 1] = False
    mmfs = trained(MMFS(12, 16, **OPTIONS))
    found = mmfs(hidden, mmfs.values(features), visible, SHAPES)
    other = features.clone()
    other[:, 1] = other[:, 1, torch.randperm(PIXELS)]
    assert torch.equal(mmfs(hidden, mmfs.values(other), visible, SHAPES), found)
    fewer = mmfs(hidden, mmfs.values(features[:, [0, 2]]), visible[..., [0, 2]], SHAPES)
    torch.testing.assert_close(fewer, found, rtol=1e-5, atol=1e-5)


def test_order_and_place_of_images_count():
    hidden, features, _ = inputs()
    mmfs, visible = trained(MMFS(12, 16, **OPTIONS)), torch.ones(2, 1, 3, dtype=torch.bool)
    found = mmfs(hidden, mmfs.values(features), visible, SHAPES)
    for other in (features.flip(1), features.roll(1, dims=2)):
        assert (mmfs(hidden, mmfs.values(other), visible, SHAPES) - found).abs().max() > 1e-3
    assert image_ranks(torch.tensor([[[1, 0, 1, 1]]]).bool()).tolist() == [[[3, 0, 2, 1]]]
    many = torch.ones(2, 1, 9, dtype=torch.bool)  # more images than embeddings
    assert mmfs(hidden, mmfs.values(features.repeat(1, 3, 1, 1)), many, SHAPES).isfinite().all()


def test_the_softmax_is_the_release_s():
    """There each image and level has a logit more, overwritten by -log(N L)."""
    logits, visible = torch.randn(2, 5, 3, 2, 4, 2), torch.rand(2, 5, 3) < 0.5
    masked = torch.where(visible[..., None, None, None], logits, -1e4)
    slots = torch.full((2, 5, 3, 2, 4, 1), -math.log(3 * 4))
    joint = torch.cat([masked, slots], dim=-1).transpose(2, 3).flatten(3).softmax(-1)
    expected = joint.view(2, 5, 2, 3, 4, 3)[..., :2].transpose(2, 3)
    torch.testing.assert_close(null_softmax(logits, visible), expected)


def test_samples_are_read_where_they_lie():
    """A level whose features are the coordinates of its pixels: a query reads its own place, in every level."""
    maps = [pixel_centers(*shape) for shape in SHAPES[:2]]
    value = torch.cat(maps)[None, None, :, None]  # (1, 1, S, 1, 2)
    places = torch.tensor([[0.2, 0.7], [0.5, 0.5], [0.75, 0.3]])
    for level in range(2):
        weights = torch.zeros(1, 3, 1, 1, 2, 1)
        weights[..., level, :] = 1
        locations = places[None, :, None, None, None, None].expand(1, 3, 1, 1, 2, 1, 2)
        torch.testing.assert_close(deformable_reference(value, locations, weights, [8, 8, 4, 4])[0], places)
    assert sincos_2d(8, (2, 3)).shape == (6, 8) and len(sincos_2d(8, (2, 3)).unique(dim=0)) == 6
    fine = sincos_2d(8, (4, 4), base=(2, 2)).view(4, 4, 8)  # as released: of a map of 2 x 2
    assert fine[0].std(dim=0)[:4].max() < 1e-6 < fine[:, 0].std(dim=0)[0]  # rows first, then columns
    torch.testing.assert_close(fine[1:3, 1:3].mean((0, 1)), sincos_2d(8, (2, 2)).mean(0))


def test_offsets_are_pixels_of_the_base():
    """As released: offset * (level's size / base) / level's size, which is the same place of every level."""
    mmfs = MMFS(12, 16, **OPTIONS)
    features = torch.cat([pixel_centers(*shape) @ torch.eye(2, 16) for shape in SHAPES])[None, None]
    with torch.no_grad():
        for parameter in mmfs.parameters():
            parameter.zero_()
        mmfs.offsets.bias.view(2, 2, 2)[:] = torch.tensor([1.0, -1.5])
        mmfs.logits.bias.view(2, 4, 2)[:, :2] = 50.0  # the two large levels
        mmfs.logits.bias.view(2, 4, 2)[:, 2:] = -50.0
        mmfs.value.weight[:8] = mmfs.value.weight[8:] = torch.eye(8, 16)
        mmfs.output.weight[:] = torch.eye(12, 16)
    read = mmfs(torch.zeros(1, 1, 12), mmfs.values(features), torch.ones(1, 1, 1, dtype=torch.bool), SHAPES)
    torch.testing.assert_close(read[0, 0, :2], torch.tensor([0.5 + 1 / 8, 0.5 - 1.5 / 8]))


@pytest.mark.parametrize("kind", ["layer", "block", "mmfs"])
def test_gradients_are_those_of_finite_differences(kind):
    shapes, options = [(3, 2), (2, 2)], {"levels": 2, "base": 3, "heads": 2, "points": 2, "images": 2}
    features = torch.randn(2, 2, 10, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    visible = torch.tensor([[[1, 1], [1, 0], [0, 0]]] * 2, dtype=torch.bool)
    module = {"layer": GatedMMFS, "block": MMFSBlock, "mmfs": MMFS}[kind](4, 4, **options)
    module = trained(module).double()

    def run(hidden, features, *parameters):
        if kind == "block":
            hidden, mask = hidden.transpose(1, 2)[..., None], visible[:, 1]
        else:
            mask = visible
        values = {name: p for (name, _), p in zip(module.named_parameters(), parameters, strict=True)}
        call = partial(torch.func.functional_call, Whole(module), {f"module.{k}": v for k, v in values.items()})
        return call((hidden, features, mask, shapes))

    assert torch.autograd.gradcheck(run, (hidden, features, *module.parameters()), fast_mode=True)


class Whole(torch.nn.Module):
    """Values and forward of a module in one call."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, hidden, features, visible, shapes):
        return self.module(hidden, self.module.values(features), visible, shapes)


@torch.no_grad()
def test_a_layer_is_one_graph():
    hidden, features, visible = inputs()
    layer = trained(GatedMMFS(12, 16, **OPTIONS))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    value = layer.values(features)
    torch.testing.assert_close(compiled(hidden, value, visible, SHAPES), layer(hidden, value, visible, SHAPES))


def test_half_precision_is_near():
    hidden, features, visible = inputs()
    layer = trained(GatedMMFS(12, 16, **OPTIONS))
    expected = layer(hidden, layer.values(features), visible, SHAPES)
    layer.bfloat16()
    found = layer(hidden.bfloat16(), layer.values(features.bfloat16()), visible, SHAPES)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)


class Prebuilt:
    """Hugging Face's kernel on the CPU: one image, any number of levels."""

    def __init__(self, wrong=0.0):
        self.wrong = wrong

    def ms_deform_attn_forward(self, value, sizes, first, places, gains, step):
        assert len(value) % step == 0 and first.tolist() == [0, *sizes.prod(1).cumsum(0)[:-1].tolist()]
        shapes = sizes.flatten().tolist()
        return deformable_reference(value[:, None], places[:, :, None], gains[:, :, None], shapes) + self.wrong

    def ms_deform_attn_backward(self, value, sizes, first, places, gains, grad, step):
        inputs = [x.detach().requires_grad_() for x in (value, places, gains)]
        with torch.enable_grad():
            out = self.ms_deform_attn_forward(inputs[0], sizes, first, *inputs[1:], step)
        return torch.autograd.grad(out, inputs, grad)


def test_the_prebuilt_kernel_is_taken_only_where_it_is_exact(monkeypatch):
    cpu = torch.device("cpu")
    assert exact(Prebuilt(), cpu, deformable_reference) and not exact(Prebuilt(0.01), cpu, deformable_reference)
    monkeypatch.setattr(hub_deformable, "find_spec", lambda name: None)
    choice = select_kernel("deformable", torch.device("cpu"), torch.float32)
    assert choice.implementation == "torch" and "mgp5[hub-kernels]" in choice.why
    monkeypatch.setenv("MGP5_KERNELS", "hub")
    with pytest.raises(Mgp5Error, match="deformable cannot run so"):
        select_kernel("deformable", torch.device("cpu"), torch.float32)
    assert select_kernel("geglu", torch.device("cpu"), torch.float32).implementation == "torch"  # which has none
