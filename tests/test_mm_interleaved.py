"""The head of MM-Interleaved: what each token, image and pixel may see, replies whose images are read back, stages."""

from dataclasses import replace

import pytest
import torch
from replies import after_text, check_together, force_images, numbers, reply, train_and_load
from tiny import picture

from mgp5 import Conversation, Image
from mgp5.backbones.hf import HFBackbone
from mgp5.config import LoraConfig
from mgp5.errors import Mgp5Error
from mgp5.events import ImageDone, ImageStep
from mgp5.heads.settings import MMInterleavedSizes
from mgp5.inference.reply import generate
from mgp5.inference.session import Session
from mgp5.loading import build
from mgp5.options import MMInterleavedOptions, reply_options
from mgp5.training.batch import Collator
from mgp5.training.presets import preset

S = 3
SIZES = MMInterleavedSizes(
    queries=S, token_width=8, token_layers=1, token_heads=2, interactions=2, adapter_heads=2, adapter_points=2, stem=8,
    resized=True, every=1, heads=2, points=2, images=4, context_heads=2, unet="adapter", unet_rank=2,
)  # fmt: skip
TALK = Conversation().add("user", Image(pixels=picture("blue")), "draw")
NEAR = {"rtol": 1e-4, "atol": 1e-4}


def fresh(llava_folder, diffusion_folder, **sizes):
    torch.manual_seed(0)
    shape = replace(SIZES, **sizes)
    return build(str(llava_folder), str(diffusion_folder), head="mm-interleaved", sizes=shape, guidance=2.0).eval()


def opened(model):
    """The model with gates open, and images that do not look alike."""
    head = model.head
    with torch.no_grad():
        for mmfs in head.llm_mmfs:
            mmfs.gate.fill_(0.7)
            mmfs.mmfs.output.weight.normal_()
        for block in head.unet_mmfs.blocks:
            block.conv.weight.normal_(std=0.3)
        head.image_encoder.tokens.output.weight.normal_()
        head.conditioner.unconditional.normal_()
        for weight in head.conditioner.resampler.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return model


@pytest.fixture
def model(llava_folder, diffusion_folder):
    return opened(fresh(llava_folder, diffusion_folder))


def config(stage="pretrain", **values):
    own = {"batch": 2, "accumulation": 1, "warmup": 0, "steps": 2, "save_every": 1, "log_every": 1, "sizes": SIZES}
    own |= {"precision": "fp32", "lora": LoraConfig(rank=2) if stage == "finetune" else None}
    return replace(preset(stage, "demo", "mm-interleaved"), **own | values)


def samples():
    names = ("red", "blue", "green", "white")
    first, second = (Image(pixels=picture(name)) for name in ("red", "yellow"))
    long = Conversation().add("user", "a", first, "b").add("assistant", "so", second, "and", first)
    return [long, *(Conversation().add("user", name).add("assistant", Image(pixels=picture(name))) for name in names)]


def batch_of(model, *conversations, **values):
    batch = Collator(model.backbone, model.head, 512, config())(conversations)
    batch = replace(batch, targets=batch.targets | values)
    batch = model.head.complete(model.backbone, batch, config(), torch.Generator())
    return replace(batch, context=model.context(batch))


def options(**values):
    own = {"temperature": 0.0, "max_tokens": 20, "max_images": 2, "steps": 2}
    return reply_options(MMInterleavedOptions, **own | values)


@torch.no_grad()
def test_gates_of_zero_are_the_base_model(llava_folder, diffusion_folder):
    model, base = fresh(llava_folder, diffusion_folder), HFBackbone.load(llava_folder)
    base.add_tokens(list(model.head.spec.new_tokens))
    batch = batch_of(model, *samples()[:2])
    embeds = model.backbone.embed(batch.ids, batch.context.tokens)
    plain = base(embeds, base.positions(batch.ids, None, batch.mask), batch.mask)
    assert torch.equal(model.hidden(batch), plain)
    assert not torch.equal(opened(model).hidden(batch), plain)
    latents, condition = torch.randn(1, 4, 8, 8), torch.randn(1, 11, 16)
    bare, unet = fresh(llava_folder, diffusion_folder).head.generator, fresh(llava_folder, diffusion_folder).head
    residuals = unet.unet_mmfs(*unet._visible(list(batch.context.pyramid.split(1)), condition))
    seen = unet.generator.predict(latents, torch.tensor(5.0), condition, residuals)
    torch.testing.assert_close(seen, bare.predict(latents, torch.tensor(5.0), condition), rtol=0, atol=0)


