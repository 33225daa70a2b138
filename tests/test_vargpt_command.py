"""The head of VARGPT by the command line: from data and parts to a reply, on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from command_line import ask_for_image, chat_and_evaluate, run, tell_and_recall
from safetensors.torch import load_file
from serve_process import serving_here

from mgp5.bench.decoding import image_rows
from mgp5.bench.drawing import drawing_kind
from mgp5.bench.timing import Bench
from mgp5.generators.vqvae import VQVAE
from mgp5.hub import resolve
from mgp5.memory.generation import first_plan_that_fits, footprint
from mgp5.memory.offload import memory_plans

SETTINGS = """batch = 2
accumulation = 1
warmup = 0
log_every = 1
precision = "fp32"
var = {width = 24, depth = 2, heads = 2}
"""
QUICK = ("--set", "max_tokens=4", "--guidance", "2")


def train(stage: str, before: str, out: str, home: Path, *more: object, **known: int) -> str:
    data = "data/cc3m" if stage == "var" else "data/vist"
    given = ["--config", "settings.toml", "--preset", "demo", "--head", "vargpt", "--max-steps", 2, "--json"]
    given += ["--set", "sample_every=0"]
    words = ["--stage", stage, "--model", before, "--data", data, "--out", out, *given, *more]
    return run("train", *words, home=home, **known)


@pytest.fixture(scope="module")
def parts(llava_folder, vqvae_folder) -> str:
    return f"{llava_folder}+{vqvae_folder}"


@pytest.fixture(scope="module")
def home(tmp_path_factory, parts) -> Path:
    """A folder with data, the run of the first stage and that of the last one; the others are in test_vargpt."""
    folder = tmp_path_factory.mktemp("vargpt")
    (folder / "settings.toml").write_text(SETTINGS)
    run("data", "storyland", "--out", "data", "--pairs", 3, "--stories", 1, "--dialogs", 1, home=folder)
    told = json.loads(train("var", parts, "var", folder, "--dry-run"))
    assert told["updates"] == 2 and sum(part["trained"] for part in told["parts"]) > 0
    for stage, before in (("var", parts), ("decode", "var")):
        lines = [json.loads(line) for line in train(stage, before, stage, folder).splitlines()]
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


def test_a_script_measures_it(home, model, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples/storyland"))
    from measure import head

    done = CliRunner().invoke(head.main, [*model, "--pictures", "2", "--out", str(home / "m.json")])
    assert done.exit_code == 0 and "attributes, drawn from the caption" in done.stdout, done.output
    found = json.loads((home / "m.json").read_text())
    assert 0 <= found["codes that are the same after drawing"] <= 1 <= found["perplexity of the codes"] <= 16


def test_codes_are_cached_before_anything_is_trained(home, parts, monkeypatch):
    """Of target images only: the LLM has its own vision tower for those that it is given."""
    data = ["--data", "data/cc3m", "--data", "data/vist", "--kinds", "codes", "--device", "cpu"]
    run("data", "cache", "--model", parts, *data, "--out", "codes", home=home)
    with monkeypatch.context() as patch:
        patch.delattr(VQVAE, "encode")
        train("var", parts, "cached", home, "--cache", "codes")
    live, cached = (load_file(home / name / "mgp5/model.safetensors") for name in ("var", "cached"))
    assert all(torch.equal(value, cached[name]) for name, value in live.items())
    (shard,) = home.glob("codes/codes-*/*.safetensors")
    codes = load_file(shard)
    assert {(value.dtype, len(value)) for value in codes.values()} == {(torch.int32, 14)}
    run("data", "cache", "--model", "var", *data, "--out", "codes", home=home)
    assert [*home.glob("codes/codes-*/*.safetensors")] == [shard]  # a run of these parts has the same codes


def test_memory_and_images_are_measured(model):
    """Plans of memory in their order, by what a card has free; and how long an image takes."""
    found = resolve(model[1])
    needs = footprint(found, torch.float32, tokens=64)
    assert {"projectors", "decoder", "codebook", "VAE"} <= needs.weights.keys()
    sizes = {plan.name: needs.total(plan) for plan in memory_plans()}
    assert sizes["offload"] < sizes["full"]
    for free in (int(size) + 1 for size in sizes.values()):
        assert first_plan_that_fits(needs, free).name == next(name for name, size in sizes.items() if size <= free)
    bench = Bench(device=torch.device("cpu"), dtype=torch.float32, backends=("eager",))
    assert drawing_kind(found) == "image"
    (row,) = image_rows(bench, found, (2,))
    assert row["provider"] == "eager" and min(row["median"], row["vae_ms"], row["image_ms"]) > 0
