"""The seam: heads in the shapes of other papers are trained, saved, loaded and served by code that knows none."""

import json
import queue
import threading
import time
from dataclasses import replace

import pytest
import torch
from replies import alike, check_together, force_images, numbers, reply
from tiny import feed, picture
from toy_heads import CodesConfig, CodesHead, CodesOptions, ScalesHead, SideHead, with_head

from mgp5 import Conversation, Image
from mgp5.errors import Mgp5Error
from mgp5.events import Finished, ImageDone, ImageStep
from mgp5.heads import ImageContext, Step, rng
from mgp5.heads.losses import labelled, text_loss
from mgp5.hub import resolve
from mgp5.inference.reply import generate, generate_batch
from mgp5.inference.scheduler import Scheduler
from mgp5.inference.session import Session
from mgp5.loading import load_checkpoint, trained_tensors
from mgp5.options import reply_options
from mgp5.serving.loop import Job, ServingLoop
from mgp5.training.batch import Collator
from mgp5.training.loop import train
from mgp5.training.presets import preset

TALK = Conversation().add("user", Image(pixels=picture("blue")), "draw")


@pytest.fixture
def codes(llava_folder):
    torch.manual_seed(0)
    return with_head(llava_folder, CodesHead(CodesConfig()))


def options(**values):
    return reply_options(CodesOptions, **{"temperature": 0.0, "max_tokens": 3, "max_images": 2} | values)


# A head whose codes the LLM samples


def test_codes_two_images_in_one_reply_with_previews_and_masks(codes):
    force_images(codes)
    session = Session(codes)
    events = list(generate(codes, TALK, options(steps=4), session))
    steps = [(event.image, event.step, event.total) for event in events if isinstance(event, ImageStep)]
    assert steps == [(image, step, 4) for image in (0, 1) for step in range(1, 5)]
    images = events[-1].message.images
    assert len(images) == 2 and [event.index for event in events if isinstance(event, ImageDone)] == [0, 1]
    first, last, *all_codes = codes.head.ids
    read = [token for token, _ in session.keys]
    starts = [at for at, token in enumerate(read) if token == first]
    runs = [read[at + 1 : at + 6] for at in starts]
    assert len(runs) == 2 and all(run[-1] == last for run in runs)
    for run in runs:
        assert all(token in all_codes[place % 2 :: 2] for place, token in enumerate(run[:-1]))
    assert runs[0] != runs[1] and (numbers(images[0]) - numbers(images[1])).abs().max() > 2
    assert images[0].meta["steps"] == 4 and images[1].meta["seed"] == images[0].meta["seed"] + 1


def test_no_two_draws_of_a_reply_share_random_numbers():
    draws = [(0, "codes"), (1, "codes"), (0, "scale 1"), (0, "scale 2"), (0, "noise"), (1, "noise")]
    numbers = [float(torch.rand((), generator=rng(7, image, use))) for image, use in draws]
    assert len(set(numbers)) == len(draws)
    assert float(torch.rand((), generator=rng(7, 1, "codes"))) == numbers[1]


def test_codes_beside_others_at_other_steps_are_as_alone(codes):
    force_images(codes)
    talks = [TALK, Conversation().add("user", "hello"), TALK.add("assistant", "so").add("user", "again")]
    ways = [options(steps=steps, seed=steps, max_tokens=tokens) for steps, tokens in ((2, 0), (5, 4), (3, 2))]
    alone = [reply(codes, talk, way) for talk, way in zip(talks, ways, strict=True)]
    for together in (None, 2):  # the batch, and one that draws between pieces of text
        scheduler = Scheduler(codes, 2, text_steps=together)
        requests = [scheduler.submit(talk, way) for talk, way in zip(talks, ways, strict=True)]
        ends = {}
        while scheduler.busy:
            ends |= {id(request): event for request, event in scheduler.step() if isinstance(event, Finished)}
        assert all(alike(ends[id(r)].message, end) for r, end in zip(requests, alone, strict=True))
    batch = [event for _, event in generate_batch(codes, talks[:2], replace(ways[0], seed=3, image_seed=3))]
    assert 2 in codes.head.calls and sum(isinstance(event, Finished) for event in batch) == 2


def test_an_image_given_up_while_a_worker_draws_it_ends_nobody_else(codes):
    force_images(codes)
    cancelled, step = threading.Event(), codes.head.step
    codes.head.step = lambda key, inputs: step(key, inputs) if cancelled.wait(30) else None
    scheduler, ended = Scheduler(codes, 2, text_steps=1, workers=2), []
    drawn, told = (scheduler.submit(TALK, options(max_tokens=40, image=image)) for image in ("always", "never"))
    while scheduler.busy:
        for request, event in scheduler.step():
            assert request is told
            if isinstance(drawn.need, Step):
                scheduler.cancel(drawn)
                cancelled.set()
            ended += [event] if isinstance(event, Finished) else []
    assert cancelled.is_set() and len(ended) == 1


