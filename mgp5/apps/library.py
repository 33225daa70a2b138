"""Named models on this disk: list them, fetch one from the hub, free it again; all of it in the hub's own cache."""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound

from ..errors import Mgp5Error
from ..files import read_json
from ..hub import LOST, PACKAGED, REPOS, Repo, from_hub, local_names, repo_of, resolve

if TYPE_CHECKING:
    from huggingface_hub import CachedRevisionInfo, ModelInfo

GB = 1e9  # bytes; downloads and disks are sold in decimal units
KINDS = {"mllm": "multimodal LLM to train with", "generator": "diffusion model to train with"}
KINDS["part"] = "part of a MiniGPT-4, a SEED-LLaMA or an MM-Interleaved"
TO_TRAIN = "to train with, it generates nothing before that: mgp5 train --stage pretrain --model LLM+MODEL"
SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")  # of files that are read
PARTS = re.compile(
    r"(unet|transformer|vae|scheduler|(text_encoder|tokenizer)(_\d)?|image_(encoder|normalizer|noising_scheduler))/[^/]+"
    r"|model_index\.json"
)
VARIANTS = re.compile(r"[._-](fp16|bf16|non_ema|ema_only)\b")
SECONDS = 5.0  # to wait for the hub's first answer
Cached = tuple[str, "CachedRevisionInfo"]  # id of the repository, and a revision of it in the cache


def catalogue() -> list[dict[str, Any]]:
    """Return each named model: what it is made of, where it is from, its licence, size in GB, and what is on disk.

    `generates` tells whether it is more than a part to train with, `whole` whether it could be loaded; `bytes` counts
    the files here.
    """
    rows: list[dict[str, Any]] = []
    for name in sorted({"demo", *local_names()}):
        size = sum(file.stat().st_size for file in (PACKAGED / name).rglob("*") if file.is_file())
        row = {"name": name, "made_of": "generates: of Storyland", "generates": True, "from": ["this package"]}
        row |= {"revision": None, "licence": "apache-2.0", "size": size / GB, "bytes": size}
        rows.append(row | {"whole": name in local_names()})
    cached = _cached()
    for name, repo in REPOS.items():
        revisions = [revision for _, revision in _of(repo, cached)]
        row = {
            "name": name,
            "made_of": KINDS[repo.kind],
            "generates": False,
            "from": [repo.id, *repo.mirrors],
            "revision": repo.revision,
        }
        row |= {"licence": repo.licence, "size": repo.size, "bytes": sum(r.size_on_disk for r in revisions)}
        rows.append(row | {"whole": any(is_complete(r.snapshot_path) for r in revisions)})
    return rows


def on_disk(row: dict[str, Any]) -> str:
    """Return how much of a row of the catalogue is on disk, in words."""
    return "yes" if row["whole"] else f"{row['bytes'] / GB:.2f} GB, not all" if row["bytes"] else "no"


def repositories(name: str) -> list[Repo]:
    """Return the repositories of a name, of "MLLM+GENERATOR", or that a folder names; none of `demo`."""
    if name in REPOS:
        return [REPOS[name]]
    parts = resolve(name)
    return [repo_of(part) for part in (parts.mllm, parts.diffusion) if not Path(part).is_dir()]


def pull(name: str, tell: Callable[[str], None]) -> None:
    """Fetch what is missing of a model (see `repositories`), and check all of it against the hub's checksums.

    A connection that breaks is resumed within the file; a run that was ended resumes with the next file. Raises
    Mgp5Error for a wrong name, no connection, no room, or files that differ from their publisher's (these are deleted).
    """
    repos = repositories(name)
    if not repos:
        tell(f"{name} is on this disk already")
    note = f"; it is {TO_TRAIN}" if name in REPOS or resolve(name).trained is None else ""
    for repo in repos:
        repo_id, revision, info = from_hub(repo.id, _ask_hub)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        files = needed_files(list(sizes))
        if not any(file.endswith((".safetensors", ".bin")) for file in files):
            raise Mgp5Error(f"{repo_id} holds no weights as safetensors", "choose another model")
        cached = (try_to_load_from_cache(repo_id, file, revision=info.sha) for file in files)
        missing = sum(sizes[file] for file, path in zip(files, cached, strict=True) if not isinstance(path, str))
        tell(f"{repo_id}: {missing / GB:.2f} of {sum(sizes[file] for file in files) / GB:.2f} GB to fetch{note}")
        _check_room(missing)
        with _one_line(f"the download of {repo_id} broke off", "run the same command again: what is whole is kept"):
            patterns = [glob.escape(file) for file in files]
            folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
        tell(f"{repo_id}: checking")
        _verify(repo_id, info.sha, Path(folder))
        tell(f"{repo_id} is in {folder}")


