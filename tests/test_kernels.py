"""Kernels: their references, the choice between both, and (in a process of its own) kernels against references."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mgp5.kernels import registry as kernels
from mgp5.kernels.guided_step import guided_step_reference, step_rows

from mgp5.errors import Mgp5Error
from mgp5.generators.denoising import linear_update
from mgp5.generators.flow import FlowSchedule
from mgp5.generators.sampler import sampler_table
from mgp5.generators.schedule import NoiseSchedule

CPU = torch.device("cpu")
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("where", "which"),
    [
        ("interpreter", "not slow"),
        pytest.param("interpreter", "slow", marks=pytest.mark.slow),
        pytest.param("gpu", "slow or not slow", marks=pytest.mark.gpu),
    ],
)
def test_kernels_match_their_references(where, which, tmp_path):
    pytest.importorskip("triton")
    cases = HERE / "kernel_cases.py", HERE / "decode_cases.py"
    command = [sys.executable, "-m", "pytest", *cases, "--rootdir", HERE.parent, "--tb=short", "-m", which]
    settings = {"OMP_NUM_THREADS": "1"}
    settings |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if where == "interpreter" else {}
    found = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("guidance", [1.0, 0.3, 7.5])
@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        (NoiseSchedule(prediction_type=kind), name)
        for kind in ("epsilon", "v_prediction")
        for name in NoiseSchedule.samplers
    ]
    + [(FlowSchedule(), name) for name in FlowSchedule.samplers],
    ids=str,
)
def test_the_guided_step_is_the_samplers(schedule, name, guidance):
    """Step by step in float64; the ring of kept predictions starts with what an earlier run left."""
    table = sampler_table(name, schedule, 8)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    own, history = latents.clone(), torch.full((table.history, *latents.shape), torch.nan, dtype=torch.float64)
    step, model_input = torch.zeros(2, dtype=torch.int32), torch.empty(4, 4, 3, 5)
    kept, rows, conversion = [], table.coefficients.tolist(), table.conversion.tolist()
    for i, row in enumerate(rows):
        count = 2 if guidance == 1.0 else 4
        prediction = torch.randn(count, 4, 3, 5, generator=generator, dtype=torch.float64)
        latents, newest = linear_update(latents, prediction, kept, row, conversion[i], guidance)
        kept = [newest, *kept][: table.history]
        rows_of_table = step_rows(table.coefficients, table.conversion, guidance)
        guided_step_reference(own, history, step, model_input, prediction, rows_of_table)
        torch.testing.assert_close(own, latents, rtol=1e-12, atol=1e-12)
        assert torch.equal(model_input, latents.float().repeat(2, 1, 1, 1)) and step.tolist() == [i + 1, 0]


def test_on_a_cpu_the_references_run_and_say_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for wanted, why in (("auto", "no triton: "), ("torch", "MGP5_KERNELS=torch")):
        monkeypatch.setenv("MGP5_KERNELS", wanted)
        found = kernels.choices(CPU, torch.float32)
        assert [choice.operation for choice in found] == list(kernels.OPERATIONS)
        assert all(choice.implementation == "torch" and choice.why.startswith(why) for choice in found)
    x = torch.randn(3, 8)
    hidden, gate = x.chunk(2, dim=1)
    geglu = kernels.select_kernel("geglu", CPU, torch.float32).function
    assert torch.equal(geglu(x), hidden * torch.nn.functional.gelu(gate))


@pytest.mark.parametrize(
    ("value", "message"), [("triton", "geglu cannot run so"), ("cuda", "expected auto, triton, hub or torch")]
)
def test_a_wrong_choice_is_one_line_and_a_usage_error(value, message, monkeypatch):
    monkeypatch.setenv("MGP5_KERNELS", value)
    with pytest.raises(Mgp5Error, match=message) as caught:
        kernels.select_kernel("geglu", CPU, torch.float32)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