def test_codes_are_served(codes):
    force_images(codes)
    alone = reply(codes, TALK, options(steps=3, seed=1))
    loop = ServingLoop(codes, rows=2)
    loop.start()
    try:
        boxes = [queue.Queue() for _ in range(3)]
        for seed, box in enumerate(boxes):
            way = options(steps=3 + 2 * (seed != 1), seed=seed)
            loop.submit(Job(TALK, way, box.put, time.monotonic() + 60))
        ends = []
        for box in boxes:
            while not isinstance(event := box.get(timeout=60), Finished):
                assert not isinstance(event, Exception), event
            ends.append(event)
    finally:
        loop.stop()
    assert alike(ends[1].message, alone) and loop.counts["finished"] == 3


def test_options_of_another_head_are_refused_before_anything_is_computed(codes):
    with pytest.raises(Mgp5Error, match="options are DiffusionOptions, expected CodesOptions"):
        list(generate(codes, TALK, reply_options(steps=3)))
    with pytest.raises(Mgp5Error, match="steps is 20, expected 1 to 9"):
        options(steps=20)


@pytest.fixture
def config():
    own = {"batch": 2, "accumulation": 1, "warmup": 0, "precision": "fp32", "lr": 1e-2, "rows_lr": 1e-2}
    return replace(preset("pretrain", "demo"), steps=2, save_every=1, log_every=1, **own)


def samples() -> list[Conversation]:
    colours = ("red", "blue", "green", "white")
    return [Conversation().add("user", c).add("assistant", Image(pixels=picture(c)), "done") for c in colours]


def test_codes_train_resume_save_and_load(codes, llava_folder, config, tmp_path, fresh_accelerator):
    before = {name: value.clone() for name, value in codes.named_parameters()}
    progress = list(train(codes, samples(), config, tmp_path / "run", stop_after=1))
    again = with_head(llava_folder, CodesHead(CodesConfig()))
    progress += list(train(again, samples(), config, tmp_path / "run", resume=True))
    assert [set(step.losses) for step in progress] == [{"text", "pixels"}] * 2
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2] and all("pixels" in row for row in log)
    after = dict(codes.named_parameters())
    trained = {name for name in {*before} & {*after} if not torch.equal(after[name], before[name])}
    assert trained == {f"head.decoder.{name}" for name, _ in codes.head.decoder.named_parameters()}
    loaded = load_checkpoint(resolve(str(tmp_path / "run")))
    saved = trained_tensors(loaded)
    assert {name.partition(".")[0] for name in saved} == {"decoder", "adapter"}
    assert loaded.config.head == "codes" and loaded.config.head_config == CodesConfig()
    loaded.merge()
    force_images(loaded.eval())
    assert len(reply(loaded, TALK, options(steps=1)).images) == 2


def test_a_stage_without_the_llm_trains_the_head_alone(codes, config, tmp_path, fresh_accelerator):
    reads = []
    codes.backbone.language.register_forward_hook(lambda *call: reads.append(1))
    run = list(train(codes, samples(), replace(config, stage="tokenizer", sample_every=1), tmp_path / "run"))
    assert [set(step.losses) for step in run] == [{"pixels"}] * 2 and not reads
    assert load_checkpoint(resolve(str(tmp_path / "run"))).config.stage == "tokenizer"
    with pytest.raises(Mgp5Error, match="unknown stage 'finetune': expected tokenizer or pretrain"):
        codes.head.stage("finetune")


def test_codes_of_target_images_are_filled_in_before_the_llm_reads(codes, config):
    batch = Collator(codes.backbone, codes.head, 512, config)(samples())
    with torch.no_grad():
        filled = codes.head.complete(codes.backbone, batch, config, torch.Generator())
        losses = codes(batch, config, torch.Generator())
        hidden = codes.hidden(filled)
    words = torch.tensor(codes.head.ids[2:])[batch.targets["codes"]]
    for row, start, expected in zip(batch.target_rows, batch.target_starts, words, strict=True):
        assert filled.ids[row, start + 1 : start + 5].tolist() == expected.tolist()
    states, labels = labelled(hidden, filled.labels)
    torch.testing.assert_close(losses.terms["text"], text_loss(codes.backbone.logits(states), labels))
    assert (batch.ids != filled.ids).any()