def needed_files(files: Sequence[str]) -> list[str]:
    """Return which files of a repository are read: no second copies in other formats and precisions.

    Weights in float16 are read where a folder has no others.
    """
    safe = any(file.endswith(".safetensors") for file in files)
    plain = {PurePath(file).parent for file in files if file.endswith(".safetensors") and not VARIANTS.search(file)}

    def only(file: str) -> bool:
        return safe and ".fp16" in file and PurePath(file).parent not in plain

    suffixes = SUFFIXES if safe else (*SUFFIXES, ".bin")  # Vicuna has no others; they are read as tensors only
    found = [file for file in files if file.endswith(suffixes) and (not VARIANTS.search(file) or only(file))]
    return [file for file in found if (PARTS.fullmatch(file) if "model_index.json" in files else "/" not in file)]


def is_complete(folder: Path) -> bool:
    """Whether a snapshot has the parts of its pipeline, weights for each configuration, and each file of an index.

    A download that was ended may have any of its files: they come several at a time, in no order.
    """
    top = folder / "model_index.json"
    pipeline = read_json(top) if top.is_file() else {}
    parts = [name for name, kind in pipeline.items() if isinstance(kind, list) and kind[0] and PARTS.match(f"{name}/_")]
    if not all(any((folder / part).glob("*config.json")) for part in parts or [""]):
        return False
    indexes = folder.rglob("*.safetensors.index.json")
    listed = [index.parent / file for index in indexes for file in read_json(index)["weight_map"].values()]
    weights = [{file.suffix for file in config.parent.iterdir()} for config in folder.rglob("config.json")]
    return bool(weights) and all(w & {".safetensors", ".bin"} for w in weights) and all(f.is_file() for f in listed)


def held(name: str) -> list[Cached]:
    """Return what is in the cache of a model."""
    return [found for repo in repositories(name) for found in _of(repo, _cached())]


def free(revisions: Sequence[CachedRevisionInfo]) -> None:
    """Delete revisions from the cache. Raises Mgp5Error if some of it lies elsewhere, or cannot be deleted."""
    strategy = scan_cache_dir().delete_revisions(*(revision.commit_hash for revision in revisions))
    paths = strategy.blobs | strategy.refs | strategy.repos | strategy.snapshots
    cache = Path(constants.HF_HUB_CACHE).resolve()
    if elsewhere := [path for path in paths if not path.resolve().is_relative_to(cache)]:
        raise Mgp5Error(f"{elsewhere[0]} is not in the cache {cache}", "nothing was deleted: remove it yourself")
    strategy.execute()
    if left := [path for path in paths if path.exists()]:
        raise Mgp5Error(f"{left[0]} could not be deleted", "check its permissions")


def _ask_hub(repo_id: str, revision: str | None) -> tuple[str, str | None, ModelInfo]:
    """Ask the hub what a repository holds; fails within seconds when there is no connection."""
    hint = f"connect, and run the same command again; here without a network: {', '.join(local_names())}"
    with _one_line(f"the hub ({constants.ENDPOINT}) cannot be reached", hint, LOST):
        return repo_id, revision, HfApi().model_info(repo_id, revision=revision, timeout=SECONDS, files_metadata=True)


@contextmanager
def _one_line(message: str, hint: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn errors of the hub's client into one line, but for `passing`."""
    try:
        yield
    except passing:
        raise
    except Exception as error:  # its HTTP library, whose errors it passes on, is another in each of its versions
        reason = str(error).strip().partition("\n")[0]
        raise Mgp5Error(f"{message} ({type(error).__name__}: {reason})", hint) from error


def _verify(repo_id: str, revision: str | None, folder: Path) -> None:
    with _one_line(f"{repo_id} could not be checked", "run the same command again: what is whole is kept"):
        wrong = [each["path"] for each in HfApi().verify_repo_checksums(repo_id, revision=revision).mismatches]
    for file in wrong:
        (folder / file).resolve().unlink(missing_ok=True)
        (folder / file).unlink(missing_ok=True)
    if wrong:
        found = f"{', '.join(wrong)} of {repo_id} {'is' if len(wrong) == 1 else 'are'} not what the hub's checksum says"
        raise Mgp5Error(found, "deleted; run the same command again")


def _check_room(need: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    room = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if need > room:
        raise Mgp5Error(f"{cache} has room for {room / GB:.1f} GB, not {need / GB:.1f}", "make room, or set HF_HOME")


def _cached() -> list[Cached]:
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [(repo.repo_id, rev) for repo in repos if repo.repo_type == "model" for rev in repo.revisions]


def _of(repo: Repo, cached: Sequence[Cached]) -> list[Cached]:
    """Return what mgp5 reads of a repository: the pinned revision, or any where none is pinned."""
    own = [(repo_id, rev) for repo_id, rev in cached if repo_id in (repo.id, *repo.mirrors)]
    return [(i, r) for i, r in own if i != repo.id or repo.revision in (None, r.commit_hash)]
