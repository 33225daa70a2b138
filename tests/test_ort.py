"""The demo by ONNX Runtime, as `auto` draws it on a CPU: the user's own store, and the same pictures as by PyTorch."""

from __future__ import annotations

import pytest
import torch
from mgp5.export.proof import psnr

import mgp5
from mgp5 import engines
from mgp5.engines.exported import ExportedEngine
from mgp5.errors import Mgp5Error


@pytest.fixture(scope="module")
def demo():
    return mgp5.load("demo").diffusion


def draw(diffusion, **options):
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(2, *diffusion.condition_shape, generator=generator)
    generators = [torch.Generator().manual_seed(1)]
    *_, latents = diffusion.draw(condition[:1], condition[1:], steps=4, generators=generators, **options)
    return diffusion.decode(latents) / 2 + 0.5


def test_auto_draws_the_demo_by_onnx_runtime(demo):
    assert isinstance(demo.engine, ExportedEngine)
    found, shortened = draw(demo), draw(demo, reuse=2)  # layers inside a file cannot be left out: PyTorch does that
    engines.apply(demo, "eager")
    assert psnr(draw(demo), found) > 80 and psnr(draw(demo, reuse=2), shortened) > 80


def test_a_gpu_needs_files_of_its_own(demo):
    with pytest.raises(Mgp5Error, match="nothing is exported for meta"):
        from mgp5.engines.exported import put_on

        put_on(demo.to("meta"), None)
