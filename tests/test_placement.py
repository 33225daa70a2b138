"""Memory modes: the estimate against real models, what is chosen when, and that no weight is used while it waits."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from PIL import ImageChops, ImageStat
from tiny import allocated, picture, same_pixels
from tiny_training import fresh

from mgp5 import Conversation, Image, engines
from mgp5.apps.open_model import load
from mgp5.cli import main
from mgp5.device import HostMemory
from mgp5.errors import Mgp5Error
from mgp5.events import Finished
from mgp5.files import GiB
from mgp5.hub import resolve
from mgp5.inference.reply import generate
from mgp5.loading import build
from mgp5.memory.generation import first_plan_that_fits, footprint, select_memory_plan
from mgp5.memory.offload import Offload, Plan, memory_plans, place
from mgp5.options import reply_options

CPU = torch.device("cpu")
SMALLEST = Plan(quantize="4bit", offload=True, tiling=True)


@cache
def needs(name, **options):
    return footprint(resolve(name), **options)


def host(monkeypatch, free):
    for module in ("generation", "host"):
        monkeypatch.setattr(f"mgp5.memory.{module}.host_memory", lambda: HostMemory(64 * GiB, int(free), True))


@cache
def demo():
    return load("demo", backend=None)


def test_a_7b_model_fits_the_cards_it_is_meant_for():
    told = needs("llava-1.5-7b+sd-2.1-base")
    assert (told.size, told.tokens) == ((512, 512), 400 + 5 * 576)
    assert 17 * GiB < told.total(Plan()) < 24 * GiB  # bf16 without tricks
    assert told.total(Plan(quantize="4bit")) < 12 * GiB
    assert told.total(SMALLEST) < 8 * GiB
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert told.quantized["4bit"] == pytest.approx(told.weights["LLM"] - layers * (2 - 4.127 / 8), rel=1e-3)
    assert told.cache == 32 * 2 * 4096 * 4096 * 2  # keys and values, room for the next power of two


@pytest.mark.slow  # 8 seconds for one more model
def test_a_7b_model_with_a_t5_fits_them_too():
    told = needs("qwen2.5-vl-7b+sd-3")
    assert told.weights["text encoders"] > 10 * GiB  # of 4.7 billion parameters
    assert told.total(Plan()) < 24 * GiB and told.total(SMALLEST) < 8 * GiB


def test_images_that_are_drawn_at_once_are_planned_for():
    """They are decoded one by one."""
    one, eight = (needs("demo", images=images) for images in (1, 8))
    assert eight.activations == one.activations | {"draw": 8 * one.activations["draw"]}
    assert eight.total(Plan()) > one.total(Plan())


def test_weights_are_those_of_the_loaded_model():
    told, model = needs("demo", dtype=torch.float32), demo()
    model.head.generator.read_text_encoders()
    tensors = [*model.parameters(), *model.buffers()]
    assert sum(told.parameters.values()) == sum(tensor.numel() for tensor in tensors)
    assert sum(told.weights.values()) == sum(tensor.nbytes for tensor in tensors)
    assert told.weights["denoiser"] == sum(p.nbytes for p in model.head.generator.unet.parameters())


def test_activations_weigh_what_the_allocator_sees():
    from mgp5.inference.decoder import Decoder

    told, model = needs("demo", dtype=torch.float32, tokens=300), demo()
    backbone, diffusion = model.backbone, model.head.generator
    decoder, latents = Decoder(backbone), torch.zeros(1, *diffusion.latent_shape(128, 128))
    condition = torch.zeros(1, *diffusion.condition_shape)

    @torch.inference_mode()
    def read():
        decoder.feed([0], backbone.embed(torch.zeros(1, 300, dtype=torch.long), []))

    @torch.inference_mode()
    def draw():
        list(diffusion.draw(condition, condition, steps=2, generators=[torch.Generator()]))

    assert told.cache + told.activations["read"] == pytest.approx(allocated(read), rel=0.02)
    assert told.activations["draw"] == pytest.approx(allocated(draw), rel=0.1)
    # Convolutions may copy what they take and give: on a CPU, those of this VAE copy less.
    assert 0.7 * told.activations["decode"] < allocated(lambda: diffusion.decode(latents)) < told.activations["decode"]
    assert told.activations["tiles"] == told.activations["decode"]  # no picture above 512 pixels


def test_auto_takes_the_mildest_plan_that_fits_and_text_encoders_take_no_gpu_memory(monkeypatch):
    host(monkeypatch, 64 * GiB)
    told = needs("llava-1.5-7b+sd-2.1-base")
    sizes = {"read": GiB // 2, "draw": GiB, "decode": 3 * GiB, "tiles": GiB // 2}  # of larger images
    told = replace(told, activations=sizes)
    more = replace(told, weights=told.weights | {"text encoders": 10 * GiB})
    assert more.total(Plan()) == told.total(Plan())
    # The LLM is larger than any image: with offloading, tiles do not matter.
    plans = [plan for plan in memory_plans() if not (plan.offload and plan.tiling)]
    sizes = [told.total(plan) for plan in plans]
    assert all(more > less for more, less in pairwise(sizes))
    assert told.total(memory_plans()[-1]) == sizes[-1]
    for plan, size in zip(plans, sizes, strict=True):
        chosen = first_plan_that_fits(told, int(size) + 1)
        assert replace(chosen, why="") == plan and f"{plan.name}, about {size / GiB:.1f} GiB" in chosen.why
    with pytest.raises(Mgp5Error, match=r"takes about \d\.\d GiB of the GPU at least .*4\.0 GiB are free"):
        first_plan_that_fits(told, 4 * GiB)
    assert first_plan_that_fits(told, 8 * GiB, "4bit").quantize == "4bit"
    with pytest.raises(Mgp5Error, match="offload"):
        first_plan_that_fits(told, 8 * GiB, "8bit")  # layers of 8 bits stay on the GPU
    assert told.total(Plan(quantize="8bit", offload=True)) > told.quantized["8bit"] + told.weights["denoiser"]


def test_the_machines_own_memory_is_respected(monkeypatch):
    told = needs("llava-1.5-7b+sd-2.1-base")
    everything = sum(size for part, size in told.weights.items() if part != "text encoders")
    assert told.host(Plan()) == (everything, 0, 0)
    bits = Plan(quantize="4bit", offload=True)  # bitsandbytes reads to the GPU; what waits comes back
    stays = sum(told.weights[part] for part, phase in told.phases_of.items() if phase == "always")
    waits = sum(told._weights(bits).values()) - told.weights["text encoders"] - stays
    assert told.host(bits) == (everything - told.weights["LLM"], waits, 0)
    host(monkeypatch, 1.01 * everything)
    assert first_plan_that_fits(told, 40 * GiB) == replace(Plan(), why=first_plan_that_fits(told, 40 * GiB).why)
    host(monkeypatch, 0.9 * everything)
    assert first_plan_that_fits(told, 40 * GiB).name == "LLM in 4 bits"  # it would fit the GPU as it is
    assert first_plan_that_fits(told, None).name == "LLM in 4 bits"  # on a CPU, with activations
    host(monkeypatch, GiB)
    with pytest.raises(Mgp5Error, match=r"this machine's memory at least .* 1.0 GiB are free of the 64.0 that"):
        first_plan_that_fits(told, None)
    with pytest.raises(Mgp5Error, match=r"takes about \d\.\d GiB of this machine's memory at least"):
        first_plan_that_fits(told, 40 * GiB)


@pytest.mark.parametrize("memory", ["auto", "low", "full"])
def test_a_load_that_cannot_fit_is_refused_before_it_begins(monkeypatch, memory):
    host(monkeypatch, GiB // 50)
    monkeypatch.setattr("mgp5.loading.load_backbone", lambda *_: pytest.fail("it reads weights"))
    with pytest.raises(Mgp5Error, match=r"demo takes (about )?0\.\d GiB of this machine's memory .* 0\.0 GiB are free"):
        load("demo", memory=memory)


def test_modes_where_there_is_nothing_to_choose():
    parts = resolve("demo")
    for memory in ("auto", "full"):
        assert select_memory_plan(memory, parts, CPU, torch.float32, "8bit") == Plan(quantize="8bit")
    low = select_memory_plan("low", parts, CPU, torch.float32)
    assert replace(low, why="") == Plan(tiling=True) and "nowhere to move" in low.why
    on_gpu = select_memory_plan("low", parts, torch.device("cuda"), torch.bfloat16)
    assert replace(on_gpu, why="") == SMALLEST
    assert select_memory_plan("low", parts, torch.device("cuda"), torch.bfloat16, "8bit").quantize == "8bit"
    assert (on_gpu.engine("auto"), on_gpu.engine(None), Plan().engine("triton")) == ("eager", None, "triton")
    with pytest.raises(Mgp5Error, match="--backend triton needs weights that stay"):
        on_gpu.engine("triton")
    with pytest.raises(Mgp5Error, match="no memory mode 'most'"):
        load("demo", memory="most")


def told(model):
    """Text and images of a reply to an image, then of one to text."""
    talk, found = Conversation().add("user", Image(pixels=picture("blue")), "a fox"), []
    for turn in range(2):
        options = reply_options(seed=turn, steps=2, max_tokens=4, image="always", max_images=1)
        (reply,) = (e.message for e in generate(model, talk, options) if isinstance(e, Finished))
        talk = talk.add("assistant", *reply.content).add("user", "and then")
        found.append((reply.text, [image.load() for image in reply.images]))
    return found


def alike(one, other):
    """Whether images differ by less than rounding on a GPU makes of them."""
    return max(ImageStat.Stat(ImageChops.difference(one, other)).mean) < 1


def assert_told_alike(one, other, same=same_pixels):
    """The same texts, and one image each, which are the same."""
    for (text, images), (others_text, others) in zip(told(one), told(other), strict=True):
        assert text == others_text and len(images) == len(others) == 1 and same(images[0], others[0])


@contextmanager
def watched(offload):
    """Fails when a module runs whose weights wait; collects the phases in which modules ran."""
    phases = []

    def look(module, _):
        ours = type(module).__module__.startswith("mgp5.engines")  # reads weights of diffusers' modules
        for tensor in (*module.parameters(recurse=ours), *module.buffers(recurse=ours)):
            waits = offload._waiting.get(id(tensor))
            if waits is not None and waits.numel():
                assert tensor.data_ptr() != waits.data_ptr(), f"{type(module)} in {offload.phase}"
                if phases[-1:] != [offload.phase]:
                    phases.append(offload.phase)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield phases
    finally:
        hook.remove()


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("generator", ["v_prediction", "sd3"])
def test_parts_are_there_when_they_compute_and_only_then(mllm_folder, generator_folder, generator, backend):
    """SD 3 has a buffer that the engine's modules share; on a CPU a copy of the weights stands for those on a GPU."""
    plain, moved = (fresh(mllm_folder, generator_folder(generator)) for _ in range(2))
    offload = Offload(moved, CPU)
    for model in (plain, moved):
        if backend:
            engines.apply(model.head.generator, backend)
    assert moved.device is offload.device and moved.head.generator.device is offload.device
    with watched(offload) as phases:
        assert_told_alike(moved, plain)
    assert phases == ["encode", "read", "draw", "decode", "read"] * 2  # behind a picture the reply may go on
    for name, part in offload.parts.items():
        where = {t.data_ptr() == offload._waiting[id(t)].data_ptr() for t in part if t.numel()}
        assert where == {name != "read"}
    assert not any(t.is_inference() for t in (*moved.parameters(), *moved.buffers()))


