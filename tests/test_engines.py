"""Engines against diffusers' own denoiser, on tiny models of the real classes."""

import copy
import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from mgp5.kernels import registry as kernels
from tiny import SIZE, WIDTH, conditions_of, save_pipeline, tiny_vae
from tiny_sd3 import save_sd3
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from mgp5 import engines
from mgp5.apps.open_model import set_backend
from mgp5.cli import main
from mgp5.engines.cuda_graph import GRAPHS
from mgp5.errors import Mgp5Error
from mgp5.generators import load_generator
from mgp5.generators.schedule import NoiseSchedule
from mgp5.generators.stable_diffusion import StableDiffusion

CPU = torch.device("cpu")
NEAR = 2e-5  # of float32 results, in units of their greatest value


def stable_diffusion(**config) -> StableDiffusion:
    """As Stable Diffusion 2 is made, unless told otherwise: linear projections, own numbers of heads; two deep."""
    torch.manual_seed(0)
    settings = {
        "sample_size": SIZE, "block_out_channels": (16, 32), "layers_per_block": 2, "transformer_layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH,
        "attention_head_dim": (2, 4), "use_linear_projection": True, "norm_num_groups": 8,
    }  # fmt: skip
    unet = UNet2DConditionModel(**settings | config)
    return StableDiffusion(unet, tiny_vae(), NoiseSchedule.from_config({"prediction_type": "v_prediction"}))


def smallest(**more) -> StableDiffusion:
    """One ResNet block of a size, two transformers: little to compile."""
    return stable_diffusion(
        block_out_channels=(16,), layers_per_block=1, transformer_layers_per_block=1,
        down_block_types=("DownBlock2D",), mid_block_type=None, up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2, **more,
    )  # fmt: skip


