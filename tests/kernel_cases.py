"""Every kernel against its PyTorch reference in float64; run by test_kernels.py, in a process of its own.

There TRITON_INTERPRET=1 runs kernels on the CPU, which must be set before they are imported; on a GPU they run as they
are. The interpreter is slow: real shapes are few, and tiles are made small where a kernel must take several.
"""

import pytest
import torch
from mgp5.kernels import adaln, deformable, geglu, group_norm, guided_step, layer_norm, registry, rms_norm, sum_map
from mgp5.kernels.group_norm_backward import frozen_norm, group_norm_backward, group_norm_backward_reference
from test_engines import NEAR, difference, smallest
from test_engines import draw as draw_images
from tiny_sd3 import tiny_sd3_vae, tiny_transformer

from mgp5 import engines
from mgp5.generators.flow import FlowSchedule
from mgp5.generators.sampler import sampler_table
from mgp5.generators.schedule import NoiseSchedule
from mgp5.generators.sd3 import StableDiffusion3

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Half an ulp of the result's type, or one where the interpreter cuts what a card rounds; and float32 arithmetic.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
FLOW = FlowSchedule()
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="kernels are not interpreted on a GPU")
TYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])


def draw(*shape, dtype=torch.float32, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (mean + torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def assert_equals(kernel, reference, *tensors, atol=1e-5, **options):
    """The kernel's results are the reference's on the same values in float64."""
    found = kernel(*tensors, **options)
    precise = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors]
    expected = reference(*precise, **options)
    for result, precise in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected)), strict=True):
        assert result.dtype == tensors[0].dtype
        rtol = TOLERANCES[result.dtype]
        torch.testing.assert_close(result.double(), precise, rtol=rtol, atol=atol)


@dtypes
@pytest.mark.parametrize(
    ("shape", "groups", "last"),
    [
        ((1, 4, 1, 1), 2, True),  # minimal
        ((2, 30, 5, 7), 3, True),  # groups of 10, as in SD's first blocks
        ((2, 30, 5, 7), 3, False),
        ((1, 128, 8, 8), 32, True),
        ((1, 60, 12, 13), 6, True),  # two kernels
        ((1, 8, 50), 4, False),  # a VAE's attention norms (B, C, T)
    ],
)
def test_group_norm(shape, groups, last, dtype, monkeypatch):
    monkeypatch.setattr(group_norm, "ONE_TILE", 8192)
    monkeypatch.setattr(group_norm, "MAX_SPLITS", 2)  # each program of the larger maps then takes several tiles
    x, (weight, bias) = draw(*shape, dtype=dtype, mean=2.0), draw(2, shape[1], dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    time = draw(shape[0], 3 * shape[1], dtype=dtype)[:, shape[1] : 2 * shape[1]]  # a slice of a table
    options = {"groups": groups, "eps": 1e-5}
    pair = group_norm.group_norm, group_norm.group_norm_reference
    assert_equals(*pair, x, weight, bias, silu=False, **options)
    assert_equals(*pair, x, weight, bias, silu=True, time=None if len(shape) == 3 else time, **options)
    assert group_norm.group_norm(x, weight, bias, silu=True, **options).movedim(1, -1).is_contiguous()
    grad, backward = draw(*shape, dtype=dtype, seed=1), (group_norm_backward, group_norm_backward_reference)
    assert_equals(*backward, grad, x, weight, bias, silu=False, **options)
    assert_equals(*backward, grad, x, weight, bias, silu=True, time=None if len(shape) == 3 else time, **options)


@dtypes
@pytest.mark.parametrize(
    ("shape", "beside", "groups"),
    [((1, 3, 1, 1), 1, 2), ((2, 20, 5, 7), 10, 3), ((3, 17, 12, 13), 43, 6), ((9, 6, 2, 3), 0, 2)],
)
def test_sum_group_norm(shape, beside, groups, dtype, monkeypatch):
    """The norm is that of the sum as it was written; each part may be missing."""
    monkeypatch.setattr(group_norm, "ONE_TILE", 8192)
    monkeypatch.setattr(group_norm, "MAX_SPLITS", 2)
    batch, channels, *sides = shape
    x, residual = draw(*shape, dtype=dtype, mean=2.0), draw(*shape, dtype=dtype, seed=1)
    offset = draw(batch, 2 * channels, dtype=dtype)[:, :channels]
    others = draw(batch, beside, *sides, dtype=dtype).to(memory_format=torch.channels_last) if beside else None
    weight, bias = draw(2, channels + beside, dtype=dtype)
    for parts in ((residual, offset, others), (None, offset[:1], others), (residual, None, others)):
        total, found = group_norm.sum_group_norm(x, *parts, weight, bias, groups, 1e-5, True)
        precise = [part if part is None else part.double() for part in (x, *parts, weight, bias)]
        expected, _ = group_norm.sum_group_norm_reference(*precise, groups, 1e-5, True)
        torch.testing.assert_close(total.double(), expected, rtol=TOLERANCES[dtype], atol=1e-5)
        expected = group_norm.group_norm_reference(total.double(), *precise[-2:], groups, 1e-5, True)
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCES[dtype], atol=1e-5)


