"""Tiny models on disk, made once per run."""

from __future__ import annotations

import pytest
import torch
from tiny import save_llava, save_pipeline, save_qwen
from tiny_mllm import save_minigpt4, save_qwen3

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The tests' own place for exported denoisers and compiled code: the user's stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
    return save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def minigpt4_folder(tmp_path_factory):
    parts = tmp_path_factory.mktemp("minigpt4")
    return save_minigpt4(parts / "composed", parts)


@pytest.fixture(scope="session")
def diffusion_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion")
    save_pipeline(folder, "v_prediction")
    return folder


@pytest.fixture(scope="session")
def small_folder(llava_folder, tmp_path_factory):
    """A whole model of the fewest layers."""
    from tiny_export import save_small

    return save_small(tmp_path_factory.mktemp("small") / "model", llava_folder)


@pytest.fixture(scope="session")
def small_export(small_folder, tmp_path_factory):
    """All its components as ONNX files, by the command."""
    from click.testing import CliRunner

    from mgp5.cli import main

    out = tmp_path_factory.mktemp("exported") / "onnx"
    result = CliRunner().invoke(main, ["export", "--onnx", "--split", "--model", str(small_folder), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "dB from PyTorch's" in result.stderr and str(out) in result.stderr
    return out


@pytest.fixture(scope="session", params=["llava", "qwen"])
def mllm_folder(request, llava_folder, qwen_folder):
    return {"llava": llava_folder, "qwen": qwen_folder}[request.param]


@pytest.fixture
def model(mllm_folder, diffusion_folder):
    from mgp5.model import build

    torch.manual_seed(1)
    return build(str(mllm_folder), str(diffusion_folder), num_vokens=4, guidance=3.0)


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps the precision of the first run for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def storyland(tmp_path_factory):
    from mgp5.storyland.write import write

    folder = tmp_path_factory.mktemp("storyland") / "train"
    write(folder, "train", pairs=6, stories=1, dialogs=2, seed=0)
    return folder


@pytest.fixture(scope="session")
def pairs(storyland):
    from mgp5.data import load_data

    return load_data("cc3m", storyland / "cc3m")


@pytest.fixture(scope="session")
def tales(storyland):
    from mgp5.data import load_data

    return load_data("vist", storyland / "vist")
