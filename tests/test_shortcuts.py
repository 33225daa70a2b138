"""Opt-in shortcuts of denoising that change the image: guidance dropped late, deep features used again."""

import json
from contextlib import contextmanager

import pytest
import torch
from click.testing import CliRunner
from test_engines import NEAR, difference, draw, generator_of, smallest, stable_diffusion, start

from mgp5 import engines
from mgp5.cli import main
from mgp5.errors import Mgp5Error
from mgp5.generators.stable_diffusion import StableDiffusion


@pytest.fixture(scope="module", params=["v_prediction", "sd3.5"])
def diffusion(request, tmp_path_factory):
    return generator_of(request.param, tmp_path_factory.mktemp("model"))


def attach(diffusion, way: str) -> None:
    engines.remove(diffusion)
    if way != "plain":
        engines.apply(diffusion, "eager")
        diffusion.engine.graphed = way == "whole"


@pytest.fixture(params=["plain", "precomputed", "whole"])
def way(request, diffusion):
    attach(diffusion, request.param)
    yield request.param
    engines.remove(diffusion)


@contextmanager
def hooked(module, hook):
    handle = module.register_forward_pre_hook(hook)
    yield
    handle.remove()


def test_from_all_of_the_guidance_to_none(diffusion, way):
    call = {"seed": 1, "count": 2, "steps": 3, "sampler": "dpm++"}
    assert torch.equal(draw(diffusion, guidance_until=1.0, **call), draw(diffusion, **call))
    assert torch.equal(draw(diffusion, guidance_until=0.0, **call), draw(diffusion, **call | {"guidance": 1.0}))
    once = draw(diffusion, guidance_until=0.4, **call)
    assert torch.equal(once[0], draw(diffusion, **call)[0]) and not torch.equal(once[1], draw(diffusion, **call)[1])


def test_steps_without_guidance_run_half_the_rows(diffusion, way):
    rows = []
    module = diffusion.engine.model.model if diffusion.engine else diffusion.denoiser
    with hooked(module, lambda _, args: rows.append(len(args[0]))):
        draw(diffusion, 1, count=2, steps=5, guidance_until=0.6)
    assert rows == [4, 4, 4, 2, 2]


def test_engines_drop_guidance_alike(diffusion):
    calls = [{"seed": 1, "count": 2}, {"seed": 2, "count": 2}, {"seed": 2, "guidance_until": 0.2}, {"seed": 1}]
    drawn = []
    for way in ("plain", "precomputed", "whole"):
        attach(diffusion, way)
        drawn.append([draw(diffusion, **{"steps": 5, "sampler": "dpm++", "guidance_until": 0.6} | c) for c in calls])
    engines.remove(diffusion)
    assert all(difference(other, drawn[0]) < NEAR for other in drawn[1:])


class DeepCache:
    """DeepCache by a hook on diffusers' own UNet: everything runs, and the last layer is given what was kept."""

    def __init__(self, reuse: int) -> None:
        self.reuse, self.step, self.kept = reuse, 0, None

    def __call__(self, resnet, args):
        x, time = args
        width = x.shape[1] - resnet.out_channels  # in these UNets the skip connection is as wide as the output
        if self.step % self.reuse == 0:
            self.kept = x[:, :width]
        self.step += 1
        return torch.cat([self.kept[-len(x) :], x[:, width:]], dim=1), time


CALLS = [
    {"seed": 1, "reuse": 2, "count": 2},
    {"seed": 2, "reuse": 3, "sampler": "dpm++"},
    {"seed": 3, "reuse": 2, "sampler": "pndm", "guidance_until": 0.5},
    {"seed": 1, "reuse": 2, "guidance": 1.0},
    {"seed": 1, "reuse": 9, "height": 8, "width": 16},
]


