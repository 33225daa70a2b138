"""`mgp5 bench` on the demo's shapes: rows that add up, and the form of the report."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from mgp5 import bench
from mgp5.cli import main
from mgp5.config import preset
from mgp5.hub import DEMO, resolve
from mgp5.shapes import skeleton


def test_the_train_suite_measures_every_way_and_reports_it(tmp_path):
    out = tmp_path / "report.json"
    command = [
        "bench",
        "--suite",
        "train",
        "--model",
        "demo",
        "--device",
        "cpu",
        "--steps",
        "1",
        "--batch",
        "4",
        "--out",
        str(out),
        "--json",
    ]
    run = CliRunner().invoke(main, command)
    assert run.exit_code == 0, run.output
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert [json.loads(line) for line in run.stdout.splitlines()] == rows
    assert {"date", "cpu", "cores", "torch", "transformers", "diffusers", "mgp5"} <= report["machine"].keys()
    ways = [f"{kind}, {kept}" for kind in ("cached", "live") for kept in ("recomputed", "kept")]
    assert [row["provider"] for row in rows] == [f"{way}, by 4" for way in ways]
    for row in rows:
        assert (row["name"], row["unit"], row["size"]) == ("pretrain update", "ms", "demo, 128 px, 4 samples")
        assert row["p20"] <= row["median"] <= row["p80"]
        assert row["samples_per_s"] == pytest.approx(4 * row["updates_per_s"], rel=0.01)
        parts = row["parts"]
        assert {"LLM", "LLM back", "denoiser", "denoiser back", "other"} <= parts.keys()
        assert ({"VAE", "text"} <= parts.keys()) == row["provider"].startswith("live")
        assert sum(parts.values()) == pytest.approx(1, abs=0.01)
        assert min(parts.values()) > 0
    operations = [row["tflop"] for row in rows]
    assert operations[0] > operations[1] and operations[2] > operations[0]  # to recompute costs, then the VAE
    assert rows[0]["estimated_gb"] < rows[1]["estimated_gb"]
    again = CliRunner().invoke(main, command)
    assert (again.exit_code, again.output.count("\n")) == (2, 1)


def test_the_cpu_suite_draws_by_turns_and_the_same_picture(tmp_path):
    out = tmp_path / "report.json"
    run = CliRunner().invoke(main, ["bench", "--suite", "cpu", "--steps", "2", "--out", str(out)])
    assert run.exit_code == 0, run.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["provider"] for row in rows] == ["diffusers", "eager"]
    assert all(row["p20"] <= row["median"] <= row["p80"] for row in rows)
    assert rows[1]["psnr"] > 60


def test_what_does_not_fit_is_told(monkeypatch):
    def full(self, *args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench.Trainer, "update", full)
    row = next(bench.train_suite(bench.Setting(parts=resolve("demo"), device="cpu", steps=1, batch=4)))
    assert row["skipped"] == "out of memory"
    assert [table.row_count for table in bench.tables([row]).renderables] == [1]


def test_made_up_batches_are_what_a_collator_would_make():
    model = skeleton(str(DEMO / "mllm"), str(DEMO / "diffusion"), preset("pretrain"))
    batch = bench.made_up(model, 3, cached=False)
    for row, start in zip(batch.rows, batch.starts, strict=True):
        told = batch.labels[row][batch.labels[row] >= 0].tolist()
        assert told == [*model.head.ids, model.backbone.tokenizer.eos_token_id]
        assert batch.ids[row, start : start + 8].tolist() == list(model.head.ids)
        assert batch.mask[row].sum() == start + 9
    assert batch.pixels.shape == (3, 3, 128, 128) and batch.moments is None
    assert bench.made_up(model, 3, cached=True).encodings.shape == (3, *model.diffusion.condition_shape)
