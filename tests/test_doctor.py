"""`mgp5 doctor`: what it tells is what is there and what is chosen."""

import json
import os
import re
from functools import cache
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import get_args

import pytest
import torch
from click.testing import CliRunner
from mgp5.kernels import registry as kernels

from mgp5 import doctor, engines
from mgp5.cli import main
from mgp5.device import HostMemory
from mgp5.evaluation.weights import WEIGHTS
from mgp5.files import GiB
from mgp5.hub import DEMO, resolve
from mgp5.memory.generation import footprint

LLAVA, MEASURED = "llava-1.5-7b+sd-2.1-base", cache(footprint)


@pytest.fixture(autouse=True)
def measured_once(monkeypatch):
    monkeypatch.setattr("mgp5.memory.generation.footprint", MEASURED)


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
    assert [w["name"] for w in found["weights"] if w["whole"]][:1] == ["demo"] and found["next"]
    assert [m["name"] for m in found["metrics"]] == list(WEIGHTS)
    assert all(m["get"] if m["path"] is None else Path(m["path"]).exists() for m in found["metrics"])
    memory = found["memory"]
    assert memory["modes"][0]["name"] == "full"
    assert all(m["total"] == max(m[p] for p in ("encode", "read", "draw", "decode")) for m in memory["modes"])
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


@pytest.mark.parametrize(
    ("card", "text", "images"), [(False, "PyTorch, operation", "eager"), (True, "one CUDA", "triton")]
)
def test_which_path_a_model_takes(card, text, images, monkeypatch):
    """Also for a card that is not here."""
    monkeypatch.setattr(kernels, "_triton_refusal", lambda device, dtype: "" if device.type == "cuda" else "no card")
    monkeypatch.setattr("mgp5.engines.decode.fault", "".format)
    device = torch.device("cuda" if card else "cpu")
    found = {row["part"]: row["path"] for row in doctor.paths("demo", device, torch.bfloat16)}
    assert found["text"].startswith(text) and found["images"] == images
    assert card is ("fused kernels" in found["text"])
    monkeypatch.setattr("mgp5.engines.precomputed.UNet2DConditionModel", type(None))
    other = {row["part"]: row for row in doctor.paths("demo", device, torch.bfloat16)}["images"]
    assert other["path"] == "diffusers" and "engines do not know" in other["why"]
    for name, value, why in (("fault", "{1} err".format, "1 err"), ("LANGUAGES", (), "LlamaModel")):
        monkeypatch.setattr(f"mgp5.engines.decode.{name}", value)
        other = doctor.paths("demo", device, torch.bfloat16)[0]
        assert card is other["why"].startswith(f"no fused kernels: {why}") and "fused" not in other["path"]


def test_whether_a_model_fits_is_told_first_and_all_tells_of_every_named_one(monkeypatch):
    monkeypatch.setattr(doctor, "host_memory", lambda: HostMemory(16 * GiB, 12 * GiB, True))
    *cards, without, empty = told("--model", LLAVA).stdout.splitlines()[: len(doctor.CARDS) + 2]
    assert {"24 GB: yes, in bf16", "16 GB: yes, LLM in 4 bits"} <= {line.split(" fits on ")[1] for line in cards}
    assert re.search(r"no, it takes 3\d\.\d+ GiB and 12\.0 GiB are free of the 16\.0 that the container", without)
    assert empty == ""
    monkeypatch.setattr(doctor, "bases", lambda: [LLAVA])  # of 25, each takes seconds
    (row,) = [line.split() for line in told("--all").stdout.splitlines() if line.split()[:1] == [LLAVA]]
    assert 10 < float(row[1]) < 30 and float(row[2]) < float(row[1])


def test_piped_it_is_plain_text():
    result = told("--model", "demo")
    assert "\x1b" not in result.stdout and result.stderr == ""
    assert all(name in result.stdout for name in kernels.OPERATIONS)
    assert "mgp5 story --images" in result.stdout.splitlines()[-2]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert any(line[:1] == ["full"] and len(line) >= 6 for line in lines)


def test_what_is_wrong_is_one_line(monkeypatch):
    assert "no model 'nothing'" in told("--model", "nothing", code=2).stderr
    monkeypatch.setenv("MGP5_KERNELS", "cuda")
    result = told(code=2)
    assert "MGP5_KERNELS=cuda, expected auto, triton, hub or torch" in result.stderr and result.stderr.count("\n") == 1


def test_configurations_are_enough(tmp_path):
    copytree(DEMO, tmp_path / "model", ignore=ignore_patterns("*.safetensors"))
    assert not list((tmp_path / "model").rglob("*.safetensors"))
    same = doctor.memory(str(tmp_path / "model"), torch.bfloat16), doctor.memory("demo", torch.bfloat16)
    assert same[0]["parts"] == same[1]["parts"]
    assert resolve(str(tmp_path / "model")).trained is not None
