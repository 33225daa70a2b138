"""The head of MM-Interleaved by the command line: from data and parts to a reply, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import ask_for_image, chat_and_evaluate, run, tell_and_recall
from serve_process import serving_here

SETTINGS = """batch = 2
accumulation = 1
warmup = 0
log_every = 1
precision = "fp32"
betas = [0.9, 0.995]
data = {pack = "isolated"}
[sizes]
queries = 3
token_width = 8
token_layers = 1
token_heads = 2
adapter_heads = 2
adapter_points = 2
stem = 8
heads = 2
points = 2
context_heads = 2
unet_rank = 2
"""
QUICK = ("--steps", "2", "--set", "max_tokens=4", "--backend", "eager")


@pytest.fixture(scope="module")
def home(tmp_path_factory, llava_folder, diffusion_folder) -> Path:
    """A folder with data and the run of both stages."""
    folder = tmp_path_factory.mktemp("mm")
    (folder / "settings.toml").write_text(SETTINGS)
    counts = ("--pairs", 4, "--stories", 1, "--dialogs", 1, "--details", 2)
    run("data", "storyland", "--out", "data", *counts, home=folder)
    parts = f"{llava_folder}+{diffusion_folder}"
    for stage, before, data in (("pretrain", parts, "cc3m"), ("finetune", "pretrain", "details")):
        given = [
            "--config",
            "settings.toml",
            "--preset",
            "demo",
            "--head",
            "mm-interleaved",
            "--max-steps",
            2,
            "--json",
        ]
        words = ["train", "--stage", stage, "--model", before, "--data", f"data/{data}", "--out", stage, *given]
        told = json.loads(run(*words, "--dry-run", home=folder))
        assert told["updates"] == 2 and sum(part["trained"] for part in told["parts"]) > 0
        lines = [json.loads(line) for line in run(*words, home=folder).splitlines()]
        assert [line["step"] for line in lines] == [1, 2] and "ldm" in lines[1]
    return folder


@pytest.fixture
def model(home) -> tuple[str, str]:
    return "--model", str(home / "finetune")


def test_a_story_is_told_and_an_image_of_it_is_recalled(home, model):
    assert tell_and_recall(home, *model, *QUICK, "--set", "earlier=last")["earlier"] == "last"


def test_a_chat_a_server_and_an_evaluation_reply(home, model):
    chat_and_evaluate(home, *model, *QUICK)
    with serving_here(model[1], rows=2) as server:
        ask_for_image(server, steps=2)


def test_what_is_kept_of_a_detail_that_no_text_tells_is_measured(home, model):
    """By the command, of the model and of its UNet alone, which cannot know; without other tasks."""
    words = ["eval", *model, *QUICK, "--format", "storyland", "--task", "details", "--limit", 2, "--batch", 2]
    run(*words, "--baseline", "t2i", "--out", "kept", home=home)
    tables = json.loads((home / "kept/report.json").read_text())["tables"]
    assert list(tables) == ["details"] and {"model", "t2i"} <= tables["details"].keys()
    for system in tables["details"].values():
        number = system["metrics"]["details"]
        assert system["replies"] == number["n"] == 2 and 0 <= number["value"] <= 1
        assert number["detail"].keys() == {"colour", "pattern", "size", "corner", "all four"}
    assert "kite" in (home / "kept/report.html").read_text()


def test_doctor_measures_it(home, model):
    told = json.loads(run("doctor", *model, "--json", home=home))["memory"]
    assert {"image_encoder", "llm_mmfs", "unet_mmfs", "unet_adapter"} <= {part["name"] for part in told["parts"]}
    assert all(mode["total"] > 0 for mode in told["modes"])