@pytest.mark.parametrize("make", [stable_diffusion, smallest])
@pytest.mark.parametrize("way", ["precomputed", "whole"])
def test_deep_features_are_used_again(make, way):
    diffusion = make()
    before, expected = draw(diffusion, 1), []
    for call in CALLS:
        settings = {"steps": 5} | call
        with hooked(diffusion.unet.up_blocks[-1].resnets[-1], DeepCache(settings.pop("reuse"))):
            expected.append(draw(diffusion, **settings))
    attach(diffusion, way)
    assert difference([draw(diffusion, **{"steps": 5} | call) for call in CALLS], expected) < NEAR
    assert difference([draw(diffusion, 1)], [before]) < NEAR
    engines.remove(diffusion)
    assert torch.equal(draw(diffusion, 1), before)


@pytest.mark.parametrize("way", ["precomputed", "whole"])
def test_deep_blocks_run_in_one_of_so_many_steps(way):
    diffusion, ran = stable_diffusion(), []
    attach(diffusion, way)
    nested = diffusion.engine.model.model
    with (
        hooked(nested.resnet, lambda *_: ran.append("outer")),
        hooked(nested.inner.mid_block, lambda *_: ran.append("deep")),
        hooked(nested.inner.down_blocks[0], lambda *_: ran.append("down")),
    ):
        draw(diffusion, 1, steps=4, reuse=2)
    assert ran == ["down", "deep", "outer", "outer"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "compile", "triton"])
def test_shortcuts_on_a_gpu(backend):
    diffusion = stable_diffusion()
    attach(diffusion, "precomputed")
    before = [draw(diffusion, **{"steps": 5} | call) for call in CALLS]
    engines.remove(diffusion)
    engines.apply(diffusion.to("cuda"), backend)
    for call, expected in zip(CALLS, before, strict=True):
        torch.testing.assert_close(draw(diffusion, **{"steps": 5} | call).cpu(), expected, rtol=2e-2, atol=2e-2)


def test_what_cannot_use_features_again(diffusion):
    engines.remove(diffusion)
    with pytest.raises(Mgp5Error, match="without an engine"):
        start(diffusion, 1, reuse=2)
    engines.apply(diffusion, "eager")
    if not isinstance(diffusion, StableDiffusion):
        with pytest.raises(Mgp5Error, match="reuse 2 of a SD3Transformer2DModel by an engine, expected a UNet"):
            start(diffusion, 1, reuse=2)
    engines.remove(diffusion)


@pytest.mark.slow
def test_each_kind_of_step_is_compiled_once():
    """Traced as for `compile`: guided or not, whole or not, and nothing again for another image."""
    diffusion = smallest()
    call = {"steps": 4, "guidance_until": 0.5, "reuse": 2}
    engines.apply(diffusion, "eager")
    before = [draw(diffusion, seed, **call) for seed in (1, 2)]
    diffusion.engine.model.model.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    first = draw(diffusion, 1, **call)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert difference([first, draw(diffusion, 2, **call)], before) < NEAR
    torch.compiler.reset()


def test_shortcuts_on_the_command_line(tmp_path):
    def run(words: str):
        return CliRunner().invoke(main, ["chat", "--message", "A fox.", "--seed", "0", "--show", "off", *words.split()])

    for words, found in (
        ("--guidance-until nan --set reuse=0", "guidance_until is nan, expected 0 to 1"),
        ("--reuse 0", "Invalid value for '--reuse'"),
        ("--set reuse=0", "reuse is 0, expected 1 or more"),
    ):
        done = run(words)
        assert done.exit_code == 2 and found in done.stderr and done.stderr.count("\n") == 1
    words = f"--set max_tokens=0 --set image=always --steps 2 --out {tmp_path / 'talk'} --backend eager --json"
    done = run(f"{words} --guidance-until 0.5 --reuse 2")
    assert done.exit_code == 0, done.stderr
    (image,) = (event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "image")
    assert image["meta"]["guidance_until"] == 0.5 and image["meta"]["reuse"] == 2
