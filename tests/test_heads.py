"""The seam: toy heads of all four papers go through the generation loop that knows none of them."""

from __future__ import annotations

import torch
from tiny import picture

from mgp5 import Conversation, Image
from mgp5.events import Finished, ImageDone
from mgp5.heads import Embeds, Forced, Prefix, Sample
from mgp5.inference.reply import generate
from mgp5.options import reply_options


class ToyHead:
    """Asks the LLM for something and paints a plain picture whose colour depends on the answer."""

    def __init__(self, ids):
        self.ids = tuple(ids)
        self.replies = []

    def allowed(self, step):
        return self.ids[1:]

    def condition(self, context):
        state = context.state
        for request in self.requests(state):
            reply = yield request
            self.replies.append(reply)
            state = reply.hidden
        return state.mean().view(1, 1, 1)

    def unconditional(self, condition):
        return condition

    def num_steps(self, options):
        return options.steps

    def draw(self, condition, options, generators):
        for step in range(options.steps):
            yield torch.full((1, 3, 4, 4), float(condition) * (step + 1))

    def finish(self, canvas):
        return canvas.clamp(-1, 1)


class MiniGPT5Toy(ToyHead):
    def requests(self, state):
        yield Forced(self.ids)


class SeedToy(ToyHead):
    def requests(self, state):
        yield Sample(5)


class InterleavedToy(ToyHead):
    def requests(self, state):
        yield Prefix()


class VargptToy(ToyHead):
    def requests(self, state):
        for scale in (1, 2, 3):
            yield Embeds(torch.ones(1, scale * scale, state.shape[-1]) * state.mean())


def run(model, kind):
    head = kind(model.head.ids)
    model.head = None  # torch modules do not take plain objects over a module
    del model.head
    object.__setattr__(model, "head", head)
    talk = Conversation().add("user", Image(pixels=picture()), "draw")
    events = list(generate(model, talk, reply_options(steps=2, max_tokens=3, image="always")))
    assert sum(isinstance(event, ImageDone) for event in events) >= 1
    assert isinstance(events[-1], Finished)
    return head


def test_minigpt5_forces_a_run(model):
    assert run(model, MiniGPT5Toy).replies[0].hidden.shape[1] == len(model.head.ids)


def test_seed_samples_allowed_codes(model):
    head = run(model, SeedToy)
    assert len(head.replies[0].ids) == 5
    assert set(head.replies[0].ids) <= set(head.ids[1:])


def test_mm_interleaved_reads_the_whole_prefix(model):
    head = run(model, InterleavedToy)
    assert head.replies[0].hidden.shape[1] > 20


def test_vargpt_feeds_embeddings_scale_by_scale(model):
    head = run(model, VargptToy)
    assert [reply.hidden.shape[1] for reply in head.replies[:3]] == [1, 4, 9]
