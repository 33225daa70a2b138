"""Runs: cut into pieces, killed, resumed, what they leave on disk and what they refuse."""

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_shards import write_tar
from tiny import picture
from tiny_training import TIMES, VOKENS, batch_of, config, finish, fork, fresh, join, same
from transformers import AutoConfig, AutoModelForImageTextToText

from mgp5 import Conversation, Mgp5Error
from mgp5.apps.open_model import load
from mgp5.config import LoraConfig, PrefixConfig, TrainConfig
from mgp5.data import load_data
from mgp5.hub import resolve
from mgp5.loading import load_checkpoint, trained_tensors
from mgp5.model import InterleavedModel
from mgp5.training import checkpoints as runs
from mgp5.training.loop import train
from mgp5.training.run import Interruption, initial_model

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def llava(llava_folder, diffusion_folder) -> InterleavedModel:
    return fresh(llava_folder, diffusion_folder)


@pytest.fixture
def run(llava_folder, diffusion_folder, pairs, tmp_path):
    """Trains a fresh model in a folder, and returns it."""

    def run(settings: TrainConfig, out: str = "run", data=pairs, **more) -> InterleavedModel:
        model = fresh(llava_folder, diffusion_folder)
        finish(model, data, settings, tmp_path / out, **more)
        return model

    return run