def test_context_images_as_tokens_train_the_rows_of_these_tokens(codes, config):
    tokens = torch.tensor(codes.head.ids[2:6])

    def encode(backbone, inputs):
        count = len(next(iter(inputs.values())))
        return ImageContext([backbone.embed(tokens[None], [])[0]] * count, ids=[tokens] * count)

    codes.head.encode_images, codes.head.context_slots = encode, lambda backbone, inputs: [4]
    codes.prepare(config)
    sample = Conversation().add("user", Image(pixels=picture("blue")), "what").add("assistant", "blue")
    batch = Collator(codes.backbone, codes.head, 512, config)([sample])
    loss = codes(batch, config, torch.Generator()).total
    loss.backward()
    rows = [p.grad for name, p in codes.named_parameters() if "trainable_tokens" in name and p.grad is not None]
    assert any(bool((grad[2:6].abs().sum(1) > 0).all()) for grad in rows)


def test_a_checkpoint_of_another_head_is_refused_in_one_line(codes, config, tmp_path, fresh_accelerator):
    list(train(codes, samples(), config, tmp_path / "run", stop_after=1))
    path = tmp_path / "run/mgp5/config.json"
    stored = json.loads(path.read_text())
    for change, message in (
        (
            {"head": "sketch"},
            "is of a model with the head 'sketch', expected one of minigpt5, seed, vargpt, mm-interleaved",
        ),
        ({"head": "minigpt5"}, "is not a configuration of mgp5"),
        ({"head_config": {"num_codes": 10, "length": 4}, "head_kind": ""}, "do not fit|tokens of its head"),
        ({"head_config": {"num_codes": 10, "length": 4}}, "was trained for 4 of 12 codes, but .* is 4 of 10 codes"),
    ):
        path.write_text(json.dumps(stored | change))
        with pytest.raises(Mgp5Error, match=message) as error:
            load_checkpoint(resolve(str(tmp_path / "run")))
        assert "\n" not in str(error.value)


# A head that feeds embeddings scale by scale


def test_scales_are_fed_and_painted_between_the_llms_calls(llava_folder):
    torch.manual_seed(0)
    model = with_head(llava_folder, ScalesHead(32))
    session = Session(model)
    way = reply_options(type(model.head.spec.image_options()), image="always", max_tokens=2, temperature=0.0)
    events = list(generate(model, TALK, way, session))
    assert model.head.seen[:3] == [1, 4, 9]
    kinds = [type(event) for event in events if isinstance(event, ImageStep | ImageDone)]
    assert kinds == [ImageStep] * 3 + [ImageDone]
    read = [token for token, _ in session.keys]
    at = read.index(model.head.ids[0])
    assert read[at : at + 16] == [model.head.ids[0], *[-1] * 14, model.head.ids[1]]
    check_together(model, [TALK, Conversation().add("user", "hi")], way)


# A head with side inputs in a layer of the LLM


@torch.no_grad()
def test_side_inputs_reach_a_layer_in_training_as_in_inference(llava_folder):
    torch.manual_seed(0)
    model = with_head(llava_folder, SideHead(32))
    two = Conversation().add("user", "a", Image(pixels=picture("red")), "b", Image(pixels=picture("blue")), "c")
    batch = Collator(model.backbone, model.head, 1000)([two.add("assistant", "yes"), TALK.add("assistant", "no")])
    hidden = model.hidden(batch)
    session = Session(model)
    state = session.read(two)
    torch.testing.assert_close(state[0, 0], hidden[0, session.length - 1], atol=1e-5, rtol=1e-4)
    token = int(batch.ids[0, session.length])
    torch.testing.assert_close(feed(session, (token,))[0, 0], hidden[0, session.length - 1], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        model.head.project.weight.zero_(), model.head.project.bias.zero_()
    plain = model.hidden(batch)
    slots = (batch.ids[0] == model.backbone.image_token_id).nonzero().flatten()
    first = int(slots[0])
    torch.testing.assert_close(plain[0, :first], hidden[0, :first])  # no token sees an image before it begins
    assert not torch.allclose(plain[0, first], hidden[0, first], atol=1e-4)


def test_cached_features_without_side_inputs_are_refused(llava_folder):
    model = with_head(llava_folder, SideHead(32))
    two = Conversation().add("user", "a", Image(pixels=picture("red"))).add("assistant", "yes")
    batch = Collator(model.backbone, model.head, 1000)([two])
    features = model.head.encode_images(model.backbone, batch.context_images).tokens
    with pytest.raises(Mgp5Error, match="cached features"):
        model.hidden(replace(batch, features=tuple(features)))


def test_side_inputs_of_a_batch_are_those_of_each_reply(llava_folder):
    torch.manual_seed(0)
    model = with_head(llava_folder, SideHead(32))
    way = reply_options(type(model.head.spec.image_options()), image="always", max_tokens=4, temperature=0.0)
    talks = [TALK, Conversation().add("user", "hi"), TALK.add("assistant", "so").add("user", Image(pixels=picture()))]
    check_together(model, talks, way)
