"""Packed rows: documents one behind another give what they give alone, for heads with and without side inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_mm_interleaved import TALK, fresh, opened, options, samples
from test_mm_interleaved import config as mm_config
from tiny_training import config as minigpt5_config
from tiny_training import fresh as fresh_minigpt5

from mgp5.config import DataConfig, LoraConfig, PrefixConfig
from mgp5.errors import Mgp5Error
from mgp5.inference.reply import generate
from mgp5.inference.session import Session
from mgp5.messages import Conversation, Message, Text
from mgp5.prompts import IGNORE
from mgp5.training.batch import Collator
from mgp5.training.presets import preset

NEAR = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def long_rows(monkeypatch):
    monkeypatch.setattr("mgp5.training.batch.PARTS", 0.1)  # of the width of a tiny LLM


def made(head, llava_folder, diffusion_folder):
    if head == "minigpt5":
        model, config = fresh_minigpt5(llava_folder, diffusion_folder), minigpt5_config("finetune", text_weight=1.0)
        model.prepare(config)
        return model.eval(), config
    model = opened(fresh(llava_folder, diffusion_folder))
    return model, mm_config(guidance_dropout=0.0)


def collate(model, config, items, pack, length=512, system=""):
    config = replace(config, data=replace(config.data, pack=pack))
    return Collator(model.backbone, model.head, length, config, system=system)(items)


@torch.no_grad()
@pytest.mark.parametrize("head", ["minigpt5", "mm-interleaved"])
def test_isolated_documents_are_as_alone(head, llava_folder, diffusion_folder):
    model, config = made(head, llava_folder, diffusion_folder)
    rows = collate(model, config, samples()[:4], "none")
    packed = collate(model, config, samples()[:4], "isolated", length=2 * rows.ids.shape[1])
    assert 1 < len(packed.ids) < 4 and rows.num_samples == packed.num_samples == 4
    assert int(rows.mask.sum()) == int(packed.mask.sum())
    batches = [model.head.complete(model.backbone, each, config, torch.Generator()) for each in (rows, packed)]
    alone, together = (model.hidden(replace(each, context=model.context(each))) for each in batches)
    torch.testing.assert_close(together[packed.mask > 0], alone[rows.mask > 0], **NEAR)
    for term in ("text", "ldm"):
        seeded = [torch.Generator().manual_seed(0) for _ in batches]
        one, other = (model(each, config, rng).terms[term] for each, rng in zip((rows, packed), seeded, strict=True))
        torch.testing.assert_close(one, other, **NEAR)


@torch.no_grad()
def test_plain_packing_isolates_images_and_contexts_but_not_self_attention(llava_folder, diffusion_folder):
    """As released: what is before a document is read, its images are not seen; nor are they painted from."""
    model, config = made("mm-interleaved", llava_folder, diffusion_folder)
    first = samples()[0]
    second = Conversation((*samples()[1].messages[:1], *first.messages[1:]))
    batch = collate(model, config, [first, second], "plain")
    batch = model.head.complete(model.backbone, batch, config, torch.Generator())
    batch = replace(batch, context=model.context(batch))
    begin = int(batch.begins[0, batch.target_starts[-1]])
    assert batch.target_begins == [0, 0, begin, begin] and begin > 0
    features, visible = model.head._earlier(batch, model.hidden(batch))
    assert visible.sum(1).tolist() == [1, 2, 0, 1]
    torch.testing.assert_close(features[3, 0], batch.context.pyramid[3])
    side = model.backbone.side_inputs(batch.ids, [3] * 5, batch.context.side, batch.begins)
    assert side.first[0, :begin].eq(0).all() and side.first[0, begin : int(batch.mask.sum())].eq(3).all()
    hidden = model.hidden(batch)
    changed = replace(batch, ids=batch.ids.clone())
    changed.ids[0, 1] = batch.ids[0, 2]
    assert not torch.allclose(model.hidden(changed)[0, begin:], hidden[0, begin:], atol=1e-4)
    isolated = replace(batch, isolated=True), replace(changed, isolated=True)
    torch.testing.assert_close(*(model.hidden(each)[0, begin:] for each in isolated), **NEAR)


@pytest.mark.parametrize(
    "stage, family, values",
    [
        ("pretrain", "llava", {"min_snr": 5.0, "guidance_dropout": 0.5}),
        ("finetune", "qwen", {"lora": LoraConfig(dropout=0.0), "checkpointing": True}),
        ("finetune", "llava", {"lora": None, "prefix": PrefixConfig(tokens=2, hidden=8)}),
    ],
)
def test_packed_rows_and_a_few_images_at_a_time_give_the_same_gradients(
    stage, family, values, llava_folder, qwen_folder, diffusion_folder
):
    model = fresh_minigpt5({"llava": llava_folder, "qwen": qwen_folder}[family], diffusion_folder)
    usual = minigpt5_config(stage, text_weight=1.0, **values)
    model.prepare(usual)
    items, found = [*samples(), *samples()[::-1]], []
    for pack, images in (("none", 99), ("isolated", 2)):
        batch = collate(model.train(), usual, items, pack)
        losses = model(batch, replace(usual, generator_batch=images), torch.Generator().manual_seed(3))
        model.zero_grad()
        losses.total.backward()
        found.append((losses.terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, batch))
    (*old, padded), (*new, packed) = found
    assert packed.num_targets > 4 and len(packed.ids) < len(padded.ids) and packed.ids.numel() < padded.ids.numel()
    for one, other in zip(old, new, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], atol=1e-6, rtol=1e-3, msg=name)


def test_rows_have_the_least_padding(llava_folder, diffusion_folder, monkeypatch):
    model, config = fresh_minigpt5(llava_folder, diffusion_folder), minigpt5_config("finetune")
    items = [Conversation().add("user", "hi").add("assistant", "ha " * length) for length in (1, 2, 9, 2, 1, 3, 1)]
    padded, packed = (collate(model, config, items, pack, length=60) for pack in ("none", "isolated"))
    assert padded.mask.sum(1).tolist() == [23, 26, 47, 26, 23, 29, 23]
    assert packed.mask.sum(1).tolist() == [49, 47, 49, 52]
    assert packed.num_samples == 7 and packed.count("text") == padded.count("text")
    monkeypatch.setattr("mgp5.training.batch.PARTS", 8)
    assert collate(model, config, items, "isolated").begins is None  # of this width a row has one sample
    monkeypatch.setattr("mgp5.training.batch.PARTS", 0.1)
    monkeypatch.setattr(type(model.backbone), "packable", False)
    assert collate(model, config, items, "isolated").begins is None
    with pytest.raises(Mgp5Error, match="pack is tight, expected none or isolated or plain"):
        DataConfig(pack="tight")


def test_an_image_that_begins_a_text_is_not_learnt_there(llava_folder, diffusion_folder):
    """The release's rule for <|beginofimage|> behind the token that begins a text."""
    model, config = made("mm-interleaved", llava_folder, diffusion_folder)
    image = samples()[1].messages[1].content[0]
    items = [Conversation((Message("assistant", content),), bare=True) for content in ((image,), (Text("so"), image))]
    batch = collate(model, config, items, "isolated")
    assert batch.labels[0, list(batch.target_starts)].tolist() == [IGNORE, model.head.ids[0]]
    assert preset("pretrain", "release", "mm-interleaved").data.pack == "plain"