def log(out: Path) -> list[dict]:
    """Rows of the log without what depends on the machine."""
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def steps(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def load_run(folder: Path) -> InterleavedModel:
    return load_checkpoint(resolve(str(folder)))


# Resuming


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_resumed_run_equals_an_uninterrupted_one(stage, pairs, tales, run, tmp_path):
    data = {"pretrain": pairs, "finetune": tales}[stage]
    talk = Conversation().add("user", "hello " * 2000).add("assistant", "hm")  # does not fit the context
    data = [*(data[i] for i in range(4)), talk]  # epochs end inside pieces
    extra = {"lora": LoraConfig(dropout=0.3), "ema": 0.8, "sample_every": 2} if stage == "finetune" else {"workers": 2}
    settings = config(stage, steps=5, accumulation=2, log_every=1, **extra)
    whole = run(settings, "whole", data)
    run(settings, "pieces", data, stop_after=2)
    run(settings, "pieces", data, stop_after=1, resume=True)
    assert same(whole, run(settings, "pieces", data, resume=True))
    assert log(tmp_path / "whole") == log(tmp_path / "pieces") and len(log(tmp_path / "whole")) == 5
    kept = "checkpoints/step-000005/state/tensors.safetensors"
    states = [load_file(tmp_path / out / kept) for out in ("whole", "pieces")]
    assert same(*states) and any(name.startswith("weight.") for name in states[0]) == (stage == "finetune")
    report = json.loads((tmp_path / "pieces/report.json").read_text())
    assert report == json.loads((tmp_path / "whole/report.json").read_text())
    assert report["step"] == 5 and report["problems"]["too long"][0] == log(tmp_path / "whole")[-1]["problems"] == 4
    if stage == "finetune":
        for name in ("step-000002", "step-000004"):
            page = (tmp_path / f"pieces/samples/{name}.html").read_text()
            assert page == (tmp_path / f"whole/samples/{name}.html").read_text()
            assert f"Step {int(name[-1])}" in page and page.count("In the data:") == 4 < page.count("<img")


def test_shards_are_resumed_by_the_same_readers(run, tmp_path):
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    for number in range(2):
        pairs = [[(f"{number}{i}.png", buffer.getvalue()), (f"{number}{i}.txt", b"a fox %d" % i)] for i in range(5)]
        members = [member for pair in pairs for member in pair]
        write_tar(tmp_path / f"{number:05}.tar", *members)

    def piece(out: str, workers: int = 2, **more) -> InterleavedModel:
        settings = config("pretrain", steps=None, epochs=2, workers=workers, sample_every=9)
        return run(settings, out, load_data("shards", tmp_path), **more)

    whole = piece("whole")
    assert log(tmp_path / "whole")[-1]["step"] == load_data("shards", tmp_path).size >= 10
    assert (tmp_path / "whole/samples/step-000009.html").is_file()
    piece("pieces", stop_after=7)
    with pytest.raises(Mgp5Error, match=r"processes 1, workers 2, not .*, workers 0: resume it with the same"):
        piece("pieces", workers=0, resume=True)
    assert same(whole, piece("pieces", resume=True))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(llava_folder, diffusion_folder, storyland, tmp_path):
    """`mgp5 train` in a process of its own: killed while it trains and while it saves, then asked to stop."""
    chance, out, base = random.Random(0), tmp_path / "killed", join(tmp_path / "base", llava_folder, diffusion_folder)
    usual = ["train", "--stage", "finetune", "--model", str(base), "--preset", "demo", "--vokens", "4"]
    usual += ["--data", str(storyland / "vist"), "--format", "vist", "--max-steps", "24"]
    for item in ("batch=1", "save_every=2", "log_every=1", "precision=fp32", "lora.dropout=0.3", "ema=0.9"):
        usual += ["--set", item]

    def begin(place: Path) -> multiprocessing.Process:
        again = ["--resume"] if runs.checkpoints(place) else []
        return fork([*usual, "--out", str(place), *again])

    def wait_for(process: multiprocessing.Process, ready) -> None:
        while process.is_alive() and not ready():
            time.sleep(0.001)

    def logged(begun: float) -> bool:
        return (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_mtime > begun

    def half_saved() -> list[Path]:
        return list(out.glob("checkpoints/.*.part"))

    saving = 0
    for attempt in range(12):
        begun, process = time.time(), begin(out)
        wait_for(process, lambda begun=begun: logged(begun))
        time.sleep(chance.random() / 20)
        if attempt % 2:
            wait_for(process, half_saved)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        saving += bool(half_saved())
        if saving >= 2 and attempt >= 3:
            break
    begun, process = time.time(), begin(out)
    wait_for(process, lambda: logged(begun))
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    newest = runs.checkpoints(out)[-1]
    assert saving >= 2 and process.exitcode == 130 and not half_saved()
    assert int(newest.name[5:]) == log(out)[-1]["step"] < 24
    assert load(newest).config.lora is not None
    process, whole = begin(out), begin(tmp_path / "whole")
    process.join()
    whole.join()
    assert process.exitcode == whole.exitcode == 0
    assert same(*(load_file(place / "mgp5/model.safetensors") for place in (out, tmp_path / "whole")))
    assert log(out) == log(tmp_path / "whole") and len(log(out)) == 24
    assert steps(out) == ["step-000022", "step-000024"]


def test_a_second_ctrl_c_does_not_wait():
    with Interruption() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_moving_average_is_what_a_run_saves_to_use(llava, run, tmp_path):
    settings = config("pretrain", steps=3, save_every=1, keep=9)
    llava.prepare(config("pretrain"))
    expected = {name: value.clone() for name, value in trained_tensors(llava).items()}
    plain = run(settings, "plain")
    for step in (1, 2, 3):
        now = load_file(tmp_path / f"plain/checkpoints/step-{step:06d}/mgp5/model.safetensors")
        expected = {name: 0.6 * value + 0.4 * now[name] for name, value in expected.items()}
    assert same(plain, run(replace(settings, ema=0.6), "average"))  # the training itself does not see it
    found = load_file(tmp_path / "average/mgp5/model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


# What a run leaves and refuses


def test_old_checkpoints_go_and_the_newest_is_what_the_run_means(run, tmp_path):
    out, settings = tmp_path / "run", config("pretrain", steps=5, save_every=1, keep=2)
    model = run(settings, stop_after=4)
    assert steps(out) == ["step-000003", "step-000004"]
    assert (out / "mgp5").resolve() == (out / "checkpoints/step-000004/mgp5").resolve()
    assert same(model, load_run(out)) and not same(model, load_run(out / "checkpoints/step-000003"))
    (out / "checkpoints/.step-000009.part/state").mkdir(parents=True)  # killed while it saved
    with (out / "log.jsonl").open("a") as rows:
        rows.write('{"step": 5, "lr": 0}\n{"step": 6, "l')
    run(settings, resume=True)
    assert steps(out) == ["step-000004", "step-000005"] and log(out)[-1]["lr"] > 0


def test_each_stage_begins_with_what_the_one_before_has_saved(mllm_folder, diffusion_folder, pairs, tales, tmp_path):
    def check_loaded(trained: InterleavedModel, loaded: InterleavedModel) -> None:
        batch = batch_of(loaded, tales[0], tales[3])
        with torch.no_grad():
            expected, found = trained.hidden(batch), loaded.hidden(batch)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(found, fresh(mllm_folder, diffusion_folder).hidden(batch), atol=1e-3)
            logits = trained.backbone.logits(expected)
            torch.testing.assert_close(loaded.backbone.logits(found), logits, atol=1e-4, rtol=1e-4)
        for name, value in trained.head.mapper.state_dict().items():
            assert torch.equal(loaded.head.mapper.state_dict()[name], value)

    first = fresh(mllm_folder, diffusion_folder)
    finish(first, pairs, config("pretrain", rows_lr=1e-2, lr=1e-2), tmp_path / "pretrain")
    check_loaded(first, load(tmp_path / "pretrain"))
    model = initial_model(str(tmp_path / "pretrain"), config("finetune"))
    assert model.config.head_config.num_vokens == VOKENS  # the run's, not the flag's
    check_loaded(first, model)
    shutil.rmtree(tmp_path / "pretrain")  # it is not needed any more
    finish(model, tales, config("finetune", rows_lr=1e-2, lr=1e-2), tmp_path / "finetune")
    check_loaded(model, load(tmp_path / "finetune/checkpoints/step-000002"))
    more = config("finetune", steps=1, lora=LoraConfig(rank=12, alpha=6, targets=("v_proj", "q_proj")))
    again = initial_model(str(tmp_path / "finetune"), more)  # the adapter goes on in one of more rank
    again.prepare(more)
    again.eval()  # no dropout
    check_loaded(model, again)
    finish(again, tales, more, tmp_path / "again")
    check_loaded(again, load(tmp_path / "again"))
    for settings, words in (
        (config("pretrain"), "finetuned already"),
        (config("finetune", lora=LoraConfig(rank=2)), r"set lora.rank=8 or more, and lora.targets=\["),
        (config("finetune", lora=None, prefix=PrefixConfig()), "set the same lora or prefix"),
    ):
        with pytest.raises(Mgp5Error, match=words):
            initial_model(str(tmp_path / "finetune"), settings)
    for name in ("mlp.0.weight", "queries"):
        assert torch.equal(model.head.mapper.state_dict()[name], first.head.mapper.state_dict()[name])


def test_a_prefix_goes_on_in_the_next_run(llava, tales):
    llava.adapt(None, PrefixConfig(tokens=2, hidden=8))
    batch, rows = batch_of(llava, tales[0]), [p for n, p in llava.named_parameters() if "trainable_tokens_delta" in n]
    with torch.no_grad():
        rows[0].add_(1.0)
        expected = llava.hidden(batch)
        llava.prepare(config("finetune", lora=None, prefix=PrefixConfig(tokens=2, hidden=8)))
        torch.testing.assert_close(llava.hidden(batch), expected)


def test_another_llm_is_refused_although_its_width_fits(run, llava_folder, tmp_path):
    run(config("pretrain", steps=1))
    other = AutoConfig.from_pretrained(llava_folder)
    other.text_config.num_hidden_layers = 3  # not two
    shutil.copytree(llava_folder, tmp_path / "other")
    AutoModelForImageTextToText.from_config(other).save_pretrained(tmp_path / "other")
    path = tmp_path / "run/mgp5/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mllm": str(tmp_path / "other")}))
    with pytest.raises(Mgp5Error, match=r"trained for llava 2x32 with \d+ tokens, but .*other is llava 3x32 with"):
        load(tmp_path / "run")


