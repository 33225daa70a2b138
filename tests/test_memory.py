"""The memory estimate: exact where it counts, near the allocator's record where it rehearses, and what fits where."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from click.testing import CliRunner
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mgp5 import Conversation, Image
from mgp5.cli import main
from mgp5.config import LoraConfig, PrefixConfig, preset
from mgp5.files import GiB
from mgp5.hub import DEMO
from mgp5.memory.estimate import dry_run_step, estimate, step, table, usual_length
from mgp5.memory.skeletons import backbone_shape, skeleton
from mgp5.training.batch import Collator

DEMO_PARTS = str(DEMO / "mllm"), str(DEMO / "diffusion")
PICTURE = DEMO.parents[1] / "examples/picnic/1.png"


def shape(config, device="meta"):
    return skeleton(*DEMO_PARTS, config, device=device)


def allocated(model, run):
    """The most that the CPU's allocator held at once while `run` ran, gradients of weights apart."""
    for parameter in model.train().parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run().total.backward()
    live = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


@pytest.mark.parametrize(
    "stage, length, checkpointing", [("pretrain", 60, True), ("pretrain", 60, False), ("finetune", 300, True)]
)
def test_a_rehearsed_step_weighs_what_the_allocator_sees(stage, length, checkpointing):
    config = replace(preset(stage), batch=2, checkpointing=checkpointing)
    told, flops = dry_run_step(shape(config), config, length)
    model = shape(config, "cpu")
    assert told == pytest.approx(allocated(model, lambda: step(model, config, length)), rel=0.1)
    with FlopCounterMode(display=False) as counter:
        step(shape(config).train(), config, length).total.backward()  # torch counts no attention on a CPU
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_made_up_step_weighs_what_the_loops_forward_does():
    config = replace(preset("pretrain"), batch=2, checkpointing=False, guidance_dropout=0.0)
    model = shape(config, "cpu")
    talk = Conversation().add("user", "the red fox sees the ball " * 12)
    talk = talk.add("assistant", Image(path=PICTURE, caption="a fox"))
    batch = Collator(model.backbone, model.head, 1000)([talk] * 2)
    real = allocated(model, lambda: model(batch, config, torch.Generator()))
    assert dry_run_step(shape(config), config, batch.ids.shape[1])[0] == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("adapter", [{"lora": LoraConfig()}, {"lora": None, "prefix": PrefixConfig(hidden=32)}])
def test_weights_gradients_and_optimizer_are_exact(adapter):
    config = replace(preset("finetune"), batch=1, ema=0.999, **adapter)
    model = shape(config, "cpu")
    total = estimate(shape(config), config, length=40).total
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    assert total.parameters == sum(p.numel() for p in parameters)
    assert total.trained == sum(p.numel() for p in trained)
    assert total.weights == sum(p.nbytes for p in parameters)
    optimizer = torch.optim.AdamW(model.parameter_groups(config))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert total.gradients == sum(p.grad.nbytes for p in trained)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert total.optimizer == sum(value.nbytes for value in moments) + sum(p.nbytes for p in trained)  # and the average


@cache
def needs(**changes):
    config = replace(preset("pretrain"), **changes)
    return estimate(skeleton("llava-1.5-7b", "sd-2.1-base", config, dtype=torch.bfloat16), config)


def test_the_defaults_fit_the_cards_they_are_meant_for():
    assert preset("pretrain").batch * preset("pretrain").accumulation == 48
    assert 16 * GiB < needs().total.total < 22 * GiB  # LLaVA-1.5-7B with Stable Diffusion 2.1 on a card of 24 GiB
    small = needs(quantize="4bit")
    assert small.total.total < 14 * GiB  # and of 16 GiB
    kept = 2 * (2 * 32064 * 4096 + 65 * 4096)  # embedding, LM head and norms
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    weights = {row.part: row.weights for row in small.rows}
    assert weights["LLM"] == pytest.approx(kept + layers * (4 + 0.127) / 8, rel=1e-3)  # QLoRA, section 3
    assert {row.part: row.weights for row in needs().rows}["LLM"] == kept + 2 * layers


def test_what_costs_memory_costs_it():
    config = replace(preset("pretrain"), batch=2)
    kept = replace(config, checkpointing=False)
    usual, kept = (estimate(shape(own), own) for own in (config, kept))
    assert kept.rows[-2].other > 1.6 * usual.rows[-2].other
    assert 0.7 < kept.flops / usual.flops < 0.85  # one forward less
    assert table(kept).row_count == len(kept.rows) + 1


def test_a_dry_run_tells_it_without_weights_or_network(tmp_path):
    message = {"role": "assistant", "content": [{"type": "image", "path": "fox.png", "caption": "a fox"}]}
    shutil.copy(PICTURE, tmp_path / "fox.png")
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "fox"}, message]}))
    command = ["train", "--stage", "pretrain", "--model", "llava-1.5-7b+sd-2.1-base", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [*command, "--data", str(tmp_path), "--format", "jsonl", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["samples"], told["tokens"]) == (1, 80)
    assert told["bytes"] == needs().total.total
    assert {row["part"] for row in told["parts"]} >= {"LLM", "vision tower", "mapper", "adapter", "activations"}
    assert not (tmp_path / "run").exists()


def test_a_story_is_as_long_as_its_pictures():
    config = preset("finetune")
    with torch.device("meta"):
        assert usual_length(backbone_shape("llava-1.5-7b"), config) == 400 + 5 * 576
        assert usual_length(backbone_shape("qwen2.5-vl-3b"), config) == 400 + 5 * 23 * 17
