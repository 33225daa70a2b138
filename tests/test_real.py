"""A real LLM and real tokenizers, where tests elsewhere have tiny random ones: `pytest -m real`, see real_parts.py."""

from itertools import pairwise

import pytest
import torch
from PIL import Image as pil
from real_parts import clip_tokenizer, llama_tokenizer, save_smollm2_llava
from serve_process import serving_here
from tiny import same_pixels
from tiny_training import config, finish

import mgp5
from mgp5 import Conversation, Image
from mgp5.events import Finished
from mgp5.inference.reply import generate_batch
from mgp5.inference.session import Session
from mgp5.loading import build

pytestmark = pytest.mark.real

ASKS = ("What is the capital of France?", "Say hello to Maria.", "Which colour has the sky on a clear day?")
GREEDY = {"temperature": 0.0, "max_tokens": 24, "image": "never"}


@pytest.fixture(scope="module")
def smollm2(shared):
    return shared("smollm2", save_smollm2_llava)


@pytest.fixture(scope="module")
def real_model(smollm2, diffusion_folder):
    torch.manual_seed(1)
    return build(str(smollm2), str(diffusion_folder), num_vokens=4, guidance=3.0)


def replies(model, talks, **options):
    """Return the messages of replies that are made together."""
    messages = [None] * len(talks)
    for index, event in generate_batch(model, talks, mgp5.reply_options(**options)):
        if isinstance(event, Finished):
            messages[index] = event.message
    return messages


def talk(ask: str) -> Conversation:
    return Conversation().add("system", "You are a helpful assistant.").add("user", ask)


def test_a_chat_is_answered_in_sense(real_model):
    answer = replies(real_model, [talk(ASKS[0])], **GREEDY)[0].text
    assert "Paris" in answer and "<|im" not in answer and "assistant" not in answer


def test_replies_of_a_batch_are_those_alone(real_model):
    options = GREEDY | {"image": "always", "steps": 2}
    together = replies(real_model, [talk(ask) for ask in ASKS], **options)
    for ask, message in zip(ASKS, together, strict=True):
        (alone,) = replies(real_model, [talk(ask)], **options)
        assert alone.text == message.text and len(message.images) == 1
        assert same_pixels(alone.images[0].load(), message.images[0].load())


def test_a_long_conversation_keeps_its_states(real_model):
    """Read turn by turn from the cache, 3,000 tokens have the state that one forward gives."""
    told = "The rain in the hills fell for a week. " * 100
    first = talk(f"{told} What fell?")
    second = first.add("assistant", "Rain.").add("user", f"{told} Where?")
    session = Session(real_model)
    session.read(first)
    cached, whole = session.read(second), Session(real_model).read(second)
    assert session.length > 1500 and (cached - whole).abs().max() < 2e-3 * whole.abs().max()


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_two_updates_of_a_stage_train_and_are_loaded(stage, real_model, smollm2, diffusion_folder, tmp_path):
    image = Image(pixels=pil.new("RGB", (32, 32), "red"), caption="a red square")
    question = "a red square" if stage == "pretrain" else "Draw a red square."
    data = [Conversation().add("user", question).add("assistant", image)] * 4
    model = build(str(smollm2), str(diffusion_folder), num_vokens=4, guidance=3.0)
    steps = finish(model, data, config(stage), tmp_path / "run")
    assert len(steps) == 2 and all(0 < step.losses["text"] < 20 for step in steps)
    trained = mgp5.load(tmp_path / "run", backend=None)
    assert trained.head.ids == model.head.ids
    (reply,) = replies(trained, [talk("Draw it.")], **(GREEDY | {"image": "always", "steps": 2}))
    assert len(reply.images) == 1


def test_the_server_answers_as_the_model_does(smollm2, diffusion_folder, tmp_path):
    import openai

    data = [Conversation().add("user", "Hello!").add("assistant", "Hello.")] * 2
    model = build(str(smollm2), str(diffusion_folder), num_vokens=4, guidance=3.0)
    finish(model, data, config("finetune", steps=1, lr=1e-6), tmp_path / "run")
    with serving_here(tmp_path / "run", rows=2) as running:
        client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)
        messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": ASKS[0]}]
        reply = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=24, modalities=["text"]
        )
    (alone,) = replies(mgp5.load(tmp_path / "run", backend=None), [talk(ASKS[0])], **GREEDY)
    assert "Paris" in alone.text and reply.choices[0].message.content == alone.text


@pytest.mark.gpu
def test_four_bits_answer_in_sense_on_a_gpu(smollm2, diffusion_folder):
    model = build(str(smollm2), str(diffusion_folder), num_vokens=4, quantize="4bit").to("cuda")
    assert "Paris" in replies(model, [talk(ASKS[0])], **GREEDY)[0].text


def test_tokenizers_are_the_real_ones(tmp_path):
    clip = clip_tokenizer(tmp_path)
    assert len(clip) == 49408
    assert clip("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    llama = llama_tokenizer()
    assert len(llama) == 32000 and llama("Hello world").input_ids == [1, 15043, 3186]


def test_new_vokens_leave_a_real_tokenizers_words_alone():
    llama = llama_tokenizer()
    texts = ("a red fox, in snow", "Grüße, 你好 😀", " two  blanks\n")
    before = [llama(text).input_ids for text in texts]
    llama.add_tokens([f"[IMG{k}]" for k in range(8)], special_tokens=True)
    assert [llama(text).input_ids for text in texts] == before
    ids = llama("a fox [IMG0][IMG1]", add_special_tokens=False).input_ids
    assert all(b - a == 1 for a, b in pairwise(ids[-2:])) and ids[-2] == 32000
