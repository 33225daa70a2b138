"""`mgp5 models`, `pull` and `rm`: the hub's real client, and a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hub_double import Hub, running
from huggingface_hub import constants

from mgp5.apps.library import is_complete, needed_files
from mgp5.cli import main
from mgp5.generators import load_generator
from mgp5.hub import REPOS

NAME = "sd-2.1-base"
REPO = REPOS[NAME]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(diffusion_folder):
    paths = [path for path in diffusion_folder.rglob("*") if path.is_file()]
    files = {path.relative_to(diffusion_folder).as_posix(): path.read_bytes() for path in paths}
    more = "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.bin", "safety_checker/model.safetensors"
    others = dict.fromkeys(("v2-1.safetensors", "README.md", *more), b"not read")
    with running(Hub({REPO.id: files | others})) as hub:
        yield hub


@pytest.fixture
def mgp5(hub, tmp_path, monkeypatch):
    """Runs a command whose hub is on this machine and whose cache is empty."""
    address = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for module in ("constants", "utils._cache_manager"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(tmp_path / "home/hub"))

    def run(*args: str, code: int = 0, stdin: str = "") -> Result:
        result = CliRunner().invoke(main, args, input=stdin)
        assert result.exit_code == code, result.stderr
        return result

    return run


def test_what_generates_is_told_from_what_is_to_train_with(mgp5):
    rows = [json.loads(line) for line in mgp5("models", "--json").stdout.splitlines()]
    assert [row["name"] for row in rows if row["generates"]] == ["demo"]
    assert "Ready to generate: demo. " in mgp5("models").stdout
    assert "GB to fetch; it is to train with" in mgp5("pull", NAME).stderr
    assert "train" not in mgp5("pull", "demo").stderr


def pulled(mgp5) -> Path:
    return Path(mgp5("pull", NAME).stderr.strip().splitlines()[-1].partition(" is in ")[2])


def line_of(mgp5, name: str = NAME) -> dict:
    return next(row for row in map(json.loads, mgp5("models", "--json").stdout.splitlines()) if row["name"] == name)


def test_pull_fetches_what_is_read_and_rm_frees_it(mgp5, hub, diffusion_folder):
    assert not line_of(mgp5)["whole"] and line_of(mgp5, "demo")["whole"]
    folder = pulled(mgp5)
    expected = {file for file in hub.repos[REPO.id] if (diffusion_folder / file).is_file()}
    assert hub.fetched() == expected == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert folder.name == REPO.revision and line_of(mgp5)["whole"]
    assert load_generator(str(folder)).native_size == load_generator(str(diffusion_folder)).native_size
    mgp5("pull", NAME)
    assert not hub.fetched()
    assert "Aborted" in mgp5("rm", NAME, stdin="n\n", code=1).stderr and folder.is_dir()
    mgp5("rm", NAME, stdin="y\n")
    assert not folder.exists() and line_of(mgp5)["bytes"] == 0
    assert "nothing of" in mgp5("rm", NAME, "--yes", code=1).stderr


def test_a_connection_that_breaks_is_taken_up_where_it_was(mgp5, hub):
    chunk = 10 * 2**20  # what the client writes at once
    large = "unet/second.safetensors"
    hub.repos[REPO.id][large] = bytes(range(256)) * (3 * chunk // 256)
    hub.cut[large] = 2 * chunk + 1000
    folder = pulled(mgp5)
    assert ("GET", large, f"bytes={2 * chunk}-") in hub.asked
    assert (folder / large).read_bytes() == hub.repos[REPO.id][large]


def test_a_killed_pull_goes_on_with_what_is_missing(mgp5, hub, tmp_path):
    """Killed in a process of its own, to which users' variables tell hub and cache."""
    hub.hold = WEIGHTS
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home")}
    command = [str(Path(sys.executable).with_name("mgp5")), "pull", NAME]
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    assert hub.reached.wait(40)
    process.kill()
    process.wait()
    hub.hold = ""
    row = line_of(mgp5)
    before = hub.fetched()
    assert not row["whole"] and WEIGHTS in before
    mgp5("pull", NAME)
    after = hub.fetched()
    assert WEIGHTS in after and len(after) < len(hub.repos[REPO.id]) - 5 and line_of(mgp5)["whole"]


@pytest.mark.parametrize("missing", ["unet", "vae/config.json", "scheduler", "tokenizer", "model_index.json"])
def test_what_a_download_may_not_have_got_yet_is_missed(diffusion_folder, tmp_path, missing):
    folder = Path(shutil.copytree(diffusion_folder, tmp_path / "snapshot"))
    assert is_complete(folder)
    (folder / missing).rename(tmp_path / "elsewhere")
    assert not is_complete(folder)


def test_a_damaged_file_is_refused_and_not_kept(mgp5, hub):
    hub.damaged.add(WEIGHTS)
    told = mgp5("pull", NAME, code=1).stderr.splitlines()
    assert told[-1].startswith(f"mgp5: {WEIGHTS} of {REPO.id} is not what the hub's checksum says")
    assert not line_of(mgp5)["whole"]
    hub.damaged.clear()
    mgp5("pull", NAME)
    assert line_of(mgp5)["whole"]


def test_without_a_network_it_says_so_at_once(mgp5, monkeypatch):
    for setting in ({"ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": True}):
        for name, value in setting.items():
            monkeypatch.setattr(constants, name, value)
        told = mgp5("pull", f"llava-1.5-7b+{NAME}", code=1).stderr
        assert told.count("\n") == 1 and "cannot be reached" in told and "demo" in told


def test_a_mirror_is_taken_where_the_first_is_gone(mgp5, hub, tmp_path):
    hub.repos[REPO.mirrors[0]] = hub.repos.pop(REPO.id)
    told = mgp5("pull", NAME).stderr
    assert f"trying {REPO.mirrors[0]}" in told and line_of(mgp5)["whole"]
    assert list((tmp_path / "home/hub").glob("models--*/refs/main"))  # by which it is found without a network


def test_rm_deletes_nothing_outside_the_cache(mgp5, hub, tmp_path):
    folder = pulled(mgp5)
    (tmp_path / "mine").write_text("mine")
    (folder / "link.json").symlink_to(tmp_path / "mine")
    other = folder.with_name("d" * 40)  # a second revision: files are deleted one by one then
    other.mkdir()
    (other / "model_index.json").symlink_to((folder / "model_index.json").resolve())
    assert "is not in the cache" in mgp5("rm", NAME, "--yes", code=1).stderr
    assert (tmp_path / "mine").read_text() == "mine"
    (folder / "link.json").unlink()
    mgp5("rm", NAME, "--yes")
    assert not folder.exists() and (other / "model_index.json").is_file()


def test_of_a_language_model_the_files_at_the_top_are_read():
    files = ["config.json", "a.safetensors", "a.bin", "onnx/a.safetensors", "a.pth", "tokenizer.model", "README.md"]
    assert needed_files(files) == ["config.json", "a.safetensors", "tokenizer.model"]
    assert needed_files(["config.json", "a.bin"]) == ["config.json", "a.bin"]
    halves = [
        "model_index.json", "unet/a.fp16.safetensors", "vae/a.safetensors", "vae/a.fp16.safetensors",
        "unet/a.fp16.bin",
    ]  # fmt: skip
    assert needed_files(halves) == ["model_index.json", "unet/a.fp16.safetensors", "vae/a.safetensors"]
