"""Each family of backbones against the forward of transformers; prefix tuning; gradient checkpointing; MiniGPT-4."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import TargetHead, feed, llm_only, picture
from tiny_mllm import QUERIES
from transformers import Blip2ForConditionalGeneration, LlamaForCausalLM

from mgp5 import Conversation, Image, prompts
from mgp5.apps.open_model import load
from mgp5.backbones.adapters import add_prefix
from mgp5.backbones.hf import HFBackbone
from mgp5.backbones.minigpt4 import compose
from mgp5.config import PrefixConfig
from mgp5.errors import Mgp5Error
from mgp5.events import ImageDone
from mgp5.inference.reply import generate
from mgp5.inference.session import Session
from mgp5.loading import build, save_checkpoint
from mgp5.options import reply_options
from mgp5.prompts import STORY_SYSTEM, caption_to_image, continue_, example, illustrate, narrate, prompt
from mgp5.training.batch import Collator

FAMILIES = ["llava", "qwen", "qwen3", "minigpt4"]
TALK = (
    Conversation()
    .add("system", "Be kind.")
    .add("user", Image(pixels=picture("red")), "then", Image(pixels=picture("blue", (70, 90))), "draw")
)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="module")
def loaded(folder):
    return HFBackbone.load(folder)


@pytest.fixture
def backbone(loaded):
    return copy.deepcopy(loaded)


def batch_of(backbone, count=2):
    """Return a batch of samples of different lengths, the second without images."""
    samples = [TALK.add("assistant", "here"), Conversation().add("user", "hi").add("assistant", "oh no, not you again")]
    return Collator(backbone, TargetHead(backbone, ("[IMG0]",), (16, 16)), 1000)(samples[:count])


def embedded(backbone, batch):
    embeds = backbone.embed(batch.ids, backbone.encode_images(batch.context_images))
    return embeds, backbone.positions(batch.ids, batch.context_images.get("image_grid_thw"), batch.mask)


@torch.no_grad()
def test_logits_equal_those_of_the_transformers_model(backbone):
    batch = batch_of(backbone)
    ours = backbone.logits(backbone(*embedded(backbone, batch), batch.mask))
    kinds = (batch.ids == backbone.image_token_id).int()
    extra = {"mm_token_type_ids": kinds} if "image_grid_thw" in batch.context_images else {}
    theirs = backbone.core(input_ids=batch.ids, attention_mask=batch.mask, **batch.context_images, **extra).logits
    real = batch.mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    red, blue = backbone.encode_images(batch.context_images)
    assert not torch.allclose(red[0], blue[0], atol=1e-3)


@torch.no_grad()
def test_images_read_with_a_cache_equal_images_read_at_once(backbone):
    session, uncached = Session(llm_only(backbone)), Session(llm_only(backbone))
    first = Conversation(TALK.messages[:1]).add("user", Image(pixels=picture("red")), "then")
    session.read(first)
    kept = session.read(TALK)
    torch.testing.assert_close(kept, uncached.read(TALK), atol=1e-5, rtol=1e-4)
    assert session.prefilled < uncached.prefilled


def test_only_the_language_model_is_in_training_mode(backbone):
    backbone.train()
    assert backbone.training and backbone.language.training
    inside = {id(module) for module in backbone.language.modules()}
    assert not [m for m in backbone.core.modules() if m.training and id(m) not in inside]


@pytest.mark.parametrize("prefix", [False, True])
def test_checkpointing_gives_the_same_gradients(backbone, prefix):
    if prefix:
        add_prefix(backbone, 3, 8)
    backbone.train()
    batch = batch_of(backbone)
    embeds, positions = embedded(backbone, batch)
    gradients, stored = [], []
    for on in (False, True):
        backbone.checkpointing(on)
        leaf, saved = embeds.detach().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            loss = backbone(leaf, positions, batch.mask).square().mean()
        gradients.append(torch.autograd.grad(loss, [leaf, *(backbone.prefix.parameters() if prefix else ())]))
        stored.append(sum(t.numel() for t in saved))
    torch.testing.assert_close(*gradients)
    assert stored[1] < stored[0] / 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prefix_trains_as_it_generates(backbone, checkpointing):
    plain = Session(llm_only(backbone)).read(TALK)
    add_prefix(backbone, 5, 16)
    backbone.checkpointing(checkpointing)
    backbone.train()
    batch = batch_of(backbone)
    embeds, positions = embedded(backbone, batch)
    hidden = backbone(embeds, positions, batch.mask)
    hidden[batch.mask.bool()].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in backbone.prefix.parameters())
    at = len(prompt(backbone, TALK).expand(backbone.image_token_id, backbone.slots(batch.context_images))) - 1
    with torch.no_grad():
        states = backbone.eval()(embeds, positions, batch.mask)
    torch.testing.assert_close(states, hidden)
    session = Session(llm_only(backbone))
    torch.testing.assert_close(session.read(TALK)[0, 0], hidden[0, at], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain[0, 0], hidden[0, at], atol=1e-3)
    token = int(batch.ids[0, at + 1])
    torch.testing.assert_close(feed(session, (token,))[0, 0], hidden[0, at + 1], atol=1e-5, rtol=1e-4)
    assert session.length == at + 2


@torch.no_grad()
def test_a_rewound_session_keeps_its_prefix(backbone):
    add_prefix(backbone, 3, 8)
    session = Session(llm_only(backbone))
    session.read(TALK.add("assistant", "no").add("user", "why?"))
    other = TALK.add("assistant", "no").add("user", "who?")
    torch.testing.assert_close(session.read(other), Session(llm_only(backbone)).read(other), atol=1e-5, rtol=1e-4)
    assert 0 < session.prefilled < 40


def test_minigpt4_is_composed_of_its_parts(minigpt4_folder):
    backbone = HFBackbone.load(minigpt4_folder)
    parts = minigpt4_folder.parent
    blip2 = Blip2ForConditionalGeneration.from_pretrained(parts / "blip2")
    llama = LlamaForCausalLM.from_pretrained(parts / "llama")
    ours = backbone.core.state_dict()
    for name, value in blip2.state_dict().items():
        if not name.startswith("language_"):
            torch.testing.assert_close(ours[name], value, atol=0, rtol=0)
    for name, value in llama.state_dict().items():
        torch.testing.assert_close(ours[f"language_model.{name}"][: len(value)], value, atol=0, rtol=0)
    projection = torch.load(parts / "projection.pth", weights_only=True)["model"]
    torch.testing.assert_close(ours["language_projection.weight"], projection["llama_proj.weight"], atol=0, rtol=0)


def test_minigpt4_has_the_prompts_of_the_released_code(minigpt4_folder):
    backbone = HFBackbone.load(minigpt4_folder)
    tokenizer, stop = backbone.tokenizer, backbone.tokenizer.convert_tokens_to_ids("▁###")
    asked = prompt(backbone, TALK)
    mark = "<Img><ImageHere></Img>"
    red, start = Image(pixels=picture("red")), f"<s>{STORY_SYSTEM}###Human:"
    two = [("cap1", red), ("cap2", red)]
    for conversation, text in (
        (TALK, f"<s>Be kind.###Human: {mark} then {mark} draw ###Assistant:"),
        (
            illustrate(two, "cap3"),
            f"{start}cap1{mark}cap2{mark}\n Generate an image with the scene description: cap3 ###Assistant:",
        ),
        (illustrate([], "cap", 1), f"{start} the scene description: cap ###Assistant:"),
        (continue_(two, 2), f"{start}cap1{mark}cap2{mark}\n What should happen then? ###Assistant:"),
        (narrate(two[:1], red, 1), f"{start}cap1{mark}\n What happen in the next scene image: {mark} ###Assistant:"),
    ):
        assert prompts._render(backbone, conversation.messages, reply=True) == text
        assert prompt(backbone, conversation).ids == tokenizer.encode(text, add_special_tokens=False)
    bare = caption_to_image(Image(pixels=picture(), caption="a fox"), bare=True)
    caption = [tokenizer.bos_token_id, *tokenizer.encode("a fox", add_special_tokens=False)]
    trigger = backbone.add_tokens(["[IMG0]"])[0]
    drawn = example(backbone, bare, "[IMG0]", [([trigger, 7], [trigger, 7])])
    assert drawn.ids == [*caption, trigger, 7, stop]
    assert prompt(backbone, replace(bare, messages=bare.messages[:1])).ids == caption
    sample = example(backbone, TALK.add("assistant", "a fox"), "[IMG0]", [])
    assert [i for i in sample.labels if i != -100] == [*tokenizer.encode(" a fox", add_special_tokens=False), stop]
    assert backbone.stop_ids == {stop, *tokenizer.convert_tokens_to_ids(["</s>", "##"])}
    assert backbone.slots(backbone.preprocess([picture()])) == [QUERIES]
    after = tokenizer.convert_tokens_to_ids("<ImageHere>")
    assert tokenizer.convert_ids_to_tokens(asked.ids)[asked.ids.index(after) + 1] == "▁"  # as the slow tokenizer had it


def test_a_projection_of_another_llm_is_refused(minigpt4_folder, tmp_path):
    parts = minigpt4_folder.parent
    torch.save({"llama_proj.weight": torch.zeros(7, 24), "llama_proj.bias": torch.zeros(7)}, tmp_path / "p.pth")
    with pytest.raises(Mgp5Error, match="expected"):
        compose(parts / "blip2", parts / "llama", tmp_path / "out", tmp_path / "p.pth")
    with pytest.raises(Mgp5Error, match="exists"):
        compose(parts / "blip2", parts / "llama", minigpt4_folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["qwen3", "minigpt4"])  # tests/test_combinations.py has LoRA
def test_a_trained_prefix_is_saved_and_loaded(name, request, diffusion_folder, tmp_path):
    model = build(str(request.getfixturevalue(f"{name}_folder")), str(diffusion_folder))
    conversation = TALK.add("assistant", Image(pixels=picture()))
    batch = Collator(model.backbone, model.head, 1000)([conversation])
    with torch.no_grad():
        untrained = model.hidden(batch)
        model.adapt(None, PrefixConfig(tokens=4, hidden=8))
        trained = [p for p in model.backbone.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
        hidden = model.eval().hidden(batch)
        model.config = replace(model.config, stage="finetune")
        save_checkpoint(model, tmp_path)
        loaded = load(tmp_path)
        torch.testing.assert_close(loaded.hidden(batch), hidden, atol=1e-5, rtol=1e-4)
    assert len(trained) > 2 and not torch.allclose(hidden, untrained, atol=1e-2)
    events = generate(loaded, TALK, reply_options(steps=1, max_tokens=0, image="always"))
    assert any(isinstance(event, ImageDone) for event in events)
