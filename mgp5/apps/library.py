"""Named models on this disk: what there is, fetch one from the hub, free it again; all of it in the hub's own cache."""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound

from ..errors import Mgp5Error
from ..hub import DEMO, LOST, REPOS, Repo, from_hub, local_names, repo_of, resolve

if TYPE_CHECKING:
    from huggingface_hub import CachedRevisionInfo, ModelInfo

GB = 1e9
KINDS = {"mllm": "multimodal LLM", "generator": "diffusion model", "part": "part of a MiniGPT-4"}
FILES = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".safetensors",
)  # what is read of a repository; .bin where there is no other
PARTS = re.compile(r"(unet|transformer|vae|scheduler|(text_encoder|tokenizer)(_\d)?)/[^/]+|model_index\.json")
VARIANTS = re.compile(r"[._-](fp16|bf16|non_ema|ema_only)\b")
SECONDS = 5.0  # to wait for the hub's first word


def catalogue() -> list[dict[str, Any]]:
    """Each name with what it is made of, where it is from, its licence and size in GB, and what of it is on disk.

    `bytes` counts the files here; `whole` tells whether it could be loaded.
    """
    size = sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file())
    demo = {"name": "demo", "made_of": "a whole model, of Storyland", "from": ["this package"], "revision": None}
    rows = [demo | {"licence": "apache-2.0", "size": size / GB, "bytes": size, "whole": "demo" in local_names()}]
    cached = _cached()
    for name, repo in REPOS.items():
        revisions = [revision for _, revision in _of(repo, cached)]
        row = {"name": name, "made_of": KINDS[repo.kind], "from": [repo.id, *repo.mirrors], "revision": repo.revision}
        row |= {"licence": repo.licence, "size": repo.size, "bytes": sum(r.size_on_disk for r in revisions)}
        rows.append(row | {"whole": any(whole(r.snapshot_path) for r in revisions)})
    return rows


def here(row: dict[str, Any]) -> str:
    """How much of a row of the catalogue is on disk, in words."""
    return "yes" if row["whole"] else f"{row['bytes'] / GB:.2f} GB, not all" if row["bytes"] else "no"


def repositories(name: str) -> list[Repo]:
    """The repositories of a name, of "MLLM+GENERATOR", or that a trained model's folder names; none of `demo`.

    Raises:
        Mgp5Error: no such model.
    """
    if name in REPOS:
        return [REPOS[name]]
    parts = resolve(name)
    ids = [place for place in (parts.mllm, parts.diffusion) if not Path(place).is_dir()]
    return [repo_of(place) for place in ids]


def pull(name: str, tell: Callable[[str], None]) -> None:
    """Fetch what is missing of a model, and check all of it against the hub's checksums.

    A connection that breaks is taken up in mid-file; a run that was ended goes on with the next file.

    Raises:
        Mgp5Error: no such model, no connection, no room, or files that are not what their publisher has (these are
            deleted).
    """
    found = repositories(name)
    if not found:
        tell(f"{name} is on this disk already")
    for repo in found:
        place, revision, info = from_hub(repo.id, _look)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        files = wanted(list(sizes))
        if not any(file.endswith((".safetensors", ".bin")) for file in files):
            raise Mgp5Error(f"{place} holds no weights as safetensors", "choose another model")
        need = sum(sizes[file] for file in files if not _on_disk(place, file, info.sha))
        tell(f"{place}: {need / GB:.2f} of {sum(sizes[file] for file in files) / GB:.2f} GB to fetch")
        _check_room(need)
        with _told(f"the download of {place} broke off", "run the same command again: what is whole is kept"):
            folder = snapshot_download(place, revision=revision, allow_patterns=[glob.escape(file) for file in files])
        tell(f"{place}: checking")
        _verify(place, info.sha, Path(folder))
        tell(f"{place} is in {folder}")


