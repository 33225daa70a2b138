"""`mgp5 bench` on tiny models: rows that add up, ways that agree, what is left out, and the form of the report."""

import json
import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from mgp5.kernels.registry import OPERATIONS
from tiny_sd3 import save_sd3

from mgp5.bench import decoding, drawing, kernels, training
from mgp5.bench.run import BenchRequest
from mgp5.bench.timing import Bench, Limits, Timing, interleave
from mgp5.cli import main
from mgp5.errors import Mgp5Error
from mgp5.hub import DEMO, resolve
from mgp5.memory.skeletons import generator_shape, skeleton
from mgp5.training.presets import preset
from mgp5.views.tables import bench_tables

CPU = torch.device("cpu")


def on_cpu(**options):
    return Bench(device=CPU, dtype=torch.float32, **options)


def run(out, *options):
    done = CliRunner().invoke(main, ["bench", "--device", "cpu", "--out", str(out), *options])
    return done, json.loads(out.read_text()) if out.exists() else None


@pytest.mark.slow
def test_the_gpu_suite_measures_every_way_and_reports_it(tmp_path, llava_folder, diffusion_folder, monkeypatch):
    monkeypatch.setattr(decoding, "REPLY", 16)
    out = tmp_path / "report.json"
    options = ["--model", f"{llava_folder}+{diffusion_folder}", "--steps", "1", "--json"]
    done, report = run(out, "--suite", "gpu", *options, "--backend", "eager", "--backend", "triton")
    assert done.exit_code == 0, done.output
    rows = report["rows"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows
    assert {"date", "cpu", "cores", "threads", "torch", "transformers", "diffusers", "mgp5"} <= report["machine"].keys()
    ways = [(row["name"], row["provider"]) for row in rows]
    drawers = [("guided step", way) for way in ("diffusers", "eager", "triton", "diffusers compiled")]
    writers = [("decode", way) for way in ("transformers dynamic", "eager", "transformers static")]
    expected = [("limit", "matmul"), ("limit", "copy"), ("condition", "eager"), *drawers, *writers]
    assert ways == expected + 2 * drawers + 2 * writers  # then four and eight at a time
    told = [line.partition("] ")[2] for line in done.stderr.splitlines()]
    assert told[1:-1] == [f"{row['size']}: {row['provider']}" for row in rows[2:]]
    matmul, copy = rows[0]["tflop_per_s"], rows[1]["gb_per_s"]
    for row in rows[2:]:
        if row["provider"] in ("triton", "diffusers compiled"):
            assert "GPU" in row["skipped"] and "median" not in row
            continue
        assert 0 < row["p20"] <= row["median"] <= row["p80"] and row["unit"] == "ms" and row["first_s"] >= 0
        if row["name"] == "guided step":
            assert row["psnr"] > 80 and row["step_error"] < 1e-4
            assert row["share_of_matmul"] == pytest.approx(row["tflop_per_s"] / matmul, abs=0.005)
            batch = int(row["size"].rpartition(" ")[2])
            assert ("image_ms" in row) == (batch == 2) and row["vae_ms"] > 0
            if batch == 2:  # 50 steps, the VAE, and what comes before
                assert row["image_ms"] > 50 * row["median"] + rows[2]["median"]
        if row["name"] == "decode":
            count = int((row["size"].partition(" behind 64, ")[2] or "1").split()[0])
            assert row["tokens_per_s"] == pytest.approx(1000 * count / row["median"], rel=0.01)
            assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / copy, rel=0.01, abs=0.0006)
    again, _ = run(out, "--suite", "gpu")
    assert (again.exit_code, again.output.count("\n")) == (2, 1)


@pytest.mark.parametrize("kind, steps", [("demo", 3), ("sd3", 4)])  # trained, and random weights
def test_we_and_diffusers_draw_the_same(kind, steps, tmp_path, qwen_folder):
    parts = resolve("demo" if kind == "demo" else f"{qwen_folder}+{save_sd3(tmp_path / 'sd3')}")
    options = {"limits": Limits(1.0, 1.0), "compiled": False, "steps": steps}
    rows = list(drawing.draw_rows(on_cpu(backends=("eager",)), parts, None, 1, **options))
    assert [row["provider"] for row in rows] == ["diffusers", "eager"]
    for row in rows:
        assert row["step_error"] < 1e-4
        assert row["psnr"] is None or row["psnr"] > {"demo": 100, "sd3": 80}[kind]  # None: the same to the last bit


def test_vokens_behind_a_prompt_are_timed():
    (row,) = decoding.condition_rows(on_cpu(), resolve("demo"))
    assert row["size"].startswith("demo, 8 positions behind 64") and row["median"] > 0


