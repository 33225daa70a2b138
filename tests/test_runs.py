"""Runs: cut into pieces, killed, resumed, what they leave on disk and what they refuse."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import picture
from tiny_training import VOKENS, batch_of, config, finish, fork, fresh, same
from transformers import AutoConfig, AutoModelForImageTextToText

from mgp5 import Conversation, Mgp5Error, cli
from mgp5.apps.open_model import load
from mgp5.config import LoraConfig, preset
from mgp5.data import load_data
from mgp5.loading import trained_tensors
from mgp5.model import InterleavedModel
from mgp5.training import checkpoints as runs
from mgp5.training.loop import rate, total_steps, train
from mgp5.training.run import Interruption, TrainRequest, estimate_stage, initial_model, train_stage

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
TIMES = {"samples_per_second", "images_per_second", "eta", "memory_gib"}


@pytest.fixture
def llava(llava_folder, diffusion_folder) -> InterleavedModel:
    return fresh(llava_folder, diffusion_folder)


@pytest.fixture
def base(llava_folder, diffusion_folder, tmp_path) -> Path:
    """A folder that --model takes."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/mllm").symlink_to(llava_folder)
    (tmp_path / "base/diffusion").symlink_to(diffusion_folder)
    return tmp_path / "base"


def log(out: Path) -> list[dict]:
    """Rows of the log without what depends on the machine."""
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def steps(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


# Resuming


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_resumed_run_equals_an_uninterrupted_one(stage, llava_folder, diffusion_folder, pairs, tales, tmp_path):
    data = {"pretrain": pairs, "finetune": tales}[stage]
    talk = Conversation().add("user", "hello " * 2000).add("assistant", "hm")  # does not fit the context
    data = [*(data[i] for i in range(4)), talk]  # epochs end inside pieces
    extra = {"lora": LoraConfig(dropout=0.3), "ema": 0.8, "sample_every": 2} if stage == "finetune" else {"workers": 2}
    settings = config(stage, steps=5, accumulation=2, log_every=1, **extra)

    def piece(out: str, **more) -> InterleavedModel:
        model = fresh(llava_folder, diffusion_folder)
        finish(model, data, settings, tmp_path / out, **more)
        return model

    whole = piece("whole")
    piece("pieces", stop_after=2)
    piece("pieces", stop_after=1, resume=True)
    last = piece("pieces", resume=True)
    assert same(whole, last)
    assert log(tmp_path / "whole") == log(tmp_path / "pieces") and len(log(tmp_path / "whole")) == 5
    states = [
        load_file(tmp_path / out / "checkpoints/step-000005/state/tensors.safetensors") for out in ("whole", "pieces")
    ]
    assert same(*states) and any(name.startswith("weight.") for name in states[0]) == (stage == "finetune")
    report = json.loads((tmp_path / "pieces/report.json").read_text())
    assert report == json.loads((tmp_path / "whole/report.json").read_text())
    assert report["step"] == 5 and report["problems"]["too long"][0] == log(tmp_path / "whole")[-1]["problems"] == 4
    if stage == "finetune":
        for name in ("step-000002", "step-000004"):
            page = (tmp_path / f"pieces/samples/{name}.html").read_text()
            assert page == (tmp_path / f"whole/samples/{name}.html").read_text()
            assert f"Step {int(name[-1])}" in page and page.count("In the data:") == 4 < page.count("<img")


def test_shards_are_resumed_by_the_same_readers(llava_folder, diffusion_folder, tmp_path):
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:05}.tar", "w") as shard:
            for i in range(5):
                for suffix, data in (("png", buffer.getvalue()), ("txt", b"a fox " + b"abcde"[i : i + 1])):
                    member = tarfile.TarInfo(f"{number}{i}.{suffix}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))

    def piece(out: str, workers: int = 2, **more) -> InterleavedModel:
        model = fresh(llava_folder, diffusion_folder)
        settings = config("pretrain", steps=None, epochs=2, workers=workers, sample_every=9)
        finish(model, load_data("shards", tmp_path), settings, tmp_path / out, **more)
        return model

    whole = piece("whole")
    assert log(tmp_path / "whole")[-1]["step"] == load_data("shards", tmp_path).size >= 10
    assert (tmp_path / "whole/samples/step-000009.html").is_file()
    piece("pieces", stop_after=7)
    with pytest.raises(Mgp5Error, match=r"processes 1, workers 2, not .*, workers 0: resume it with the same"):
        piece("pieces", workers=0, resume=True)
    assert same(whole, piece("pieces", resume=True))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(base, storyland, tmp_path):
    """`mgp5 train` in a process of its own: killed while it trains and while it saves, then asked to stop."""
    chance, out = random.Random(0), tmp_path / "killed"
    usual = ["train", "--stage", "finetune", "--model", str(base), "--preset", "demo", "--vokens", "4"]
    usual += ["--data", str(storyland / "vist"), "--format", "vist", "--max-steps", "32"]
    for item in ("batch=1", "save_every=2", "log_every=1", "precision=fp32", "lora.dropout=0.3", "ema=0.9"):
        usual += ["--set", item]

    def begin(place: Path) -> multiprocessing.Process:
        again = ["--resume"] if runs.checkpoints(place) else []
        return fork([*usual, "--out", str(place), *again])

    def wait_for(process: multiprocessing.Process, ready) -> None:
        while process.is_alive() and not ready():
            time.sleep(0.0001)

    def half_saved() -> list[Path]:
        return list(out.glob("checkpoints/.*.part"))

    saving = 0
    for attempt in range(12):
        begun, process = time.time(), begin(out)
        wait_for(
            process, lambda begun=begun: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_mtime > begun
        )
        time.sleep(chance.random() / 20)
        if attempt % 2:
            wait_for(process, half_saved)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        saving += bool(half_saved())
        if saving >= 2 and attempt >= 3:
            break
    begun, process = time.time(), begin(out)
    wait_for(process, lambda: (out / "log.jsonl").stat().st_mtime > begun)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    newest = runs.checkpoints(out)[-1]
    assert saving >= 2 and process.exitcode == 130 and not half_saved()
    assert int(newest.name[5:]) == log(out)[-1]["step"] < 32
    assert load(newest).config.lora is not None
    process, whole = begin(out), begin(tmp_path / "whole")
    process.join()
    whole.join()
    assert process.exitcode == whole.exitcode == 0
    assert same(*(load_file(place / "mgp5/model.safetensors") for place in (out, tmp_path / "whole")))
    assert log(out) == log(tmp_path / "whole") and len(log(out)) == 32
    assert steps(out) == ["step-000030", "step-000032"]


def test_a_second_ctrl_c_does_not_wait():
    with Interruption() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_moving_average_is_what_a_run_saves_to_use(llava_folder, diffusion_folder, pairs, tmp_path):
    def run(out: str, **values) -> InterleavedModel:
        model = fresh(llava_folder, diffusion_folder)
        finish(model, pairs, config("pretrain", steps=3, save_every=1, keep=9, **values), tmp_path / out)
        return model

    first = fresh(llava_folder, diffusion_folder)
    first.prepare(config("pretrain"))
    expected = {name: value.clone() for name, value in trained_tensors(first).items()}
    plain = run("plain")
    for step in (1, 2, 3):
        now = load_file(tmp_path / f"plain/checkpoints/step-{step:06d}/mgp5/model.safetensors")
        expected = {name: 0.6 * value + 0.4 * now[name] for name, value in expected.items()}
    assert same(plain, run("average", ema=0.6))  # the training itself does not see it
    found = load_file(tmp_path / "average/mgp5/model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


# What a run leaves and refuses


def test_old_checkpoints_go_and_the_newest_is_what_the_run_means(
    llava, llava_folder, diffusion_folder, pairs, tmp_path
):
    out = tmp_path / "run"
    finish(llava, pairs, config("pretrain", steps=5, save_every=1, keep=2), out, stop_after=4)
    assert steps(out) == ["step-000003", "step-000004"]
    assert (out / "mgp5").resolve() == (out / "checkpoints/step-000004/mgp5").resolve()
    assert same(llava, fresh_from(out)) and not same(llava, fresh_from(out / "checkpoints/step-000003"))
    (out / "checkpoints/.step-000009.part/state").mkdir(parents=True)  # killed while it saved
    os.replace(out / "log.jsonl", tmp_path / "log")
    (out / "log.jsonl").write_text((tmp_path / "log").read_text() + '{"step": 5, "lr": 0}\n{"step": 6, "l')
    finish(
        fresh(llava_folder, diffusion_folder),
        pairs,
        config("pretrain", steps=5, save_every=1, keep=2),
        out,
        resume=True,
    )
    assert steps(out) == ["step-000004", "step-000005"] and log(out)[-1]["lr"] > 0


def fresh_from(folder: Path) -> InterleavedModel:
    from mgp5.hub import resolve
    from mgp5.loading import load_checkpoint

    return load_checkpoint(resolve(str(folder)))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_loaded_model_gives_the_states_of_the_trained_one(stage, mllm_folder, diffusion_folder, tales, tmp_path):
    model = fresh(mllm_folder, diffusion_folder)
    finish(model, tales, config(stage, rows_lr=1e-2, lr=1e-2), tmp_path / "run")
    again = load(tmp_path / "run")
    batch = batch_of(model, tales[0], tales[4])
    with torch.no_grad():
        expected, found = model.hidden(batch), again.hidden(batch)
        untrained = fresh(mllm_folder, diffusion_folder).hidden(batch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found, untrained, atol=1e-3)
        torch.testing.assert_close(again.backbone.logits(found), model.backbone.logits(expected), atol=1e-4, rtol=1e-4)
    for name, value in model.head.mapper.state_dict().items():
        assert torch.equal(again.head.mapper.state_dict()[name], value)


def test_finetuning_begins_with_what_pretraining_made(mllm_folder, diffusion_folder, pairs, tales, tmp_path):
    first = fresh(mllm_folder, diffusion_folder)
    finish(first, pairs, config("pretrain", rows_lr=1e-2), tmp_path / "pretrain")
    model = initial_model(str(tmp_path / "pretrain"), config("finetune"))
    assert model.config.head_config.num_vokens == VOKENS  # the run's, not the flag's
    batch = batch_of(model, tales[3])
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(batch), first.hidden(batch), atol=1e-5, rtol=1e-4)
    finish(model, tales, config("finetune", rows_lr=1e-2), tmp_path / "finetune")
    again = load(tmp_path / "finetune")
    with torch.no_grad():
        torch.testing.assert_close(again.hidden(batch), model.hidden(batch), atol=1e-5, rtol=1e-4)
    with pytest.raises(Mgp5Error, match="finetuned already"):
        initial_model(str(tmp_path / "finetune"), config("finetune"))
    for name in ("mlp.0.weight", "queries"):
        assert torch.equal(again.head.mapper.state_dict()[name], first.head.mapper.state_dict()[name])


def test_a_run_is_never_overwritten(llava_folder, diffusion_folder, pairs, tmp_path):
    def run(steps: int = 1, out: str = "run", **more):
        settings = config("pretrain", steps=steps, **more.pop("settings", {}))
        return finish(fresh(llava_folder, diffusion_folder), pairs, settings, tmp_path / out, **more)

    run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(Mgp5Error, match=r"run already holds a run.*--resume"):
        run()
    with pytest.raises(Mgp5Error, match=r"run is a run with another lr, batch"):
        run(settings={"lr": 1e-5, "batch": 3}, resume=True)
    with pytest.raises(Mgp5Error, match=r"accumulation 1, processes 1.*, not accumulation 2.*: keep accumulation x"):
        run(settings={"accumulation": 2}, resume=True)
    with pytest.raises(Mgp5Error, match=r"holds no run to resume"):
        run(out="other", resume=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Mgp5Error, match=r"--out .*file.* cannot be written"):
        run(out="file")
    (tmp_path / "somebody's").mkdir()
    (tmp_path / "somebody's/config.json").write_text("{}")
    with pytest.raises(Mgp5Error, match=r"already holds"):
        run(out="somebody's")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert [event.step for event in run(steps=2, resume=True)] == [2]  # a run may be made longer


def test_a_run_that_saved_nothing_may_begin_again(llava_folder, diffusion_folder, pairs, tmp_path):
    events = train(fresh(llava_folder, diffusion_folder), pairs, config("pretrain", steps=3), tmp_path / "run")
    next(events)
    events.close()
    assert len(finish(fresh(llava_folder, diffusion_folder), pairs, config("pretrain", steps=1), tmp_path / "run")) == 1


def test_a_full_disk_leaves_the_checkpoints_before(llava, llava_folder, diffusion_folder, pairs, tmp_path):
    out, settings = tmp_path / "run", config("pretrain", steps=3, save_every=1)
    finish(llava, pairs, settings, out, stop_after=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    again = train(fresh(llava_folder, diffusion_folder), pairs, settings, out, resume=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # no file may grow larger, as on a full disk
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(Mgp5Error, match=r"step 2 cannot be saved in .*make room and go on with --resume"):
            next(again)
    finally:
        signal.signal(signal.SIGXFSZ, old)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert steps(out) == ["step-000001"] and same(llava, fresh_from(out))


class Barren(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Conversation:
        raise Mgp5Error("nothing is here", "look elsewhere")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_data_worker_is_one_line(workers, llava, tmp_path):
    with pytest.raises(Mgp5Error, match=r"^nothing is here: look elsewhere$"):
        finish(llava, Barren(), config("pretrain", workers=workers), tmp_path / "run")


def test_a_finetuned_checkpoint_needs_nothing_of_the_stage_before(llava, llava_folder, pairs, tales, tmp_path):
    finish(llava, pairs, config("pretrain"), tmp_path / "pretrain")
    model = initial_model(str(tmp_path / "pretrain"), config("finetune"))
    shutil.rmtree(tmp_path / "pretrain")
    finish(model, tales, config("finetune"), tmp_path / "finetune")
    again = load(tmp_path / "finetune/checkpoints/step-000002")
    with torch.no_grad():
        batch = batch_of(model, tales[3])
        torch.testing.assert_close(again.hidden(batch), model.hidden(batch), atol=1e-5, rtol=1e-4)
    # Another LLM, although its width fits: three layers, not two.
    other = AutoConfig.from_pretrained(llava_folder)
    other.text_config.num_hidden_layers = 3
    shutil.copytree(llava_folder, tmp_path / "other")
    AutoModelForImageTextToText.from_config(other).save_pretrained(tmp_path / "other")
    path = tmp_path / "finetune/mgp5/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mllm": str(tmp_path / "other")}))
    with pytest.raises(Mgp5Error, match=r"trained for llava 2x32 with \d+ tokens, but .*other is llava 3x32 with"):
        load(tmp_path / "finetune")


def test_the_rate_warms_up_and_decays():
    settings = config("pretrain", warmup=10)
    rates = [rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.02
    assert rate(config("pretrain", warmup=0), 0, 5) == 1.0
    cosine = [rate(config("pretrain", warmup=10, schedule="cosine"), step, 100) for step in range(100)]
    assert cosine[:10] == rates[:10] and cosine[55] == pytest.approx(0.5) and cosine[-1] < 0.001
    assert total_steps(preset("pretrain"), range(4800)) == 200
    assert total_steps(preset("finetune"), range(320)) == 40
    assert total_steps(preset("finetune"), range(320), processes=4) == 10
    with pytest.raises(Mgp5Error, match="is not known: give --max-steps"):
        total_steps(preset("finetune"), SimpleNamespace(stream=None, size=None))


# The command


def test_both_stages_from_the_command_line(llava_folder, diffusion_folder, storyland, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/mllm").symlink_to(llava_folder)
    Path("base/diffusion").symlink_to(diffusion_folder)
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
    assert load(tmp_path / "finetune").config.lora == LoraConfig(rank=2)
    saved = json.loads((tmp_path / "finetune/config.json").read_text())
    assert (saved["batch"], saved["lora"]["rank"], saved["stage"]) == (2, 2, "finetune")


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
        stage="pretrain",
        data=(("cc3m", storyland / "cc3m"),),
        out=tmp_path / "run",
        model=str(base),
        preset="demo",
        overrides={"batch": 1, "precision": "fp32"},
        max_steps=2,
        vokens=4,
        device="cpu",
    )
    estimate = estimate_stage(request)
    assert (estimate.samples, estimate.updates, estimate.batch) == (6, 2, 1) and estimate.memory.total.trained > 0
    assert [event.step for event in train_stage(request)] == [1, 2]
    assert load(tmp_path / "run").config.stage == "pretrain"


def test_each_data_needs_its_format(storyland, tmp_path):
    args = ["train", "--stage", "pretrain", "--data", str(storyland / "cc3m"), "--data", "x", "--format", "cc3m"]
    result = CliRunner().invoke(cli.main, [*args, "--model", "demo", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "2 --data but 1 --format" in result.stderr


def test_trackers_see_every_update(base, storyland, tmp_path):
    pytest.importorskip("tensorboard")
    given = ["train", "--stage", "pretrain", "--preset", "demo", "--model", str(base), "--out", str(tmp_path / "run")]
    given += ["--data", str(storyland / "cc3m"), "--format", "cc3m", "--max-steps", "2", "--set", "batch=1"]
    result = CliRunner().invoke(cli.main, [*given, "--set", 'trackers=["tensorboard"]'])
    assert result.exit_code == 0, result.stderr
    assert any(path.stat().st_size for path in (tmp_path / "run").rglob("events.out.tfevents.*"))