def generator_of(kind: str, folder):
    if kind == "v_prediction":
        return stable_diffusion()
    saved = save_pipeline(folder, kind) if kind == "epsilon" else save_sd3(folder, sd35=kind == "sd3.5")
    return load_generator(str(saved))


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "sd3", "sd3.5"])
def diffusion(request, tmp_path_factory):
    return generator_of(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture
def clean(diffusion):
    """The model without an engine, before and after."""
    yield diffusion
    engines.remove(diffusion)


def start(diffusion, seed: int, count: int = 1, **options):
    """A drawing that has not begun; conditions and noise belong to the seed."""
    conditions = conditions_of(diffusion, seed, count + 1)
    generators = [torch.Generator().manual_seed(seed + k) for k in range(count)]
    settings = {"steps": 3, "guidance": 3.0, "sampler": "euler"} | options
    return diffusion.draw(conditions[1:], conditions[:1], generators=generators, **settings)


def draw(diffusion, seed: int, count: int = 1, **options):
    return torch.stack(list(start(diffusion, seed, count, **options)))


def test_inputs_are_where_the_model_is(diffusion):
    """A device without memory refuses tensors of others, so this holds for GPUs too."""
    elsewhere = copy.deepcopy(diffusion).to("meta")
    for backend in (None, "eager"):
        if backend:
            engines.apply(elsewhere, backend)
        drawn = draw(elsewhere, 1, count=2, sampler="dpm++", steps=2)
        size = (diffusion.native_size,) * 2
        assert drawn.is_meta and drawn.shape == (2, 2, *diffusion.latent_shape(*size))


CALLS = [
    {"seed": 1},
    {"seed": 2},  # another condition
    {"seed": 1, "count": 2, "sampler": "dpm++", "steps": 4},
    {"seed": 1, "guidance": 1.0},
    {"seed": 5, "guidance": 1.0, "count": 2},
    {"seed": 3, "height": 8, "width": 16},
    {"seed": 1},
]


def all_calls(diffusion):
    calls = [*CALLS, {"seed": 4, "sampler": "pndm", "steps": 6}] if isinstance(diffusion, StableDiffusion) else CALLS
    return [draw(diffusion, **call) for call in calls]


@pytest.fixture(scope="module")
def before(diffusion):
    """What all calls draw without an engine."""
    return all_calls(diffusion)


def difference(found, expected) -> float:
    """The greatest difference of several results, in units of the greatest value of each; NaN stays."""
    pairs = zip(found, expected, strict=True)
    return float(torch.stack([(one - other).abs().max() / other.abs().max() for one, other in pairs]).max())


def test_eager_draws_the_same_and_comes_off_again(clean, before):
    weights = {name: (p.clone(), p.stride()) for name, p in clean.denoiser.named_parameters()}
    names = list(clean.state_dict())
    assert engines.apply(clean, "eager").name == "eager" and list(clean.state_dict()) == names
    found = all_calls(clean)
    assert difference(found, before) < NEAR and {latents.dtype for latents in found} == {torch.float32}
    engines.remove(clean)
    assert all(torch.equal(one, other) for one, other in zip(all_calls(clean), before, strict=True))
    for name, p in clean.denoiser.named_parameters():
        assert torch.equal(p, weights[name][0]) and p.stride() == weights[name][1]


def test_whole_steps_draw_the_same(clean, before):
    """The code of a CUDA graph, without a graph: indices and history on the device, buffers used again."""
    engines.apply(clean, "eager")
    clean.engine.graphed = True
    assert difference(all_calls(clean), before) < NEAR
    steps = clean.engine.graphs.steps
    assert len(steps) == GRAPHS and not any(step.states for step in steps)


@pytest.mark.parametrize("whole", [False, True])
def test_two_images_at_a_time_do_not_see_each_other(clean, whole):
    apart = [draw(clean, seed) for seed in (1, 2)]
    engines.apply(clean, "eager")
    clean.engine.graphed = whole
    together = zip(start(clean, 1), start(clean, 2), strict=True)
    assert difference([torch.stack(steps) for steps in zip(*together, strict=True)], apart) < NEAR


def test_constant_work_is_done_once(clean):
    """Projections of the condition and of time run once per image, whatever the number of steps."""
    engines.apply(clean, "eager")
    names = ("attn2.to_k", "attn2.to_v", "time_emb_proj", "time_embedding", "time_text_embed", "context_embedder")
    names = names if isinstance(clean, StableDiffusion) else ("norm1.linear", *names[4:])
    constant = {name: module for name, module in clean.denoiser.named_modules() if name.endswith(names)}
    others = dict(clean.engine.model.model.named_modules())
    assert len(constant) > 2 and not any(module in others.values() for module in constant.values())
    calls = Counter()
    handles = [module.register_forward_hook(lambda one, *_: calls.update([one])) for module in constant.values()]
    draw(clean, 1, steps=5)
    for handle in handles:
        handle.remove()
    assert set(calls.values()) == {1} and len(calls) >= len(constant) - 1


def test_training_does_not_see_an_engine(clean):
    def loss():
        generator = torch.Generator().manual_seed(5)
        latents = torch.randn(2, *clean.latent_shape(16, 16), generator=generator)
        condition = torch.randn(2, *clean.condition_shape, generator=generator).requires_grad_()
        value = clean.loss(latents, condition, generator).sum()
        value.backward()
        return value.detach(), condition.grad

    before = loss()
    engines.apply(clean, "eager")
    draw(clean, 1)
    after = loss()
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


def test_convolutions_that_are_not_packed(monkeypatch):
    """What a large model on a CPU takes."""
    monkeypatch.setattr("mgp5.engines.engine.SMALL", 0)
    diffusion = stable_diffusion()
    before = draw(diffusion, 1)
    engines.apply(diffusion, "eager")
    assert diffusion.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert difference([draw(diffusion, 1)], [before]) < NEAR
    engines.remove(diffusion)
    assert torch.equal(draw(diffusion, 1), before)


def test_choices_on_a_cpu(monkeypatch, tmp_path):
    assert engines.select_backend("auto", CPU, torch.float32).name == "eager"
    with pytest.raises(Mgp5Error, match=r"triton cannot run here: .*(GPU|not installed)"):
        engines.select_backend("triton", CPU, torch.float32)
    with pytest.raises(Mgp5Error, match="no backend 'fast', expected auto, eager, compile, triton"):
        engines.select_backend("fast", CPU, torch.float32)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Mgp5Error, match="compile cannot run here: there is no C\\+\\+ compiler"):
        engines.select_backend("compile", CPU, torch.float32)


