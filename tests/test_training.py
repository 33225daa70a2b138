"""The two stages on tiny models: what trains, what does not, and that a run can be cut into pieces."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from tiny import picture

from mgp5 import Conversation, Image, Mgp5Error, cli
from mgp5.checkpoint import trained_tensors
from mgp5.collate import Collator
from mgp5.config import LoraConfig, TrainConfig, preset
from mgp5.data import load_data
from mgp5.data.storyland.write import write
from mgp5.losses import Losses
from mgp5.model import MiniGPT5, build, load
from mgp5.prompt import IGNORE
from mgp5.train import rate, total_steps, train
from mgp5.training import start

VOKENS = 4


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the precision of the first run for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def storyland(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("storyland") / "train"
    write(folder, "train", pairs=6, stories=1, dialogs=2, seed=0)
    return folder


@pytest.fixture(scope="session")
def pairs(storyland):
    return load_data("cc3m", storyland / "cc3m")


@pytest.fixture(scope="session")
def tales(storyland):
    return load_data("vist", storyland / "vist")


def config(stage: str, steps: int = 2, **values) -> TrainConfig:
    """The demo preset, small."""
    own = {"batch": 2, "warmup": 0, "precision": "fp32", "lr": 1e-3, "weight_decay": 0.1}
    return replace(preset(stage, "demo"), steps=steps, **own | values)


def fresh(mllm: Path, diffusion: Path) -> MiniGPT5:
    torch.manual_seed(1)
    return build(str(mllm), str(diffusion), num_vokens=VOKENS, guidance=3.0)


@pytest.fixture
def llava(llava_folder, diffusion_folder) -> MiniGPT5:
    return fresh(llava_folder, diffusion_folder)


def finish(*args, **more) -> list:
    return list(train(*args, **more))


def batch_of(model: MiniGPT5, *conversations: Conversation):
    size = (model.diffusion.native_size,) * 2
    return Collator(model.backbone, model.head.tokens, size, model.backbone.context_length)(conversations)


def weights(model: MiniGPT5) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: MiniGPT5, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that are not bit for bit what they were, adapters folded in."""
    model.merge()
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def check_rows(model: MiniGPT5, before: dict[str, torch.Tensor]) -> None:
    """The voken rows of embedding and LM head have changed, and no other row, although weight decay is on."""
    ids, core = list(model.head.ids), model.backbone.core
    old = fresh_rows(before)
    for name, weight in (("embed", core.get_input_embeddings().weight), ("head", core.lm_head.weight)):
        same = (weight == old[name]).all(dim=1)
        assert not same[ids].any()
        same[ids] = True
        assert same.all()