@torch.no_grad()
def test_no_image_is_made_of_itself_or_of_a_later_one(model):
    """Neither its condition nor what its UNet attends to; a drawn image is seen by the text and the image behind it."""
    base = batch_of(model, *samples()[:2])
    hidden = model.hidden(base)
    first, second = base.target_starts[:2]
    features, visible = model.head._earlier(base, hidden)
    assert visible.sum(1).tolist() == [1, 2, 0] and [first, second] == sorted([first, second])
    vision = Collator(model.backbone, model.head, 512, config())(samples()[:2]).targets["vision"]
    for target, start in ((0, first), (1, second)):
        other = vision.clone()
        other[target] = torch.randn_like(other[target])
        changed = batch_of(model, *samples()[:2], vision=other)
        states = model.hidden(changed)
        torch.testing.assert_close(states[0, : start + 1], hidden[0, : start + 1], **NEAR)
        assert not torch.allclose(states[0, start + S + 1 :], hidden[0, start + S + 1 :], atol=1e-3)
        now, _ = model.head._earlier(changed, states)
        for image in range(3):
            own = features[image][visible[image]], now[image][visible[image]]
            assert torch.allclose(*own, atol=1e-4) == (image != 1 or target != 0)


@torch.no_grad()
@pytest.mark.parametrize("earlier", ["all", "last", "none"])
def test_the_unet_attends_to_the_images_that_the_option_names(model, earlier):
    head, images = model.head, [torch.randn(1, 85, 16) for _ in range(3)]
    head.config = replace(head.config, sizes=replace(head.config.sizes, earlier=earlier))

    def drawn(pyramids, **values):
        force_images(model)
        session = Session(model)
        session.read(Conversation().add("user", "hello"))
        seen = []
        head.generator.begin, real = lambda *args: seen.append(args) or real(*args), head.generator.begin
        context = type("Context", (), {"pyramids": pyramids, "options": options(guidance=2.0, **values).image})
        context.rng = staticmethod(lambda use: torch.Generator().manual_seed(0))
        state = head._begin(session.states, context)
        head.generator.begin = real
        head.generator.step([state])
        return state.latents

    base = drawn(images)
    for number in range(3):
        other = [p[:, torch.randperm(85)] if i == number else p for i, p in enumerate(images)]
        seen = earlier == "all" or (earlier == "last" and number == 2)
        assert torch.allclose(drawn(other), base, atol=1e-4) != seen
    assert torch.allclose(drawn(images, earlier="none"), drawn([]), atol=1e-5)
    assert torch.allclose(drawn(images, earlier="last"), drawn(images[2:], earlier="all"), atol=1e-5)


@torch.no_grad()
def test_a_condition_is_that_of_its_own_states_whatever_the_padding(model):
    states = torch.randn(2, 9, 32)
    both = torch.stack([states[0], torch.cat([states[1, :4], torch.randn(5, 32)])])
    conditions = model.head.conditioner(both, [9, 4])
    torch.testing.assert_close(conditions[1:], model.head.conditioner(states[1:, :4]), **NEAR)
    assert not torch.allclose(model.head.conditioner(states[1:, :4].flip(1)), conditions[1:], atol=1e-3)


