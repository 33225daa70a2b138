"""The ablations: rows as data, what they share, verdicts; the command as a process that is killed and goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image as pil

from mgp5 import Mgp5Error
from mgp5.config import preset
from mgp5.evaluation.ablations import ATTRIBUTES, BASELINE, FRECHET, mean_over_seeds, needed, rows, verdict
from mgp5.evaluation.ablations_measure import place
from mgp5.evaluation.ablations_page import report
from mgp5.evaluation.ablations_run import FORMATS, SETTINGS, Plan, _chain, runs_of
from mgp5.options import override, parse_settings
from mgp5.training import checkpoints as runs

TABLE = rows(3.0)


def plan(out: Path, model: str = "", data: Path | None = None) -> Plan:
    own = {"updates": {"pretrain": 2, "finetune": 1}, "samples": 2, "steps": 2, "guidance": 3.0}
    return Plan(out=out, data=data or out / "data/train", model=model, device="cpu", backend="eager", **own)


def test_rows_are_what_train_takes_and_have_something_to_be_compared_with():
    for row in TABLE.values():
        for stage in FORMATS:
            override(preset(stage, "demo"), parse_settings((*SETTINGS[stage], *(getattr(row, stage) or ()))))
        assert row.papers_stage in row.stages and row.papers_stage in TABLE[row.against].stages
        assert row.name == BASELINE or bool(row.papers) == bool(row.source)
    assert [row.name for row in needed(TABLE, ["guidance 15"])] == [BASELINE, "guidance 10", "guidance 15"]
    with pytest.raises(Mgp5Error, match="no row 'CFG': there are baseline; without CFG"):
        needed(TABLE, ["CFG"])


def test_rows_share_the_trainings_that_are_the_same(tmp_path):
    found = runs_of(TABLE, needed(TABLE, []), plan(tmp_path))
    folders = [run.folder(tmp_path, 0) for run in found.values()]
    assert len(set(folders)) == len(folders)
    assert [path.parts[-1] for path in folders].count("pretrain") == 10  # baseline, 5 designs, 4 numbers of vokens
    assert [path.parts[-1] for path in folders].count("finetune") == 12  # and prefix tuning, without pretraining
    base = found[TABLE[BASELINE].training("pretrain")]
    assert found[TABLE["prefix tuning"].training("finetune")].before is base
    assert len(base.drawn) == 8 and len(found[TABLE[BASELINE].training("finetune")].drawn) == 4
    alone = found[TABLE["without pretraining"].training("finetune")]
    assert (alone.before, alone.updates) == (None, 3)  # the updates of both stages


def test_intervals_over_seeds():
    found = mean_over_seeds([1.0, 2.0, 3.0])  # standard deviation 1, quantile 4.303
    assert (found["value"], found["n"]) == (2.0, 3)
    assert found["high"] == pytest.approx(2 + 4.303 / 3**0.5) and found["low"] == pytest.approx(2 - 4.303 / 3**0.5)
    assert mean_over_seeds([1.0]) == {"value": 1.0, "n": 1}


@pytest.mark.parametrize(
    ("differences", "expected", "said"),
    [
        ([-0.1, -0.11, -0.12], -1, "agrees"),
        ([-0.1, -0.11, -0.12], 1, "disagrees"),
        ([-0.1, -0.11, -0.12], 0, "disagrees"),
        ([0.1, 0.11, 0.12], 1, "agrees"),
        ([-0.1, 0.11, -0.12], -1, "within chance"),
        ([0.0, 0.0, 0.0], -1, "within chance"),
        ([-0.5], -1, ""),
    ],
)
def test_verdicts(differences, expected, said):
    assert verdict(mean_over_seeds(differences), expected) == said


def test_every_row_is_in_table_and_page_with_its_verdict(tmp_path):
    """From numbers made by hand: every row is worse than the baseline, one of guidance as good as what it follows."""
    mine = plan(tmp_path)
    found = runs_of(TABLE, needed(TABLE, []), mine)
    settings = {"updates": mine.updates, "samples": 2, "steps": 2, "guidance": 3.0, "weights": ""}
    runs.write_json(tmp_path / "config.json", settings)
    for row in TABLE.values():
        for stage in row.stages:
            for seed in range(3):
                worse = 0.0 if row.training(stage) == TABLE[BASELINE].training(stage) else 0.1
                worse = 0.1 if row.guidance or row.context != "full" else worse
                file = place(found[row.training(stage)].folder(tmp_path, seed), (row.context, row.guidance or 3.0))
                file.parent.mkdir(parents=True, exist_ok=True)
                numbers = {ATTRIBUTES: 0.8 - worse - 0.01 * seed, FRECHET: 5 + 10 * worse + seed, "pictures": 2}
                numbers["training"] = {"updates": 3, "minutes": 1.5, "losses": {"ldm": 0.2}}
                runs.write_json(file, numbers)
                pil.new("RGB", (8, 8)).save(file.with_suffix(".jpg"))
    facts = report(mine, TABLE, found, 3)
    assert json.loads((tmp_path / "ablations.json").read_text()) == facts and list(facts["rows"]) == list(TABLE)
    ours = {name: line["ours"] for name, line in facts["rows"].items()}
    assert ours["without CFG"] == ours["no context"] == {ATTRIBUTES: "agrees", FRECHET: "agrees"}
    assert ours["fixed queries"] == {ATTRIBUTES: "agrees", FRECHET: "disagrees"}
    assert ours["16 vokens"] == {ATTRIBUTES: "disagrees", FRECHET: "disagrees"}
    assert ours["guidance 15"] == {ATTRIBUTES: "within chance", FRECHET: "within chance"}
    difference = facts["rows"]["1 voken"]["pretrain"]["difference"][ATTRIBUTES]
    assert difference["value"] == pytest.approx(-0.1) and difference["high"] == pytest.approx(-0.1)
    page = (tmp_path / "ablations.html").read_text()
    assert "<script" not in page and page.count("<svg") == 4 and page.count("<img") == len(TABLE)
    for name in TABLE:
        assert page.count(f"<tr><td>{name}</td>") == 1


def command(out: Path, *more: str) -> list[str]:
    flags = ["--seeds", "1", "--pretrain-steps", "2", "--finetune-steps", "1", "--samples", "2", "--steps", "2"]
    chosen = ["--rows", "prefix tuning", "--rows", "guidance 1", "--backend", "eager", "--device", "cpu"]
    return [sys.executable, "-m", "mgp5", "ablate", "--out", str(out), *flags, *chosen, *more]


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_a_killed_command_goes_on_and_ends_as_one_that_went_through(
    storyland, llava_folder, diffusion_folder, tmp_path
):
    out, model = tmp_path / "out", f"{llava_folder}+{diffusion_folder}"
    flags = ["--model", model, "--data", str(storyland)]
    first = out / "runs/baseline/seed-0/pretrain"
    process = subprocess.Popen(command(out, *flags), cwd=tmp_path)
    while not (first / "mgp5").exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and workers
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # nothing is left behind that trains
        time.sleep(0.05)
    trained = (first / "mgp5/model.safetensors").stat().st_mtime_ns

    done = subprocess.run(command(out, *flags, "--json"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (first / "mgp5/model.safetensors").stat().st_mtime_ns == trained  # not again
    facts = json.loads(done.stdout)
    assert list(facts["rows"]) == [BASELINE, "prefix tuning", "guidance 1"]
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["baseline", "prefix-tuning"]
    assert not (out / "runs/prefix-tuning/seed-0/pretrain").exists()  # the baseline's

    mine = plan(tmp_path / "other", model, storyland)
    for name in ("data", "cache"):
        shutil.copytree(out / name, mine.out / name)
    _chain(mine, list(runs_of(rows(7.5), needed(TABLE, ["prefix tuning"]), mine).values()), 0)
    for path in sorted(mine.out.glob("runs/*/seed-0/*/mgp5/model.safetensors")):
        assert path.read_bytes() == (out / path.relative_to(mine.out)).read_bytes(), path

    refused = subprocess.run(command(out, *flags, "--samples", "3"), cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and re.search("ablations with another samples", refused.stderr)
    assert os.listdir(tmp_path / "out/runs/baseline") == ["seed-0"]
