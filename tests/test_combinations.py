"""Every multimodal LLM with every generator: tiny checkpoints of real classes go through both stages and a reply."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny import picture
from tiny_sd3 import GENERATORS

from mgp5 import Conversation, Image
from mgp5.apps.open_model import load
from mgp5.events import ImageDone
from mgp5.inference.reply import generate
from mgp5.loading import build, save_checkpoint
from mgp5.options import reply_options
from mgp5.training.batch import Collator
from mgp5.training.presets import preset

MLLMS = ("llava", "qwen", "qwen3", "minigpt4")


def pairs():
    """All of them; each LLM with two generators, and each generator with two LLMs, in every run."""
    for a, b in product(range(len(MLLMS)), range(len(GENERATORS))):
        rare = () if (b - a) % len(GENERATORS) < 2 else pytest.mark.slow
        yield pytest.param(MLLMS[a], [*GENERATORS][b], marks=rare)


@pytest.mark.parametrize(("mllm", "generator"), pairs())
def test_a_combination_trains_saves_loads_and_replies(mllm, generator, generator_folder, request, tmp_path):
    torch.manual_seed(0)
    model = build(str(request.getfixturevalue(f"{mllm}_folder")), str(generator_folder(generator)), num_vokens=2)
    talk = Conversation().add("user", "a", Image(pixels=picture("blue")), "fox")
    sample = talk.add("assistant", "here", Image(pixels=picture(), caption="a fox"))
    batch = Collator(model.backbone, model.head, model.backbone.context_length)([sample])
    for stage in ("pretrain", "finetune"):
        config = replace(preset(stage), guidance_dropout=0.5)
        model.prepare(config)
        model.train()
        losses = model(batch, config, torch.Generator().manual_seed(0))
        assert set(losses.terms) == ({"text", "ldm", "caption"} if stage == "pretrain" else {"text", "ldm"})
        losses.total.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        without = [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
        assert not without
        assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
        assert any("lora" in name for name in trained) == (stage == "finetune")
        optimizer = torch.optim.AdamW(model.parameter_groups(config))
        optimizer.step()
        model.zero_grad(set_to_none=True)
        save_checkpoint(model, tmp_path / stage)
        model.merge()
    again = load(tmp_path / "finetune")
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(again.hidden(batch), model.hidden(batch), atol=1e-4, rtol=1e-3)
    options = reply_options(seed=0, steps=2, guidance=2.0, max_tokens=3, image="always")
    images = [event for event in generate(again, talk, options) if isinstance(event, ImageDone)]
    assert images
