"""`mgp5 train`: both stages, a request from Python, and what trackers see."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_training import TIMES, join

from mgp5 import Mgp5Error, cli
from mgp5.apps.open_model import load
from mgp5.config import LoraConfig
from mgp5.data import load_data
from mgp5.training.run import TrainRequest, estimate_stage, train_stage

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def base(llava_folder, diffusion_folder, tmp_path) -> Path:
    return join(tmp_path / "base", llava_folder, diffusion_folder)


def test_both_stages_from_the_command_line(base, storyland, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("settings.toml").write_text("batch = 2\naccumulation = 1\nlog_every = 1\n")

    def run(stage: str, model: str, *args: str):
        given = ["train", "--stage", stage, "--model", model, "--config", "settings.toml", "--out", stage, *args]
        result = CliRunner().invoke(cli.main, given, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return result

    cc3m = ["--data", str(storyland / "cc3m"), "--format", "cc3m", "--vokens", "4"]
    result = run("pretrain", "base", *cc3m, "--preset", "demo", "--dry-run")
    assert "6 samples, 6 updates" in result.stderr and "trainable parameters" in result.stderr
    assert not Path("pretrain").exists()
    result = run("pretrain", "base", *cc3m, "--preset", "demo", "--max-steps", "2", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and {"text", "ldm", "caption", "total", *TIMES} <= lines[0].keys()
    shutil.copytree(storyland / "vist", "vist")
    for picture_file in Path("vist/train_images").iterdir():
        picture_file.write_bytes(b"not a picture")
    both = ["--data", "vist", "--format", "vist", "--data", str(storyland / "mmdialog")]
    both += ["--format", "mmdialog", "--set", "lora.rank=2", "--set", "data.turn_tokens=none", "--max-steps", "1"]
    result = run("finetune", "pretrain", *both)
    assert not result.stdout and "finetune" in result.stderr and "x broken image (first: " in result.stderr
    monkeypatch.chdir("/")  # a run knows its parts from anywhere
    trained = load(tmp_path / "finetune").config
    assert trained.lora == LoraConfig(rank=2) and trained.history == 3  # of the dialogues
    saved = json.loads((tmp_path / "finetune/config.json").read_text())
    assert (saved["batch"], saved["lora"]["rank"], saved["stage"]) == (2, 2, "finetune")


def test_own_stories_train_what_was_finetuned_before(base, storyland, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own, vist = Path("own"), load_data("vist", storyland / "vist")
    shutil.copytree(vist.stories[0].scenes[0][1].path.parent, own)
    scenes = [{"text": text, "path": image.path.name} for text, image in vist.stories[0].scenes]
    (own / "train.jsonl").write_text(json.dumps({"story": scenes}) + "\n")

    def run(*args: str) -> Result:
        given = ["--stage", "finetune", "--data", "own", "--device", "cpu", "--set", "batch=14", *args]
        return CliRunner().invoke(cli.main, ["train", *given], catch_exceptions=False)

    result = run("--model", "base", "--vokens", "4", "--out", "first", "--max-steps", "1")
    for words in ("--preset own-laptop", "warning: only 1 update of 14 samples", "grows over 20 updates"):
        assert words in result.stderr
    assert result.stderr.endswith(
        "What was trained is in first, sample pages in first/samples. "
        "Next: mgp5 story --model first --images PICTURES --out FOLDER\n"
    )
    result = run("--model", "first", "--out", "mine", "--dry-run")
    assert "14 samples, 10 updates of 14 samples" in result.stderr
    result = run("--model", "first", "--out", "mine", "--max-steps", "1", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["total"] == 1
    for refused, words in (
        (("--model", "first", "--out", "mine"), "already holds a run"),
        (("--model", "first", "--out", "new", "--preset", "prefix"), "set the same lora or prefix"),
        (("--model", "first", "--out", "new", "--preset", "gill"), "captions alone train the head"),
    ):
        for dry in ((), ("--dry-run",)):
            result = run(*refused, *dry)
            assert result.exit_code == 2 and words in result.stderr
    result = run("--model", "first", "--out", "new", "--dry-run", "--set", "precision=fp16")
    assert result.exit_code == 0 and "on this machine the run is refused: precision is fp16" in result.stderr


def test_a_request_is_checked_whole_and_trains_from_python(base, storyland, tmp_path):
    data = (("cc3m", storyland / "cc3m"), ("shards", tmp_path), ("csv", tmp_path))
    with pytest.raises(Mgp5Error) as caught:
        TrainRequest(
            stage="pretrain", data=data, out=base, model="nope", overrides={"lr": -1.0}, vokens=17, device="abacus"
        )
    for words in ("vokens is 17", "format 'csv'", "shards are a stream", "no model 'nope'", "'abacus'", "lr is -1"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 2
    request = TrainRequest(
        stage="pretrain", data=(("cc3m", storyland / "cc3m"),), out=tmp_path / "run", model=str(base), preset="demo",
        overrides={"batch": 1, "precision": "fp32"}, max_steps=2, vokens=4, device="cpu",
    )  # fmt: skip
    args = ["train", "--stage", "pretrain", "--data", "x", "--data", "x", "--format", "cc3m"]
    result = CliRunner().invoke(cli.main, [*args, "--model", "demo", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "2 --data but 1 --format" in result.stderr
    estimate = estimate_stage(request)
    assert (estimate.samples, estimate.updates, estimate.batch) == (6, 2, 1) and estimate.memory.total.trained > 0
    assert [event.step for event in train_stage(request)] == [1, 2]
    assert load(tmp_path / "run").config.stage == "pretrain"


def test_trackers_see_every_update(base, storyland, tmp_path):
    pytest.importorskip("tensorboard")
    given = ["train", "--stage", "pretrain", "--preset", "demo", "--model", str(base), "--out", str(tmp_path / "run")]
    given += ["--data", str(storyland / "cc3m"), "--format", "cc3m", "--max-steps", "2", "--set", "batch=1"]
    result = CliRunner().invoke(cli.main, [*given, "--set", 'trackers=["tensorboard"]'])
    assert result.exit_code == 0, result.stderr
    assert any(path.stat().st_size for path in (tmp_path / "run").rglob("events.out.tfevents.*"))
