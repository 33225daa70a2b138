"""The embedded demo: ordinary checkpoints, small enough, that say and draw what is asked. test_golden_outputs.py has
the story of the README's first command."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pil

import mgp5
from mgp5 import Conversation, Image
from mgp5.events import Finished, ImageDone
from mgp5.inference.session import Session
from mgp5.prompts import illustrate, narrate
from mgp5.storyland.language import accepts
from mgp5.storyland.tell import story
from mgp5.storyland.world import rng

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "mgp5" / "demo"


@pytest.fixture(scope="module")
def demo():
    return mgp5.load("demo", backend=None)


def test_weights_are_half_precision_safetensors_of_at_most_40_mb():
    from safetensors import safe_open

    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} == {"mllm", "unet", "vae", "text_encoder", "mgp5"}
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_parts_are_ordinary_checkpoints():
    from diffusers import StableDiffusionPipeline
    from transformers import LlavaForConditionalGeneration

    assert LlavaForConditionalGeneration.from_pretrained(DEMO / "mllm").num_parameters() > 1e6
    pipe = StableDiffusionPipeline.from_pretrained(DEMO / "diffusion")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red fox waves on the beach on a sunny day", num_inference_steps=2).images[0]
    assert image.size == (128, 128)


def test_pictures_are_not_blank_and_depend_on_the_words(demo):
    options, pixels = mgp5.reply_options(image="always", max_tokens=0, steps=8), []
    for text in ("a red fox stands on the beach on a sunny day", "a blue elephant sleeps in the forest at night"):
        events = mgp5.generate(demo, illustrate([], text), options)
        pixels += [np.asarray(e.image.load()).astype(float) for e in events if isinstance(e, ImageDone)]
    assert min(len(np.unique(p.reshape(-1, 3), axis=0)) for p in pixels) > 1000
    assert np.abs(pixels[0] - pixels[1]).mean() > 25


def test_lessons_are_what_the_demo_is_trained_on(demo, monkeypatch):
    """A lesson of examples/storyland ends where its image is due, which the LLM, trained on such, tells by a voken."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "storyland"))
    from lessons import lesson as any_lesson
    from lessons import sample, story_lesson

    lesson = story_lesson(story(rng("test", 0, 0), "test"), "illustrate", 1, 0, "text")
    made = sample(demo.backbone, lesson)
    assert made.labels[-1] == len(demo.backbone.tokenizer) and not made.pictures
    assert made.target == lesson.about
    talk = Conversation(lesson.conversation.messages[:-1])
    state = Session(demo).read(talk)
    assert demo.backbone.logits(state).argmax() == demo.head.ids[0]
    lengths = {len(any_lesson(rng("test", 0, number), "test").conversation.messages) for number in range(200)}
    assert max(lengths) - 2 <= demo.config.history <= max(lengths)  # the longest without the system's and the reply


@pytest.mark.parametrize("seed", range(2))
def test_a_reply_without_a_system_message_is_a_chats(demo, seed):
    """It is asked with the model's system text, and ends where another turn would begin."""
    asked, options = Conversation().add("user", "a green frog"), mgp5.reply_options(seed=seed, max_tokens=40, steps=2)
    reply = list(mgp5.generate(demo, asked, options))[-1].message
    assert reply.text and not re.search("ASSISTANT|USER|assistant", reply.text)
    spoken = Conversation().add("system", demo.config.system).add("user", "a green frog")
    assert list(mgp5.generate(demo, spoken, options))[-1].message.text == reply.text


def test_narration_is_a_sentence_of_the_world(demo):
    picture = Image(pixels=pil.open(ROOT / "examples" / "picnic" / "1.png"))
    events = list(mgp5.generate(demo, narrate([], picture), mgp5.reply_options(image="never", temperature=0)))
    text = next(e.message.text for e in events if isinstance(e, Finished))
    assert accepts(text) and "bear" in text, text
