"""The floor plan, held by reading the source: imports go down, rooms stay small, `click` stays at the door.

Lazy and type-only imports count like all others. What the floor plan allows stands in `TIERS`, the lowest first: a file
may import from its own tier and from those before it, as long as no circle comes of it.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VALUES = ("messages", "events", "options", "config", "errors", "prompts", "files", "images", "device")
TIERS = (
    VALUES,
    ("hub", "views"),
    ("backbones", "generators", "kernels"),
    ("heads", "engines"),
    ("model", "loading", "memory"),
    ("inference",),
    ("training", "data", "apps", "evaluation", "storyland", "export", "doctor", "bench", "convert", "demo"),
    ("serving",),
    ("commands",),
    ("cli", "__main__"),
)
RANK = {room: rank for rank, rooms in enumerate(TIERS) for room in rooms}
LINES, FUNCTION, NAMES = 350, 60, 15


@cache
def trees() -> dict[str, tuple[Path, ast.Module]]:
    """Dotted name of a module -> its file and its parsed source."""
    found = {}
    for room in ("mgp5", "kernels", "export"):
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if room == "mgp5" else ("mgp5", *parts)).removesuffix(".__init__")
            found[name] = path, ast.parse(path.read_text())
    return found


def imported(name: str) -> set[str]:
    """Names that a module imports anywhere; a relative one is made absolute, one of mgp5 is that of its file."""
    path, tree = trees()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in trees() else base for alias in node.names}
    return found


@cache
def edges() -> dict[str, set[str]]:
    """Module of mgp5 -> modules of mgp5 that it imports. The package's own `__init__` is the door, and belongs to no
    room."""
    return {name: (imported(name) & trees().keys()) - {name, "mgp5"} for name in trees() if name != "mgp5"}


def room(name: str) -> str:
    return name.split(".")[1]


@cache
def rooms() -> dict[str, set[str]]:
    """Room -> other rooms that its files import from."""
    found: dict[str, set[str]] = {room(name): set() for name in edges()}
    for name, below in edges().items():
        found[room(name)] |= {room(other) for other in below} - {room(name)}
    return found


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    found, ahead = set(), [start]
    while ahead:
        new = graph[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def upward() -> Iterator[str]:
    for name, below in edges().items():
        for other in below:
            views = room(name) == "views" and room(other) not in ("views", *VALUES)
            if RANK[room(other)] > RANK[room(name)] or views:
                yield f"{name} imports {other}"


def circles() -> Iterator[str]:
    """Neither files nor rooms need one another both ways."""
    for graph, kind in ((edges(), "file"), (rooms(), "room")):
        yield from (f"{kind} {name} needs itself in a circle" for name in graph if name in reachable(name, graph))


def clicks() -> Iterator[str]:
    for name in edges():
        if room(name) not in ("commands", "cli") and any(other.split(".")[0] == "click" for other in imported(name)):
            yield f"{name} imports click"


def dictionaries() -> Iterator[str]:
    """A command line's dictionary that walked out of commands/."""
    for name, (_, tree) in trees().items():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        if "flags" in names and "commands" not in name:
            yield f"{name} knows flags"


def sizes() -> Iterator[str]:
    for name, (path, tree) in trees().items():
        if path.read_text().count("\n") > LINES:
            yield f"{name} has more than {LINES} lines"
        for node in ast.walk(tree):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if function and node.end_lineno - node.lineno + 1 > FUNCTION:
                yield f"{name}.{node.name} has more than {FUNCTION} lines"


def crowds() -> Iterator[str]:
    """Folders of more names than a reader takes in; mgp5/ itself has 15 modules and 16 folders."""
    for folder in {path.parent for path, _ in trees().values()}:
        inside = [path for path in folder.iterdir() if path.name not in ("__init__.py", "__main__.py", "__pycache__")]
        modules = sum(path.suffix == ".py" for path in inside)
        folders = len({path.name.partition("-")[0] for path in inside if path.is_dir()})  # demo, demo-seed are one kind
        top = folder == ROOT / "mgp5"
        if modules > NAMES or folders > NAMES + 1 or (modules + folders > NAMES and not top):
            yield f"{folder.relative_to(ROOT)} has more than {NAMES} names"


CHECKS = (upward, circles, clicks, dictionaries, sizes, crowds)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_floor_plan_is_kept(check):
    assert sorted(set(check())) == []


def test_every_file_stands_in_a_room_of_the_plan():
    assert {room(name) for name in edges()} <= RANK.keys()
