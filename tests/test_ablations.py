"""Presets, and what the papers ablate: each is configuration, and changes what it should and nothing else."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny import picture
from tiny_training import fresh

from mgp5 import Conversation, Image, Mgp5Error
from mgp5.config import TrainConfig
from mgp5.heads.losses import caption_loss
from mgp5.loading import build
from mgp5.model import InterleavedModel
from mgp5.options import override, parse_settings
from mgp5.prompts import IGNORE, example
from mgp5.training.batch import Collator
from mgp5.training.presets import PRESETS, preset

TALK = Conversation().add("user", "a fox").add("assistant", Image(pixels=picture(), caption="fox"))


def make(llava_folder, diffusion_folder, vokens: int = 4, **mapper) -> InterleavedModel:
    torch.manual_seed(1)
    return build(str(llava_folder), str(diffusion_folder), num_vokens=vokens, **mapper)


@pytest.fixture
def llava(llava_folder, diffusion_folder) -> InterleavedModel:
    return fresh(llava_folder, diffusion_folder)


def losses(model: InterleavedModel, config: TrainConfig):
    return model(Collator(model.backbone, model.head, 1000)([TALK]), config, torch.Generator().manual_seed(0))


def trained(model: InterleavedModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_presets_are_the_papers_and_the_releases_numbers():
    first, second = preset("pretrain"), preset("finetune")
    assert (first.lr, first.rows_lr, first.batch * first.accumulation, first.epochs) == (2e-4, 2e-4, 48, 2)
    assert (second.lr, second.batch * second.accumulation, second.epochs) == (2e-5, 32, 4)
    assert (second.lora.rank, second.lora.alpha, second.lora.targets) == (8, 16, ("q_proj", "v_proj"))
    assert (first.text_weight, first.ldm_weight, first.caption_weight) == (0.01, 1.0, 0.1)
    assert (second.text_weight, second.ldm_weight, second.caption_weight) == (0.01, 1.0, 0.0)
    assert first.guidance_dropout == second.guidance_dropout == 0.1 and first.min_snr is None
    old, older = preset("pretrain", "release"), preset("finetune", "release")
    assert (old.lr, old.rows_lr, old.min_snr, old.voken_labels) == (2e-4, 2e-5, 5.0, "ends")
    assert (older.lr, older.rows_lr, older.batch * older.accumulation, older.epochs) == (2e-5, 2e-5, 48, 2)
    prefix = preset("finetune", "prefix")
    assert (prefix.prefix.tokens, prefix.prefix.hidden, prefix.lora) == (5, 1024, None)
    for name, stage in product(PRESETS["minigpt5"], ("pretrain", "finetune")):
        assert override(preset(stage, name), {}) == preset(stage, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("kind=decoder",), "kind is decoder, expected encoder-decoder or decoder-only"),
        (("batch=0", "lr=-1.0"), "batch is 0, expected at least 1; lr is -1.0, expected above 0"),
        (("batch.size=3",), "batch has no settings of its own"),
        (("prefix.tokens=0",), "prefix has 0 tokens and hidden width 1024"),
        (("ema=1.0",), "ema is 1.0, expected 0 or more and below 1"),
        (("data.history=x",), "history is 'x', expected a whole number or none"),
        (("prefix.tokens=3", "lora.rank=4"), "lora and prefix are both given"),
    ],
)
def test_all_that_is_wrong_is_told_at_once(settings, message):
    with pytest.raises(Mgp5Error, match=r"expected|no settings") as error:
        override(preset("pretrain"), parse_settings(settings))
    assert message in str(error.value) and error.value.exit_code == 2


def test_none_is_no_configuration_or_one_of_the_choices():
    config = override(preset("finetune"), parse_settings(("prefix.tokens=3", "lora=none")))
    assert (config.prefix.tokens, config.prefix.hidden, config.lora) == (3, 1024, None)
    config = override(preset("finetune"), parse_settings(("quantize=none", "data.context=none")))
    assert (config.quantize, config.data.context) == ("none", "none")


@pytest.mark.parametrize("labels", ["all", "first", "ends"])
def test_voken_labels(llava, labels):
    layout = llava.head.layout({}, replace(preset("finetune"), voken_labels=labels))
    sample = example(llava.backbone, TALK, llava.head.spec.new_tokens[0], [layout])
    run = sample.labels[-5:-1]  # before the end token
    kept = {"all": [0, 1, 2, 3], "first": [0], "ends": [0, 3]}[labels]
    assert run == [voken if i in kept else IGNORE for i, voken in enumerate(llava.head.ids)]
    assert sample.labels[-1] == llava.backbone.tokenizer.eos_token_id


@pytest.mark.parametrize("count", [1, 2, 16])
def test_voken_counts(llava_folder, diffusion_folder, count):
    model = make(llava_folder, diffusion_folder, count)
    assert losses(model, preset("pretrain")).total.isfinite()
    model.prepare(preset("pretrain"))
    mapper = sum(p.numel() for p in model.head.mapper.parameters())
    assert trained(model) == 2 * count * model.backbone.width + mapper


def test_fixed_queries_do_not_train(llava):
    llava.prepare(preset("pretrain"))
    everything = trained(llava)
    llava.merge()
    llava.prepare(replace(preset("pretrain"), train_queries=False))
    assert everything - trained(llava) == llava.head.mapper.queries.numel()


def test_a_decoder_only_mapper_trains_and_draws(llava_folder, diffusion_folder):
    model = make(llava_folder, diffusion_folder, kind="decoder-only")
    terms = losses(model, preset("pretrain")).terms
    assert set(terms) == {"text", "ldm", "caption"} and all(term.isfinite() for term in terms.values())
    condition = model.head.mapper(torch.randn(1, 4, model.backbone.width))
    generators, unconditional = [torch.Generator().manual_seed(0)], model.head.unconditional(condition)
    *_, latents = model.head.generator.draw(condition, unconditional, generators=generators, steps=2, guidance=2.0)
    assert latents.isfinite().all()


def test_a_loss_of_weight_zero_is_not_computed(llava, monkeypatch):
    config = preset("pretrain")
    assert set(losses(llava, replace(config, caption_weight=0.0)).terms) == {"text", "ldm"}
    with monkeypatch.context() as patch:
        patch.setattr(llava.head.generator, "loss", None)  # not even called
        assert set(losses(llava, replace(config, ldm_weight=0.0)).terms) == {"text", "caption"}
    monkeypatch.setattr(llava.backbone, "logits", None)
    assert set(losses(llava, replace(config, text_weight=0.0)).terms) == {"ldm", "caption"}


def test_without_guidance_dropout_the_empty_text_is_the_other_half(llava):
    condition = llava.head.mapper(torch.randn(1, 4, llava.backbone.width))
    torch.testing.assert_close(llava.head.unconditional(condition), llava.head.mapper.unconditional(4))
    llava.prepare(replace(preset("pretrain"), guidance_dropout=0.0))
    llava.eval()
    assert llava.config.head_config.unconditional == "text"
    torch.testing.assert_close(llava.head.unconditional(condition), llava.head.generator.encode_text([""]))


def test_gills_objective_is_the_distance_to_the_caption(llava):
    config = preset("pretrain", "gill")
    found = losses(llava.eval(), config)
    assert set(found.terms) == {"text", "caption"} and found.weights["caption"] == 1.0
    torch.testing.assert_close(found.total, 0.01 * found.terms["text"] + found.terms["caption"])


def test_caption_distances():
    torch.manual_seed(0)
    condition, encoding = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    gap = condition - encoding
    torch.testing.assert_close(caption_loss(condition, encoding), gap.pow(2).sum() / 80)
    torch.testing.assert_close(caption_loss(condition, encoding, distance="l2"), gap.pow(2).sum(-1).sqrt().mean())
    pooled = gap[:, -1, :3].pow(2).mean()  # a term of its own; what pads it does not count
    torch.testing.assert_close(caption_loss(condition, encoding, 3), gap[:, :-1].pow(2).mean() + pooled)
