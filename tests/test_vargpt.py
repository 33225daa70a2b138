"""The head of VARGPT: scales through the LLM, its stages of training, replies with text and images in turn."""

from dataclasses import replace

import pytest
import torch
from replies import after_text, check_together, numbers, reply, train_and_load
from tiny import picture

from mgp5 import Conversation, Image
from mgp5.config import LoraConfig
from mgp5.errors import Mgp5Error
from mgp5.events import ImageDone, ImageStep
from mgp5.generators.var import VARConfig
from mgp5.inference.reply import generate
from mgp5.inference.session import Session
from mgp5.loading import build
from mgp5.memory.offload import Offload
from mgp5.options import VARGPTOptions, reply_options
from mgp5.training.batch import Collator
from mgp5.training.presets import preset

SIZES = (1, 4, 9)
VAR = VARConfig(width=24, depth=2, heads=2, drop_path=0.0)
TALK = Conversation().add("user", Image(pixels=picture("blue")), "draw")
STAGES = ("var", "align", "instruct", "decode")


@pytest.fixture
def model(llava_folder, vqvae_folder, request):
    torch.manual_seed(0)
    shape = {"var": VAR, "unconditional": getattr(request, "param", "learned")}
    return build(str(llava_folder), str(vqvae_folder), head="vargpt", **shape).eval()


def config(stage, **values):
    own = {"batch": 2, "accumulation": 1, "warmup": 0, "steps": 2, "save_every": 1, "log_every": 1, "var": VAR}
    own |= {"precision": "fp32", "lora": LoraConfig(rank=2) if stage == "decode" else None}
    return replace(preset(stage, "demo", "vargpt"), **own | values)


def samples():
    names = ("red", "blue", "green", "white")
    return [Conversation().add("user", n).add("assistant", Image(pixels=picture(n)), "so") for n in names]


def options(**values):
    return reply_options(VARGPTOptions, **{"temperature": 0.0, "max_tokens": 6, "max_images": 2} | values)


def test_a_reply_has_text_image_text_image_with_previews_and_repeats_by_seed(model):
    after_text(model, 2)
    session = Session(model)
    events = list(generate(model, TALK, options(max_tokens=20), session))
    steps = [(event.image, event.step, event.total) for event in events if isinstance(event, ImageStep)]
    assert steps == [(image, scale, 3) for image in (0, 1) for scale in (1, 2, 3)]
    message = events[-1].message
    assert [type(part).__name__ for part in message.content][:4] == ["Text", "Image", "Text", "Image"]
    assert sum(isinstance(event, ImageDone) for event in events) == 2 and message.images[0].load().size == (12, 12)
    start, _, end = model.head.ids
    read = [token for token, _ in session.keys]
    for at in (i for i, token in enumerate(read) if token == start):
        assert read[at + 1 : at + 2 + sum(SIZES)] == [-1] * sum(SIZES) + [end]
    plain = options(image="always", max_tokens=0)
    images = [numbers(reply(model, TALK, way).images[0]) for way in (plain, plain, replace(plain, seed=5))]
    assert torch.equal(*images[:2]) and not torch.equal(*images[1:])


@pytest.mark.parametrize("model", ["noise", "learned"], indirect=True)
def test_replies_together_are_as_alone_and_scales_share_calls(model):
    talks = [TALK, Conversation().add("user", "hello there"), Conversation().add("user", "a")]
    calls, step = [], model.head.step
    model.head.step = lambda key, inputs: calls.append((key[0], len(inputs))) or step(key, inputs)
    assert all(message.images for message in check_together(model, talks, options(image="always", max_tokens=2)))
    assert max(count for name, count in calls if name == "scale") > 1


