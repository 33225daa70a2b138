"""The demo by ONNX Runtime, as `auto` draws it on a CPU: the user's cache, and the same images as by PyTorch."""

import pytest
import torch
from mgp5.export.cache import fill
from mgp5.export.parity import psnr

import mgp5
from mgp5 import engines
from mgp5.engines.exported import ExportedEngine


def draw(generator, **options):
    rng = torch.Generator().manual_seed(0)
    condition = torch.randn(2, *generator.condition_shape, generator=rng)
    *_, latents = generator.draw(condition[:1], condition[1:], steps=4, generators=[rng], **options)
    return generator.decode(latents) / 2 + 0.5


@pytest.mark.slow
def test_auto_draws_the_demo_by_onnx_runtime():
    fill("demo", lambda line: None)  # as `mgp5 export --cache`
    generator = mgp5.load("demo").head.generator
    assert isinstance(generator.engine, ExportedEngine)
    image, shortened = draw(generator), draw(generator, reuse=2)
    engines.apply(generator, "eager")
    assert psnr(draw(generator), image) > 80 and psnr(draw(generator, reuse=2), shortened) > 80
