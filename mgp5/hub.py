"""Find the parts of a model by its name: the table of known repositories on the hub, mirrors, folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from .errors import Mgp5Error
from .files import read_json
from .options import read_toml

LOST = (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError)
PACKAGED = Path(__file__).parent  # in which demo, demo-seed, ... are
DEMO = PACKAGED / "demo"
HALVES = ("fp16", "bf16")  # in names of weights, as in model.fp16.safetensors
T = TypeVar("T")


@dataclass(frozen=True)
class Repo:
    """One repository on the hub."""

    id: str  # "owner/name"
    kind: Literal["mllm", "generator", "part"]  # "part" of what `convert` puts together, see `convert`
    licence: str  # as its card says; a gated one has to be accepted there first
    size: float  # of the download in GB of 1e9 bytes, as the hub shows it
    revision: str | None = None  # the commit that is read; None reads the newest
    mirrors: Sequence[str] = ()  # other ids with the same weights, tried (newest commit) when the first is gone


REPOS = {name: Repo(**facts) for name, facts in read_toml(Path(__file__).with_name("hub.toml")).items()}


def bases() -> list[str]:
    """Return the names of models to train from: every multimodal LLM with every generator."""
    return [f"{mllm}+{generator}" for mllm in _names("mllm") for generator in _names("generator")]


def _names(kind: str) -> list[str]:
    return [name for name, repo in REPOS.items() if repo.kind == kind]


@dataclass(frozen=True)
class Parts:
    """Where the parts of a model are: folders or hub ids, and the folder of what mgp5 trained, None if nothing is."""

    name: str
    mllm: str
    diffusion: str
    trained: Path | None


def local_names() -> list[str]:
    """Return the names of models inside the package, which need no network: demo first."""
    return sorted(path.parents[1].name for path in PACKAGED.glob("demo*/mgp5/config.json"))


def resolve(name: str) -> Parts:
    """Return the parts of a name or a folder, or of "MLLM+GENERATOR" of names, folders or hub ids. Raises Mgp5Error
    where there is no such model, with the nearest name."""
    folder = PACKAGED / name if name in ("demo", *local_names()) else Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(name, folder)
    parts = name.split("+")
    found = [find_part(part, kind) for part, kind in zip(parts, ("mllm", "generator"), strict=False)]
    if len(parts) == 2 and all(found):
        return Parts(name, *found, None)
    raise _no_model(name)


def _no_model(name: str) -> Mgp5Error:
    if name in REPOS:
        hint = f"it is to train with, as in {_names('mllm')[0]}+{_names('generator')[0]}: mgp5 models lists both kinds"
    elif near := get_close_matches(name, [*local_names(), *REPOS, *bases()], 1, 0.7):
        hint = f"did you mean {near[0]}?"
    else:
        here = ", ".join(local_names())
        hint = f"here are {here} and folders of trained models; mgp5 models lists what can be trained"
    return Mgp5Error(f"no model {name!r}", hint, usage=True)


def find_part(part: str, kind: str) -> str | None:
    """Return the folder or hub id of a name of this kind in the table, a folder or a hub id; None for other texts."""
    if part in REPOS:
        return REPOS[part].id if REPOS[part].kind == kind else None
    if part and (folder := Path(part).expanduser()).is_dir():
        return str(folder)
    return part if part.count("/") == 1 and all(part.split("/")) else None


def from_hub(name: str, load: Callable[[str, str | None], T]) -> T:
    """Return `load(id, revision)`; while a repository is gone or out of reach, try its mirrors, and say so on stderr.

    A folder, or an id that is not in the table, is tried as it is, with its newest commit. Raises Mgp5Error for a gated
    repository, and how to get in; whatever else `load` raises passes.
    """
    repo = repo_of(name)
    tries = [(repo.id, repo.revision), *((mirror, None) for mirror in repo.mirrors)]
    tries.sort(key=lambda each: each[0] != name)  # a mirror that was asked for by its name comes first
    while True:
        tried, revision = tries.pop(0)
        try:
            return load(tried, revision)
        except (OSError, Mgp5Error) as error:
            reasons = _causes(error)
            if any(isinstance(reason, GatedRepoError) for reason in reasons):
                hint = "accept it on its page on the hub, then log in with: hf auth login"
                raise Mgp5Error(f"{tried} asks you to accept its licence first", hint) from error
            if not tries or not any(isinstance(reason, LOST) for reason in reasons):
                raise
            sys.stderr.write(f"{tried} is gone or out of reach, trying {tries[0][0]}\n")


def repo_of(repo_id: str) -> Repo:
    """Return the entry of the table for an id, or for that of a mirror; one without facts for other ids."""
    return next((r for r in REPOS.values() if repo_id in (r.id, *r.mirrors)), Repo(repo_id, "part", "", 0.0))


def any_precision(load: Callable[..., T], name: str | Path, **options: Any) -> T:
    """Return what a `from_pretrained` loads, also where there are weights of half precision only (*.fp16.safetensors).
    Raises what it raises for the weights without such a name."""
    failed: Exception | None = None
    for variant in ({}, *({"variant": each} for each in HALVES)):
        try:
            return load(name, **options, **variant)
        except (OSError, ValueError, SafetensorError) as error:
            failed = failed or error
    raise failed


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and its causes: transformers and diffusers wrap errors of the hub."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    return causes


def _from_folder(name: str, folder: Path) -> Parts:
    config = folder / "mgp5" / "config.json"
    if config.is_file():
        raw = read_config(config)
        return Parts(name, _part_of(folder, raw, "mllm"), _part_of(folder, raw, "diffusion"), folder / "mgp5")
    if (folder / "mllm").is_dir() and (folder / "diffusion").is_dir():
        return Parts(name, str(folder / "mllm"), str(folder / "diffusion"), None)
    raise Mgp5Error(
        f"{folder} is not a model: expected mgp5/config.json, or the folders mllm and diffusion",
        "give --model a folder that mgp5 train has written, or a name such as demo",
        usage=True,
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return the raw configuration of a trained model. Raises Mgp5Error when it cannot be read, or names no parts."""
    raw = read_json(path, "train or copy the model again")
    if not {"mllm", "diffusion"} <= raw.keys():
        raise Mgp5Error(f"{path} names no mllm and diffusion", "train or copy the model again")
    return raw


def _part_of(folder: Path, raw: dict[str, Any], part: str) -> str:
    value = str(raw[part])
    return os.path.normpath(folder / value) if (folder / value).is_dir() else value


def explain(error: Exception, name: str) -> Mgp5Error:
    """Return a loading error of transformers, diffusers or the hub as one line."""
    reason = str(error).strip().partition("\n")[0]
    hint = f"check the folder; without a network only local models load: {', '.join(local_names())}"
    return Mgp5Error(f"cannot load {name} ({reason})", hint)