def test_a_run_is_never_overwritten(run, tmp_path):
    settings = config("pretrain", steps=1)

    def refuse(match: str, settings: TrainConfig = settings, **more) -> None:
        with pytest.raises(Mgp5Error, match=match):
            run(settings, **more)

    run(settings)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    refuse(r"run already holds a run.*--resume")
    refuse(r"run is a run with another lr, batch", replace(settings, lr=1e-5, batch=3), resume=True)
    told = r"accumulation 1, processes 1.*, not accumulation 2.*: keep accumulation x"
    refuse(told, replace(settings, accumulation=2), resume=True)
    refuse(r"holds no run to resume", out="other", resume=True)
    (tmp_path / "file").write_text("mine")
    refuse(r"--out .*file.* cannot be written", out="file")
    (tmp_path / "somebody's").mkdir()
    (tmp_path / "somebody's/config.json").write_text("{}")
    refuse(r"already holds", out="somebody's")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    run(replace(settings, steps=2), resume=True)  # a run may be made longer
    assert runs.checkpoints(tmp_path / "run")[-1].name == "step-000002"


def test_a_run_that_saved_nothing_may_begin_again(llava, run, pairs, tmp_path):
    events = train(llava, pairs, config("pretrain", steps=3), tmp_path / "run")
    next(events)
    events.close()
    run(config("pretrain", steps=1))
    assert steps(tmp_path / "run") == ["step-000001"]


def test_a_full_disk_leaves_the_checkpoints_before(llava, run, pairs, tmp_path):
    settings = config("pretrain", steps=3, save_every=1)
    model = run(settings, stop_after=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    again = train(llava, pairs, settings, tmp_path / "run", resume=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # no file may grow larger, as on a full disk
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(Mgp5Error, match=r"step 2 cannot be saved in .*make room and go on with --resume"):
            next(again)
    finally:
        signal.signal(signal.SIGXFSZ, old)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert steps(tmp_path / "run") == ["step-000001"] and same(model, load_run(tmp_path / "run"))


class Barren(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Conversation:
        raise Mgp5Error("nothing is here", "look elsewhere")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_data_worker_is_one_line(workers, llava, tmp_path):
    with pytest.raises(Mgp5Error, match=r"^nothing is here: look elsewhere$"):
        finish(llava, Barren(), config("pretrain", workers=workers), tmp_path / "run")