def test_a_reply_has_text_image_text_image_and_reads_what_it_drew(model):
    after_text(model, 2)
    session = Session(model)
    events = list(generate(model, TALK, options(), session))
    message = events[-1].message
    assert [type(part).__name__ for part in message.content][:4] == ["Text", "Image", "Text", "Image"]
    assert sum(isinstance(event, ImageDone) for event in events) == 2
    assert [event.step for event in events if isinstance(event, ImageStep)] == [1, 2] * 2
    begin, slot, read = model.head.ids[0], model.backbone.image_token_id, session.keys
    starts = [at for at, (token, _) in enumerate(read) if token == begin]
    assert len(starts) == 3 == len(session.pyramids) == len(session.decoder.rows[0].side)  # one was given
    runs = [read[at + 1 : at + 1 + S] for at in starts]
    assert all({token for token, _ in run} == {slot} for run in runs) and len({run[0] for run in runs}) == 3
    # The cache, which was fed token by token, holds what a forward over all of it gives.
    ids = torch.tensor([[token for token, _ in read]])
    images = [*session._encoded.values()]
    with torch.inference_mode():
        embeds = model.backbone.embed(ids, [image.tokens for image in images])
        side = model.backbone.side_inputs(ids, [S] * 3, torch.cat([image.context.side for image in images]))
        whole = model.backbone(embeds, model.backbone.positions(ids, None), side=side)
    torch.testing.assert_close(session.states, whole, **NEAR)
    encoded, real = [], model.head.encode_images
    model.head.encode_images = lambda *args: encoded.append(1) or real(*args)
    talk = Conversation((*TALK.messages, message)).add("user", "again")
    again = session._keys(*session._render(talk))  # as the next turn has it: the cache of drawn images can be kept
    starts = [at for at, (token, _) in enumerate(again) if token == begin]
    assert [again[at + 1 : at + 1 + S] for at in starts] == runs and not encoded


def test_replies_need_no_image_repeat_and_depend_on_earlier_images(model):
    plain = options(image="always", max_tokens=0)
    alone = Conversation().add("user", "hello")
    images = [reply(model, alone, way).images[0] for way in (plain, plain, replace(plain, seed=5))]
    assert torch.equal(numbers(images[0]), numbers(images[1])) and not torch.equal(*map(numbers, images[1:]))
    red = Conversation().add("user", Image(pixels=picture("red")), "draw")
    assert not torch.equal(*(numbers(reply(model, talk, plain).images[0]) for talk in (TALK, red)))


def test_replies_in_a_batch_are_as_alone(model):
    force_images(model)
    longer = TALK.add("assistant", "so").add("user", *TALK.messages[0].content)
    talks = [TALK, Conversation().add("user", "hello there"), longer]
    assert [len(message.images) for message in check_together(model, talks, options())] == [2] * 3


@pytest.mark.parametrize(
    ("stage", "unet"), [("pretrain", "adapter"), ("finetune", "adapter"), ("pretrain", "full"), ("pretrain", "frozen")]
)
def test_each_stage_trains_its_part_resumes_bit_for_bit_and_loads(
    llava_folder, diffusion_folder, stage, unet, tmp_path, fresh_accelerator
):
    model = fresh(llava_folder, diffusion_folder, unet=unet)
    with torch.no_grad():
        for block in model.head.unet_mmfs.blocks:
            block.conv.weight.normal_(std=0.1)  # else nothing behind it has a gradient in the first step
        for mmfs in model.head.llm_mmfs:
            mmfs.gate.fill_(0.1)
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items() if "vision" in k}
    rows, start, whole, loaded = train_and_load(model, samples(), config(stage, unet_lr=1e-3), tmp_path)
    assert [set(row.losses) for row in rows] == [{"text", "ldm"}] * 2
    parts = {name.partition(".")[0] for name in start if not torch.equal(start[name], whole[name])}
    more = {"full": {"denoiser"}, "adapter": {"unet_adapter"}, "frozen": set()}[unet]
    assert parts == {"image_encoder", "llm_mmfs", "conditioner", "unet_mmfs"} | more
    assert any("lora" in name for name in whole) == (stage == "finetune")
    assert all(torch.equal(value, dict(model.backbone.state_dict())[_base(k, model)]) for k, value in frozen.items())
    assert (loaded.head, loaded.head_config) == ("mm-interleaved", model.head.config)


