"""Decoding: the static cache, rows of a batch, synchronization, sampling, and batched replies against single ones."""

from dataclasses import replace

import pytest
import torch
from tiny import feed, llm_only, picture
from tiny_training import fresh

from mgp5 import Conversation, Image
from mgp5.backbones.adapters import add_prefix
from mgp5.backbones.hf import HFBackbone
from mgp5.backbones.kv_cache import SMALLEST
from mgp5.errors import Mgp5Error
from mgp5.events import Finished, ImageDone, ImageStep
from mgp5.inference.decoder import Decoder
from mgp5.inference.reply import generate, generate_batch
from mgp5.inference.request import ReplyText
from mgp5.inference.session import Session
from mgp5.inference.token_sampling import SamplingParams, penalise, sample
from mgp5.options import reply_options
from mgp5.prompts import role_markers

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
TALKS = [
    Conversation().add("user", "hi"),
    Conversation().add("system", "Be kind.").add("user", Image(pixels=picture("red")), "then", "draw"),
    Conversation().add("user", Image(pixels=picture("blue", (70, 90))), "look", Image(pixels=picture("green"))),
    Conversation().add("user", "a fox").add("assistant", "a red one").add("user", "where?"),
    Conversation().add("user", "tell me of it, and at some length"),
]
WAYS = [
    reply_options(seed=1, steps=2, max_tokens=9),
    reply_options(seed=2, steps=2, max_tokens=14, temperature=0, image="always"),
    reply_options(seed=3, steps=2, max_tokens=5, temperature=0.7, top_p=0.5, image="always"),
    reply_options(seed=4, steps=1, max_tokens=0, image="always"),
    reply_options(seed=5, image_seed=9, steps=2, max_tokens=20, repetition_penalty=1.5, image="always"),
]


@pytest.fixture(scope="module", params=["llava", "qwen", "qwen3", "minigpt4"])
def backbone(request):
    return HFBackbone.load(request.getfixturevalue(f"{request.param}_folder"))


@pytest.fixture(scope="module", params=["llava", "qwen"])  # whose positions are a number, and three
def model(request, diffusion_folder):
    model = fresh(request.getfixturevalue(f"{request.param}_folder"), diffusion_folder)
    model.head.spec = replace(model.head.spec, reads_prefix=True)  # sessions keep all states, to be compared
    return model


def reference(backbone, session):
    """Return the states of all tokens of a session, by one forward without a cache."""
    ids = torch.tensor([[token for token, _ in session.keys]])
    images = list(session._encoded.values())
    grids = torch.cat([s.grid for s in images]) if images and images[0].grid is not None else None
    return backbone(backbone.embed(ids, [s.tokens for s in images]), backbone.positions(ids, grids))


@torch.inference_mode()
@pytest.mark.parametrize(("bucket", "piece"), [(1, 2048), (32, 2)])
def test_rows_of_different_lengths_equal_whole_sequences(backbone, bucket, piece, monkeypatch):
    monkeypatch.setattr("mgp5.backbones.kv_cache.PIECE", piece)
    decoder = Decoder(backbone, 3, tokens_per_sync=4, bucket=bucket)
    sessions = [Session(llm_only(backbone), decoder=decoder, row=row) for row in range(3)]
    for session, talk in zip(sessions[:2], TALKS[1:3], strict=True):
        session.read(talk)
    for row, session in enumerate(sessions[:2]):
        decoder.set_sampling(row, SamplingParams(0, 1, 1, torch.Generator()))
        feed(session, (5, 6))
    sessions[2].read(TALKS[0])  # joins later
    hidden = decoder.feed([2, 0], torch.cat([session.embed((7, 8, 9))[0] for session in (sessions[2], sessions[0])]))
    for session, states in zip((sessions[2], sessions[0]), hidden.split(1), strict=True):
        session.append(states, [(7, ""), (8, ""), (9, "")])
    for row, (tokens, states) in decoder.steps({0: 10, 1: 11}, 4).items():
        sessions[row].append(states[None], [(token, "") for token in [10 + row, *tokens[:-1]]])
    for row, session in enumerate(sessions):
        assert decoder.rows[row].length == session.length
        torch.testing.assert_close(session.states, reference(backbone, session), **CLOSE)