@torch.no_grad()
def test_a_reply_is_in_training_what_it_was_when_it_was_said(llava_folder, diffusion_folder):
    """The collator's ids, side inputs and states of a sample are those of the session that generated it."""
    model, config = made("mm-interleaved", llava_folder, diffusion_folder)
    first, *_ = samples()
    system = model.config.system
    meant = collate(model, config, [TALK.add("assistant", *first.messages[1].content)], "none", system=system)
    said, slot = meant.ids[0, int((meant.labels[0] != IGNORE).nonzero()[0]) :], model.head.ids[1]
    tokens, bonus = iter(said[said != slot].tolist()), torch.zeros(len(model.backbone.lm_head.weight))
    hook = lambda module, args, logits: logits + bonus.zero_().index_fill(0, torch.tensor(next(tokens)), 1e4)  # noqa: E731
    forced = model.backbone.lm_head.register_forward_hook(hook)
    session = Session(model)
    message = list(generate(model, TALK, options(max_tokens=30), session))[-1].message
    forced.remove()
    batch = collate(model, config, [Conversation((*TALK.messages, message))], "none", system=system)
    batch = model.head.complete(model.backbone, batch, config, torch.Generator())
    batch = replace(batch, context=model.context(batch))
    keys = [token for token, _ in session.keys]
    read = len(keys)
    assert batch.ids[0, :read].tolist() == keys and len(session.pyramids) == 3 and message.text
    torch.testing.assert_close(batch.context.side, session.decoder.rows[0].side, **NEAR)
    torch.testing.assert_close(batch.context.pyramid, torch.cat(session.pyramids), **NEAR)
    torch.testing.assert_close(model.hidden(batch)[:, :read], session.states, **NEAR)