def test_others_may_compute_between_two_steps(model):
    offload = Offload(model, CPU)
    condition = torch.zeros(1, *model.head.generator.condition_shape)
    steps = model.head.generator.draw(condition, condition, steps=3, generators=[torch.Generator()])
    with watched(offload) as phases:
        for _ in steps:
            model.backbone.logits(torch.zeros(1, model.backbone.width))
    assert phases == ["draw", "read"] * 3


def test_an_llm_of_few_bits_moves_too_and_8_bits_stay(llava_folder, diffusion_folder):
    pytest.importorskip("bitsandbytes")
    for kind in ("4bit", "8bit"):
        models = []
        for _ in range(2):
            torch.manual_seed(1)
            models.append(build(str(llava_folder), str(diffusion_folder), num_vokens=4, quantize=kind))
        plan = Plan(quantize=kind, offload=True)
        offload = place(models[1], plan, CPU)
        assert ("read" in offload.parts) == (kind == "4bit")
        assert_told_alike(*models)


def test_large_pictures_are_decoded_in_tiles_and_others_are_not(model):
    noise = torch.randn(1, *model.head.generator.latent_shape(160, 128), generator=torch.Generator().manual_seed(0))
    whole = [model.head.generator.decode(part) for part in (noise[..., :64, :], noise)]
    place(model, Plan(tiling=True), CPU)
    tiles = [model.head.generator.decode(part) for part in (noise[..., :64, :], noise)]
    assert torch.equal(whole[0], tiles[0])
    assert not torch.equal(whole[1], tiles[1])
    torch.testing.assert_close(whole[1], tiles[1], rtol=0, atol=0.2)


def test_the_command_line_says_what_it_does(tmp_path):
    (tmp_path / "scenes.txt").write_text("a fox in the rain")
    command = ["story", "--text", str(tmp_path / "scenes.txt"), "--scenes", "0", "--steps", "1", "--memory", "low"]
    command += ["--backend", "eager", "--out", str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "memory low: VAE tiling only, as on a CPU there is nowhere to move parts to\n" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [Plan(), Plan(offload=True, tiling=True), SMALLEST], ids=lambda plan: plan.name)
def test_a_gpu_takes_no_more_than_was_told(plan):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, options = torch.cuda.memory_reserved(), {"dtype": torch.bfloat16, "device": "cuda", "backend": "eager"}
    moved = load("demo", memory=plan, **options)
    told(moved)
    assert torch.cuda.max_memory_reserved() - before < needs("demo").total(plan)
    assert_told_alike(moved, load("demo", memory=replace(plan, offload=False), **options), same=alike)