def test_states_of_scales_are_the_same_in_training_and_in_a_reply(model):
    """Teacher-forced and cached: the codes that a reply drew, given to training, have the logits that drew them."""
    drawn, logits = [], []
    scale = model.head.decoder.decode_scale
    add = model.head.generator.quantizer.next_input

    def watched(inputs, number, classes, cache):
        values, cache = scale(inputs, number, classes, cache)
        logits.append(values)
        return values, cache

    model.head.decoder.decode_scale = watched
    model.head.generator.quantizer.next_input = lambda f, n, codes: drawn.append(codes) or add(f, n, codes)
    talk = Conversation().add("user", "red")
    reply(model, talk, options(image="always", max_tokens=0, guidance=1.0))
    sample = talk.add("assistant", Image(pixels=picture("red")))
    settings = config("decode", lora=None, guidance_dropout=0.0)
    batch = Collator(model.backbone, model.head, 512, settings, system=model.config.system)([sample])
    batch = replace(batch, targets={"codes": torch.cat(drawn, 1).clone()})
    seen = []
    forward = model.head.decoder.forward
    model.head.decoder.forward = lambda inputs, classes: seen.append(forward(inputs, classes)) or seen[-1]
    with torch.no_grad():
        model(batch, settings, torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[0], torch.cat(logits, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_its_part_resumes_bit_for_bit_and_loads(model, stage, tmp_path, fresh_accelerator):
    settings = config(stage, train_decoder=False, whole_llm=stage == "instruct", learn_prompts=stage == "decode")
    rows, start, whole, loaded = train_and_load(model, samples(), settings, tmp_path)
    assert [set(row.losses) for row in rows] == [{"codes"} if stage == "var" else {"codes", "text"}] * 2
    moved = {name.partition(".")[0] for name in start if not torch.equal(start[name], whole[name])}
    expected = {"var": {"decoder"}, "align": {"projectors"}, "instruct": set(), "decode": {"decoder", "projectors"}}
    assert moved == expected[stage]
    assert any("multi_modal_projector" in name for name in whole) == (stage == "instruct")
    assert (loaded.head, loaded.stage) == ("vargpt", stage)


def test_images_in_and_out_are_one_sample_and_prompts_are_learnt_if_asked(model):
    red, blue, green = (Image(pixels=picture(name)) for name in ("red", "blue", "green"))
    sample = Conversation().add("user", red, "next").add("assistant", "look", blue, "and", green)
    labels = {}
    for prompts in (False, True):
        settings = config("decode", learn_prompts=prompts, guidance_dropout=0.0)
        batch = Collator(model.backbone, model.head, 512, settings)([sample])
        full = model.head.complete(model.backbone, batch, settings, torch.Generator().manual_seed(0))
        labels[prompts] = full.labels
        assert full.targets["codes"].shape == (2, sum(SIZES)) and batch.num_targets == 2
        losses = model(batch, settings, torch.Generator().manual_seed(0))
        assert losses.terms["codes"].isfinite() and losses.weights["codes"] == 1.0
    silent = (batch.ids == model.head.ids[1]) | (batch.ids == model.backbone.image_token_id)
    assert (labels[True][silent] == -100).all() and (labels[True][~silent] == batch.ids[~silent]).all()
    assert (labels[False] != -100).sum() < (labels[True] != -100).sum()


def test_parts_that_wait_are_there_when_a_scale_is_drawn(model):
    talk, way = Conversation().add("user", "red"), options(image="always", max_tokens=0)
    expected = reply(model, talk, way).images[0]
    offload, phases = Offload(model, torch.device("cpu")), []
    assert model.head.decoder.head.weight.numel() and "codebook" in model.head.parts()
    for owner, name in ((model.head.decoder, "decode_scale"), (model.head.generator.quantizer, "add")):
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, real=real: phases.append(offload.phase) or real(*args))
    image = reply(model, talk, way).images[0]
    assert torch.equal(numbers(image), numbers(expected)) and set(phases) == {"draw"}


def test_another_generator_is_refused_and_presets_are_the_papers(llava_folder, diffusion_folder):
    with pytest.raises(Mgp5Error, match="the head vargpt draws by a VQVAE, not by StableDiffusion"):
        build(str(llava_folder), str(diffusion_folder), head="vargpt", var=VAR)
    align, instruct, decode = (preset(stage, "paper", "vargpt") for stage in STAGES[1:])
    assert [c.batch * c.accumulation for c in (align, instruct, decode)] == [1024, 256, 1024]
    assert [c.lr for c in (align, instruct, decode)] == [1e-3, 5e-5, 5e-5] and decode.epochs == 12
    assert instruct.whole_llm and preset("align", "release", "vargpt").learn_prompts
