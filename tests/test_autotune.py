"""How `auto` finds an engine on a GPU; here with engines that a CPU has."""

from __future__ import annotations

import json
import os

import pytest
import torch
from test_engines import stable_diffusion
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from mgp5 import engines
from mgp5.engines import autotune


def broken():
    raise RuntimeError("PassManager::run failed\nand much more")


def test_a_candidate_is_taken_only_if_it_is_right_and_faster(monkeypatch):
    latents, clock = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), [0.0]
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock[0])

    def plain():
        clock[0] += 1.0
        return latents

    ways = {"eager": plain, "near": lambda: latents * 1.01, "wrong": lambda: latents * 1.2}
    ways |= {"nan": lambda: latents * torch.nan, "broken": broken}
    best, why = autotune.fastest(ways)
    assert best == "near"
    assert "wrong draws something else (relative difference 0.2)" in why
    assert "nan draws something else" in why
    assert "broken failed (PassManager::run failed)" in why and "much more" not in why
    assert autotune.fastest({"eager": plain, "broken": broken})[0] == "eager"
    with pytest.raises(RuntimeError):
        autotune.fastest({"eager": broken, "near": plain})


def test_the_result_is_remembered_for_this_model_and_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    diffusion = stable_diffusion()
    best, why = autotune.fastest_engine(diffusion, ("eager",))
    assert best == "eager" and "ms a step" in why
    file = tmp_path / "mgp5" / "engines.json"
    (key,) = json.loads(file.read_text())
    file.write_text(json.dumps({key: ["eager", "as it was"]}))
    assert autotune.fastest_engine(diffusion, ("eager",)) == ("eager", "as it was")
    file.write_text("{")
    assert "ms a step" in autotune.fastest_engine(diffusion, ("eager",))[1]
    assert diffusion.engine is None


def test_compiled_code_is_kept_for_the_next_run(tmp_path, monkeypatch):
    """Importing the compiler sets the variable to a temporary folder, which does not count as told."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for told, kept in (
        (None, tmp_path / "mgp5" / "inductor"),
        (default_cache_dir(), tmp_path / "mgp5" / "inductor"),
        (str(tmp_path / "mine"), tmp_path / "mine"),
    ):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if told:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", told)
        engines.keep_compiled()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(kept)
