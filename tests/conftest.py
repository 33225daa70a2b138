"""Tiny models on disk, made once per run."""

from __future__ import annotations

import pytest
import torch
from tiny import save_llava, save_pipeline, save_qwen

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def diffusion_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion")
    save_pipeline(folder, "v_prediction")
    return folder


@pytest.fixture(scope="session", params=["llava", "qwen"])
def mllm_folder(request, llava_folder, qwen_folder):
    return {"llava": llava_folder, "qwen": qwen_folder}[request.param]


@pytest.fixture
def model(mllm_folder, diffusion_folder):
    from mgp5.model import build

    torch.manual_seed(1)
    return build(str(mllm_folder), str(diffusion_folder), num_vokens=4, guidance=3.0)
