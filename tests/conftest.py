"""Tiny models on disk, made once for all processes of a run; which tests are quick, and which need a GPU.

What takes seconds to import is imported where it is used: the process that only tells others what to run needs none.
"""

import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

QUICK = (  # files of `pytest -m quick`: a minute on two cores
    "architecture", "collate", "convert", "data", "evaluation", "generators", "golden", "hub", "mapper", "model",
    "sampler", "storyland", "views",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in two processes, where pytest-xdist is installed; named tests stay in this one."""
    worker, named = "PYTEST_XDIST_WORKER" in os.environ, config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if not worker and not named and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = 2, "worksteal"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of a quick run only its files are imported."""
    name = collection_path.stem.removeprefix("test_")
    return (config.option.markexpr == "quick" and collection_path.suffix == ".py" and name not in QUICK) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
    for item in items:
        if item.path.stem.removeprefix("test_") in QUICK and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Millions of objects that stay are not looked through again and again: a tenth of the time of an export."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """(name, make) -> a folder of the run, which `make(folder)` fills in the first process that asks for it."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    base.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(shared):
    """The run's own place for exported denoisers and compiled code: the user's stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared("cache", Path.mkdir)))
        yield


@pytest.fixture(scope="session")
def llava_folder(shared):
    from tiny_mllm import save_llava

    return shared("llava", save_llava)


@pytest.fixture(scope="session")
def qwen_folder(shared):
    from tiny_mllm import save_qwen

    return shared("qwen", save_qwen)


@pytest.fixture(scope="session")
def qwen3_folder(shared):
    from tiny_mllm import save_qwen3

    return shared("qwen3", save_qwen3)


@pytest.fixture(scope="session")
def minigpt4_folder(shared):
    from tiny_mllm import save_minigpt4

    return shared("minigpt4", lambda folder: save_minigpt4(folder / "composed", folder)) / "composed"


@pytest.fixture(scope="session")
def generator_folder(shared) -> Callable[[str], Path]:
    """Key of GENERATORS -> a folder of this generator."""
    from tiny_sd3 import GENERATORS

    return lambda name: shared(name, GENERATORS[name])


@pytest.fixture(scope="session")
def diffusion_folder(generator_folder):
    return generator_folder("v_prediction")


@pytest.fixture(scope="session")
def vqvae_folder(shared):
    from tiny import save_vqvae

    return shared("vqvae", save_vqvae)


@pytest.fixture(scope="session")
def clip_folder(shared):
    from tiny import save_clip

    return shared("clip", save_clip)


@pytest.fixture(scope="session")
def small_folder(llava_folder, shared):
    """A whole model of the fewest layers."""
    from tiny_export import save_small

    return shared("small", lambda folder: save_small(folder, llava_folder))


@pytest.fixture(scope="session")
def small_model(small_folder):
    from mgp5.apps.open_model import load

    return load(small_folder)


@pytest.fixture(scope="module")
def loads_once():
    """What commands load by the same words is one model."""
    from mgp5.apps import open_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_model, "load", functools.cache(open_model.load))
        yield


@pytest.fixture
def mgp5(small_model, small_folder, tmp_path, monkeypatch):
    """Runs a command on the small model, which is loaded once, in an empty folder."""
    from mgp5.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mgp5.apps.open_model.load", lambda name, **_: small_model)
    quick = ("--model", str(small_folder), "--steps", "2", "--set", "max_tokens=6", "--seed", "1")

    def run(command: str, *args: object, stdin: str | bytes | None = None):
        return CliRunner().invoke(main, [command, *quick, *map(str, args)], input=stdin, catch_exceptions=False)

    return run


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A red picture with a text, and a blue one without."""
    from tiny import picture

    folder = tmp_path / "pictures"
    folder.mkdir()
    picture("red").save(folder / "2.png")
    picture("blue").save(folder / "10.jpg")
    (folder / "2.txt").write_text("A red day.\n")
    return folder


@pytest.fixture(scope="session")
def small_export(small_folder, shared):
    """All its components as ONNX files, by the command."""
    import torch._dynamo.config

    from mgp5.cli import main

    def export(folder: Path) -> None:
        command = ["export", "--onnx", "--split", "--model", str(small_folder), "--out", str(folder)]
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):  # a fifth faster where sizes are symbols
            result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        assert "dB from PyTorch's" in result.stderr and str(folder) in result.stderr

    return shared("onnx", export)


@pytest.fixture(scope="session", params=["llava", "qwen"])
def mllm_folder(request, llava_folder, qwen_folder):
    return {"llava": llava_folder, "qwen": qwen_folder}[request.param]


@pytest.fixture
def model(mllm_folder, diffusion_folder):
    from tiny_training import fresh

    return fresh(mllm_folder, diffusion_folder)


@pytest.fixture(scope="session")
def short_samples():
    """Sample pages of few steps and tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mgp5.training.samples.STEPS", 2)
        patch.setattr("mgp5.training.samples.TOKENS", 8)
        yield


@pytest.fixture
def fresh_accelerator(short_samples):
    """Accelerate keeps the precision of the first run for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def storyland(shared):
    from mgp5.storyland.write import write

    return shared("storyland", lambda folder: write(folder, "train", pairs=6, stories=1, dialogs=2, seed=0))


@pytest.fixture(scope="session")
def pairs(storyland):
    from mgp5.data import load_data

    return load_data("cc3m", storyland / "cc3m")


@pytest.fixture(scope="session")
def tales(storyland):
    from mgp5.data import load_data

    return load_data("vist", storyland / "vist")