def fresh_rows(before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    embed = next(value for name, value in before.items() if name.endswith("embed_tokens.weight"))
    head = next(value for name, value in before.items() if name.endswith("lm_head.weight"))
    return {"embed": embed, "head": head}


# What trains


def test_pretraining_trains_voken_rows_and_mapper_only(mllm_folder, diffusion_folder, pairs, tmp_path):
    model = fresh(mllm_folder, diffusion_folder)
    before = weights(model)
    finish(model, pairs, config("pretrain"), tmp_path / "run")
    names = changed(model, before)
    assert all("mapper" in name or name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in names)
    for part in ("mapper.mlp.0.weight", "mapper.mlp.2.weight", "mapper.queries", "mapper.transformer.encoder"):
        assert any(part in name for name in names)
    check_rows(model, before)


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_finetuning_trains_rows_lora_and_the_mappers_transformer(
    family, llava_folder, qwen_folder, diffusion_folder, tales, tmp_path
):
    model = fresh({"llava": llava_folder, "qwen": qwen_folder}[family], diffusion_folder)
    before = weights(model)
    finish(model, tales, config("finetune"), tmp_path / "run")
    rows = ("embed_tokens.weight", "lm_head.weight")
    names = {name for name in changed(model, before) if not name.endswith(rows)}
    assert {name for name in names if "mapper" not in name} == {
        name for name in before if "language_model" in name and name.endswith(("q_proj.weight", "v_proj.weight"))
    }
    assert all("mapper.transformer" in name for name in names if "mapper" in name)
    assert any("mapper.transformer.decoder" in name for name in names)
    check_rows(model, before)


def test_embedding_rows_have_no_weight_decay(llava):
    llava.prepare("pretrain", None)
    rows, rest = llava.parameter_groups(config("pretrain", rows_lr=5e-5))
    assert (rows["lr"], rows["weight_decay"]) == (5e-5, 0.0)
    assert rest["weight_decay"] == 0.1
    assert sum(p.numel() for p in rows["params"]) == 2 * VOKENS * llava.backbone.width
    assert {id(p) for p in rest["params"]} == {id(p) for p in llava.head.mapper.parameters()}


def test_losses_fall_when_one_batch_is_repeated(llava, pairs, tmp_path):
    batch = batch_of(llava, *(pairs[i] for i in range(4)))
    settings = config("pretrain", steps=30, batch=4, lr=3e-3, rows_lr=1e-2, guidance_dropout=0.0)

    @torch.no_grad()
    def losses() -> dict[str, float]:
        terms = llava.eval()(batch, settings, torch.Generator().manual_seed(0)).terms
        return {name: value.item() for name, value in terms.items()}

    before = losses()
    finish(llava, torch.utils.data.Subset(pairs, range(4)), settings, tmp_path / "run")
    after = losses()
    assert after["text"] < 0.9 * before["text"]
    assert after["caption"] < 0.5 * before["caption"]
    assert after["ldm"] < before["ldm"]


# The losses


def test_weights_of_the_losses_are_the_papers(llava, pairs):
    batch = batch_of(llava, pairs[0])
    for stage, expected in (("pretrain", {"text", "ldm", "caption"}), ("finetune", {"text", "ldm"})):
        losses = llava(batch, preset(stage), torch.Generator().manual_seed(0))
        assert losses.weights == {"text": 0.01, "ldm": 1.0, "caption": 0.1 if stage == "pretrain" else 0.0}
        assert losses.terms.keys() == expected
        total = sum(losses.weights[name] * value.item() for name, value in losses.terms.items())
        assert losses.total.item() == pytest.approx(total, rel=1e-5)
    ones = {name: torch.tensor(1.0) for name in ("text", "ldm", "caption")}
    assert Losses(ones, {"text": 0.01, "ldm": 1.0, "caption": 0.1}).total.item() == pytest.approx(1.11)


@pytest.fixture
def spied(llava, monkeypatch):
    """A model that notes what its mapper reads and which captions are the target."""
    seen, real = {}, llava.diffusion.encode_text

    def encode_text(texts: list[str]) -> torch.Tensor:
        seen["texts"] = texts
        return real(texts)

    monkeypatch.setattr(llava.diffusion, "encode_text", encode_text)
    llava.head.mapper.mlp.register_forward_pre_hook(lambda _, args: seen.update(states=args[0]))
    return llava, seen


def told(*captions: str) -> list[Conversation]:
    return [Conversation().add("user", "draw").add("assistant", Image(pixels=picture(), caption=c)) for c in captions]


def test_guidance_dropout_puts_zeros_before_the_mlp_and_takes_the_empty_caption(spied):
    model, seen = spied
    batch = batch_of(model, *told(*"abcdefgh"))
    model(batch, config("pretrain", guidance_dropout=0.5), torch.Generator().manual_seed(0))
    dropped = [not states.any() for states in seen["states"]]
    assert True in dropped and False in dropped
    assert seen["texts"] == ["" if zero else caption for zero, caption in zip(dropped, "abcdefgh", strict=True)]
    model(batch, config("pretrain", guidance_dropout=0.0), torch.Generator().manual_seed(0))
    assert seen["states"].flatten(1).any(dim=1).all()


def test_caption_loss_only_where_there_are_captions(spied):
    model, seen = spied
    plain = config("pretrain", guidance_dropout=0.0)
    model(batch_of(model, *told("a fox", "", "a hen")), plain, torch.Generator().manual_seed(0))
    assert seen["texts"] == ["a fox", "a hen"]
    losses = model(batch_of(model, *told("", "")), plain, torch.Generator().manual_seed(0))
    assert "caption" not in losses.terms and "ldm" in losses.terms


def test_only_the_first_voken_of_a_run_has_a_label(model, tales):
    samples = [tales[i] for i in range(len(tales))]
    batch = batch_of(model, *samples)
    assert len(batch.starts) == sum(len(sample.messages[-1].images) for sample in samples) > 4
    for row, at in zip(batch.rows, batch.starts, strict=True):
        run = batch.ids[row, at : at + VOKENS + 1].tolist()
        labels = batch.labels[row, at : at + VOKENS + 1].tolist()
        assert tuple(run[:VOKENS]) == model.head.ids
        assert labels == [run[0], *[IGNORE] * (VOKENS - 1), run[-1]]
        assert run[-1] in model.backbone.stop_ids
    assert (batch.labels[batch.mask == 0] == IGNORE).all()


def test_a_batch_without_pictures_has_a_text_loss_only(llava):
    batch = batch_of(llava, Conversation().add("user", "hi").add("assistant", "hello"))
    assert llava(batch, config("finetune"), torch.Generator()).terms.keys() == {"text"}


# Runs


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_resumed_run_equals_an_uninterrupted_one(stage, llava_folder, diffusion_folder, pairs, tales, tmp_path):
    data = torch.utils.data.Subset({"pretrain": pairs, "finetune": tales}[stage], range(5))  # epochs end inside pieces
    extra = {"lora": LoraConfig(dropout=0.3)} if stage == "finetune" else {}
    settings = config(stage, steps=5, accumulation=2, log_every=1, **extra)

    def piece(out: str, **more) -> MiniGPT5:
        model = fresh(llava_folder, diffusion_folder)
        finish(model, data, settings, tmp_path / out, **more)
        return model

    whole = piece("whole")
    piece("pieces", stop_after=2)
    (tmp_path / "pieces/mgp5/model.safetensors").write_bytes(b"of another step")  # a run resumes from its state alone
    piece("pieces", stop_after=1, resume=True)
    last = piece("pieces", resume=True)
    expected, found = trained_tensors(whole), trained_tensors(last)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    def log(out: str) -> list[dict]:
        rows = map(json.loads, (tmp_path / out / "log.jsonl").read_text().splitlines())
        return [{name: value for name, value in row.items() if name != "rate"} for row in rows]

    assert log("whole") == log("pieces") and len(log("whole")) == 5


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
    model = start({"model": str(tmp_path / "pretrain"), "vokens": 8}, config("finetune"))
    assert model.config.num_vokens == VOKENS  # the run's, not the flag's
    batch = batch_of(model, tales[3])
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(batch), first.hidden(batch), atol=1e-5, rtol=1e-4)
    finish(model, tales, config("finetune", rows_lr=1e-2), tmp_path / "finetune")
    again = load(tmp_path / "finetune")
    with torch.no_grad():
        torch.testing.assert_close(again.hidden(batch), model.hidden(batch), atol=1e-5, rtol=1e-4)
    with pytest.raises(Mgp5Error, match="finetuned already"):
        start({"model": str(tmp_path / "finetune"), "vokens": 8}, config("finetune"))
    for name in ("mlp.0.weight", "queries"):
        assert torch.equal(again.head.mapper.state_dict()[name], first.head.mapper.state_dict()[name])


