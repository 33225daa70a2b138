"""The loop of a server: replies that come and go beside each other are what they are alone."""

import queue
import time
from dataclasses import replace

import pytest
import torch
from PIL import ImageChops, ImageStat
from test_decode import assert_same, finished
from tiny import picture, save_pipeline
from tiny_mllm import save_llava

from mgp5 import engines
from mgp5.apps.open_model import load
from mgp5.engines.exported import engine_of
from mgp5.engines.onnx import OnnxSession
from mgp5.errors import Mgp5Error
from mgp5.events import Event, Finished, ImageDone, ImageStep, TextChunk
from mgp5.inference.reply import generate
from mgp5.inference.scheduler import Scheduler
from mgp5.loading import build
from mgp5.messages import Conversation, Image
from mgp5.options import Options, reply_options
from mgp5.serving.loop import Job, Refused, ServingLoop

TALKS = [
    Conversation().add("user", "hello"),
    Conversation().add("user", Image(pixels=picture("blue", (70, 90))), "look", Image(pixels=picture("green"))),
    Conversation().add("user", "a fox").add("assistant", "a red one").add("user", "where?"),
    Conversation().add("user", "tell me of it, and at some length"),
]
WAYS = [
    reply_options(seed=1, steps=6, max_tokens=9, image="always"),
    reply_options(seed=2, steps=3, max_tokens=0, image="always", guidance=1.0, sampler="euler"),
    reply_options(seed=3, steps=4, max_tokens=40, temperature=0.7, image="never"),
    reply_options(seed=4, image_seed=9, steps=9, max_tokens=3, image="always", sampler="pndm", guidance_until=0.5),
    reply_options(seed=5, steps=4, max_tokens=2, image="always", sampler="ddim", height=32, width=16),
    reply_options(seed=6, steps=5, max_tokens=30, max_images=3, temperature=2.0, top_p=1.0, image="always"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    llava, diffusion = (tmp_path_factory.mktemp(name) for name in ("llava", "diffusion"))
    torch.manual_seed(1)
    return build(str(save_llava(llava)), str(save_pipeline(diffusion, "v_prediction")), num_vokens=4, guidance=3.0)


@pytest.fixture
def serving(whole):
    started = []

    def start(**settings) -> ServingLoop:
        started.append(ServingLoop(whole, **settings))
        started[-1].start()
        return started[-1]

    yield start
    for engine in started:
        engine.stop()
        assert not engine.alive


class Asked(Job):
    """A job and what it was given."""

    def __init__(self, talk: Conversation, options: Options, seconds: float = 60.0, previews: int = 0) -> None:
        self.given: queue.Queue[Event | Refused] = queue.Queue()
        super().__init__(talk, options, self.given.put, time.monotonic() + seconds, previews)

    def events(self) -> list[Event]:
        found = []
        while not (found and isinstance(found[-1], Finished)):
            found.append(self.given.get(timeout=60))
            if isinstance(found[-1], Refused):
                raise found[-1]
        return found

    def refusal(self) -> Refused:
        with pytest.raises(Refused) as refused:
            self.events()
        return refused.value

    def wait_for(self, kind: type) -> None:
        while not isinstance(self.given.get(timeout=60), kind):
            pass


def serves(engine: ServingLoop) -> bool:
    engine.submit(asked := Asked(TALKS[0], WAYS[1]))
    return isinstance(asked.events()[-1], Finished)


@pytest.mark.parametrize(("rows", "workers", "backend"), [(6, 1, None), (2, 1, "eager"), (3, 2, "eager")])
def test_replies_beside_each_other_are_what_they_are_alone(whole, serving, rows, workers, backend):
    if backend:
        engines.apply(whole.head.generator, backend)
    try:
        alone = [list(generate(whole, TALKS[i % 4], options)) for i, options in enumerate(WAYS)]
        engine = serving(rows=rows, workers=workers)
        asked = [Asked(TALKS[i % 4], options) for i, options in enumerate(WAYS)]
        for one in asked:
            engine.submit(one)
            time.sleep(0.01)  # they begin one after another, in the middle of others
        for one, other in zip(asked, alone, strict=True):
            events = one.events()
            assert_same(finished(events), finished(other))
            assert [type(event) for event in events] == [type(event) for event in other]
        if rows == 6:  # images at different steps share calls
            assert engine.counts["denoising_calls"] < engine.counts["denoising_steps"]
    finally:
        engines.remove(whole.head.generator)


def test_previews_show_the_image_so_far_and_change_nothing(serving):
    engine, asked = serving(rows=3), [Asked(TALKS[0], WAYS[0], previews=count) for count in (0, 2, 3)]
    engine.submit(*asked)
    plain, two, three = (one.events() for one in asked)
    for events, steps in ((plain, []), (two, [2, 4]), (three, [2, 3, 4])):  # of 6
        shown = [event for event in events if isinstance(event, ImageStep) and event.preview]
        assert [event.step for event in shown] == steps
        assert_same(finished(events), finished(plain))
        last = finished(events).message.images[0].load()
        distances = [ImageStat.Stat(ImageChops.difference(event.preview.load(), last)).sum[0] for event in shown]
        assert distances == sorted(distances, reverse=True) and 0 not in distances  # nearer and nearer


def by_files(model, folder, *names: str) -> list[int]:
    """Let exported files draw; returns the rows of each call of the denoiser to come."""
    cpu = torch.device("cpu")
    engine = engine_of(model.head.generator, folder, names, lambda name: OnnxSession(folder / name / "model.onnx", cpu))
    run, calls = engine.model.session, []
    engine.model.session = lambda **tensors: calls.append(len(tensors["sample"])) or run(**tensors)
    model.head.generator.engine = engine
    return calls


@pytest.mark.parametrize("way", ["none", "eager", "denoiser", "unet"])
def test_pictures_at_different_steps_are_one_call(whole, small_folder, small_export, way):
    """Pictures join one by one; each step is one call of the model for all of one size."""
    if way in ("denoiser", "unet"):
        whole = load(small_folder, backend=None)
        calls = by_files(whole, small_export, way)
    else:
        if way == "eager":
            engines.apply(whole.head.generator, way)
        calls = []
        part = whole.head.generator.engine.model.model if way == "eager" else whole.head.generator.unet
        hook = part.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    try:
        generator, conditions = whole.head.generator, torch.randn(3, *whole.head.generator.condition_shape)
        unconditional = whole.head.unconditional(conditions)
        ways = [replace(options.image, guidance=options.image.guidance or 3.0) for options in WAYS[:3]]
        waiting, drawing, made = list(enumerate(ways)), {}, {}
        while waiting or drawing:
            if waiting:
                seed, own = waiting.pop(0)
                rng = torch.Generator().manual_seed(seed)
                drawing[seed] = generator.begin(conditions[seed : seed + 1], unconditional, own, rng)
            before = len(calls)
            assert len({state.key for state in drawing.values()}) == 1
            generator.step(list(drawing.values()))
            assert len(calls) == before + 1
            made |= {seed: state.latents for seed, state in drawing.items() if state.done}
            drawing = {seed: state for seed, state in drawing.items() if not state.done}
        assert calls == [2, 3, 5, 5, 4, 4]  # rows: two of an image that has guidance
        for seed, own in enumerate(ways):
            rngs = [torch.Generator().manual_seed(seed)]
            *_, alone = generator.draw(conditions[seed : seed + 1], unconditional, generators=rngs, **vars(own))
            torch.testing.assert_close(made[seed], alone, rtol=1e-4, atol=1e-4)
    finally:
        if way in ("none", "eager"):
            hook.remove()
        engines.remove(whole.head.generator)


def test_text_goes_on_while_others_draw(serving):
    engine = serving(rows=2)
    drawn, told = Asked(TALKS[0], WAYS[0].updated({"steps": 300, "max_tokens": 0})), Asked(TALKS[3], WAYS[2])
    engine.submit(drawn)
    drawn.wait_for(ImageStep)
    engine.submit(told)
    assert any(isinstance(event, TextChunk) for event in told.events())
    assert not any(isinstance(event, ImageDone) for event in drawn.given.queue)
    engine.cancel(drawn)


def test_a_full_queue_refuses_and_jobs_are_served_in_their_order(serving):
    engine, ends = serving(rows=1, limit=3), []
    first, *others = (Asked(TALKS[0], WAYS[0].updated({"steps": steps, "max_tokens": 0})) for steps in (300, 2, 3, 1))

    def note(event, number: int) -> None:
        ends.extend([number] * isinstance(event, Finished))

    for number, one in enumerate(others):
        put = one.deliver
        one.deliver = lambda event, put=put, number=number: (put(event), note(event, number))
    engine.submit(first)
    first.wait_for(ImageStep)
    engine.submit(*others)
    with pytest.raises(Refused) as refused:
        engine.submit(Asked(TALKS[0], WAYS[0]))
    assert refused.value.status == 429
    engine.cancel(first)
    for one in others:
        one.events()
    assert ends == [0, 1, 2] and first.given.qsize() < 300


def test_deadlines_end_jobs_that_run_and_jobs_that_wait(serving):
    engine = serving(rows=1)
    long = WAYS[0].updated({"steps": 900, "max_tokens": 0})
    asked = [Asked(TALKS[0], long, seconds) for seconds in (0.3, 0.1)]
    engine.submit(*asked)
    assert [one.refusal().status for one in asked] == [504, 504]
    assert serves(engine)


def test_what_is_wrong_with_one_request_ends_that_one(serving):
    engine, fine = serving(rows=3), Asked(TALKS[0], WAYS[0])
    ways = (Conversation().add("user", "x" * 3000), WAYS[0]), (TALKS[0], WAYS[0].updated({"height": 9, "width": 9}))
    bad = [Asked(*way) for way in ways]
    engine.submit(fine, *bad)
    for refusal in (one.refusal() for one in bad):
        assert refusal.status == 400 and "\n" not in refusal.message
    assert isinstance(fine.events()[-1], Finished)


def test_an_error_of_the_model_fails_what_runs_and_no_more(whole, serving):
    def broken(*_):
        raise RuntimeError("out of memory, and of patience")

    engine, hook = serving(rows=2), whole.head.generator.unet.register_forward_pre_hook(broken)
    engine.submit(asked := Asked(TALKS[0], WAYS[1]))
    refusal = asked.refusal()
    hook.remove()
    assert (refusal.status, refusal.message) == (500, "the reply failed (RuntimeError)")
    assert serves(engine)


def test_a_reply_given_up_while_it_waits_never_begins(whole):
    scheduler = Scheduler(whole, 3)
    bad = scheduler.submit(Conversation().add("user", "x" * 3000), WAYS[0])
    given_up, other = (scheduler.submit(TALKS[0], WAYS[1]) for _ in range(2))
    said = []
    while scheduler.busy:
        for request, event in scheduler.step():
            said.append((request, event))
            if request is bad:
                scheduler.cancel(given_up)
    assert isinstance(said[0][1], Mgp5Error)
    assert {request for request, _ in said} == {bad, other} and isinstance(said[-1][1], Finished)


def test_a_picture_of_nan_is_the_servers_fault(whole, serving):
    decoder = whole.head.generator.vae.decoder
    engine, hook = serving(rows=2), decoder.register_forward_hook(lambda _module, _args, out: out * float("nan"))
    engine.submit(asked := Asked(TALKS[0], WAYS[1]))
    refusal = asked.refusal()
    hook.remove()
    assert refusal.status == 500 and refusal.message.startswith("a picture came out as numbers that are not finite")
    assert serves(engine)