def wanted(files: Sequence[str]) -> list[str]:
    """Which files of a repository are read: no second copies in other formats and precisions."""
    pickled = not any(file.endswith(".safetensors") for file in files)
    suffixes = (*FILES, ".bin") if pickled else FILES  # Vicuna has no others; they are read as tensors only
    pipeline = "model_index.json" in files
    found = [file for file in files if file.endswith(suffixes) and not VARIANTS.search(file)]
    return [file for file in found if (PARTS.fullmatch(file) if pipeline else "/" not in file)]


def whole(folder: Path) -> bool:
    """Whether a snapshot has the parts of its pipeline, weights for each configuration, and each file of an index.

    A download that was ended may have any of its files: they come several at a time, in no order.
    """
    top = folder / "model_index.json"
    pipeline = json.loads(top.read_text()) if top.is_file() else {}
    parts = [name for name, made in pipeline.items() if isinstance(made, list) and made[0] and PARTS.match(f"{name}/_")]
    if not all(any((folder / part).glob("*config.json")) for part in parts or [""]):
        return False
    named = [
        index.parent / file
        for index in folder.rglob("*.safetensors.index.json")
        for file in json.loads(index.read_text())["weight_map"].values()
    ]
    weights = [{file.suffix for file in config.parent.iterdir()} for config in folder.rglob("config.json")]
    return bool(weights) and all(w & {".safetensors", ".bin"} for w in weights) and all(f.is_file() for f in named)


def held(name: str) -> list[tuple[str, CachedRevisionInfo]]:
    """What is in the cache of a model: (id of the repository, revision)."""
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


def _look(place: str, revision: str | None) -> tuple[str, str | None, ModelInfo]:
    """Ask the hub what a repository holds; fails within seconds when there is no connection."""
    hint = f"connect, and run the same command again; here without a network: {', '.join(local_names())}"
    with _told(f"the hub ({constants.ENDPOINT}) cannot be reached", hint, LOST):
        info = HfApi().model_info(place, revision=revision, timeout=SECONDS, files_metadata=True)
        return place, revision, info


@contextmanager
def _told(what: str, hint: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Errors of the hub's client as one line, but for some.

    Its HTTP library, whose errors it passes on, is another in each of its versions: hence all of them.
    """
    try:
        yield
    except but:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise Mgp5Error(f"{what} ({type(error).__name__}: {reason})", hint) from error


def _on_disk(place: str, file: str, revision: str | None) -> bool:
    return isinstance(try_to_load_from_cache(place, file, revision=revision), str)


def _verify(place: str, revision: str | None, folder: Path) -> None:
    with _told(f"{place} could not be checked", "run the same command again: what is whole is kept"):
        wrong = [each["path"] for each in HfApi().verify_repo_checksums(place, revision=revision).mismatches]
    for file in wrong:
        (folder / file).resolve().unlink(missing_ok=True)
        (folder / file).unlink(missing_ok=True)
    if wrong:
        found = f"{', '.join(wrong)} of {place} {'is' if len(wrong) == 1 else 'are'} not what the hub's checksum says"
        raise Mgp5Error(found, "deleted; run the same command again")


def _check_room(need: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    room = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if need > room:
        raise Mgp5Error(f"{cache} has room for {room / GB:.1f} GB, not {need / GB:.1f}", "make room, or set HF_HOME")


def _cached() -> list[tuple[str, CachedRevisionInfo]]:
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [(repo.repo_id, rev) for repo in repos if repo.repo_type == "model" for rev in repo.revisions]


def _of(repo: Repo, cached: Sequence[tuple[str, CachedRevisionInfo]]) -> list[tuple[str, CachedRevisionInfo]]:
    """Those that mgp5 reads: the pinned revision, or any where none is pinned."""
    mine = [(place, rev) for place, rev in cached if place in (repo.id, *repo.mirrors)]
    return [(p, r) for p, r in mine if p != repo.id or repo.revision in (None, r.commit_hash)]
