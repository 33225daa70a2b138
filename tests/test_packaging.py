"""The package as installed: its folders, its command, and what must not be importable."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distribution, entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def command(letter: str) -> str:
    """Command (a) or (b) of the README."""
    found = re.search(rf"^\({letter}\)[^`]*```sh\n(.+?)\n```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"README has no command ({letter})"
    return found[1]


def test_the_root_of_the_repository_is_not_on_the_path():
    """There, our kernels/ would shadow Hugging Face's package of that name, which transformers imports."""
    assert ROOT not in [Path(entry).resolve() for entry in sys.path if entry]
    spec = find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))


@pytest.mark.parametrize("name", ["kernels", "export"])
def test_folders_beside_mgp5_are_its_subpackages(name):
    spec = find_spec(f"mgp5.{name}")
    assert spec is not None and Path(spec.origin).resolve() == ROOT / name / "__init__.py"


def test_the_command_is_our_main():
    from mgp5.cli import main

    (command,) = entry_points(group="console_scripts", name="mgp5")
    assert command.load() is main


def test_every_package_is_listed():
    """A wheel holds what pyproject.toml lists; a new folder must be added there."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "mgp5").rglob("__init__.py") if "demo" not in path.parts}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == found | {"mgp5.kernels", "mgp5.export"}


def test_the_public_names_exist():
    import mgp5
    from mgp5 import model
    from mgp5.inference import reply as generation

    assert mgp5.generate is generation.generate and mgp5.Options is generation.Options and mgp5.load is model.load
    assert all(hasattr(mgp5, name) for name in mgp5.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        mgp5.nothing  # noqa: B018


def test_constraints_cover_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    names = {re.split(r"[^\w-]", needed)[0].lower() for needed in distribution("mgp5").requires or []}
    assert names <= pinned


def test_top_level_is_what_the_design_says():
    folders, files = {"mgp5", "kernels", "export", "tests", "examples"}, {"README.md", "LICENSE"}
    allowed = folders | files | {"pyproject.toml", "constraints.txt"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    top = {line.split("/")[0] for line in listed if line and not line.startswith(".")}
    assert top <= allowed


def test_the_readmes_two_commands_are_what_ci_runs():
    """Command (a) runs in test_demo.py."""
    told = "mgp5 story --images examples/picnic --scenes 2 --out out/picnic"
    assert command("a") == f"pip install -c constraints.txt -e . && {told}"
    assert command("b") == "pip install -c constraints.txt -e '.[test]' && pytest"
    script = (ROOT / ".ci/run").read_text()
    assert (
        "pip install -q -c constraints.txt -e '.[test]' && pytest" in script and f"{told.split(' --out')[0]} " in script
    )