def test_a_way_that_fails_or_has_no_time_leaves_the_others_alone():
    breaking = Mock(side_effect=[None, RuntimeError("at the second image")])
    ways = {
        "good": lambda: (lambda: None, lambda: None),
        "full": Mock(side_effect=torch.OutOfMemoryError("a long text")),
        "absent": Mock(side_effect=Mgp5Error("not installed", "install it")),
        "breaking": lambda: (breaking,),
        "slow": lambda: (lambda: None,),
    }
    told = []
    found = interleave(on_cpu(steps=3, minutes=1, startup={"slow": 61.0}, tell=told.append), "a size", ways, weights=0)
    skipped = {name: timed.skipped for name, timed in found.items() if timed.skipped}
    assert skipped == {
        "full": "out of memory", "absent": "not installed", "breaking": "RuntimeError: at the second image",
        "slow": "out of time",
    }  # fmt: skip
    assert [len(run) for run in found["good"].runs] == [2] * 3
    row = Timing(runs=[(0.2, 0.1)] * 3).row(1, per=4)
    assert (row["median"], row["p20"], row["p80"], row["unit"]) == (25.0, 25.0, 25.0, "ms")
    assert told == [f"a size: {name}" for name in ways]


def test_without_time_there_is_a_report_of_what_was_left_out(tmp_path):
    done, report = run(tmp_path / "report.json", "--suite", "cpu", "--minutes", "0")
    assert done.exit_code == 0, done.output
    left = report["rows"][2:]
    assert [row["name"] for row in left] == ["condition", "guided step", "decode", "reply"]
    assert {(row["provider"], row["skipped"]) for row in left} == {("all", "out of time")}
    assert done.stdout.count("skipped: out of time") == 4


def test_a_model_that_cannot_be_made_is_a_row(tmp_path, diffusion_folder):
    (tmp_path / "empty").mkdir()
    options = ["--model", f"{tmp_path / 'empty'}+{diffusion_folder}", "--steps", "1"]
    done, report = run(tmp_path / "report.json", "--suite", "cpu", *options)
    assert done.exit_code == 0, done.output
    reasons = {row["name"]: row.get("skipped", "") for row in report["rows"][2:]}
    assert reasons["condition"] and reasons["decode"] and not reasons["guided step"]


@pytest.mark.parametrize(
    "options", ["kernels --steps 2", "kernels --minutes 2", "gpu --batch 4", "train --backend eager", "cpu --model x"]
)
def test_what_a_suite_does_not_take_is_refused_in_a_line(tmp_path, options):
    done, report = run(tmp_path / "report.json", "--suite", *options.split())
    assert (done.exit_code, done.output.count("\n"), report) == (2, 1, None)
    assert options.split()[1] in done.output or "no model 'x'" in done.output


def test_all_that_is_wrong_with_a_request_is_said_at_once(tmp_path):
    (tmp_path / "report.json").touch()
    told = r"report.json exists already; .* takes no --batch; --steps 0, expected 1 or more"
    with pytest.raises(Mgp5Error, match=told):
        BenchRequest(suite="cpu", out=tmp_path / "report.json", batch=2, steps=0)


def test_every_kernel_is_timed_and_its_bytes_counted():
    assert {case.operation for case in kernels.cases(512)} == set(OPERATIONS)
    row = next(kernels.kernel_rows(on_cpu()))
    assert (row["name"], row["size"], row["provider"]) == ("group_norm", "1280x8x8 float32", "eager")
    moved = 4 * (2 * 2 * 1280 * 8 * 8 + 2 * 1280 + 2 * 1280)  # the map read and written, weight and bias, time
    assert row["p20"] <= row["median"] <= row["p80"] and row["unit"] == "us"
    assert row["gb_per_s"] == pytest.approx(moved / row["median"] / 1e3, rel=0.02, abs=0.1)


def test_operations_and_bytes_are_those_of_the_published_models():
    with torch.device("meta"):
        generator = generator_shape("sd-2.1-base")
    # By hand: convolutions, projections and attention of the UNet of 865,910,724 parameters, for two rows.
    assert drawing.operations(generator, 512, 1) == pytest.approx(1.609e12, rel=1e-3)
    assert drawing.operations(generator, 512, 4) == 4 * drawing.operations(generator, 512, 1)
    bench = Bench(device=torch.device("meta"), dtype=torch.bfloat16)
    model = decoding.make_model(resolve("llava-1.5-7b+sd-2.1-base"), bench)
    # LLaMA 7B without its embedding, and 64 tokens more in its LM head.
    assert decoding.read_bytes(model) == 2 * (6_738_415_616 - 32_000 * 4096 + 64 * 4096)


def test_the_difference_to_a_reference_is_that_of_its_definition():
    noise, first, last = (torch.full((1, 1, 2, 2), value) for value in (0.0, 2.0, 0.0))
    last[..., 0, 0] = 10.0
    row = drawing.difference((first + 0.5, last + 0.1), (first, last), noise)
    assert row == {"psnr": pytest.approx(20 * math.log10(10 / 0.1), abs=0.05), "step_error": 0.25}
    assert drawing.difference((first, last), (first, last), noise)["psnr"] is None