@dtypes
@pytest.mark.parametrize(("shape", "factor"), [((1, 1, 1, 1), 2), ((3, 20, 5, 7), 2), ((9, 130, 3, 2), 1)])
def test_sum_map(shape, factor, dtype):
    x, residual = draw(*shape, dtype=dtype).to(memory_format=torch.channels_last), draw(*shape, dtype=dtype, seed=1)
    offset = draw(shape[0], 2 * shape[1], dtype=dtype)[:, shape[1] :]
    pair = sum_map.sum_map, sum_map.sum_map_reference
    for parts in ((None, None), (residual, offset), (None, offset[:1])):
        assert_equals(*pair, x, *parts, factor=factor)


@pytest.mark.parametrize(("channels", "size"), [(1280, 8), (320, 18)])
def test_group_norm_at_sizes_of_sd(channels, size):
    x, (weight, bias) = draw(1, channels, size, size, dtype=torch.bfloat16), draw(2, channels, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    options = {"groups": 32, "eps": 1e-5, "silu": True}
    assert_equals(group_norm.group_norm, group_norm.group_norm_reference, x, weight, bias, **options)


def test_group_norm_of_a_large_mean_and_of_oddly_lying_pixels():
    """E[x^2] - E[x]^2 would lose all digits of the first; the second cannot be read as one row of pixels."""
    weight, bias = draw(2, 8)
    for x in (draw(1, 8, 24, 24, mean=3000.0), draw(2, 8, 9, 12)[:, :, ::2, ::3]):
        found = group_norm.group_norm(x, weight, bias, 2, 1e-5, False)
        expected = group_norm.group_norm_reference(x.double(), weight.double(), bias.double(), 2, 1e-5, False)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@dtypes
@pytest.mark.parametrize("shape", [(1, 2), (3, 7, 34), (2, 9, 512), (20, 2560)])
def test_geglu(shape, dtype):
    assert_equals(geglu.geglu, geglu.geglu_reference, draw(*shape, dtype=dtype))


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (5, 3, 33), (2, 8, 256), (9, 320)])
def test_add_layer_norm(shape, dtype):
    x, residual = draw(*shape, dtype=dtype, mean=3.0), draw(*shape, dtype=dtype, seed=1)
    weight, bias = draw(2, shape[-1], dtype=dtype)
    assert_equals(layer_norm.layer_norm, layer_norm.layer_norm_reference, x, weight, bias, 1e-5)
    pair = layer_norm.add_layer_norm, layer_norm.add_layer_norm_reference
    for later in (None, weight):
        assert_equals(*pair, x, residual, weight, bias, 1e-5, later)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 5, 33), (2, 8, 256), (1, 3, 1536)])
def test_adaln(shape, dtype):
    batch, _, width = shape
    hidden, update = draw(*shape, dtype=dtype, mean=1.0), draw(*shape, dtype=dtype, seed=1)
    scale, shift, gate = draw(batch, 3 * width, dtype=dtype).chunk(3, dim=1)
    assert_equals(adaln.adaln, adaln.adaln_reference, hidden, scale, shift, 1e-6)
    assert_equals(adaln.gated_adaln, adaln.gated_adaln_reference, hidden, update, gate, scale, shift, 1e-6)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 24), (2, 7, 4, 64)])
def test_rms_norm(shape, dtype):
    query, key, _ = draw(*shape[:2], 3, *shape[2:], dtype=dtype).unbind(2)  # slices of a fused projection
    weights = draw(2, shape[-1], dtype=dtype)
    assert_equals(rms_norm.rms_norm, rms_norm.rms_norm_reference, query, key, *weights, 1e-6)