def test_a_denoiser_that_is_not_known():
    diffusion = stable_diffusion(resnet_time_scale_shift="scale_shift")
    with pytest.raises(Mgp5Error, match="unusual time embeddings"):
        engines.apply(diffusion, "eager")
    choice = engines.apply(diffusion, "auto")
    assert choice.name is None and "unusual time embeddings" in choice.why and diffusion.engine is None


def test_compile_is_one_graph_for_all_steps_and_images(monkeypatch, tmp_path):
    """Traced as for `compile`, without its minute of C++: no break, and nothing traced again for what is the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    diffusion = smallest()
    calls = [{"seed": 1}, {"seed": 2}, {"seed": 1, "steps": 3, "guidance": 3.5, "sampler": "dpm++"}]
    before = [draw(diffusion, **call) for call in calls]
    assert str(tmp_path / "mgp5" / "inductor") in engines.apply(diffusion, "compile").why
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mgp5" / "inductor")
    diffusion.engine.model.model.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert difference([draw(diffusion, **call) for call in calls], before) < NEAR
    torch.compiler.reset()


@pytest.mark.slow
def test_compile_draws_the_same(clean, before):
    engines.apply(clean, "compile")
    assert difference(all_calls(clean), before) < NEAR
    torch.compiler.reset()


def run(*words: str):
    return CliRunner().invoke(main, ["chat", "--message", "A fox.", "--steps", "1", "--seed", "0", *words])


def test_backend_on_the_command_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused = run("--backend", "triton", "--model", "demo", "--out", "talk")
    assert refused.exit_code == 2 and "--backend triton cannot run here" in refused.stderr
    assert not list(tmp_path.iterdir())
    told = run("--set", "max_tokens=0", "--set", "image=always", "--show", "off")
    assert told.exit_code == 0 and "backend eager: the fastest" in told.stderr, told.stderr
    quiet = run("--set", "max_tokens=0", "--set", "image=never", "--json")
    assert quiet.exit_code == 0 and "backend" not in quiet.stderr


def test_compiled_code_is_kept_for_the_next_run(tmp_path, monkeypatch):
    """Importing the compiler sets the variable to a temporary folder, which does not count as told."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for told, kept in (
        (None, tmp_path / "mgp5" / "inductor"),
        (default_cache_dir(), tmp_path / "mgp5" / "inductor"),
        (str(tmp_path / "mine"), tmp_path / "mine"),
    ):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if told:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", told)
        engines.keep_compiled()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept)


@pytest.mark.parametrize("refusal, name", [("", "triton"), ("compute capability 6.1, it needs 7.5", "eager")])
def test_on_a_gpu_nothing_is_compiled_unless_asked_for(refusal, name, monkeypatch):
    """What `auto` decides for a card that is not here, and that it decides without a trial."""
    monkeypatch.setattr(kernels, "_triton_refusal", lambda device, dtype: refusal)
    choice = engines.select_backend("auto", torch.device("cuda"), torch.bfloat16)
    assert (choice.name, choice.compiles) == (name, False) and (not refusal or refusal in choice.why)
    monkeypatch.setattr(engines, "find_spec", lambda name: True)
    assert engines.select_backend("compile", torch.device("cuda"), torch.bfloat16).compiles


@pytest.mark.parametrize("name", [None, "eager", "triton", "onnx", "trt", "compile"])
def test_tokens_are_compiled_for_who_asked_for_it(name, monkeypatch):
    """Where the head has a denoiser: whatever engine draws, on any device."""
    monkeypatch.setattr("mgp5.export.cache.apply", lambda *args: engines.BackendChoice(name))
    monkeypatch.setattr(engines, "keep_compiled", lambda: None)
    model = SimpleNamespace(
        head=SimpleNamespace(generator=stable_diffusion()), backbone=SimpleNamespace(device=CPU, lm_head=None)
    )
    set_backend(model, "auto")
    assert model.backbone.compiled == (name == "compile")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "compile", "triton"])
def test_engines_on_a_gpu(clean, before, backend):
    clean.to("cuda")
    try:
        engines.apply(clean, backend)
        for found, expected in zip(all_calls(clean), before, strict=True):
            torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)
    finally:
        engines.remove(clean)
        clean.to("cpu")