@torch.inference_mode()
def test_rows_that_hold_no_token_are_finite_and_change_nothing(backbone):
    """A row without tokens decodes along in a batch, between rows that have some: its softmax is over something."""
    decoder = Decoder(backbone, 3, tokens_per_sync=4, bucket=32)
    session = Session(llm_only(backbone), decoder=decoder, row=1)
    session.read(TALKS[2])
    decoder.set_sampling(1, SamplingParams(0, 1, 1, torch.Generator()))
    tokens, states = decoder.steps({1: 10}, 4)[1]
    session.append(states[None], [(token, "") for token in [10, *tokens[:-1]]])
    torch.testing.assert_close(session.states, reference(backbone, session), **CLOSE)
    assert decoder._buffers[3].states.isfinite().all() and decoder.rows[0].length == 0
    late = Session(llm_only(backbone), decoder=decoder, row=0)  # what idling wrote is not seen
    late.read(TALKS[1])
    torch.testing.assert_close(late.states, reference(backbone, late), **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("temperature", [0, 5.0])
def test_rows_that_pad_the_vocabulary_are_never_sampled(qwen_folder, temperature):
    backbone = HFBackbone.load(qwen_folder)
    backbone.add_tokens(["[IMG0]"])
    tokens = len(backbone.tokenizer)
    backbone.core.resize_token_embeddings(tokens + 2, mean_resizing=False)
    loud = 1000 * backbone.lm_head.weight[0]
    backbone.lm_head.weight[tokens:] = torch.stack([loud, -loud])  # one of them wins, whatever the state is
    decoder = Decoder(backbone, tokens_per_sync=16)
    session = Session(llm_only(backbone), decoder=decoder)
    state = session.read(TALKS[0])
    assert backbone.logits(state).argmax() >= tokens == backbone.vocabulary
    for allowed in (None, range(tokens + 2)):
        params = SamplingParams(temperature, 1.0, 1.0, torch.Generator().manual_seed(0))
        decoder.set_sampling(0, params, allowed=allowed)
        assert decoder.pick({0: state[0, 0]})[0] < tokens and max(decoder.steps({0: 5}, 16)[0][0]) < tokens


@torch.inference_mode()
def test_removed_tokens_leave_no_trace_and_growing_keeps_the_others(backbone):
    session, fresh = Session(llm_only(backbone)), Session(llm_only(backbone))
    session.read(TALKS[1])
    for long in (False, True):
        length = session.length
        session.decoder.feed([0], session.embed(tuple(range(20, 30)))[0])
        session.decoder.cut(0, length)
        feed(session, tuple(range(SMALLEST)) if long else (5,))
    assert session.decoder.cache.index.capacity > SMALLEST
    torch.testing.assert_close(session.states, reference(backbone, session), **CLOSE)
    kept = session.length
    session.read(TALKS[1].add("assistant", "no").add("user", "why?"))
    assert 0 < session.prefilled < kept
    torch.testing.assert_close(session.state, fresh.read(TALKS[1].add("assistant", "no").add("user", "why?")), **CLOSE)


def finished(events):
    return next(event for event in events if isinstance(event, Finished))


def assert_same(one, other):
    assert (one.message.text, one.reason) == (other.message.text, other.reason)
    assert [type(part) for part in one.message.content] == [type(part) for part in other.message.content]
    assert one.meta["tokens"] == other.meta["tokens"]
    for first, second in zip(one.message.images, other.message.images, strict=True):
        pixels = [torch.frombuffer(bytearray(image.load().tobytes()), dtype=torch.uint8) for image in (first, second)]
        assert (pixels[0].int() - pixels[1].int()).abs().max() <= 2  # of 255
        assert first.meta == second.meta


def test_a_batch_equals_single_replies(model):
    singles = [list(generate(model, talk, options)) for talk, options in zip(TALKS, WAYS, strict=True)]
    for bucket, tokens_per_sync in ((1, 1), (32, 8)):
        decoder = Decoder(model.backbone, 5, tokens_per_sync=tokens_per_sync, bucket=bucket)
        sessions = [Session(model, decoder=decoder, row=row) for row in range(5)]
        batch = list(generate_batch(model, TALKS, WAYS, sessions, images_at_once=2))
        for row, alone in enumerate(singles):
            events = [event for index, event in batch if index == row]
            assert_same(finished(events), finished(alone))
            assert [type(event) for event in events] == [type(event) for event in alone]
        together = [[index for index, event in batch if isinstance(event, ImageStep)].index(row) for row in (1, 2)]
        assert together == [0, 1]  # the first two pictures take turns, step by step


def test_turns_of_a_batch_read_only_new_tokens(model):
    options = replace(WAYS[0], draw="never")
    decoder = Decoder(model.backbone, 2, tokens_per_sync=8, bucket=32)
    sessions = [Session(model, decoder=decoder, row=row) for row in range(2)]
    talks, before = TALKS[1:3], [0, 0]
    for _ in range(2):
        pairs = generate_batch(model, talks, options, sessions)
        events = dict(pair for pair in pairs if isinstance(pair[1], Finished))
        alone = [finished(generate(model, talk, options)) for talk in talks]
        for row, other in enumerate(alone):
            assert_same(events[row], other)
            assert other.meta["prefilled"] - events[row].meta["prefilled"] >= before[row]
        before = [other.meta["prefilled"] for other in alone]
        pairs = zip(talks, alone, strict=True)
        talks = [Conversation((*talk.messages, other.message)).add("user", "so?") for talk, other in pairs]


def test_tokens_decoded_beyond_the_end_leave_no_trace(model):
    """Tokens that were sampled after an image, a stop or the limit are dropped, with their random numbers."""
    for options in (*WAYS, reply_options(seed=8, steps=1, max_tokens=30, max_images=2, temperature=2.0, top_p=1.0)):
        sessions = [Session(model, decoder=Decoder(model.backbone, tokens_per_sync=n)) for n in (1, 8)]
        replies = [finished(generate(model, TALKS[1], options, session)) for session in sessions]
        assert_same(*replies)
        assert sessions[0].keys == sessions[1].keys
        torch.testing.assert_close(sessions[0].states, sessions[1].states, **CLOSE)


def test_a_forced_run_is_one_forward_without_the_lm_head(model):
    calls = []
    parts = {"head": model.backbone.lm_head, "layer": model.backbone.language.layers[0]}
    hooks = [part.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, part in parts.items()]
    events = list(generate(model, TALKS[0], reply_options(steps=1, max_tokens=0, image="always")))
    for hook in hooks:
        hook.remove()
    assert any(isinstance(event, ImageDone) for event in events)
    assert calls == ["layer", "layer"]  # the prompt and the run


@torch.inference_mode()
def test_a_prefix_is_before_every_row(backbone):
    torch.manual_seed(0)
    add_prefix(backbone, 3, 8)
    try:
        decoder = Decoder(backbone, 2, tokens_per_sync=2, bucket=32)
        sessions = [Session(llm_only(backbone), decoder=decoder, row=row) for row in range(2)]
        for session, talk in zip(sessions, TALKS[1:3], strict=True):
            session.read(talk)
            decoder.set_sampling(session.row, SamplingParams(0, 1, 1, torch.Generator()))
        for row, (tokens, states) in decoder.steps({0: 10, 1: 11}, 2).items():
            sessions[row].append(states[None], [(10 + row, ""), (tokens[0], "")])
        for session in sessions:
            torch.testing.assert_close(session.states, reference(backbone, session), **CLOSE)
    finally:
        backbone.prefix = None


@torch.inference_mode()
def test_a_compiled_step_is_one_graph_for_all_conversations(backbone):
    """Trace as for --backend compile, without its compilers; `fullgraph` raises where the trace breaks."""
    compiled, states = torch.compile(backbone.forward, dynamic=False, fullgraph=True, backend="eager"), []
    for traced in (False, True, True):
        decoder = Decoder(backbone, tokens_per_sync=2, bucket=64)
        session = Session(llm_only(backbone), decoder=decoder)
        session.read(TALKS[1])
        decoder.set_sampling(0, SamplingParams(0, 1, 1, torch.Generator()))
        decoder._language = compiled if traced else backbone
        with torch._dynamo.config.patch(error_on_recompile=True):
            states.append(decoder.steps({0: 10}, 2)[0][1])
    torch.compiler.reset()
    torch.testing.assert_close(states[1], states[0], **CLOSE)
    assert torch.equal(states[1], states[2])


def test_sampling_inverts_the_cumulative_distribution():
    chances = torch.tensor([0.1, 0.5, 0.0, 0.25, 0.15])
    logits = chances.log().expand(6, -1)

    def tokens(numbers, top_p, temperature=1.0, top_k=0.0):
        chance = [torch.full((len(numbers), 1), value) for value in (temperature, top_p, top_k)]
        return sample(logits[: len(numbers)], *chance[:2], torch.tensor(numbers)[:, None], chance[2]).tolist()

    assert tokens([0.0, 0.49, 0.51, 0.74, 0.76, 0.9999], 1.0) == [1, 1, 3, 3, 4, 0]
    assert tokens([0.0, 0.66, 0.67, 0.9999], 0.7) == [1, 1, 3, 3]  # 0.5 and 0.25 reach 0.7
    assert tokens([0.99], 0.5) == tokens([0.99], 0.01) == [1]
    assert tokens([0.99], 1e-50) == tokens([0.99], 1.0, temperature=1e-50) == [1]  # zeros in single precision
    assert tokens([0.0, 0.66, 0.67, 0.9999], 1.0, top_k=2) == [1, 1, 3, 3] and tokens([0.99], 1.0, top_k=1) == [1]
    squares = chances.square() / chances.square().sum()
    first = float(squares[1])
    assert tokens([first - 0.01, first + 0.01], 1.0, temperature=0.5) == [1, 3]
    assert SamplingParams(0, 0.9, 1.0, torch.Generator()).numbers(2) == [0.0, 0.0]


def test_a_penalty_makes_generated_tokens_less_likely():
    logits, said = torch.tensor([[2.0, 2.0, -2.0, -2.0]]), torch.tensor([[True, False, True, False]])
    assert penalise(logits, said, torch.tensor([[2.0]])).tolist() == [[1.0, 2.0, -4.0, -2.0]]
    assert torch.equal(penalise(logits, said, torch.tensor([[1.0]])), logits)


def test_unused_random_numbers_are_used_later():
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    one, many = (SamplingParams(1.0, 1.0, 1.0, generator) for generator in draws)
    ahead, singly = many.numbers(8), []
    for _ in range(8):
        singly += one.numbers(1)
        one.used()
    assert singly == ahead and len(set(ahead)) == 8
    many.used()
    assert many.numbers(7) == ahead[1:]


def test_sessions_of_several_decoders_and_sliding_layers_are_refused(llava_folder, model):
    with pytest.raises(Mgp5Error, match="several decoders"):
        list(generate_batch(model, TALKS[:2], None, [Session(model), Session(model)]))
    backbone = HFBackbone.load(llava_folder)
    text = backbone.core.config.get_text_config()
    text.layer_types, text.sliding_window = ["full_attention", "sliding_attention"], 64
    with pytest.raises(Mgp5Error, match="sliding_attention"):
        Session(llm_only(backbone))


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("said", "stops", "shown"),
    [
        ("a fox ASSISTANT: hi", ("ASSISTANT:", "USER:"), "a fox "),
        ("an ASS in US", ("ASSISTANT:", "USER:"), "an ASS in US"), ("one. two", (". ",), "one"),
        ("abcabd", ("abd",), "abc"), ("no stop", (), "no stop"),
    ],
)  # fmt: skip
def test_a_stop_ends_a_reply_and_none_of_it_is_shown(said, stops, shown):
    text, streamed = ReplyText(stops=stops), ""
    for letter in said:
        streamed += text.add(Letters(), ord(letter))
        if text.stopped:
            break
    assert streamed + text.close() == shown and text.stopped == (shown != said)
    assert [part.text for part in text.parts] == [shown.strip()]


def test_role_markers_are_those_of_the_template(minigpt4_folder, llava_folder, qwen_folder):
    markers = [role_markers(HFBackbone.load(folder)) for folder in (llava_folder, minigpt4_folder, qwen_folder)]
    assert markers == [("ASSISTANT:", "USER:"), ("###Assistant:", "###Human:"), ()]
