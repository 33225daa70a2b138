"""The head of VARGPT by the command line: from data and parts to a reply, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import ask_for_image, chat_and_evaluate, run, tell_and_recall
from serve_process import serving_here

STAGES = ("var", "align", "instruct", "decode")
SETTINGS = """batch = 2
accumulation = 1
warmup = 0
log_every = 1
precision = "fp32"
var = {width = 24, depth = 2, heads = 2}
"""
QUICK = ("--set", "max_tokens=4", "--guidance", "2")


@pytest.fixture(scope="module")
def home(tmp_path_factory, llava_folder, vqvae_folder) -> Path:
    """A folder with data and the run of each stage, which begins with that of the stage before."""
    folder = tmp_path_factory.mktemp("vargpt")
    (folder / "settings.toml").write_text(SETTINGS)
    run("data", "storyland", "--out", "data", "--pairs", 6, "--stories", 1, "--dialogs", 1, home=folder)
    parts = f"{llava_folder}+{vqvae_folder}"
    for stage, before in zip(STAGES, (parts, *STAGES), strict=False):
        data = ["--data", "data/vist" if stage in ("instruct", "decode") else "data/cc3m"]
        given = ["--config", "settings.toml", "--preset", "demo", "--head", "vargpt", "--max-steps", 2, "--json"]
        words = ["train", "--stage", stage, "--model", before, *data, "--out", stage, *given]
        if stage in ("var", "decode"):
            told = json.loads(run(*words, "--dry-run", home=folder))
            assert told["updates"] == 2 and sum(part["trained"] for part in told["parts"]) > 0
            words += ["--set", f"sample_every={2 * (stage == 'decode')}"]
        lines = [json.loads(line) for line in run(*words, home=folder).splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
    return folder


@pytest.fixture
def model(home) -> tuple[str, str]:
    return "--model", str(home / "decode")


def test_a_story_is_told_and_an_image_of_it_is_recalled(home, model):
    metadata = tell_and_recall(home, *model, *QUICK, "--set", "code_top_p=0.5")
    assert (metadata["code_top_p"], metadata["guidance"]) == (0.5, 2.0) and "steps" not in metadata
    told = run("story", *model, "--steps", 5, "--text", "lines.txt", "--out", "refused", home=home, code=2)
    assert "no setting steps" in told and "code_top_k" in told


def test_a_chat_a_server_and_an_evaluation_reply(home, model):
    chat_and_evaluate(home, *model, *QUICK)
    with serving_here(model[1], rows=2) as server:
        ask_for_image(server)
        images = set()
        for more, code in (
            *(({"size": "12x12"}, 200), ({"code_top_k": 1, "code_top_p": 0.9}, 200), ({"size": "64x64"}, 400)),
            *(({"steps": 5}, 400), ({"code_temperature": 1.0}, 400), ({"num_inference_steps": 5}, 400)),
        ):
            status, reply = server.post("/v1/images/generations", prompt="a fox", seed=1, **more)
            assert status == code, reply
            if code == 200:
                images.add(reply["data"][0]["b64_json"])
            else:
                assert reply["error"]["message"].startswith(next(iter(more)).removeprefix("num_inference_"))
        assert len(images) == 2  # code_top_k takes the likeliest codes
        fields = json.loads(server.ask("GET", "/openapi.json")[1])["components"]["schemas"]["ImagesRequest"][
            "properties"
        ]
        assert "code_top_k" in fields and not {"steps", "num_inference_steps", "code_temperature"} & fields.keys()


def test_doctor_and_bench_measure_it(home, model):
    told = json.loads(run("doctor", *model, "--json", home=home))["memory"]
    assert {"projectors", "decoder", "codebook", "VAE"} <= {part["name"] for part in told["parts"]}
    assert all(mode["total"] > 0 for mode in told["modes"])
    assert list((home / "decode" / "samples").glob("*.html"))