def test_a_run_is_never_overwritten(llava_folder, diffusion_folder, pairs, tmp_path):
    def run(steps: int = 1, out: str = "run", **more):
        settings = config("pretrain", steps=steps, **more.pop("settings", {}))
        return finish(fresh(llava_folder, diffusion_folder), pairs, settings, tmp_path / out, **more)

    run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(Mgp5Error, match=r"run already holds a run.*--resume"):
        run()
    with pytest.raises(Mgp5Error, match=r"run is a run with another lr, batch"):
        run(settings={"lr": 1e-5, "batch": 3}, resume=True)
    with pytest.raises(Mgp5Error, match=r"holds no run to resume"):
        run(out="other", resume=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Mgp5Error, match=r"--out .*file.* cannot be written"):
        run(out="file")
    (tmp_path / "somebody's").mkdir()
    (tmp_path / "somebody's/config.json").write_text("{}")
    with pytest.raises(Mgp5Error, match=r"already holds"):
        run(out="somebody's")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert [event.step for event in run(steps=2, resume=True)] == [2]  # a run may be made longer


def test_a_run_that_saved_nothing_may_begin_again(llava_folder, diffusion_folder, pairs, tmp_path):
    events = train(fresh(llava_folder, diffusion_folder), pairs, config("pretrain", steps=3), tmp_path / "run")
    next(events)
    events.close()
    assert len(finish(fresh(llava_folder, diffusion_folder), pairs, config("pretrain", steps=1), tmp_path / "run")) == 1


def test_samples_that_do_not_fit_the_context_are_left_out_and_counted(llava, tmp_path):
    talk = Conversation().add("user", "word " * 2000).add("assistant", "hm")
    finish(llava, [talk, talk], config("finetune", steps=1), tmp_path / "run")
    (row,) = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert row["too_long"] >= 2 and "text" not in row


def test_the_rate_warms_up_and_decays():
    settings = config("pretrain", warmup=10)
    rates = [rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.02
    assert rate(config("pretrain", warmup=0), 0, 5) == 1.0
    assert total_steps(preset("pretrain"), 4800) == 200
    assert total_steps(preset("finetune"), 320) == 40


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
    assert [line["step"] for line in lines] == [1, 2] and {"text", "ldm", "caption", "total"} <= lines[0].keys()
    both = ["--data", str(storyland / "vist"), "--format", "vist", "--data", str(storyland / "mmdialog")]
    both += ["--format", "mmdialog", "--set", "lora.rank=2", "--max-steps", "1"]
    result = run("finetune", "pretrain", *both)
    assert not result.stdout and "finetune" in result.stderr
    monkeypatch.chdir("/")  # a run knows its parts from anywhere
    assert load(tmp_path / "finetune").config.lora == LoraConfig(rank=2)
    saved = json.loads((tmp_path / "finetune/config.json").read_text())
    assert (saved["batch"], saved["lora"]["rank"], saved["stage"]) == (2, 2, "finetune")


def test_each_data_needs_its_format(storyland, tmp_path):
    args = ["train", "--stage", "pretrain", "--data", str(storyland / "cc3m"), "--data", "x", "--format", "cc3m"]
    result = CliRunner().invoke(cli.main, [*args, "--model", "demo", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "2 --data but 1 --format" in result.stderr