def test_the_compiler_knows_what_diffusers_documents():
    known = torch._inductor.list_options()
    assert set(torch._inductor.list_mode_options("max-autotune") | drawing.INDUCTOR) <= set(known)


def test_several_replies_are_timed_together(monkeypatch):
    monkeypatch.setattr(decoding, "REPLY", 4)
    rows = list(decoding.decode_rows(on_cpu(backends=("eager",)), resolve("demo"), (1, 3)))
    assert [row["size"].endswith("3 at once") for row in rows] == [False] * 3 + [True] * 3
    assert not any("skipped" in row for row in rows)
    assert rows[4]["tokens_per_s"] == pytest.approx(3000 / rows[4]["median"], rel=0.01)


@pytest.mark.slow
def test_the_train_suite_measures_every_way_and_reports_it(tmp_path, llava_folder, diffusion_folder):
    out = tmp_path / "report.json"
    options = ["--model", f"{llava_folder}+{diffusion_folder}", "--steps", "1", "--batch", "6", "--json"]
    done, report = run(out, "--suite", "train", *options)
    assert done.exit_code == 0, done.output
    rows = report["rows"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows
    ways = [f"{kind}, {kept}" for kept in ("kept, by 6", "recomputed, by 2") for kind in ("live", "cached")]
    assert [row["provider"] for row in rows] == [*ways, "live, kept, by 1"]
    for row in rows:
        assert (row["name"], row["unit"]) == ("pretrain update", "ms") and row["size"].endswith(" 16 px, 6 samples")
        assert row["p20"] <= row["median"] <= row["p80"]
        assert row["samples_per_s"] == pytest.approx(6 * row["updates_per_s"], rel=0.01)
        parts = row["parts"]
        assert {"LLM", "LLM back", "denoiser", "denoiser back", "other"} <= parts.keys()
        assert ({"VAE", "text"} <= parts.keys()) == row["provider"].startswith("live")
        assert sum(parts.values()) == pytest.approx(1, abs=0.01)
    operations = [row["tflop"] for row in rows]
    assert operations[3] > operations[1] and operations[2] > operations[3]  # to recompute costs, and the VAE
    assert all(row["estimated_gib"] >= 0 for row in rows)


def test_training_begins_with_the_most_telling_rows_and_ends_in_time(monkeypatch):
    monkeypatch.setattr(training, "skeleton", lambda *args, **options: Mock(head=Mock(generator=Mock(native_size=512))))
    bench = Bench(device=torch.device("cpu"), dtype=torch.float32, minutes=0)
    rows = list(training.train_rows(bench, resolve("llava-1.5-7b+sd-2.1-base"), 48, "minigpt5"))
    first = [
        "live, kept, by 48, images by 16",
        "cached, kept, by 48, images by 16",
        "live, recomputed, by 16, images by 4",
    ]
    assert [row["provider"] for row in rows[:3]] == first and rows[3]["provider"] == "live, recomputed, by 16"
    assert {row["skipped"] for row in rows} == {"out of time"} and len({row["provider"] for row in rows}) == 7


def test_an_update_that_does_not_fit_is_told(llava_folder, diffusion_folder, monkeypatch):
    def full(self, *args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(training.Trainer, "update", full)
    row = next(training.train_rows(on_cpu(), resolve(f"{llava_folder}+{diffusion_folder}"), 4, "minigpt5"))
    assert row["skipped"] == "out of memory"
    assert bench_tables([row]).renderables[-1].endswith("skipped: out of memory")


def test_made_up_batches_are_what_a_collator_would_make():
    config = replace(preset("pretrain"), batch=3)
    model = skeleton(str(DEMO / "mllm"), str(DEMO / "diffusion"), config)
    batch = training.random_batch(model, config)
    for row, start in zip(batch.target_rows, batch.target_starts, strict=True):
        told = [*model.head.ids, model.backbone.tokenizer.eos_token_id]
        assert batch.ids[row, start : start + 9].tolist() == batch.labels[row, start : start + 9].tolist() == told
    assert batch.count("text") == 3 * 9 and batch.num_samples == 3
    assert {name: value.shape for name, value in batch.targets.items()} == {"pixels": (3, 3, 128, 128)}
    cached = training.random_batch(model, config, cached=1).targets
    assert cached["encodings"].shape == (3, *model.head.generator.condition_shape) and "moments" in cached


@pytest.mark.parametrize("head", ["seed", pytest.param("mm-interleaved", marks=pytest.mark.slow)])
def test_updates_of_other_heads_are_measured(head, llava_folder, diffusion_folder, monkeypatch):
    monkeypatch.setattr(training, "preset", lambda stage, head: preset(stage, "demo", head))
    rows = training.train_rows(on_cpu(), resolve(f"{llava_folder}+{diffusion_folder}"), 2, head)
    row = next(rows)
    assert row["name"] == f"{head} pretrain update" and row["median"] > 0 and row["parts"]["LLM back"] > 0
