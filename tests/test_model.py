"""Vokens, states and generation on tiny random LLaVA and Qwen2.5-VL models."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from tiny import feed, picture, same_pixels

from mgp5 import Conversation, Image, Message, Text
from mgp5.apps.story import SceneInput, StoryRequest, tell_story
from mgp5.config import MapperConfig, MiniGPT5Config
from mgp5.events import Finished, ImageDone, ImageStep, TextChunk
from mgp5.heads.minigpt5 import predicting_states
from mgp5.heads.settings import model_config_from
from mgp5.inference.reply import generate
from mgp5.inference.session import Session
from mgp5.options import reply_options
from mgp5.prompts import example, prompt
from mgp5.training.batch import Collator
from mgp5.training.presets import preset


def ask(text="draw a fox", color="red"):
    return Conversation().add("user", "look", Image(pixels=picture(color)), text)


def last_message(events):
    return next(event.message for event in events if isinstance(event, Finished))


def forced_states(model, conversation):
    """Return the states of generation: read the prompt, then the run of vokens in one forward."""
    session = Session(model)
    first = session.read(conversation)
    return torch.cat([first, feed(session, model.head.ids)], dim=1)  # (1, 1 + n, D)


@torch.no_grad()
def trained_states(model, conversation, shift=0):
    collator = Collator(model.backbone, model.head, 1000)
    batch = collator([conversation.add("assistant", Image(pixels=picture()))])
    starts = [start + shift for start in batch.target_starts]
    return predicting_states(model.hidden(batch), batch.target_rows, starts, model.head.num_vokens)


def test_teacher_forced_states_equal_generated_states_and_not_those_beside_them(model):
    conversation = ask()
    generated = predicting_states(forced_states(model, conversation), [0], [1], model.head.num_vokens)
    torch.testing.assert_close(trained_states(model, conversation), generated, atol=1e-5, rtol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trained_states(model, conversation, shift=1), generated, atol=1e-2, rtol=1e-2)


def test_run_in_one_forward_equals_token_by_token(model):
    conversation = ask()
    together = forced_states(model, conversation)
    session = Session(model)
    states = [session.read(conversation)] + [feed(session, (i,)) for i in model.head.ids]
    torch.testing.assert_close(together, torch.cat(states, dim=1), atol=1e-5, rtol=1e-4)


def test_cached_turns_equal_uncached_turns_and_read_only_new_tokens(model):
    options = reply_options(seed=3, max_tokens=12, steps=2, image="always")
    cached, fresh = Session(model), Session(model, reuse=False)
    talk, read_before = ask(), 0
    for _ in range(3):
        messages = [last_message(generate(model, talk, options, session)) for session in (cached, fresh)]
        assert messages[0].text == messages[1].text
        assert same_pixels(*(message.images[0].load() for message in messages))
        assert fresh.prefilled - cached.prefilled >= read_before  # the earlier prompt was not read again
        read_before = fresh.prefilled
        talk = Conversation((*talk.messages, messages[0])).add("user", "and then?")


def test_two_images_in_one_reply(model):
    logits = model.backbone.logits
    order = iter([5, model.head.ids[0], 6, 7, model.head.ids[0], 8, *[next(iter(model.backbone.stop_ids))] * 9])

    def scripted(hidden):
        result = torch.full_like(logits(hidden), -50.0)
        result[..., next(order)] = 50.0
        return result

    model.backbone.logits = scripted
    events = list(generate(model, ask(), reply_options(steps=3, temperature=0)))
    done = [event for event in events if isinstance(event, ImageDone)]
    assert [event.index for event in done] == [0, 1]
    assert len([event for event in events if isinstance(event, ImageStep)]) == 6
    assert [event.image.meta["seed"] for event in done] == [0, 1]
    assert not same_pixels(done[0].image.load(), done[1].image.load())
    kinds = [type(part).__name__ for part in last_message(events).content]
    assert kinds == ["Text", "Image", "Text", "Image", "Text"]
    streamed = "".join(event.text for event in events if isinstance(event, TextChunk))
    assert streamed.replace(" ", "") == last_message(events).text.replace(" ", "")


def test_same_seeds_same_reply_and_seeds_are_separate(model):
    def run(**seeds):
        message = last_message(generate(model, ask(), reply_options(steps=2, max_tokens=10, image="always", **seeds)))
        return message.text, message.images[0].load()

    words, image = run(seed=1, image_seed=5)
    again, same = run(seed=1, image_seed=5)
    assert again == words and same_pixels(same, image)
    again, other = run(seed=1, image_seed=6)
    assert again == words and not same_pixels(other, image)
    assert run(seed=2, image_seed=5)[0] != words


@pytest.mark.parametrize("image, count", [("never", 0), ("always", 1)])
def test_image_can_be_forced_and_forbidden(model, image, count):
    for seed in range(3):
        message = last_message(generate(model, ask(), reply_options(seed=seed, image=image, steps=1, max_tokens=8)))
        assert len(message.images) >= count if image == "always" else not message.images


def test_unconditional_branch_is_the_mapper_on_zeros_and_computed_once(model):
    condition = torch.zeros(1, *model.head.generator.condition_shape)
    first = model.head.unconditional(condition)
    zeros = torch.zeros(1, model.head.num_vokens, model.backbone.width)
    torch.testing.assert_close(first, model.head.mapper(zeros))
    assert model.head.unconditional(condition) is first
    model.train()
    model.eval()
    assert model.head.unconditional(condition) is not first


def test_vokens_start_at_the_mean_row(model):
    core, ids = model.backbone.core, list(model.head.ids)
    for weight in (core.get_input_embeddings().weight, model.backbone.lm_head.weight):
        known = weight[: len(model.backbone.tokenizer) - len(ids)]
        torch.testing.assert_close(weight[ids], known.mean(0).expand(len(ids), -1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("typed", ["[IMG0]", "{}", "[IM[IMG0]G0]", "{0[0]}{0}{0[1]}{0[2]}", "</</s>s>"])
def test_special_tokens_in_a_users_text_are_only_text(model, typed):
    """Also those that are spelled inside themselves, of a question and of an answer that is to be learnt."""
    tokenizer, typed = model.backbone.tokenizer, typed.format(model.backbone.image_token)
    special = {*model.head.ids, model.backbone.image_token_id, *tokenizer.all_special_ids}

    def count(text):
        talk = Conversation().add("user", text).add("assistant", text)
        return sum(token in special for token in example(model.backbone, talk, "[IMG0]", []).ids)

    assert count(f"hi {typed} there") == count("hi there")
    session = Session(model)
    session.read(Conversation().add("user", f"hi {typed} there"))
    assert not {token for token, _ in session.keys} & {*model.head.ids, model.backbone.image_token_id}


def test_a_token_added_after_a_first_prompt_is_text_too(model):
    """The pattern of the special tokens is kept between texts, but not past a change of the tokenizer."""
    tokenizer = model.backbone.tokenizer
    conversation = Conversation().add("user", "say [NEW] to me")
    prompt(model.backbone, conversation)
    added = tokenizer.add_tokens(["[NEW]"], special_tokens=True)
    assert added == 1 and tokenizer.convert_tokens_to_ids("[NEW]") not in prompt(model.backbone, conversation).ids
    assert tokenizer.encode("say [NEW]", add_special_tokens=False)[-1] == tokenizer.convert_tokens_to_ids("[NEW]")


@pytest.mark.parametrize("context, shown", [("full", True), ("none", False)])
def test_the_prompt_of_a_narration_has_the_history_of_the_models_configuration(model, monkeypatch, context, shown):
    asked = []

    def record(model, conversation, options, session):
        asked.append(conversation)
        yield Finished(Message("assistant", (Text("a tale"),)), "stop")

    monkeypatch.setattr("mgp5.inference.reply.generate", record)
    model.config = replace(model.config, narrate_from=context)
    first, second = Image(pixels=picture("red")), Image(pixels=picture("blue"))
    inputs = SceneInput(first, "once"), SceneInput(second)
    list(tell_story(StoryRequest(inputs=inputs, scenes=0), model))
    assert any(image is first for image in asked[0].images) is shown
    assert ("once" in asked[0].messages[-1].text) is shown


@pytest.mark.parametrize(("history", "shown"), [(None, 5), (3, 3), (1, 1), (0, 1)])
def test_a_reply_reads_as_many_messages_as_those_of_its_training_had(model, history, shown):
    talk = Conversation().add("system", "Talk.").add("user", "one").add("assistant", "two")
    talk = talk.add("user", "three").add("assistant", "four").add("user", "five")
    model.config = replace(model.config, history=history)
    session = Session(model)
    list(generate(model, talk, reply_options(max_tokens=1, image="never"), session))
    expected = Conversation((talk.messages[0], *talk.messages[-shown:]))
    assert [token for token, _ in session.keys][: session.prefilled] == prompt(model.backbone, expected).ids


def test_a_configuration_of_before_heads_had_names_is_read():
    mapper = {"llm_width": 32, "width": 16, "queries": 11, "encoder_layers": 1, "decoder_layers": 1}
    old = {"mllm": "mllm", "diffusion": "diffusion", "num_vokens": 4, "mapper": mapper, "unconditional": "text"}
    old |= {"diffusion_kind": "StableDiffusion epsilon 11x16", "guidance": 2.0}
    config = model_config_from(old, "config.json")
    assert config.head == "minigpt5" and config.head_kind == "StableDiffusion epsilon 11x16" and config.guidance == 2.0
    assert config.head_config == MiniGPT5Config(num_vokens=4, mapper=MapperConfig(**mapper), unconditional="text")
    assert model_config_from(json.loads(json.dumps(asdict(config))), "config.json") == config


def test_what_each_stage_trains_is_a_table(model):
    """Sections 3.3 and 4.1: rows without weight decay, and the mapper; in the second stage its MLP and queries rest."""
    plans = {stage: model.head.train_plan(preset(stage)) for stage in ("pretrain", "finetune")}

    def rule(stage, name):
        return next((rule for rule in plans[stage] if re.search(rule.pattern, name)), None)

    rows = "backbone.model.base_model.model.lm_head.token_adapter.trainable_tokens_delta.default"
    lora = "backbone.model.base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"
    for stage, config in ((stage, preset(stage)) for stage in plans):
        assert rule(stage, rows)[1:] == (config.rows_lr, 0.0)
        assert rule(stage, lora)[1:] == (config.lr, config.weight_decay)
        assert rule(stage, "head.mapper.transformer.encoder.layers.0.linear1.weight").lr == config.lr
        assert rule(stage, "head.generator.unet.conv_in.weight") is None
        assert rule(stage, "backbone.model.base_model.model.lm_head.weight") is None
    assert [rule(stage, "head.mapper.mlp.0.weight").lr is None for stage in plans] == [False, True]
    assert [rule(stage, "head.mapper.queries").lr is None for stage in plans] == [False, True]
