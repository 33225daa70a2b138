"""The head of SEED by the command line: from data and parts to a reply, on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from command_line import ask_for_image, chat_and_evaluate, run, tell_and_recall
from safetensors.torch import load_file
from serve_process import serving_here
from tiny_training import join

from mgp5.apps.open_model import load
from mgp5.bench.decoding import condition_rows
from mgp5.bench.timing import Bench
from mgp5.hub import resolve
from mgp5.storyland.world import ATTRIBUTES

ROOT = Path(__file__).parents[1]
STAGES = ("tokenizer-contrastive", "tokenizer", "pretrain", "finetune")
SETTINGS = """batch = 2
accumulation = 1
warmup = 0
log_every = 1
precision = "fp32"
[tokenizer]
queries = 4
width = 16
heads = 2
causal_layers = 2
codes = 12
code_width = 4
block_layers = 1
reverse_layers = 1
text_positions = 64
projection = 8
"""
QUICK = ("--steps", "2", "--set", "max_tokens=4", "--backend", "eager")


def train(stage: str, before: str, out: str, home: Path, *more: str, **known: int) -> str:
    """Do two updates of a stage, which begins with the run of another."""
    data = ["--data", "data/vist" if stage == "finetune" else "data/cc3m"]
    given = ["--config", "settings.toml", "--preset", "demo", "--head", "seed", "--max-steps", 2, "--json"]
    return run("train", "--stage", stage, "--model", before, *data, "--out", out, *given, *more, home=home, **known)


@pytest.fixture(scope="module")
def home(tmp_path_factory, llava_folder, diffusion_folder) -> Path:
    """A folder with data and the run of each stage, which begins with that of the stage before."""
    folder = tmp_path_factory.mktemp("seed")
    join(folder / "base", llava_folder, diffusion_folder)
    (folder / "settings.toml").write_text(SETTINGS)
    run("data", "storyland", "--out", "data", "--pairs", 6, "--stories", 1, "--dialogs", 1, home=folder)
    for stage, before in zip(STAGES, ("base", *STAGES), strict=False):
        told = json.loads(train(stage, before, stage, folder, "--dry-run"))
        assert told["updates"] == 2 and sum(part["trained"] for part in told["parts"]) > 0
        lines = [json.loads(line) for line in train(stage, before, stage, folder).splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
    return folder


@pytest.fixture
def model(home) -> tuple[str, str]:
    return "--model", str(home / "finetune")


def test_a_story_is_told_and_an_image_of_it_is_recalled(home, model):
    assert tell_and_recall(home, *model, *QUICK, "--set", "code_top_p=1.0")["code_top_p"] == 1.0


def test_a_chat_a_server_and_an_evaluation_reply(home, model):
    chat_and_evaluate(home, *model, *QUICK)
    with serving_here(model[1], rows=2) as server:
        ask_for_image(server, steps=2)
        fields = {"prompt": "a fox", "seed": 1, "steps": 2}
        drawn = [server.post("/v1/images/generations", code_temperature=t, **fields)[1]["data"] for t in (0, 0.0, 9.0)]
        assert drawn[0] == drawn[1] != drawn[2]


def test_codes_are_cached_and_those_of_another_tokenizer_are_refused(home):
    def cache(model: str, out: str, kinds: str, **known: int) -> str:
        data = ["--data", "data/cc3m", "--data", "data/vist", "--out", out, "--kinds", kinds, "--device", "cpu"]
        return run("data", "cache", "--model", model, *data, home=home, **known)

    cache("tokenizer", "codes", "codes")
    for stage, before in (("pretrain", "tokenizer"), ("finetune", "pretrain")):
        lines = train(stage, before, f"cached-{stage}", home, "--cache", "codes").splitlines()
        assert len(lines) == 2
        live, cached = (load_file(home / name / "mgp5/model.safetensors") for name in (stage, f"cached-{stage}"))
        assert all(torch.equal(value, cached[name]) for name, value in live.items())
    (part,) = home.glob("codes/codes-*/*.safetensors")
    codes = load_file(part)
    assert {(value.dtype, len(value)) for value in codes.values()} == {(torch.int32, 4)}
    cache("tokenizer-contrastive", "stale", "codes")
    told = train("pretrain", "tokenizer", "refused", home, "--cache", "stale", code=1)
    assert "differs in weights" in told
    cache("tokenizer", "latents", "latents")
    told = train("pretrain", "tokenizer", "refused", home, "--cache", "latents", code=1)
    assert "holds latents, which the head seed has no use for" in told and "--kinds captions,codes" in told
    assert "in which no tokenizer was trained" in cache("base", "none", "codes", code=2)
    assert "whose head minigpt5 has none" in cache("demo", "none", "codes", code=2)


def test_scripts_of_storyland_measure_and_pack_it(home, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples/storyland"))
    import pack
    import seed
    from measure import head

    def script(main, *args: object) -> None:
        done = CliRunner().invoke(main, list(map(str, args)), catch_exceptions=False)
        assert done.exit_code == 0, done.output

    first, sizes = home / "tokenizer-contrastive", {"steps": 3, "sharp": 1, "noisy": 1, "images": 8, "batch": 2}
    options = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    script(seed.main, "--work", home / "kept", "--model", first, "--out", home / "second", *options)
    before, after = (load(folder).head.tokenizer for folder in (first, home / "second"))
    for name in ("causal.queries", "quantizer.codebook.weight", "reverse.projection.weight"):
        assert not torch.equal(before.get_parameter(name), after.get_parameter(name))
    script(pack.main, "--share", "../base", "--run", home / "finetune", "--out", home / "packed", "--guidance", 2)
    packed = load(home / "packed")
    assert (packed.config.mllm, packed.config.guidance) == (str(home / "base/mllm"), 2.0)
    assert {value.dtype for value in load_file(home / "packed/mgp5/model.safetensors").values()} == {torch.float16}
    script(head.main, "--model", home / "packed", "--pictures", 4, "--batch", 3, "--steps", 1, "--out", home / "m.json")
    found = json.loads((home / "m.json").read_text())
    recalls = [share for name, share in found.items() if "R@" in name]
    assert len(recalls) == 8 and all(0 <= share <= 1 for share in recalls) and max(recalls) == 1  # R@5 of four
    for name in ("attributes, through codes and back", "attributes, drawn from the caption"):
        assert found[name].keys() == {*ATTRIBUTES, "mean", "all"}
    assert 0 < found["share of the codebook in use"] <= 1 <= found["perplexity of the codes"] <= 12


def test_doctor_and_bench_measure_it(home, model):
    told = json.loads(run("doctor", *model, "--json", home=home))["memory"]
    assert "tokenizer" in {part["name"] for part in told["parts"]}
    assert all(mode["total"] > 0 for mode in told["modes"])
    bench = Bench(device=torch.device("cpu"), dtype=torch.float32, steps=1)
    (row,) = condition_rows(bench, resolve(model[1]))  # of the suites the part that asks the head
    assert row["median"] > 0 and "6 positions" in row["size"]