def points(images, dtype, batch=2, tokens=5, heads=2, width=12, levels=((4, 3), (2, 2)), number=3):
    """Inputs of deformable attention; some points lie beyond the edges, and the levels share their places."""
    pixels = sum(height * width for height, width in levels)
    value = draw(1, images, pixels, heads, width, dtype=dtype).expand(batch, -1, -1, -1, -1)
    places = 0.5 + 0.4 * draw(batch, tokens, images, heads, 1, number, 2)
    weights = draw(batch, tokens, images, heads, len(levels), number)
    return value, places.expand(-1, -1, -1, -1, len(levels), -1, -1), weights, [x for shape in levels for x in shape]


@pytest.mark.parametrize(
    ("images", "dtype"), [(0, torch.float32), (3, torch.float32), (1, torch.float16), (1, torch.bfloat16)]
)
def test_deformable(images, dtype):
    inputs = points(images, dtype, tokens=2)
    assert_equals(deformable.deformable, deformable.deformable_reference, *inputs)
    *tensors, shapes = inputs
    leaves = [x.double().requires_grad_() for x in tensors]
    expected = deformable.deformable_reference(*leaves, shapes)
    grad = draw(*expected.shape, dtype=dtype)
    expected = torch.autograd.grad(expected, leaves, grad.double())
    leaves = [x.detach().requires_grad_() for x in tensors]
    found = torch.autograd.grad(deformable.deformable(*leaves, shapes), leaves, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=max(1e-4, TOLERANCES[dtype]), atol=1e-4)


def test_elements_that_do_not_lie_side_by_side():
    """Columns of a transposed map are handled, or refused where a copy would cost what the kernel saves."""
    assert_equals(geglu.geglu, geglu.geglu_reference, draw(6, 5).T)
    x, (weight, bias) = draw(6, 5).T, draw(2, 6)
    assert_equals(layer_norm.add_layer_norm, layer_norm.add_layer_norm_reference, x, x, weight, bias, 1e-5)
    value, places, weights, shapes = points(2, torch.float32)
    value, weights = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (value, weights))
    places = places.flip(-1).contiguous().flip(-1).movedim(-1, 0).contiguous().movedim(0, -1)
    assert_equals(deformable.deformable, deformable.deformable_reference, value, places, weights, shapes)
    odd = draw(2, 8, 3).transpose(1, 2)
    assert_equals(adaln.adaln, adaln.adaln_reference, odd, draw(8, 2).T, draw(8, 2).T, 1e-6)
    with pytest.raises(ValueError, match="last stride 1"):
        rms_norm.rms_norm(odd[:, None], odd[:, None], weight, weight, 1e-6)
    with pytest.raises(ValueError, match="side by side"):
        group_norm.group_norm(draw(1, 4, 2, 2), weight[:4], bias[:4], 2, 1e-5, True, draw(4, 2).T[:1, :4])


def steps(name, dtype, shape, *, guided=True, last=True):
    """Buffers of a guided step as an engine keeps them; the history holds what an earlier run may have left."""
    table = sampler_table(name, NoiseSchedule(), 6)
    latents = draw(*shape)
    layout = torch.channels_last if last else torch.contiguous_format
    rows = guided_step.step_rows(table.coefficients, table.conversion, 7.5 if guided else 1.0)
    return {
        "latents": latents,
        "history": torch.full((table.history, *shape), torch.nan, device=DEVICE),
        "step": torch.zeros(2, dtype=torch.int32, device=DEVICE),
        "model_input": torch.zeros(2 * shape[0], *shape[1:], dtype=dtype, device=DEVICE).to(memory_format=layout),
        "rows": rows.float().to(DEVICE),
    }


@pytest.mark.parametrize(
    ("shape", "guided", "last", "types"),  # each type with each sampler, and with each shape
    [
        ((1, 1, 1, 1), True, False, [*TOLERANCES]),
        ((3, 4, 5, 7), True, True, [torch.float16, torch.bfloat16, torch.float32]),
        ((2, 4, 9, 16), False, True, [torch.bfloat16, torch.float32, torch.float16]),
    ],
)
@pytest.mark.parametrize(("place", "name"), enumerate(["ddim", "dpm++", "pndm"]))
def test_guided_steps(place, name, shape, guided, last, types):
    """Several in a row: the ring of kept predictions and the index on the device are part of it."""
    dtype = types[place]
    found = steps(name, dtype, shape, guided=guided, last=last)
    expected = {k: v.double() if k in ("latents", "history", "rows", "model_input") else v for k, v in found.items()}
    expected["step"] = found["step"].clone()
    for i in range(len(found["rows"])):
        prediction = draw((2 if guided else 1) * shape[0], *shape[1:], dtype=dtype, seed=i)
        prediction = prediction.to(memory_format=torch.channels_last) if last else prediction
        guided_step.guided_step(prediction=prediction, **found)
        guided_step.guided_step_reference(prediction=prediction.double(), **expected)
        assert found["step"].tolist() == expected["step"].tolist() == [i + 1, 0]
        for buffer in ("latents", "history"):
            torch.testing.assert_close(
                found[buffer].double(), expected[buffer], rtol=1e-4, atol=1e-4, equal_nan=buffer == "history"
            )
        inputs = found["latents"].to(dtype).repeat(2, 1, 1, 1)
        torch.testing.assert_close(found["model_input"], inputs, rtol=TOLERANCES[dtype], atol=0)