def _base(name, model):
    """The name of a frozen weight once peft has wrapped the model."""
    wrapped = model.backbone.model is not model.backbone.core
    return name.replace("model.", "model.base_model.model.", 1) if wrapped else name


def test_the_unconditional_context_is_learned_and_begins_at_the_empty_text(model):
    with torch.no_grad():
        model.head.conditioner.unconditional.zero_()
    model.prepare(config())
    empty = model.head.generator.encode_text([""])
    assert torch.equal(model.head.unconditional(empty), empty)
    batch = batch_of(model, *samples()[1:3])
    always = config(guidance_dropout=0.999999)
    model.head.losses(model.hidden(batch), batch, always, torch.Generator()).total.backward()
    conditioner = model.head.conditioner
    assert conditioner.unconditional.grad.any() and not conditioner.project.weight.grad.any()


def test_an_image_without_anything_before_it_has_no_loss(model):
    batch = batch_of(model, *samples()[1:2])
    first = replace(batch, ids=batch.ids[:, batch.target_starts[0] - 1 :], target_starts=(1,))
    hidden = model.hidden(batch)[:, batch.target_starts[0] - 1 :]
    assert model.head.losses(hidden, first, config(), torch.Generator()).total == 0
    assert model.head.losses(model.hidden(batch), batch, config(), torch.Generator()).total > 0


def test_captions_are_learnt_both_ways_but_no_image_where_a_text_begins(model):
    """Before losses are counted: how an update is split does not matter."""
    captioned = [
        Conversation().add("user", "draw").add("assistant", Image(pixels=picture("red"), caption=word))
        for word in "abcd"
    ]
    batch = Collator(model.backbone, model.head, 512, config())(captioned)
    assert {start == 1 for start in batch.target_starts} == {True, False}
    for row, start in zip(batch.target_rows, batch.target_starts, strict=True):
        assert batch.labels[row, start] == (-100 if start == 1 else model.head.ids[0])
        assert (batch.labels[row, start + 1 :] != -100).any()  # what follows an image is learnt either way


def test_rates_are_the_releases(model):
    model.prepare(release := preset("pretrain", "release", "mm-interleaved"))
    names = dict(zip(dict(model.named_parameters()), model._planned(release), strict=True))
    rates = {name: (rule.lr, rule.weight_decay) for name, (p, rule) in names.items() if p.requires_grad}
    assert rates["head.llm_mmfs.0.gate"] == (1e-4, 0.0)
    offsets = "llm_mmfs.0.mmfs.offsets.weight", "unet_mmfs.blocks.0.mmfs.offsets.bias"
    assert [rates[f"head.{name}"] for name in offsets] == [(1e-5, 0.0)] * 2
    assert rates["head.conditioner.project.weight"] == rates["head.image_encoder.adapter.up.weight"] == (1e-4, 0.05)
    assert not any("vision_tower" in name or "generator" in name for name in rates)
    paper, tiny = preset("finetune", "paper", "mm-interleaved"), preset("pretrain", "demo", "mm-interleaved")
    assert (paper.ldm_weight, paper.unet_lr, paper.sizes.earlier, release.sizes.earlier) == (10.0, 1e-4, "all", "last")
    assert paper.sizes.unet == "full" and tiny.sizes.unet == "adapter"


def test_what_does_not_fit_is_refused(model, qwen_folder, diffusion_folder):
    with pytest.raises(Mgp5Error, match="a ViT-Adapter for the vision tower of qwen2_5_vl"):
        build(str(qwen_folder), str(diffusion_folder), head="mm-interleaved", sizes=SIZES)
    with pytest.raises(Mgp5Error, match="reuse 2"):
        reply(model, TALK, options(image="always", reuse=2))
    with pytest.raises(Mgp5Error, match="earlier is first, expected all, last or none"):
        options(earlier="first")
    with pytest.raises(Mgp5Error, match="expected MMInterleavedOptions"):
        reply(model, TALK, reply_options(image="always"))
    with pytest.raises(Mgp5Error, match=r"queries is 0, expected at least 1(.|\n)*unet is half"):
        MMInterleavedSizes(queries=0, unet="half")
