"""`mgp5 doctor`: what it tells is what is there and what is chosen."""

from __future__ import annotations

import json
import os
from shutil import copytree, ignore_patterns
from typing import get_args

import pytest
import torch
from click.testing import CliRunner

from mgp5 import doctor, engines, kernels
from mgp5.cli import main
from mgp5.hub import DEMO, resolve


def told(*command, code=0):
    result = CliRunner().invoke(main, ["doctor", *command])
    assert result.exit_code == code, result.output
    return result


def test_json_is_one_object_with_all_there_is():
    found = json.loads(told("--model", "demo", "--json").stdout)
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["versions"]["torch"] == torch.__version__
    assert [o["name"] for o in found["operations"]] == list(kernels.OPERATIONS)
    assert {o["chosen"] for o in found["operations"]} <= {"triton", "torch"}
    assert [e["name"] for e in found["engines"]] == list(get_args(engines.Backend))
    memory = found["memory"]
    assert memory["modes"][0]["name"] == "full"
    assert all(m["total"] == max(m[p] for p in ("see", "read", "draw", "decode")) for m in memory["modes"])
    assert {p["name"] for p in memory["parts"]} >= {"LLM", "mapper", "denoiser", "VAE"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_every_choice_has_its_reason():
    found = doctor.examine()
    assert "memory" not in found
    auto, *others = found["engines"]
    assert auto["chosen"] == "eager" and "CPU" in auto["why"]
    triton = next(e for e in others if e["name"] == "triton")
    assert triton["chosen"] is None and "it needs a GPU" in triton["why"]
    assert all("no triton: it needs a GPU" in o["why"] for o in found["operations"])


def test_piped_it_is_plain_text():
    result = told("--model", "demo")
    assert "\x1b" not in result.stdout and result.stderr == ""
    assert all(name in result.stdout for name in kernels.OPERATIONS)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert any(line[:1] == ["full"] and len(line) >= 6 for line in lines)


def test_what_is_wrong_is_one_line(monkeypatch):
    assert "no model 'nothing'" in told("--model", "nothing", code=2).stderr
    monkeypatch.setenv("MGP5_KERNELS", "cuda")
    result = told(code=2)
    assert "MGP5_KERNELS=cuda, expected auto, triton or torch" in result.stderr and result.stderr.count("\n") == 1


def test_configurations_are_enough(tmp_path):
    copytree(DEMO, tmp_path / "model", ignore=ignore_patterns("*.safetensors"))
    assert not list((tmp_path / "model").rglob("*.safetensors"))
    same = doctor.memory(str(tmp_path / "model"), torch.bfloat16), doctor.memory("demo", torch.bfloat16)
    assert same[0]["parts"] == same[1]["parts"]
    assert resolve(str(tmp_path / "model")).trained is not None