def test_what_a_guided_step_refuses():
    buffers = steps("dpm++", torch.float16, (1, 4, 6, 6))
    prediction = draw(2, 4, 6, 12)
    with pytest.raises(ValueError, match="evenly spaced"):
        guided_step.guided_step(prediction=prediction[..., :6], **buffers)
    with pytest.raises(ValueError, match="contiguous float32"):
        guided_step.guided_step(prediction=prediction, **buffers | {"latents": buffers["latents"].half()})


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_guided_step_in_a_cuda_graph():
    """One graph replays for all steps: index, row and ring slot are read on the device."""
    buffers = steps("pndm", torch.bfloat16, (2, 4, 64, 64))
    expected = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in buffers.items()}
    prediction, start = draw(4, 4, 64, 64, dtype=torch.bfloat16), buffers["latents"].clone()
    guided_step.guided_step(prediction=prediction, **buffers)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        guided_step.guided_step(prediction=prediction, **buffers)
    buffers["latents"].copy_(start)
    buffers["step"].zero_()
    for i in range(len(buffers["rows"])):
        prediction.copy_(draw(4, 4, 64, 64, dtype=torch.bfloat16, seed=i))
        graph.replay()
        guided_step.guided_step_reference(prediction=prediction, **expected)
    torch.testing.assert_close(buffers["latents"], expected["latents"], rtol=1e-4, atol=1e-4)


@interpreted
def test_what_triton_can_run_is_chosen():
    """In the interpreter it runs on a CPU; not in float64, and not rows that no tile holds."""
    device = torch.device("cpu")
    assert {choice.implementation for choice in registry.choices(device, torch.bfloat16)} == {"triton"}
    assert "20000 wide" in registry.select_kernel("adaln", device, torch.float32, width=20000).why
    assert "float64" in registry.select_kernel("geglu", device, torch.float64).why


@interpreted
@pytest.mark.parametrize("make", [smallest, lambda: StableDiffusion3(tiny_transformer(True), tiny_sd3_vae(), FLOW)])
def test_kernels_in_place(make):
    diffusion = make()
    before = draw_images(diffusion, 1, steps=1)
    image = diffusion.decode(before[-1])
    assert engines.apply(diffusion, "triton").name == "triton"
    diffusion.engine.graphed = True
    assert difference([draw_images(diffusion, 1, steps=1), diffusion.decode(before[-1])], [before, image]) < NEAR


@interpreted
@pytest.mark.parametrize("linear", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_frozen_unet_in_place_keeps_losses_and_gradients(linear):
    diffusion = smallest(use_linear_projection=linear)
    latents = draw(3, *diffusion.latent_shape(*[diffusion.native_size] * 2))

    def losses(checkpointing):
        diffusion.checkpointing(checkpointing)
        condition, seeded = draw(3, *diffusion.condition_shape).requires_grad_(), torch.Generator().manual_seed(0)
        loss = diffusion.loss(latents, condition, seeded, at_once=2)
        loss.sum().backward()
        return loss.detach(), condition.grad

    before = losses(False)
    assert engines.fuse_unet(diffusion.unet)
    assert diffusion.unet.conv_norm_out.forward.func is frozen_norm
    for found in (losses(False), losses(True)):
        for one, other in zip(found, before, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    diffusion.unet.requires_grad_()
    assert not engines.fuse_unet(diffusion.unet)  # kernels have no gradients of weights


def test_the_gradient_of_a_time_embedding():
    norm, seen = torch.nn.GroupNorm(3, 6, device=DEVICE).requires_grad_(False), draw(2, 6, 4, 3, seed=1)
    options = norm.weight, norm.bias, norm.num_groups, norm.eps, True
    x, time = draw(2, 6, 4, 3).requires_grad_(), draw(1, 6).requires_grad_()
    found = (frozen_norm(norm, x, True, time), group_norm.group_norm_reference(x, *options, time))
    one, other = (torch.autograd.grad(normed, (x, time), seen) for normed in found)
    for gradient, expected in zip(one, other, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
