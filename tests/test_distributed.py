"""Two processes, as `torchrun` and `accelerate launch` start them, against one: DDP and FSDP on CPUs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_training import fork_two, join

from mgp5 import cli
from mgp5.apps.open_model import load

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def usual(llava_folder, diffusion_folder, storyland, tmp_path_factory) -> list[str]:
    """Arguments of a run whose microbatches are one sample: with pictures, without, and broken ones."""
    folder = tmp_path_factory.mktemp("parallel")
    base = join(folder / "base", llava_folder, diffusion_folder)
    shutil.copytree(storyland / "vist", folder / "vist")
    (folder / "vist/train_images/000000003.jpg").write_bytes(b"not a picture")
    given = ["train", "--stage", "finetune", "--preset", "demo", "--model", str(base), "--vokens", "4", "--json"]
    given += ["--data", f"{folder}/vist", "--format", "vist", "--data", f"{storyland}/mmdialog", "--format", "mmdialog"]
    for item in ("batch=1", "log_every=1", "precision=fp32", "lora.dropout=0.3", "ema=0.8", "sample_every=6"):
        given += ["--set", item]
    return [*given, "--max-steps", "8"]


def losses(out: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{name: row.get(name, 0) for name in ("step", "text", "ldm", "lr", "problems")} for row in rows]


def state(out: Path) -> dict[str, torch.Tensor]:
    (newest,) = sorted(out.glob("checkpoints/*"))[-1:]
    return load_file(newest / "mgp5/model.safetensors") | load_file(newest / "state/tensors.safetensors")


@pytest.fixture(scope="module")
def one(usual, tmp_path_factory) -> Path:
    """A run of one process, that accumulates what the two do at once."""
    out = tmp_path_factory.mktemp("one") / "run"
    result = CliRunner().invoke(cli.main, [*usual, "--out", str(out), "--set", "accumulation=4"])
    assert result.exit_code == 0, result.stderr
    return out


def check(found: Path, expected: Path) -> None:
    """Losses, weights, moving average and optimizer agree, and so do the files."""
    assert len(losses(found)) == len(losses(expected)) == 8 and losses(found)[-1]["problems"] > 0
    for row, other in zip(losses(found), losses(expected), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=2e-5)
    found, expected = state(found), state(expected)
    assert found.keys() == expected.keys() and any(name.startswith("weight.") for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_two_processes_train_as_one_with_twice_the_accumulation(usual, one, tmp_path):
    workers = fork_two([*usual, "--out", str(tmp_path / "two"), "--set", "accumulation=2"], tmp_path)
    while workers[1].is_alive() and not (tmp_path / "0.out").read_text().endswith("\n"):
        time.sleep(0.001)
    os.kill(workers[1].pid, signal.SIGTERM)  # to one of them only
    for worker in workers:
        worker.join()
        assert worker.exitcode == 130
    out, err = ([(tmp_path / f"{rank}.{name}").read_text() for rank in (0, 1)] for name in ("out", "err"))
    first, *rows = map(json.loads, out[0].splitlines())
    assert first["step"] == 1 and {"samples_per_second", "eta", "memory_gib"} <= first.keys()
    assert [row["step"] for row in rows] == list(range(2, len(losses(tmp_path / "two")) + 1))
    assert out[1] == "" and "".join(err).count("mgp5: interrupted") == 1
    # One process goes on where the two were.
    given = [*usual, "--out", str(tmp_path / "two"), "--set", "accumulation=4", "--resume"]
    result = CliRunner().invoke(cli.main, given)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[0])["step"] <= 8
    check(tmp_path / "two", one)
    assert json.loads((one / "report.json").read_text())["problems"].keys() == {"broken image"}


@pytest.mark.slow
def test_torchrun_starts_both(usual, one, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mgp5"]
    command += [*usual, "--out", str(tmp_path / "two"), "--set", "accumulation=2"]
    assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0
    check(tmp_path / "two", one)


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones(usual, one, tmp_path):
    """Processes with the environment of `accelerate launch --use_fsdp`."""
    two = [*usual, "--out", str(tmp_path / "two"), "--set", "accumulation=2"]
    for more in (["--stop-after", "3"], ["--resume"]):
        for worker in fork_two([*two, *more], tmp_path, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"):
            worker.join()
            assert worker.exitcode == 0
    check(tmp_path / "two", one)
    assert load(tmp_path / "two").config.lora is not None
    pages = [(run / "samples/step-000006.html").read_text() for run in (one, tmp_path / "two")]
    assert [page.count("<img") for page in pages] == [pages[0].count("<img")] * 2
