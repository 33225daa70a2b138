"""Checkpoints in the layout of the release (keys, rows, what Lightning wraps around them), made with tiny shapes."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny import LENGTH, TEXT, WIDTH
from tiny_mllm import llama_tokenizer
from torch import nn
from transformers import LlamaForCausalLM

from mgp5 import Conversation, cli
from mgp5.apps.open_model import load
from mgp5.backbones.hf import HFBackbone
from mgp5.events import ImageDone
from mgp5.inference.reply import generate
from mgp5.options import reply_options

WORDS, DIM = len(llama_tokenizer()), TEXT["hidden_size"]


class Mapping(nn.Module):
    """What the release trains of its own: the names are the release's."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"num_encoder_layers": 4, "num_decoder_layers": 4, "dim_feedforward": 4 * WIDTH, "dropout": 0.0}
        self.fc = nn.Sequential(nn.Linear(DIM, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.llm_to_t2i_mapping = nn.Transformer(WIDTH, batch_first=True, norm_first=True, **shape)
        self.t2i_decoder_prompt = nn.Parameter(torch.randn(1, LENGTH, WIDTH))

    def forward(self, states):
        return self.llm_to_t2i_mapping(src=self.fc(states), tgt=self.t2i_decoder_prompt.repeat(len(states), 1, 1))


def lightning(state, path: Path) -> Path:
    extra = {"epoch": 1, "global_step": 110_000, "pytorch-lightning_version": "2.0.2", "hparams_name": "kwargs"}
    torch.save({"state_dict": state, "hyper_parameters": {"learning_rate": 2e-5, "gpus": [0, 1]}, **extra}, path)
    return path


@pytest.fixture(scope="module")
def release(tmp_path_factory, minigpt4_folder):
    """stage1.ckpt and stage2.ckpt, and what is in them."""
    torch.manual_seed(5)
    folder, mapping = tmp_path_factory.mktemp("release"), Mapping()
    words = LlamaForCausalLM.from_pretrained(minigpt4_folder.parent / "llama")
    rows = {
        name: torch.cat([0.99 * weight.detach(), torch.randn(9, DIM)])  # shrunk by decay, then the nine new tokens
        for name, weight in (("model.embed_tokens", words.model.embed_tokens.weight), ("lm_head", words.lm_head.weight))
    }
    own = mapping.state_dict()
    lightning({f"model.llama_model.{k}.weight": v for k, v in rows.items()} | own, folder / "stage1.ckpt")
    second = {f"model.llama_model.base_model.model.{k}.modules_to_save.default.weight": v + 1 for k, v in rows.items()}
    lora = {}
    for layer in range(TEXT["num_hidden_layers"]):
        for kind in "qv":
            name = f"model.llama_model.base_model.model.model.layers.{layer}.self_attn.{kind}_proj.lora_"
            lora |= {f"{name}A.default.weight": torch.randn(8, DIM), f"{name}B.default.weight": torch.randn(DIM, 8)}
    moved = {k: v + 0.1 for k, v in own.items() if k.startswith("llm_to_t2i")}
    lightning(second | lora | moved, folder / "stage2.ckpt")
    return folder, mapping, rows, lora


def run(*arguments):
    return CliRunner().invoke(cli.main, ["convert", *map(str, arguments)])


@pytest.fixture
def base(minigpt4_folder, diffusion_folder):
    return f"{minigpt4_folder}+{diffusion_folder}"


def test_stage_1(release, base, tmp_path):
    folder, mapping, rows, _ = release
    done = run(folder / "stage1.ckpt", "--model", base, "--out", tmp_path / "m")
    assert done.exit_code == 0 and "A model of stage pretrain" in done.stderr and "not used" not in done.stderr
    model = load(tmp_path / "m")
    states = torch.randn(2, 8, DIM)
    torch.testing.assert_close(model.head.mapper(states), mapping(states), atol=1e-6, rtol=1e-5)
    ids = list(model.head.ids)
    embedding = model.backbone.core.get_input_embeddings().weight
    torch.testing.assert_close(embedding[ids], rows["model.embed_tokens"][-9:-1])
    torch.testing.assert_close(model.backbone.lm_head.weight[ids], rows["lm_head"][-9:-1])
    kept = model.backbone.lm_head.weight[:WORDS]  # those of the LLM, not what decay had made of them
    torch.testing.assert_close(kept, rows["lm_head"][:WORDS] / 0.99, atol=1e-6, rtol=1e-4)
    talk = Conversation().add("user", "draw a fox")
    events = list(generate(model, talk, reply_options(steps=1, max_tokens=3, image="always")))
    assert any(isinstance(event, ImageDone) for event in events)


def test_stage_2_needs_stage_1_and_wins_over_it(release, base, minigpt4_folder, tmp_path):
    folder, mapping, rows, lora = release
    arguments = ("--model", base, "--out", tmp_path / "m")
    alone = run(folder / "stage2.ckpt", *arguments)
    assert alone.exit_code == 1 and "no mapper.mlp.0.weight" in alone.stderr and "stage1_cc3m" in alone.stderr
    before = HFBackbone.load(minigpt4_folder).language.state_dict()
    assert run(folder / "stage1.ckpt", folder / "stage2.ckpt", *arguments).exit_code == 0
    config = json.loads((tmp_path / "m/mgp5/config.json").read_text())
    assert config["stage"] == "finetune" and (config["lora"]["rank"], config["lora"]["alpha"]) == (8, 16)
    model = load(tmp_path / "m")
    for layer in range(TEXT["num_hidden_layers"]):
        for kind in "qv":
            name = f"layers.{layer}.self_attn.{kind}_proj."
            a, b = (lora[f"model.llama_model.base_model.model.model.{name}lora_{x}.default.weight"] for x in "AB")
            merged = model.backbone.language.get_submodule(name[:-1]).weight
            torch.testing.assert_close(merged, before[name + "weight"] + 2 * b @ a, atol=1e-4, rtol=1e-4)
    moved = dict(mapping.llm_to_t2i_mapping.named_parameters())["encoder.layers.0.linear1.weight"] + 0.1
    torch.testing.assert_close(model.head.mapper.transformer.encoder.layers[0].linear1.weight, moved)
    torch.testing.assert_close(model.head.mapper.queries, mapping.t2i_decoder_prompt)
    torch.testing.assert_close(model.backbone.lm_head.weight[list(model.head.ids)], rows["lm_head"][-9:-1] + 1)


def test_a_minigpt4_is_put_together_on_the_way(release, minigpt4_folder, diffusion_folder, tmp_path):
    parts = minigpt4_folder.parent
    three = f"{parts / 'blip2'}+{parts / 'llama'}+{diffusion_folder}"
    arguments = ("--model", three, "--out", tmp_path / "m")
    without = run(release[0] / "stage1.ckpt", *arguments)
    assert without.exit_code == 2 and "prerained_minigpt4_7b.pth" in without.stderr
    assert run(parts / "projection.pth", release[0] / "stage1.ckpt", *arguments).exit_code == 0
    moved = (tmp_path / "m").rename(tmp_path / "moved")  # it names its own MiniGPT-4 by a relative path
    assert load(moved).config.mllm == str(moved / "mllm")
    assert run(parts / "projection.pth", "--model", three, "--out", tmp_path / "n").exit_code == 0
    assert (tmp_path / "n/mllm/config.json").is_file() and not (tmp_path / "n/mgp5").exists()


def test_what_does_not_fit_is_one_line(release, base, llava_folder, diffusion_folder, tmp_path):
    stage1, out = release[0] / "stage1.ckpt", tmp_path / "out"
    torch.save({"state_dict": {}, "hyper_parameters": Path("x")}, tmp_path / "code.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    for checkpoint, model, message in (
        (tmp_path / "none.ckpt", base, "none.ckpt"),
        (tmp_path / "text.ckpt", base, "no file of torch.save"),
        (tmp_path / "code.ckpt", base, "it holds pathlib"),
        (tmp_path / "other.ckpt", base, "hold no embed_tokens and no lm_head"),
        (stage1, f"{llava_folder}+{diffusion_folder}", f"embed_tokens of the checkpoints is ({WORDS + 9}, {DIM})"),
        (stage1, "minigpt4", "no model 'minigpt4'"),
    ):
        failed = run(checkpoint, "--model", model, "--out", out)
        assert failed.exit_code in (1, 2) and message in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr
    assert not out.exists()
    (out / "mgp5").mkdir(parents=True)
    assert "holds a model already" in run(stage1, "--model", base, "--out", out).stderr
